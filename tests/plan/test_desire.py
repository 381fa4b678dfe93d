# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import IpMode, Service
from lbagent.model.state import Desired, ProbeTarget, Pulse, Snapshot
from lbagent.model.vip import Mode
from lbagent.plan.desire import Memory, desire
from tests.builders import (
    make_endpoint,
    make_key,
    make_pool,
    make_port,
    make_service,
    make_settings,
    make_snapshot,
    make_vip,
)
from tests.plan.worlds import a_snapshot

A = "198.51.100.1"
WEB = make_service(status=[A])


def judgement(desired: Desired, name: str = "web") -> Judgement:
    return desired.judgements[make_key(name)]


def reason(service: Service, **fields: Any) -> Reason:
    return judgement(desire(make_snapshot([service], **fields)), service.key.name).reason


# --- forwards -------------------------------------------------------------------------------------


def test_every_tcp_and_udp_port_of_every_address_is_a_vip() -> None:
    ports = [make_port(80), make_port(53, protocol="UDP"), make_port(9, protocol="SCTP")]
    service = make_service(ports=ports, families=(4, 6), status=[A, "2001:db8::1"])
    snapshot = make_snapshot([service], settings=make_settings(make_pool("p", "198.51.100.0/24", "2001:db8::/64")))
    assert {str(vip) for vip in desire(snapshot).forwards} == {
        f"{A}:80/TCP",
        f"{A}:53/UDP",
        "[2001:db8::1]:80/TCP",
        "[2001:db8::1]:53/UDP",
    }


def test_a_forward_in_nat_mode_goes_to_the_node_port() -> None:
    forward = desire(make_snapshot([WEB])).forwards[make_vip()]
    assert (forward.mode, forward.node_port) == (Mode.NAT, 30_080)


def test_a_forward_in_a_dsr_mode_keeps_the_port() -> None:
    service = make_service(status=[A], ip_mode=IpMode.VIP, annotations={"lbagent.io/mode": "dsr-ipip"})
    forward = desire(make_snapshot([service])).forwards[make_vip()]
    assert (forward.mode, forward.node_port) == (Mode.DSR_IPIP, 0)


def test_a_dsr_service_is_forwarded_by_nat_until_its_status_says_ip_mode_vip() -> None:
    annotations = {"lbagent.io/mode": "dsr-l2"}
    desired = desire(make_snapshot([make_service(status=[A], ip_mode=IpMode.PROXY, annotations=annotations)]))
    (forward,) = desired.forwards.values()
    assert forward.mode is Mode.NAT  # until then: so a change of mode costs no route
    assert len(desired.routes) == 1
    assert judgement(desired).reason is Reason.PENDING_ASSIGNMENT
    for written in (None, IpMode.VIP):  # unset means VIP
        service = make_service(status=[A], ip_mode=written, annotations=annotations)
        assert make_vip() in desire(make_snapshot([service])).forwards


def test_source_ranges_of_both_families_and_the_affinity_stand_in_every_forward() -> None:
    service = make_service(status=[A], source_ranges=("2001:db8::/32", "192.0.2.0/24"), affinity_timeout_s=10_800)
    forward = desire(make_snapshot([service])).forwards[make_vip()]
    assert forward.source_ranges == ("192.0.2.0/24", "2001:db8::/32")
    assert forward.affinity_timeout_s == 10_800


def test_services_with_the_same_backends_share_one_ring() -> None:
    services = [make_service(name, status=[f"198.51.100.{n}"]) for n, name in enumerate("abc", start=1)]
    assert len(desire(make_snapshot(services)).rings) == 1


def test_ports_whose_probes_differ_have_rings_of_their_own() -> None:
    service = make_service(ports=[80, 81], status=[A])
    down = {ProbeTarget("10.0.0.1", "tcp", 30_081): Pulse(up=False, since=0.0)}
    desired = desire(make_snapshot([service], health=down))
    assert len(desired.rings) == 2
    assert judgement(desired).reason is Reason.SATISFIED


# --- routes ---------------------------------------------------------------------------------------


def test_a_route_needs_every_vip_that_has_an_active_backend() -> None:
    service = make_service(ports=[80, 81], status=[A])
    down = {ProbeTarget(f"10.0.0.{n}", "tcp", 30_081): Pulse(up=False, since=0.0) for n in (1, 2, 3)}
    desired = desire(make_snapshot([service], health=down))
    assert {route.prefix: needs for route, needs in desired.routes.items()} == {f"{A}/32": {make_vip()}}
    assert make_vip(f"{A}:81/TCP") in desired.forwards  # its backends are down, not gone
    assert judgement(desired).reason is Reason.NO_HEALTHY_BACKENDS


def test_an_ipv6_address_is_announced_as_a_128() -> None:
    service = make_service(families=(6,), status=["2001:db8::1"])
    snapshot = make_snapshot([service], settings=make_settings(make_pool("p", "2001:db8::/64")))
    assert [route.prefix for route in desire(snapshot).routes] == ["2001:db8::1/128"]


def test_a_route_carries_the_policy_of_its_pool() -> None:
    policy = replace(make_pool().policy, name="std", communities=("65001:100",))
    desired = desire(make_snapshot([WEB], settings=make_settings(make_pool(policy=policy))))
    assert [route.policy for route in desired.routes] == [policy]


def test_without_an_active_backend_there_is_no_route() -> None:
    desired = desire(make_snapshot([WEB], endpoints={"web": []}))
    assert (desired.forwards, desired.routes) == ({}, {})
    assert judgement(desired).reason is Reason.NO_ENDPOINTS


def test_a_family_without_backends_does_not_stop_the_other() -> None:
    service = make_service(families=(4, 6), status=[A, "2001:db8::1"])
    settings = make_settings(make_pool("p", "198.51.100.0/24", "2001:db8::/64"))
    desired = desire(make_snapshot([service], settings=settings, endpoints={"web": [make_endpoint(family=4)]}))
    assert [route.prefix for route in desired.routes] == [f"{A}/32"]
    assert judgement(desired).reason is Reason.NO_ENDPOINTS
    assert "IPv6" in judgement(desired).detail


def test_a_host_that_drains_announces_nothing_and_forwards_on() -> None:
    desired = desire(make_snapshot([WEB], draining=True))
    assert desired.routes == {}
    assert make_vip() in desired.forwards
    assert judgement(desired).reason is Reason.HOST_DRAINING


def test_a_host_whose_facts_are_stale_and_who_shall_withdraw_then_announces_nothing() -> None:
    desired = desire(make_snapshot([WEB], stale=True))
    assert desired.routes == {}
    assert make_vip() in desired.forwards
    assert judgement(desired).reason is Reason.HOST_STALE


# --- judgements -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "expected"),
    [
        (WEB, Reason.SATISFIED),
        (make_service(type="ClusterIP", status=[A]), Reason.NOT_LOAD_BALANCER),
        (make_service(load_balancer_class="other.io/lb", status=[A]), Reason.NOT_OURS),
        (make_service(status=[A], deleting=True), Reason.DELETING),
        (make_service(), Reason.PENDING_ASSIGNMENT),
        (make_service(status=[A], source_ranges=("x",)), Reason.BAD_SOURCE_RANGES),
        (make_service(status=[A], annotations={"lbagent.io/mode": "x"}), Reason.MODE_UNAVAILABLE),
        (make_service(status=[A], ports=[make_port(node_port=0)]), Reason.NO_NODE_PORT),
        (make_service(status=[A], ports=[make_port(9, protocol="SCTP")]), Reason.NO_SUPPORTED_PORT),
        (make_service(status=["203.0.113.1"]), Reason.OUTSIDE_POOLS),
    ],
)
def test_every_service_has_one_reason(service: Service, expected: Reason) -> None:
    assert reason(service) is expected


def test_what_is_refused_is_neither_forwarded_nor_announced() -> None:
    for service in (
        make_service(type="ClusterIP", status=[A]),
        make_service(load_balancer_class="other.io/lb", status=[A]),
        make_service(status=[A], deleting=True),
        make_service(status=[A], source_ranges=("x",)),
        make_service(status=[A], ports=[make_port(node_port=0)]),
    ):
        desired = desire(make_snapshot([service]))
        assert (desired.forwards, desired.routes) == ({}, {}), service


def test_no_eligible_node_is_told() -> None:
    assert reason(WEB, nodes=[], endpoints={"web": [make_endpoint()]}) is Reason.NO_NODES


def test_unreachable_nodes_are_told() -> None:
    assert reason(WEB, nodes=1, unreachable=frozenset({"10.0.0.1"})) is Reason.NO_HEALTHY_BACKENDS


def test_a_failed_proof_is_told_and_keeps_the_route_desired() -> None:
    desired = desire(make_snapshot([WEB], unproven={make_vip(): "no answer"}))
    assert judgement(desired).reason is Reason.NOT_FORWARDING
    assert "no answer" in judgement(desired).detail
    assert len(desired.routes) == 1


def test_one_bad_service_never_stops_the_others() -> None:
    bad = make_service("bad", annotations={"lbagent.io/load-balancer-ips": "☃", "lbagent.io/mode": "☃"})
    desired = desire(make_snapshot([bad, WEB]))
    assert judgement(desired).reason is Reason.SATISFIED
    assert judgement(desired, "bad").reason is Reason.MODE_UNAVAILABLE


def test_toggling_the_traffic_policy_changes_the_backends_and_nothing_else() -> None:
    cluster, local = (
        desire(make_snapshot([make_service(status=[A], policy=policy)], endpoints={"web": [make_endpoint("node2")]}))
        for policy in ("Cluster", "Local")
    )
    assert [len(ring.backends) for ring in cluster.rings.values()] == [3]
    assert [[b.node for b in ring.backends] for ring in local.rings.values()] == [["node2"]]
    assert cluster.routes == local.routes


# --- purity ---------------------------------------------------------------------------------------


def shuffled(snapshot: Snapshot, random: Random) -> Snapshot:
    """The same cluster, read in another order."""

    def mixed(mapping: Any) -> Any:
        items = list(mapping.items())
        random.shuffle(items)
        return dict(items)

    return replace(
        snapshot,
        services=mixed(snapshot.services),
        nodes=mixed(snapshot.nodes),
        endpoints={key: tuple(random.sample(ends, len(ends))) for key, ends in mixed(snapshot.endpoints).items()},
    )


def test_the_same_cluster_in_any_order_gives_the_same_plan() -> None:
    for seed in range(500):
        random = Random(seed)
        snapshot = a_snapshot(random.choice)
        assert desire(shuffled(snapshot, random)) == desire(snapshot), f"world {seed}"


def test_planning_does_not_change_the_snapshot_and_planning_twice_gives_the_same() -> None:
    for seed in range(200):
        snapshot, again = a_snapshot(Random(seed).choice), a_snapshot(Random(seed).choice)
        assert desire(snapshot) == desire(snapshot), f"world {seed}"
        assert replace(snapshot, endpoints={}) == replace(again, endpoints={})


def changed(snapshot: Snapshot, random: Random) -> Snapshot:
    """The cluster a moment later: some objects are new, the others the very same."""
    later = a_snapshot(random.choice)
    services = dict(snapshot.services)
    endpoints = dict(snapshot.endpoints)
    for key, service in later.services.items():
        if random.random() < 0.4:
            services[key], endpoints[key] = service, later.endpoints[key]
    for key in list(services):
        if random.random() < 0.1:
            del services[key]
    pulses = {}
    if random.random() < 0.3:
        target = ProbeTarget("10.0.0.1", random.choice(["tcp", "proxy"]), random.choice([30_080, 10_256]))
        pulses[target] = Pulse(up=random.random() < 0.5, closing=random.random() < 0.5, since=0.0)
    return replace(
        snapshot,
        now=snapshot.now + 1,
        services=services,
        endpoints=endpoints,
        nodes=later.nodes if random.random() < 0.3 else dict(snapshot.nodes),
        settings=make_settings(make_pool()) if random.random() < 0.05 else snapshot.settings,
        unreachable=later.unreachable,
        health=pulses,
        draining=later.draining,
        is_leader=random.random() < 0.7,
        listed=random.random() < 0.95,
        unproven={vip: "x" for vip in desire(snapshot).forwards if random.random() < 0.1},
        leaving={"node1": snapshot.now + random.choice([-1, 5])},
        namespace_labels={} if random.random() < 0.2 else snapshot.namespace_labels,
    )


def test_a_memory_changes_no_answer() -> None:
    for seed in range(200):
        random, memory = Random(seed), Memory()
        snapshot = a_snapshot(random.choice)
        for _ in range(6):
            assert desire(snapshot, memory) == desire(snapshot), f"history {seed}"
            snapshot = changed(snapshot, random)
