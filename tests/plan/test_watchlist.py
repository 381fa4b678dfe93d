# SPDX-License-Identifier: Apache-2.0
"""What is probed, for whom, and how much of it."""

from dataclasses import replace

import pytest

from lbagent.model.pool import Pool
from lbagent.model.service import (
    Endpoint,
    Ingress,
    Node,
    NodeAddress,
    Port,
    Protocol,
    Service,
    ServiceKey,
    TrafficPolicy,
)
from lbagent.model.state import ProbeTarget, Settings, Snapshot
from lbagent.plan.watchlist import watchlist

WEB = ServiceKey("default", "web")


def service(name: str = "web", **changes: object) -> Service:
    plain = Service(
        key=ServiceKey("default", name),
        ports=(
            Port(name="a", protocol=Protocol.TCP, port=80, node_port=30080),
            Port(name="b", protocol=Protocol.UDP, port=53, node_port=30053),
        ),
        ingress=(Ingress(ip="192.0.2.1"),),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def snapshot(*services: Service, **settings: object) -> Snapshot:
    nodes = {
        f"n{i}": Node(
            name=f"n{i}", addresses=(NodeAddress("InternalIP", f"10.0.0.{i}"), NodeAddress("InternalIP", f"fd00::{i}"))
        )
        for i in (1, 2)
    }
    return Snapshot(
        now=0.0,
        listed=True,
        settings=Settings(pools=(Pool(name="p", ranges=()),), **settings),  # type: ignore[arg-type]
        services={s.key: s for s in services},
        endpoints={s.key: (Endpoint(address="10.244.1.1", node="n1"),) for s in services},
        nodes=nodes,
    )


def kinds(found: frozenset[ProbeTarget], kind: str) -> set[str]:
    return {t.address for t in found if t.kind == kind}


def test_kube_proxy_is_asked_once_per_node_and_family() -> None:
    found = watchlist(snapshot(service("a"), service("b")))
    assert kinds(found, "proxy") == {"10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"}


def test_tcp_node_ports_are_probed_in_the_family_of_the_address_and_udp_ports_are_not() -> None:
    found = {t for t in watchlist(snapshot(service())) if t.kind == "tcp"}
    assert found == {ProbeTarget("10.0.0.1", "tcp", 30080), ProbeTarget("10.0.0.2", "tcp", 30080)}


def test_under_policy_local_only_nodes_with_endpoints_are_asked() -> None:
    local = service(external_traffic_policy=TrafficPolicy.LOCAL, health_check_node_port=31000)
    found = watchlist(snapshot(local))
    assert kinds(found, "local") == {"10.0.0.1"}
    assert kinds(found, "tcp") == {"10.0.0.1"}


def test_a_service_without_an_address_or_of_somebody_else_is_not_probed() -> None:
    assert watchlist(snapshot(service(ingress=()))) == frozenset()
    assert watchlist(snapshot(service(load_balancer_class="other"))) == frozenset()


def test_a_service_may_ask_not_to_be_probed() -> None:
    assert watchlist(snapshot(service(annotations={"lbagent.io/probe": "none"}))) == frozenset()


def test_node_ports_beyond_the_limit_are_left_out_service_by_service() -> None:
    found = watchlist(
        snapshot(
            service("a"),
            service("b", ports=(Port(name="", protocol=Protocol.TCP, port=1, node_port=2),)),
            node_port_probes=3,
        )
    )
    assert {t.port for t in found if t.kind == "tcp"} == {30080}


def test_a_service_that_asks_for_it_comes_first() -> None:
    other = service(
        "z",
        ports=(Port(name="", protocol=Protocol.TCP, port=1, node_port=2),),
        annotations={"lbagent.io/probe": "node-port"},
    )
    found = watchlist(snapshot(service("a"), other, node_port_probes=2))
    assert {t.port for t in found if t.kind == "tcp"} == {2}


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_the_services_does_not_matter(order: int) -> None:
    services = [service("a"), service("b"), service("c")]
    assert watchlist(snapshot(*services[::order])) == watchlist(snapshot(*services))
