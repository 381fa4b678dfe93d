# SPDX-License-Identifier: Apache-2.0
"""The embedded node ports answer as kube-proxy was seen to answer."""

import json
from typing import Any

import pytest

from tests.lab import nodeport
from tests.lab.fetch import fetch
from tests.lab.kube import Object, PodEndpoint, endpoint_slice, service
from tests.lab.lab import Lab
from tests.lab.poll import wait_for
from tests.lab.traffic import Ledger, ask_udp, burst

ON_NODE1 = PodEndpoint(address="10.244.1.10", node="node1")
ON_NODE2 = PodEndpoint(address="10.244.2.10", node="node2")


def rules(*endpoints: PodEndpoint, node: str = "node1", ingress: tuple[Object, ...] = (), **spec: Any) -> str:
    item = service("web", ports=(("http", "TCP", 80),), **spec)
    item["spec"]["ports"][0]["nodePort"] = 30080
    item["status"] = {"loadBalancer": {"ingress": list(ingress)}}
    return nodeport.rules(node, [item], {"default/web": [endpoint_slice("web", endpoints)]})


def test_policy_cluster_masquerades_to_every_endpoint() -> None:
    text = rules(ON_NODE1, ON_NODE2)
    assert "mod 2 map { 0 : 10.244.1.10 . 8080, 1 : 10.244.2.10 . 8080 }" in text
    assert f"meta mark set meta mark | {nodeport.MASQUERADE_MARK} dnat ip" in text


def test_policy_local_keeps_the_source_and_the_node() -> None:
    text = rules(ON_NODE1, ON_NODE2, externalTrafficPolicy="Local")
    assert "mod 1 map { 0 : 10.244.1.10 . 8080 }" in text
    assert "meta mark set" not in text


def test_policy_local_without_a_local_endpoint_is_dropped_and_not_refused() -> None:
    text = rules(ON_NODE2, externalTrafficPolicy="Local")
    assert "tcp dport 30080 drop" in text
    assert "tcp dport 30080 reject" in text  # of IPv6, which has no endpoint at all
    assert "nfproto ipv4 fib daddr type local tcp dport 30080 reject" not in text


def test_a_terminating_endpoint_serves_only_when_none_is_ready() -> None:
    leaving = PodEndpoint(address="10.244.1.11", node="node1", ready=False, serving=True, terminating=True)
    assert "10.244.1.11" not in rules(ON_NODE1, leaving)
    assert "10.244.1.11 . 8080" in rules(leaving)


@pytest.mark.parametrize(("mode", "served"), [("VIP", True), ("Proxy", False)])
def test_the_load_balancer_address_is_served_only_in_ip_mode_vip(mode: str, served: bool) -> None:
    text = rules(ON_NODE1, ingress=({"ip": "203.0.113.1", "ipMode": mode},))
    assert ("ip daddr 203.0.113.1 tcp dport 80" in text) is served


def ask(lab: Lab, address: str, port: int, *, timeout_s: float = 2.0) -> Ledger:
    return burst(lab.client, address, port, count=12, rate=100, timeout_s=timeout_s)


def ports_of(lab: Lab, name: str) -> tuple[int, int]:
    ports = lab.api.service(name)["spec"]["ports"]
    return ports[0]["nodePort"], ports[1]["nodePort"]


@pytest.mark.netns
def test_every_node_serves_the_node_port_in_both_families(bare_lab: Lab) -> None:
    pods = bare_lab.deploy("both", families=(4, 6))
    http, udp = ports_of(bare_lab, "both")
    for node in bare_lab.topology.nodes:
        for address in node.segment.addresses_only:
            wait_for("an answer", lambda address=address: ask(bare_lab, address, http), until=_all_ok, limit_s=10)  # type: ignore[misc]
        assert ask_udp(bare_lab.client, node.segment.ip4, udp, "hello")["echo"] == "hello"
    seen = ask(bare_lab, bare_lab.topology.nodes[0].segment.ip4, http)
    assert set(seen.by_pod) <= {pod.name for pod in pods}
    bare_lab.undeploy("both")


@pytest.mark.netns
def test_policy_local_shows_the_client_to_the_pod_and_its_node_says_so_on_its_health_port(bare_lab: Lab) -> None:
    bare_lab.deploy("local", pods=1, externalTrafficPolicy="Local")
    http, _ = ports_of(bare_lab, "local")
    health_port = bare_lab.api.service("local")["spec"]["healthCheckNodePort"]
    with_pod, without_pod = (node.segment.ip4 for node in bare_lab.topology.nodes[:2])
    seen = wait_for("an answer", lambda: ask(bare_lab, with_pod, http), until=_all_ok, limit_s=10)
    assert set(seen.by_source) == {"198.51.100.10"}
    assert set(ask(bare_lab, without_pod, http, timeout_s=0.5).by_error) == {"no answer in 0.5 s"}

    def health(address: str) -> tuple[int, int]:
        url = f"http://{address}:{health_port}/"
        response = wait_for("the health port", lambda: fetch(bare_lab.client, url), limit_s=5)
        return response.status, json.loads(response.text)["localEndpoints"]

    assert health(with_pod) == (200, 1)
    assert health(without_pod) == (503, 0)
    bare_lab.undeploy("local")


@pytest.mark.netns
def test_a_service_without_endpoints_is_refused(bare_lab: Lab) -> None:
    bare_lab.deploy("empty", pods=0)
    http, _ = ports_of(bare_lab, "empty")
    node = bare_lab.topology.nodes[0].segment.ip4
    wait_for(
        "a refusal",
        # One at a time: the refusal is an ICMP message, and the kernel limits their rate.
        lambda: burst(bare_lab.client, node, http, count=1).by_error,
        until=lambda seen: set(seen) == {"Connection refused"},
        limit_s=10,
    )
    bare_lab.undeploy("empty")


def _all_ok(ledger: Ledger) -> bool:
    return not ledger.failures
