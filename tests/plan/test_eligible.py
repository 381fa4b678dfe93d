# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable
from typing import Any

import pytest

from lbagent.model.reason import Reason
from lbagent.model.service import Endpoint, Node, NodeAddress, Protocol, Service
from lbagent.model.state import ProbeTarget, Pulse
from lbagent.plan.eligible import (
    DRAIN_TAINT,
    EXCLUDE_LABEL,
    Choice,
    Eligibility,
    Selection,
    is_excluded,
    usable,
    weight,
)
from tests.builders import closing_endpoint, make_endpoint, make_node, make_service

PORT = 30_080


def choose(
    nodes: Iterable[Node],
    endpoints: Iterable[Endpoint],
    *,
    service: Service | None = None,
    family: int = 4,
    address_type: str = "InternalIP",
    health: dict[ProbeTarget, Pulse] | None = None,
    protocol: Protocol = Protocol.TCP,
    **eligibility: Any,
) -> Selection:
    choice = Choice(Eligibility({node.name: node for node in nodes}, **eligibility), health or {})
    return choice.select(
        service or make_service(),
        usable(endpoints, family=family),
        family=family,
        address_type=address_type,
        protocol=protocol,
        node_port=PORT,
    )


def backends(selection: Selection) -> dict[str, tuple[int, str]]:
    return {backend.node: (backend.weight, backend.state.value) for backend in selection.backends}


LOCAL = make_service(policy="Local")
NODES = [make_node("node1"), make_node("node2"), make_node("node3")]


# --- nodes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "true", "True", "1", "yes", "no", "FaLsE", "0.0"])
def test_the_exclude_label_removes_a_node_whatever_its_value(value: str) -> None:
    assert is_excluded(make_node(labels={EXCLUDE_LABEL: value}))


@pytest.mark.parametrize("value", ["false", "False", "FALSE", "0", "f", "F"])
def test_an_exclude_label_that_parses_as_false_keeps_the_node(value: str) -> None:
    assert not is_excluded(make_node(labels={EXCLUDE_LABEL: value}))


def test_a_node_being_deleted_is_no_backend() -> None:
    selection = choose([make_node("node1"), make_node("node2", deleting=True)], [make_endpoint()])
    assert backends(selection) == {"node1": (1, "active")}


def test_a_node_that_is_not_ready_stays_a_backend() -> None:
    assert backends(choose([make_node(ready=False)], [make_endpoint()])) == {"node1": (1, "active")}


def test_the_autoscalers_taint_drains_a_node() -> None:
    selection = choose([make_node("node1"), make_node("node2", taints=(DRAIN_TAINT,))], [make_endpoint()])
    assert backends(selection) == {"node1": (1, "active"), "node2": (1, "draining")}
    assert selection.finding_by_address["10.0.0.2"].why == f"taint {DRAIN_TAINT}"


def test_an_excluded_node_drains_for_a_while_before_it_is_gone() -> None:
    nodes = [make_node("node1"), make_node("node2", labels={EXCLUDE_LABEL: ""}), make_node("node3", deleting=True)]
    selection = choose(nodes, [make_endpoint()], leaving=frozenset({"node2", "node3"}))
    assert backends(selection) == {"node1": (1, "active"), "node2": (1, "draining"), "node3": (1, "draining")}


def test_a_node_without_an_address_of_the_family_is_no_backend_of_it() -> None:
    nodes = [make_node("node1", "10.0.0.1"), make_node("node2", "10.0.0.2", "fd00::2")]
    selection = choose(nodes, [make_endpoint(family=6)], family=6)
    assert [backend.address for backend in selection.backends] == ["fd00::2"]


def test_of_several_addresses_the_first_of_the_family_counts() -> None:
    node = make_node("node1", "fd00::9", "10.0.0.9", "10.0.0.8")
    assert [b.address for b in choose([node], [make_endpoint()]).backends] == ["10.0.0.9"]


def test_a_pool_may_choose_another_type_of_node_address() -> None:
    node = Node(name="n", addresses=(NodeAddress("InternalIP", "10.0.0.1"), NodeAddress("ExternalIP", "192.0.2.1")))
    selection = choose([node], [make_endpoint()], address_type="ExternalIP")
    assert [b.address for b in selection.backends] == ["192.0.2.1"]


def test_two_nodes_with_one_address_are_one_backend() -> None:
    selection = choose([make_node("b", "10.0.0.1"), make_node("a", "10.0.0.1")], [make_endpoint("a")])
    assert backends(selection) == {"a": (1, "active")}


def test_a_node_without_a_next_hop_from_this_host_is_down() -> None:
    selection = choose(NODES[:2], [make_endpoint()], unreachable=frozenset({"10.0.0.2"}))
    assert backends(selection) == {"node1": (1, "active"), "node2": (1, "down")}


def test_no_eligible_node_is_a_reason() -> None:
    assert choose([], [make_endpoint()]).reason is Reason.NO_NODES


# --- endpoints ------------------------------------------------------------------------------------


def test_policy_cluster_takes_every_node_with_weight_one() -> None:
    selection = choose(NODES, [make_endpoint("node1"), make_endpoint("node1")])
    assert backends(selection) == dict.fromkeys(["node1", "node2", "node3"], (1, "active"))


def test_policy_cluster_needs_one_usable_endpoint_anywhere_even_without_a_node() -> None:
    assert choose(NODES, [make_endpoint("")]).reason is None
    assert choose(NODES, [make_endpoint(ready=False)]).reason is Reason.NO_ENDPOINTS
    assert choose(NODES, []).reason is Reason.NO_ENDPOINTS


def test_policy_cluster_falls_back_to_endpoints_that_serve_while_they_terminate() -> None:
    assert choose(NODES, [closing_endpoint()]).reason is None


def test_terminating_endpoints_that_do_not_serve_are_never_used() -> None:
    ended = make_endpoint(ready=False, serving=False, terminating=True)
    assert choose(NODES, [ended]).reason is Reason.NO_ENDPOINTS


def test_policy_local_weighs_nodes_by_their_ready_endpoints() -> None:
    ends = [make_endpoint("node1"), *(make_endpoint("node2") for _ in range(9))]
    assert backends(choose(NODES, ends, service=LOCAL)) == {"node1": (1, "active"), "node2": (9, "active")}


def test_policy_local_drains_a_node_with_only_terminating_endpoints() -> None:
    ends = [make_endpoint("node1"), closing_endpoint("node2")]
    assert backends(choose(NODES, ends, service=LOCAL)) == {"node1": (1, "active"), "node2": (1, "draining")}


def test_policy_local_counts_no_terminating_endpoint_beside_ready_ones() -> None:
    ends = [make_endpoint("node1"), closing_endpoint("node1")]
    assert backends(choose(NODES, ends, service=LOCAL)) == {"node1": (1, "active")}


def test_policy_local_serves_on_with_terminating_endpoints_when_nothing_else_is_left() -> None:
    health = {ProbeTarget("10.0.0.1", "local", 32_000): Pulse(up=False, closing=True, since=0.0)}
    selection = choose(NODES, [closing_endpoint("node1"), closing_endpoint("node1")], service=LOCAL, health=health)
    assert backends(selection) == {"node1": (2, "active")}


def test_policy_local_ignores_endpoints_without_a_node() -> None:
    assert choose(NODES, [make_endpoint("")], service=LOCAL).reason is Reason.NO_NODES


def test_policy_local_with_endpoints_on_excluded_nodes_only_is_no_nodes() -> None:
    nodes = [make_node(labels={EXCLUDE_LABEL: ""}), make_node("node2")]
    assert choose(nodes, [make_endpoint("node1")], service=LOCAL).reason is Reason.NO_NODES


def test_an_endpoint_in_two_slices_counts_once_in_its_best_condition() -> None:
    ends = [
        make_endpoint("node1", "10.244.0.1", ready=False, serving=False),
        make_endpoint("node1", "10.244.0.1"),
        closing_endpoint("node1", address="10.244.0.1"),
    ]
    for order in (ends, ends[::-1]):
        assert usable(order, family=4).ready_by_node == {"node1": 1}


def test_the_families_are_counted_apart() -> None:
    ends = [make_endpoint("node1"), make_endpoint("node2", family=6)]
    assert usable(ends, family=4).ready_by_node == {"node1": 1}
    assert usable(ends, family=6).ready_by_node == {"node2": 1}


@pytest.mark.parametrize(
    ("ready", "expected"),
    [(1, 1), (2, 2), (15, 15), (16, 16), (17, 18), (18, 18), (31, 32), (33, 32), (34, 36), (100, 104), (110, 112)],
)
def test_large_weights_are_rounded_to_four_significant_bits(ready: int, expected: int) -> None:
    assert weight(ready) == expected


def test_a_weight_is_never_more_than_one_seventeenth_off() -> None:
    assert max(abs(weight(n) - n) / n for n in range(1, 5_000)) <= 1 / 17


def test_a_weight_never_falls_when_an_endpoint_is_added() -> None:
    assert all(weight(n) <= weight(n + 1) for n in range(1, 5_000))


# --- health ---------------------------------------------------------------------------------------


def probed(kind: str, port: int, address: str = "10.0.0.2", **pulse: bool) -> dict[ProbeTarget, Pulse]:
    return {ProbeTarget(address, kind, port): Pulse(since=0.0, **pulse)}


def test_a_node_port_that_does_not_answer_takes_the_node_down() -> None:
    selection = choose(NODES[:2], [make_endpoint()], health=probed("tcp", PORT, up=False))
    assert backends(selection) == {"node1": (1, "active"), "node2": (1, "down")}
    assert selection.finding_by_address["10.0.0.2"].source == "node port"


def test_the_probe_of_another_port_says_nothing() -> None:
    selection = choose(NODES[:2], [make_endpoint()], health=probed("tcp", PORT + 1, up=False))
    assert backends(selection)["node2"] == (1, "active")


def test_a_tcp_probe_says_nothing_of_udp() -> None:
    selection = choose(NODES[:2], [make_endpoint()], health=probed("tcp", PORT, up=False), protocol=Protocol.UDP)
    assert backends(selection)["node2"] == (1, "active")


def test_kube_proxys_503_drains_a_node_for_both_policies() -> None:
    health = probed("proxy", 10_256, up=False, closing=True)
    for service in (make_service(), LOCAL):
        ends = [make_endpoint("node1"), make_endpoint("node2")]
        assert backends(choose(NODES[:2], ends, service=service, health=health))["node2"] == (1, "draining")


def test_a_service_that_wants_no_probes_is_judged_without_them() -> None:
    service = make_service(annotations={"lbagent.io/probe": "none"})
    selection = choose(NODES[:2], [make_endpoint()], service=service, health=probed("tcp", PORT, up=False))
    assert backends(selection)["node2"] == (1, "active")


def test_the_health_check_node_port_counts_for_local_only() -> None:
    health = probed("local", 32_000, up=False, closing=True)
    ends = [make_endpoint("node1"), make_endpoint("node2")]
    assert backends(choose(NODES[:2], ends, service=LOCAL, health=health))["node2"] == (1, "draining")
    assert backends(choose(NODES[:2], ends, health=health))["node2"] == (1, "active")


def test_everybody_down_is_a_reason_that_says_why() -> None:
    selection = choose(NODES[1:2], [make_endpoint()], health=probed("tcp", PORT, up=False))
    assert selection.reason is Reason.NO_HEALTHY_BACKENDS
    assert "node port" in selection.detail
    assert backends(selection) == {"node2": (1, "down")}


def test_panic_believes_the_api_when_probes_leave_nobody() -> None:
    selection = choose(NODES[1:2], [make_endpoint()], health=probed("tcp", PORT, up=False), panic_keep=True)
    assert selection.reason is None
    assert "panic" in selection.detail
    assert backends(selection) == {"node2": (1, "active")}


def test_panic_does_not_forward_without_a_next_hop() -> None:
    selection = choose(
        NODES[1:2],
        [make_endpoint()],
        health=probed("tcp", PORT, up=False),
        panic_keep=True,
        unreachable=frozenset({"10.0.0.2"}),
    )
    assert selection.reason is Reason.NO_HEALTHY_BACKENDS


def test_services_that_ask_the_same_question_get_the_same_answer_object() -> None:
    choice = Choice(Eligibility({node.name: node for node in NODES}), {})
    ends = usable([make_endpoint()], family=4)
    ask = {"family": 4, "address_type": "InternalIP", "protocol": Protocol.TCP}
    first = choice.select(make_service("a"), ends, node_port=30_001, **ask)
    second = choice.select(make_service("b"), ends, node_port=30_002, **ask)
    assert first is second
