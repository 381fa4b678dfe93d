# SPDX-License-Identifier: Apache-2.0
"""The real kube-proxy is asked through our attempts: its words mean what ``check`` and ``health`` take them for.

One namespace is the node and holds the control plane too; nothing leaves it.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lbagent.model.state import ProbeTarget
from lbagent.model.vip import BackendState
from lbagent.plan.health import Slices, fuse, sign, worst
from lbagent.probe.check import Answer, Attempt, Outcome, question
from lbagent.probe.judge import judge
from tests.k8s.controlplane import ADMIN_TOKEN, PROXY_TOKEN, ControlPlane, kubeconfig
from tests.lab.kube import Api, PodEndpoint, endpoint_slice
from tests.lab.netns import Namespace
from tests.lab.poll import wait_for

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(180)]

NODE, ADDRESS = "node1", "10.99.0.1"
TIMEOUT_S = 2.0
LIMIT_S = 15.0


class Site:
    """A node with its kube-proxy, the API, and us beside it."""

    def __init__(self, namespace: Namespace, plane: ControlPlane, api: Api) -> None:
        self.namespace = namespace
        self.plane = plane
        self.api = api
        self.proxy: subprocess.Popen[bytes] | None = None

    def start_proxy(self) -> None:
        file = self.plane.folder / "proxy.kubeconfig"
        file.write_text(json.dumps(kubeconfig(self.plane.url, token=PROXY_TOKEN, ca_file=self.plane.ca_file)))
        command = self.namespace.command(*self.plane.proxy_command(NODE, file))
        with (self.plane.folder / "kube-proxy.log").open("ab") as log:
            self.proxy = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill_proxy(self) -> None:
        if self.proxy:
            self.proxy.kill()
            self.proxy.wait(timeout=10)
            self.proxy = None

    def ask(self, kind: str, port: int) -> Outcome:
        """One attempt from within the namespace."""
        began = time.monotonic()
        attempt = Attempt(question(ProbeTarget(ADDRESS, kind, port)), began=began, deadline=began + TIMEOUT_S)
        with self.namespace.entered():
            outcome = attempt.begin()
        with select.epoll() as poller:
            if outcome is None:
                poller.register(attempt.fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
            while outcome is None:
                left_s = attempt.deadline - time.monotonic()
                outcome = attempt.advance() if left_s > 0 and poller.poll(left_s) else attempt.expire()
        return outcome

    def wait(self, kind: str, port: int, until: Callable[[Outcome], bool]) -> Outcome:
        """kube-proxy follows the API within its sync period."""
        log = self.plane.folder / "kube-proxy.log"
        return wait_for(f"{kind} {port}", lambda: self.ask(kind, port), until=until, limit_s=LIMIT_S, logs=[log])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    namespace = Namespace(f"g{os.getpid()}-{secrets.token_hex(2)}")
    folder: Path = tmp_path_factory.mktemp("site")
    plane = ControlPlane(folder, address="127.0.0.1", advertise=ADDRESS, enter=namespace.command())
    site = Site(namespace, plane, Api(url=plane.url, token=ADMIN_TOKEN, namespace=namespace, ca_file=plane.ca_file))
    try:
        namespace.create()
        namespace.ip("link add node0 type bridge", f"address add {ADDRESS}/24 dev node0", "link set node0 up")
        namespace.ip("route add default dev node0")
        namespace.sysctl({"net/ipv4/ip_forward": "1"})
        with namespace.entered():
            plane.start()
            plane.wait_ready()
        site.api.create_node(NODE, (ADDRESS,))
        wait_for("the namespace default", lambda: site.api.call("GET", "/api/v1/namespaces/default"), limit_s=LIMIT_S)
        yield site
    finally:
        site.kill_proxy()
        plane.stop()
        namespace.delete()


@pytest.fixture
def running(site: Site) -> Iterator[Site]:
    site.start_proxy()
    site.wait("proxy", 10256, lambda o: o.answer is Answer.UP)
    yield site
    site.kill_proxy()


@dataclass(frozen=True)
class Web:
    """A Service with policy Local and two pods on the node; ``port`` is its healthCheckNodePort."""

    site: Site
    name: str
    port: int

    def put_pods(self, *, ready: bool) -> None:
        pods = [
            PodEndpoint(address=f"10.244.1.{i}", node=NODE, ready=ready, serving=True, terminating=not ready)
            for i in (1, 2)
        ]
        self.site.api.put_slice(endpoint_slice(self.name, tuple(pods)))


@pytest.fixture
def web(running: Site) -> Iterator[Web]:
    name = f"web-{secrets.token_hex(3)}"
    made = running.api.create_service(name, externalTrafficPolicy="Local")
    web = Web(running, name, made["spec"]["healthCheckNodePort"])
    web.put_pods(ready=True)
    running.wait("local", web.port, lambda o: o == Outcome(answer=Answer.UP, weight=2, detail="HTTP 200"))
    yield web
    running.api.delete_service(name)


def taint(site: Site, *keys: str) -> None:
    site.api.call(
        "PATCH", f"/api/v1/nodes/{NODE}", {"spec": {"taints": [{"key": k, "effect": "NoSchedule"} for k in keys]}}
    )


def state(slices: Slices, *outcomes: Outcome) -> BackendState:
    """What the plan would make of kube-proxy's answers alone."""
    signs = []
    for outcome in outcomes:
        believed = judge(None, outcome, now=0.0, rise=1, fall=1)
        signs.append(sign(believed.pulse() if believed else None))
    return fuse(hop=True, slices=slices, kube_proxy=worst(signs)).state


def test_a_node_whose_last_pods_terminate_but_serve_drains(running: Site, web: Web) -> None:
    web.put_pods(ready=False)
    local = running.wait("local", web.port, lambda o: o.answer is not Answer.UP)
    assert local == Outcome(answer=Answer.CLOSING, detail="HTTP 503, no ready endpoint on the node")
    assert state(Slices.CLOSING, local, running.ask("proxy", 10256)) is BackendState.DRAINING


def test_a_node_that_the_autoscaler_will_delete_drains_though_its_own_port_says_otherwise(
    running: Site, web: Web
) -> None:
    taint(running, "ToBeDeletedByClusterAutoscaler")
    try:
        proxy = running.wait("proxy", 10256, lambda o: o.answer is not Answer.UP)
        local = running.ask("local", web.port)
        assert proxy == Outcome(answer=Answer.CLOSING, detail="HTTP 503, the node is about to go")
        assert (local.answer, local.weight) == (Answer.UP, 2)
        assert state(Slices.READY, local, proxy) is BackendState.DRAINING
    finally:
        taint(running)
    running.wait("proxy", 10256, lambda o: o.answer is Answer.UP)


def test_a_kube_proxy_that_hangs_takes_the_node_down_unless_its_port_answers(running: Site) -> None:
    assert running.proxy
    running.proxy.send_signal(signal.SIGSTOP)
    try:
        proxy = running.ask("proxy", 10256)
    finally:
        running.proxy.send_signal(signal.SIGCONT)
    assert proxy == Outcome(answer=Answer.DOWN, detail=f"no answer within {TIMEOUT_S:g} s")
    assert state(Slices.READY, proxy) is BackendState.DOWN


def test_a_kube_proxy_that_has_died_has_no_opinion_for_cluster_and_drains_for_local(running: Site, web: Web) -> None:
    running.kill_proxy()
    proxy, local = running.ask("proxy", 10256), running.ask("local", web.port)
    assert proxy == Outcome(answer=Answer.NOT_OFFERED, detail="connection refused")
    assert local == Outcome(answer=Answer.CLOSING, detail="connection refused")
    assert state(Slices.READY, proxy) is BackendState.ACTIVE
    assert state(Slices.READY, proxy, local) is BackendState.DRAINING
