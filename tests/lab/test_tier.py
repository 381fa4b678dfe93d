# SPDX-License-Identifier: Apache-2.0
"""Two LB hosts, a ToR and a cluster: what a client and the ToR see when things come, go and die."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab.lab import Lab
from tests.lab.poll import tail, wait_for
from tests.lab.topology import CLIENT
from tests.lab.tor import Session
from tests.lab.traffic import Ledger, Load, ask_udp, burst

pytestmark = pytest.mark.netns

HTTP, ASK = 80, 53
RATE = 100.0


def served(lab: Lab, name: str, **spec: object) -> str:
    """Deploy a Service and wait until the ToR spreads it over both hosts; returns its address."""
    lab.deploy(name, **spec)  # type: ignore[arg-type]
    address = lab.address_of(name)
    lab.wait_routes(address, tuple(lab.hosts))
    lab.wait_node_ports(name)
    return address


def trouble(lab: Lab, ledger: Ledger) -> list[str]:
    """What failed or had to be sent again, by which link it left the ToR, and what the agents said last."""
    clients = lab.tap.clients_by_host()
    lines = [
        f"{one.error or 'answered'} after {one.duration_s:.2f} s, {one.retransmits} retransmitted, client {one.client},"
        f" seen towards {[name for name in lab.hosts if one.client in clients[name]]}"
        for one in ledger.requests
        if one.error or one.retransmits
    ]
    return [*lines, *(tail(log, lines=25) for log in lab.logs)] if lines else []


@contextmanager
def no_bgp_message(lab: Lab, address: str) -> Iterator[None]:
    """Nothing inside may send BGP anything but keepalives, nor move the route in the ToR's kernel."""

    def sessions() -> dict[tuple[str, int], Session]:
        return {
            (host.name, family): lab.tor.session(host.lb, family=family)
            for host in lab.hosts.values()
            for family in (4, 6)
        }

    before = sessions()
    with lab.tor.watching_routes(address) as changes:
        yield
    assert sessions() == before
    assert changes == []


@pytest.mark.parametrize("families", [(4,), (6,)])
def test_a_service_is_reachable_through_both_hosts(tier: Lab, service_name: str, families: tuple[int, ...]) -> None:
    address = served(tier, service_name, families=families)
    ledger = burst(tier.client, address, HTTP, count=120, rate=RATE)
    assert trouble(tier, ledger) == []
    assert len(ledger.by_pod) == 3
    carriers = tier.tap.carriers(ledger)
    assert set(carriers) == {"lb1", "lb2"}, carriers
    assert min(carriers.values()) > 20
    answers = [ask_udp(tier.client, address, ASK, f"question {number}") for number in range(20)]
    assert [answer["echo"] for answer in answers] == [f"question {number}" for number in range(20)]


def test_with_policy_local_the_pod_sees_the_lb_host_that_carried_the_request(tier: Lab, service_name: str) -> None:
    address = served(tier, service_name, pods=2, externalTrafficPolicy="Local")
    ledger = burst(tier.client, address, HTTP, count=60, rate=RATE)
    assert trouble(tier, ledger) == []
    by_snat = {host.name: ledger.by_source.get(host.lb.snat.ip4, 0) for host in tier.hosts.values()}
    assert by_snat == tier.tap.carriers(ledger)
    assert CLIENT.ip4 not in ledger.by_source  # nat mode: the pod sees us, not the client


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_agent_that_ends_under_load_costs_no_request_and_no_bgp_message(
    tier: Lab, service_name: str, how: signal.Signals
) -> None:
    address = served(tier, service_name)
    host = tier.hosts["lb1"]
    assert host.agent is not None
    with no_bgp_message(tier, address), Load(tier.client, address, HTTP, rate=RATE) as load:
        time.sleep(0.5)
        ended = time.monotonic()
        host.agent.kill(how)
        assert host.agent.gone(limit_s=10)
        time.sleep(1.5)
        alone = load.ledger.between(ended)
        host.start_agent()
        host.wait_ready()
        time.sleep(1.0)
    assert trouble(tier, load.ledger) == []
    assert tier.tap.carriers(alone)["lb1"] > 0


def test_a_host_that_loses_power_loses_its_route_and_no_later_request(tier: Lab, service_name: str) -> None:
    address = served(tier, service_name)
    with Load(tier.client, address, HTTP, rate=RATE) as load:
        time.sleep(0.5)
        tier.hosts["lb1"].power_off()
        tier.wait_routes(address, ("lb2",))
        gone = time.monotonic()
        time.sleep(2.0)
    later = load.ledger.between(gone)
    assert trouble(tier, later) == []
    assert tier.tap.carriers(later) == {"lb1": 0, "lb2": later.sent}
    tier.hosts["lb1"].power_on()
    tier.wait_routes(address, ("lb1", "lb2"), limit_s=60)
    back = burst(tier.client, address, HTTP, count=60, rate=RATE)
    assert trouble(tier, back) == []
    assert tier.tap.carriers(back)["lb1"] > 0


def test_a_deleted_service_is_withdrawn_before_it_is_unprogrammed(tier: Lab, service_name: str) -> None:
    address = served(tier, service_name)
    with Load(tier.client, address, HTTP, rate=RATE, timeout_s=1.0) as load:
        time.sleep(0.5)
        tier.api.delete_service(service_name)
        tier.wait_routes(address, ())
        time.sleep(1.0)
    # Unprogrammed first, requests would reach an LB host and die there; withdrawn first, the ToR never sends them.
    # One request may have been under way at that moment.
    sent_to_hosts = set().union(*tier.tap.clients_by_host().values())
    died_at_hosts = [one for one in load.ledger.failures if one.client in sent_to_hosts]
    assert len(load.ledger.failures) > 50
    assert len(died_at_hosts) <= 1, died_at_hosts
    wait_for("the Service to be gone", lambda: not tier.has_service(service_name), limit_s=15, logs=tier.logs)


def test_agents_that_start_while_the_api_is_silent_serve_from_memory(tier: Lab, service_name: str) -> None:
    address = served(tier, service_name)
    for host in tier.hosts.values():
        memory = host.folder / "state" / "snapshot.json"
        wait_for(
            f"{host.name} to write down what it knows", memory.read_text, until=lambda text: address in text, limit_s=20
        )
    apiserver = tier.cluster.server
    apiserver.kill(signal.SIGSTOP)
    try:
        with no_bgp_message(tier, address), Load(tier.client, address, HTTP, rate=RATE) as load:
            for host in tier.hosts.values():
                host.kill_agent()
                host.start_agent()
            for host in tier.hosts.values():
                assert host.wait_ready()["from_memory"] is True
            time.sleep(1.0)
    finally:
        apiserver.kill(signal.SIGCONT)
    assert trouble(tier, load.ledger) == []
    for host in tier.hosts.values():
        wait_for(
            f"{host.name} to hear the API again",
            host.wait_ready,
            until=lambda status: status["from_memory"] is False,
            limit_s=30,
            logs=host.logs,
        )
