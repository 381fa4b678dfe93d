# SPDX-License-Identifier: Apache-2.0
"""One pass after another over fakes: the whole life of a Service, and of a host."""

from dataclasses import replace

import pytest

from lbagent.model.reason import Reason
from lbagent.model.service import ServiceKey
from tests.agent.machine import WEB, Machine, one_service
from tests.fakes.targets import FakeCluster


@pytest.fixture
def cluster() -> FakeCluster:
    return one_service()


async def test_a_service_gets_its_address_is_programmed_and_then_announced(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    last = await machine.settle()
    (address,) = cluster.services[WEB].status_addresses
    assert machine.journal == [f"program {address}:80/TCP", f"announce {address}"]
    assert last.desired.judgements[WEB].reason is Reason.SATISFIED
    assert cluster.writes == 1


async def test_a_settled_host_does_nothing_more(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    before = list(machine.journal)
    await machine.settle()
    assert machine.journal == before
    assert cluster.writes == 1


async def test_a_deleted_service_is_withdrawn_confirmed_settled_and_only_then_unprogrammed(
    cluster: FakeCluster,
) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (address,) = cluster.services[WEB].status_addresses
    machine.journal.clear()
    del cluster.services[WEB]
    await machine.settle()
    assert machine.journal == [f"withdraw {address}"]
    machine.speaker.confirm(machine.now)
    machine.now += 0.4
    await machine.settle()
    assert machine.journal == [f"withdraw {address}"]
    machine.now += 0.2
    await machine.settle()
    assert machine.journal == [f"withdraw {address}", f"unprogram {address}:80/TCP"]


async def test_a_restarted_agent_changes_nothing(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    machine.journal.clear()
    machine.start()
    await machine.settle()
    assert machine.journal == []


async def test_a_host_that_boots_without_the_api_serves_what_it_remembers(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    last = await machine.settle()
    silent = FakeCluster()
    silent.listed = silent.leads = False
    reborn = Machine(silent, stored=last.snapshot)
    await reborn.settle()
    (address,) = cluster.services[WEB].status_addresses
    assert reborn.journal == [f"program {address}:80/TCP", f"announce {address}"]
    assert reborn.world.from_memory


async def test_nothing_is_planned_from_a_cluster_that_was_never_listed(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    machine.journal.clear()
    cluster.listed = False
    cluster.services.clear()
    machine.start()
    await machine.settle()
    assert machine.journal == []


async def test_a_detached_program_withdraws_the_routes_and_attaching_brings_them_back(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (address,) = cluster.services[WEB].status_addresses
    machine.journal.clear()
    machine.kernel.attached.clear()
    last = await machine.settle()
    assert machine.journal == [f"withdraw {address}"]
    assert last.desired.judgements[WEB].reason is Reason.NOT_FORWARDING
    machine.kernel.attached["eth0"] = "native"
    machine.loop.one_pass(complete=True)
    await machine.settle()
    assert machine.journal == [f"withdraw {address}", f"announce {address}"]


async def test_a_proof_that_fails_later_withdraws_the_route(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (vip,) = machine.kernel.forwards
    machine.kernel.broken[vip] = "the packet was dropped"
    machine.loop.one_pass(complete=True)
    assert machine.speaker.state.routes == frozenset()


async def test_a_map_entry_lost_by_hand_is_programmed_again_without_a_flap(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (vip,) = machine.kernel.forwards
    machine.journal.clear()
    machine.kernel.forwards.clear()
    await machine.settle()
    assert machine.journal == [f"program {vip}"]
    assert b'lbagent_drift_total{target="kernel"} 1.0' in machine.metrics.render()


async def test_what_the_kernels_door_repairs_by_itself_is_counted_too(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    machine.kernel.repairs = 2
    await machine.settle()
    assert b'lbagent_drift_total{target="kernel"} 2.0' in machine.metrics.render()


async def test_what_the_agent_changes_itself_is_no_drift(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    cluster.services[WEB] = replace(cluster.services[WEB], affinity_timeout_s=60)
    await machine.settle()
    del cluster.services[WEB]
    await machine.settle()
    machine.speaker.confirm(machine.now)
    machine.now += 1
    await machine.settle()
    assert machine.kernel.forwards == {}
    assert b"lbagent_drift_total{" not in machine.metrics.render()


async def test_a_withdrawal_long_ago_does_not_keep_the_loop_busy(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    del cluster.services[WEB]
    await machine.settle()
    machine.speaker.confirm(machine.now)
    await machine.settle()
    assert machine.loop._due_s == pytest.approx(0.5)
    machine.now += 1
    await machine.settle()
    assert machine.loop._due_s == 30.0


async def test_a_node_without_next_hop_serves_nobody(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    machine.kernel.unresolved.add("10.0.2.1")
    last = await machine.settle()
    assert last.desired.judgements[WEB].reason is Reason.NO_HEALTHY_BACKENDS
    assert machine.speaker.state.routes == frozenset()


async def test_the_last_backends_stay_in_the_ring_while_packets_may_still_arrive(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (held,) = machine.kernel.forwards.values()
    machine.kernel.unresolved.add("10.0.2.1")
    await machine.settle()
    assert machine.speaker.state.routes == frozenset()
    assert list(machine.kernel.forwards.values()) == [held]
    machine.speaker.confirm(machine.now)
    machine.now += 1
    await machine.settle()
    assert list(machine.kernel.forwards.values()) != [held]


async def test_a_host_that_does_not_hold_the_lease_writes_nothing(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    cluster.leads = False
    last = await machine.settle()
    assert cluster.writes == 0
    assert last.desired.judgements[WEB].reason is Reason.PENDING_ASSIGNMENT


async def test_two_services_never_get_one_address_while_writes_are_under_way(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    machine.loop.one_pass()  # the write is queued, not yet sent
    older = ServiceKey("default", "aaa")
    cluster.services[older] = replace(cluster.services[WEB], key=older, uid="u0", created=-5.0)
    cluster.endpoints[older] = cluster.endpoints[WEB]
    await machine.settle()
    addresses = [a for s in cluster.services.values() for a in s.status_addresses]
    assert len(addresses) == len(set(addresses)) == 2


async def test_a_released_address_rests_before_it_is_given_again(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (address,) = cluster.services[WEB].status_addresses
    del cluster.services[WEB]
    await machine.settle()
    assert machine.world.snapshot().reservations[address].service == WEB
    machine.now += 61
    assert machine.world.snapshot().reservations == {}


async def test_a_host_that_has_heard_nothing_for_long_keeps_announcing_unless_told_otherwise(
    cluster: FakeCluster,
) -> None:
    machine = Machine(cluster)
    await machine.settle()
    cluster.age_s = 86_400.0
    await machine.settle()
    assert len(machine.speaker.state.routes) == 1
    machine.world.withdraw_after_s = 300.0
    last = await machine.settle()
    assert machine.speaker.state.routes == frozenset()
    assert len(machine.kernel.forwards) == 1
    assert last.desired.judgements[WEB].reason is Reason.HOST_STALE
    cluster.age_s = 1.0
    await machine.settle()
    assert len(machine.speaker.state.routes) == 1


async def test_a_list_that_comes_back_empty_is_held_back_until_somebody_confirms(cluster: FakeCluster) -> None:
    for number in range(14):
        key = ServiceKey("default", f"s{number:02}")
        cluster.services[key] = replace(cluster.services[WEB], key=key, uid=key.name)
        cluster.endpoints[key] = cluster.endpoints[WEB]
    machine = Machine(cluster)
    machine.world.settings = replace(machine.world.settings, guard_withdraw_share=0.5)
    await machine.settle()
    assert len(machine.speaker.state.routes) == 15
    kept = dict(cluster.services)
    cluster.services.clear()
    last = await machine.settle()
    assert len(machine.speaker.state.routes) == 15
    assert "one pass would withdraw 15 of 15 addresses" in last.held_why
    assert b"lbagent_guard_blocked 1.0" in machine.metrics.render()
    cluster.services.update(kept)
    last = await machine.settle()
    assert last.held_why == ""
    cluster.services.clear()
    await machine.settle()
    machine.world.confirmed = True
    await machine.settle()
    assert machine.speaker.state.routes == frozenset()


async def test_a_vip_that_finds_no_room_is_said_to_be_not_forwarding_and_is_tried_again(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (vip,) = machine.kernel.forwards
    other = ServiceKey("default", "zzz")
    cluster.services[other] = replace(cluster.services[WEB], key=other, uid="u9", ingress=())
    cluster.endpoints[other] = cluster.endpoints[WEB]
    second = replace(vip, address="192.0.2.1")
    machine.kernel.refuses[second] = "4096 VIPs are all there is room for"
    last = await machine.settle()
    assert last.desired.judgements[other].reason is Reason.NOT_FORWARDING
    assert "room for" in last.desired.judgements[other].detail
    assert last.desired.judgements[WEB].reason is Reason.SATISFIED
    machine.kernel.refuses.clear()
    last = await machine.settle()
    assert last.desired.judgements[other].reason is Reason.SATISFIED
    assert {r.address for r in machine.speaker.state.routes} == {vip.address, second.address}
