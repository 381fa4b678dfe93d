# SPDX-License-Identifier: Apache-2.0
"""Modes that keep the client's address, from the client to the pod and straight back."""

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbagent import assets
from tests.lab.lab import Lab
from tests.lab.poll import tail, wait_for
from tests.lab.topology import CLIENT
from tests.lab.traffic import ask_udp, burst

pytestmark = pytest.mark.netns

HTTP, ASK = 80, 53
RATE = 100.0


def choose_mode(lab: Lab, name: str, mode: str) -> None:
    """Ask for the mode and wait until both kernels forward in it."""
    path = f"/api/v1/namespaces/default/services/{name}"
    lab.api.call("PATCH", path, {"metadata": {"annotations": {"lbagent.io/mode": mode}}})
    for host in lab.hosts.values():

        def modes() -> set[tuple[Any, Any]]:
            return {(row["mode"], row["proven"]) for row in host.vips()}  # noqa: B023 - asked at once

        wait_for(
            f"{host.name} to forward in mode {mode}",
            modes,
            until=lambda found: found == {(mode, True)},
            limit_s=20,
            logs=host.logs,
        )


@pytest.fixture
def opening_nodes(tier: Lab, tmp_path: Path) -> Iterator[None]:
    """Nodes that open tunnels by ebpf/decap.c, for a kernel without ipip."""
    built = tmp_path / "decap.o"
    source = assets.path("ebpf") / "decap.c"
    machine = platform.machine()
    flags = ["-O2", "-target", "bpf", f"-D__{machine}__", f"-I/usr/include/{machine}-linux-gnu"]
    subprocess.run(["clang", *flags, "-c", str(source), "-o", str(built)], check=True)
    places = [tier.topology.namespace(node.name) for node in tier.topology.nodes]
    for place in places:
        place.ip(f"link set dev eth0 xdp obj {built} sec xdp")
    yield
    for place in places:
        place.ip("link set dev eth0 xdp off")


def reaches_pods_with_its_own_address(lab: Lab, name: str, mode: str) -> None:
    lab.deploy(name, externalTrafficPolicy="Local")
    address = lab.address_of(name)
    lab.wait_routes(address, tuple(lab.hosts))
    choose_mode(lab, name, mode)
    assert lab.tor.next_hops(address) == tuple(lab.hosts)
    status = lab.api.service(name)["status"]["loadBalancer"]["ingress"]
    assert [ingress["ipMode"] for ingress in status] == ["VIP"]
    ledger = burst(lab.client, address, HTTP, count=90, rate=RATE)
    failed = [(one.error, one.client) for one in ledger.requests if one.error]
    assert failed == [], [tail(log, lines=20) for log in lab.logs]
    assert set(ledger.by_source) == {CLIENT.ip4}
    assert len(ledger.by_pod) == 3
    assert min(lab.tap.carriers(ledger).values()) > 10
    answers = [ask_udp(lab.client, address, ASK, f"question {number}") for number in range(10)]
    assert [answer["echo"] for answer in answers] == [f"question {number}" for number in range(10)]


def test_dsr_l2_shows_the_pod_the_client(tier: Lab, service_name: str) -> None:
    reaches_pods_with_its_own_address(tier, service_name, "dsr-l2")


@pytest.mark.usefixtures("opening_nodes")
def test_dsr_ipip_shows_the_pod_the_client(tier: Lab, service_name: str) -> None:
    reaches_pods_with_its_own_address(tier, service_name, "dsr-ipip")
