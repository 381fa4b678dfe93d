# SPDX-License-Identifier: Apache-2.0
from random import Random
from typing import Any

import pytest

from lbagent.model.service import Service
from lbagent.model.state import Observed, ProbeTarget, Pulse
from lbagent.plan.desire import Memory, desire
from lbagent.plan.explain import Sentence, explain
from tests.builders import (
    closing_endpoint,
    make_endpoint,
    make_key,
    make_node,
    make_port,
    make_service,
    make_snapshot,
    make_vip,
)
from tests.plan.worlds import a_snapshot

A = "198.51.100.1"
WEB = make_service(status=[A])


def told(service: Service = WEB, *, observed: Observed | None = None, **fields: Any) -> tuple[Sentence, ...]:
    """What is said of one Service; by default all is programmed and announced."""
    snapshot, memory = make_snapshot([service], **fields), Memory()
    desired = desire(snapshot, memory)
    if observed is None:
        proven = frozenset(desired.forwards) - snapshot.unproven.keys()
        observed = Observed(forwards=desired.forwards, proven=proven, routes=frozenset(desired.routes))
    return explain(service.key, snapshot, desired, observed, memory=memory)


def obstacles(found: tuple[Sentence, ...]) -> list[str]:
    return [f"{s.about}: {s.text}" for s in found if s.is_obstacle]


def test_a_service_that_is_served_has_no_obstacle_and_every_station_is_named() -> None:
    found = told()
    assert obstacles(found) == []
    assert [s.about for s in found] == ["class", "address", "mode", "endpoints", "backends", "kernel", "route"]


@pytest.mark.parametrize(
    ("service", "fields", "obstacle"),
    [
        (make_service(type="ClusterIP"), {}, "class: is not of type LoadBalancer: type ClusterIP"),
        (make_service(load_balancer_class="x/y"), {}, "class: asks for another load-balancer class: class x/y"),
        (make_service(annotations={"lbagent.io/address-pool": "none"}), {}, "address: unknown_pool"),
        (make_service(annotations={"lbagent.io/load-balancer-ips": "x"}), {}, "request: bad_request"),
        (make_service(status=["203.0.113.1"]), {}, "address: may not keep 203.0.113.1: outside_pools"),
        (make_service(), {}, "address: 198.51.100.0 is about to be written"),
        (make_service(status=[A], ports=[make_port(node_port=0)]), {}, "mode: no_node_port"),
        (
            make_service(status=[A], ports=[make_port(), make_port(9, protocol="SCTP")]),
            {},
            "port: 9/SCTP is not forwarded",
        ),
        (WEB, {"endpoints": {"web": []}}, "endpoints: IPv4: 0 ready on 0 nodes"),
        (WEB, {"nodes": [], "endpoints": {"web": [make_endpoint()]}}, f"backends: {A}:80/TCP: none; no_nodes"),
        (WEB, {"unproven": {make_vip(): "no answer"}}, f"kernel: {A}:80/TCP does not work here: no answer"),
        (WEB, {"draining": True}, f"route: {A} is not to be announced: this host is being drained"),
        (WEB, {"observed": Observed()}, f"kernel: {A}:80/TCP is not programmed"),
    ],
)
def test_what_stands_in_the_way_is_marked(service: Service, fields: dict[str, Any], obstacle: str) -> None:
    assert any(found.startswith(obstacle) for found in obstacles(told(service, **fields))), told(service, **fields)


def test_a_route_that_waits_says_for_what() -> None:
    snapshot = make_snapshot([WEB])
    found = told(observed=Observed(forwards=desire(snapshot).forwards))
    assert f"route: {A}/32 waits for {A}:80/TCP" in obstacles(found)


def test_a_backend_that_is_not_active_says_who_decided() -> None:
    health = {ProbeTarget("10.0.0.2", "tcp", 30_080): Pulse(up=False, since=0.0)}
    assert f"{A}:80/TCP: node2 (10.0.0.2) is down: the node port does not answer, says node port" in [
        s.text for s in told(health=health)
    ]


def test_terminating_endpoints_and_nodes_that_are_out_are_named() -> None:
    service = make_service(status=[A], policy="Local")
    nodes = [make_node("node1"), make_node("node2"), make_node("node3", deleting=True)]
    endpoints = {
        "web": [make_endpoint("node1"), closing_endpoint("node2"), make_endpoint("node3"), make_endpoint("n9")]
    }
    texts = [s.text for s in told(service, nodes=nodes, endpoints=endpoints)]
    assert "IPv4: 3 ready on 3 nodes; only terminating ones on node2" in texts
    assert "node3 is out: being deleted" in texts
    assert "n9 holds endpoints but is not known" in texts


def test_a_node_that_counts_other_endpoints_is_named() -> None:
    service = make_service(status=[A], policy="Local")
    health = {ProbeTarget("10.0.0.1", "local", 32_000): Pulse(up=True, since=0.0, weight=7)}
    texts = [s.text for s in told(service, health=health)]
    assert "node1: the node reports 7 ready endpoints, the EndpointSlices 1" in texts


def test_a_service_that_is_not_known_is_said_so() -> None:
    snapshot, memory = make_snapshot([]), Memory()
    assert explain(make_key("x"), snapshot, desire(snapshot, memory), Observed(), memory=memory)[0].is_obstacle


def test_whatever_the_world_every_service_can_be_explained() -> None:
    for seed in range(300):
        snapshot, memory = a_snapshot(Random(seed).choice), Memory()
        desired = desire(snapshot, memory)
        for key in snapshot.services:
            assert explain(key, snapshot, desired, Observed(), memory=memory), f"world {seed}"


def test_a_sentence_prints_its_mark_and_its_station() -> None:
    assert str(Sentence("route", "x", is_obstacle=True)) == "! route      x"
