# SPDX-License-Identifier: Apache-2.0
from typing import Any

from lbagent.model.reason import Reason
from lbagent.model.service import Service
from lbagent.plan.eligible import Choice, Eligibility, usable
from lbagent.plan.facts import establish
from lbagent.plan.serve import Served, serve
from tests.builders import make_endpoint, make_node, make_pool, make_port, make_service, make_settings, make_vip

A, A6 = "198.51.100.1", "2001:db8::1"
SETTINGS = make_settings(make_pool("p", "198.51.100.0/24", "2001:db8::/64"))


def served(service: Service, *, endpoints: Any = None, nodes: Any = None) -> Served:
    facts = establish(service, {}, SETTINGS)
    nodes = [make_node("node1"), make_node("node2")] if nodes is None else nodes
    ends = [make_endpoint("node1", family=f) for f in (4, 6)] if endpoints is None else endpoints
    choice = Choice(Eligibility({node.name: node for node in nodes}), {})
    return serve(service, facts.wish, facts.claim.held, {f: usable(ends, family=f) for f in (4, 6)}, choice)


def test_each_family_has_its_own_backends_and_its_own_route() -> None:
    found = served(make_service(families=(4, 6), status=[A, A6]))
    assert {route.prefix for route in found.vips_by_route} == {f"{A}/32", f"{A6}/128"}
    assert len(found.backends_by_ring) == 2
    assert found.obstacle is None


def test_ports_of_one_address_share_the_ring_and_the_route() -> None:
    found = served(make_service(ports=[80, make_port(53, protocol="UDP")], status=[A]))
    assert len(found.backends_by_ring) == 1
    assert list(found.vips_by_route.values()) == [{make_vip(f"{A}:80/TCP"), make_vip(f"{A}:53/UDP")}]


def test_without_a_backend_there_is_neither_forward_nor_route_but_the_question_is_kept() -> None:
    found = served(make_service(status=[A]), endpoints=[])
    assert (found.forwards, found.vips_by_route) == ({}, {})
    assert found.obstacle.reason is Reason.NO_ENDPOINTS
    assert found.selection_by_vip[make_vip()].reason is Reason.NO_ENDPOINTS


def test_an_obstacle_names_the_family_where_there_are_two() -> None:
    found = served(make_service(families=(4, 6), status=[A, A6]), endpoints=[make_endpoint("node1")])
    assert found.obstacle.detail == "IPv6"
    assert [route.prefix for route in found.vips_by_route] == [f"{A}/32"]


def test_backends_are_in_the_order_of_their_addresses() -> None:
    nodes = [make_node("z", "10.0.0.1"), make_node("a", "10.0.0.2")]
    (backends,) = served(make_service(status=[A]), nodes=nodes).backends_by_ring.values()
    assert [backend.node for backend in backends] == ["z", "a"]
