# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings

from lbagent.model.service import Condition
from lbagent.model.state import Desired, Observed, Snapshot
from lbagent.model.step import Announce, Assign, Program, Release, Report, Step, Unprogram, Withdraw
from lbagent.plan.desire import desire
from lbagent.plan.report import CONDITION, FINALIZER
from lbagent.plan.steps import steps
from tests.builders import make_pool, make_service, make_settings, make_snapshot, make_vip
from tests.plan.worlds import Pick, Targets, a_snapshot, picks, snapshots, some

PASSES = 12


def one_pass(targets: Targets, snapshot: Snapshot, stop_after: int | None = None) -> list[Step]:
    """Plan once and perform, at most so many Steps; returns those that change something."""
    seen = targets.see(snapshot)
    desired = desire(seen)
    todo = list(steps(targets.observed(), desired, seen))[:stop_after]
    for step in todo:
        targets.perform(step, desired)
    return [step for step in todo if not isinstance(step, Report)]


def settle(targets: Targets, snapshot: Snapshot) -> tuple[object, ...]:
    """Pass after pass until nothing but Reports is left; returns the place."""
    for _ in range(PASSES):
        todo = one_pass(targets, snapshot)
        if not todo and not targets.attracting_still():
            return targets.place()
        targets.tick()
        targets.confirm()
    raise AssertionError(f"still busy after {PASSES} passes: {todo}")


def arrive(targets: Targets, snapshot: Snapshot) -> None:
    """A new state of the cluster: what was written to statuses is overruled."""
    targets.services = dict(snapshot.services)


def check_every_prefix(pick: Pick) -> None:
    """A history of interrupted passes, then a world whose plan is interrupted everywhere."""
    targets = Targets(late=pick([False, True]))
    for _ in range(pick(range(1, 4))):
        snapshot = a_snapshot(pick)
        arrive(targets, snapshot)
        one_pass(targets, snapshot, stop_after=pick(range(12)))
        targets.tick(pick([0.0, 0.1, 1.0]))
        one_pass(targets, snapshot, stop_after=pick(range(12)))
    last = a_snapshot(pick)
    arrive(targets, last)
    candidates = sorted(desire(targets.see(last)).forwards)
    targets.broken = frozenset(some(pick, candidates, 1))
    seen = targets.see(last)
    desired = desire(seen)
    todo = list(steps(targets.observed(), desired, seen))
    places = []
    for length in range(len(todo) + 1):
        interrupted = targets.copy()
        for step in todo[:length]:
            interrupted.perform(step, desired)
        places.append(settle(interrupted, last))
    for length, place in enumerate(places):
        assert place == places[-1], f"interrupted after {length} of {[type(step).__name__ for step in todo]}"


@settings(max_examples=60, deadline=None)
@given(pick=picks())
def test_every_prefix_is_safe_and_planning_again_from_it_ends_in_the_same_place(pick: Pick) -> None:
    check_every_prefix(pick)


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_thousands_of_random_worlds_are_safe_after_every_prefix(first: int) -> None:
    for seed in range(first, first + 500):
        try:
            check_every_prefix(Random(seed).choice)
        except AssertionError as error:
            error.add_note(f"world {seed}")
            raise


@settings(max_examples=50, deadline=None)
@given(snapshot=snapshots(), drift=snapshots())
def test_whatever_the_targets_hold_the_end_is_what_is_desired(snapshot: Snapshot, drift: Snapshot) -> None:
    targets = Targets(services=dict(drift.services))
    settle(targets, replace(drift, draining=False))
    arrive(targets, snapshot)
    settle(targets, snapshot)
    desired = desire(targets.see(snapshot))
    assert targets.forwards == desired.forwards
    assert set(targets.routes.values()) == set(desired.routes)


@settings(max_examples=50, deadline=None)
@given(snapshot=snapshots())
def test_a_settled_world_needs_no_step_but_reports(snapshot: Snapshot) -> None:
    targets = Targets(services=dict(snapshot.services))
    settle(targets, snapshot)
    assert one_pass(targets, snapshot) == []


def planned(snapshot: Snapshot, observed: Observed) -> list[Step]:
    return [s for s in steps(observed, desire(snapshot), snapshot) if not isinstance(s, Report)]


def settled(snapshot: Snapshot) -> tuple[Targets, Desired]:
    targets = Targets(services=dict(snapshot.services))
    settle(targets, snapshot)
    return targets, desire(targets.see(snapshot))


def test_nothing_is_done_before_the_first_complete_list() -> None:
    targets, _ = settled(make_snapshot([make_service(status=["198.51.100.1"])]))
    assert planned(make_snapshot(listed=False), targets.observed()) == []


def test_a_new_service_is_programmed_before_it_is_announced() -> None:
    snapshot = make_snapshot([make_service(status=["198.51.100.1"])])
    assert [type(step) for step in planned(snapshot, Observed())] == [Program, Announce]


def test_a_deleted_service_is_withdrawn_first_and_forgotten_when_its_address_has_settled() -> None:
    targets, _ = settled(make_snapshot([make_service(status=["198.51.100.1"])]))
    targets.late = True
    gone = make_snapshot([])
    targets.services = {}
    assert [type(step) for step in one_pass(targets, gone)] == [Withdraw]
    targets.tick(60)
    assert one_pass(targets, gone) == []  # a peer may still hold the route
    targets.confirm()
    assert one_pass(targets, gone) == []  # packets may still be under way
    targets.tick(0.5)
    assert one_pass(targets, gone) == [Unprogram(vips=(make_vip(),))]


def test_changed_backends_replace_the_forward_without_a_flap() -> None:
    service = make_service(status=["198.51.100.1"])
    targets, _ = settled(make_snapshot([service], nodes=3))
    assert [type(step) for step in planned(make_snapshot([service], nodes=2), targets.observed())] == [Program]


def test_a_changed_path_policy_replaces_the_route_by_one_announcement() -> None:
    service = make_service(status=["198.51.100.1"])
    targets, _ = settled(make_snapshot([service]))
    policy = replace(make_pool().policy, communities=("65001:1",))
    changed = make_snapshot([service], settings=make_settings(make_pool(policy=policy)))
    assert [type(step) for step in planned(changed, targets.observed())] == [Announce]


def test_a_removed_port_of_an_announced_address_is_forgotten_at_once() -> None:
    service = make_service(ports=(80, 443), status=["198.51.100.1"])
    targets, _ = settled(make_snapshot([service]))
    less = make_snapshot([make_service(ports=(80,), status=["198.51.100.1"])])
    assert planned(less, targets.observed()) == [Unprogram(vips=(make_vip("198.51.100.1:443/TCP"),))]


def test_a_replaced_port_is_forgotten_only_after_the_new_one_is_proven() -> None:
    targets, _ = settled(make_snapshot([make_service(ports=(80,), status=["198.51.100.1"])]))
    moved = make_snapshot([make_service(ports=(443,), status=["198.51.100.1"])])
    targets.services = dict(moved.services)
    assert [type(step) for step in one_pass(targets, moved)] == [Program]
    assert one_pass(targets, moved) == [Unprogram(vips=(make_vip(),))]


def test_an_announced_vip_that_fails_its_proof_is_withdrawn() -> None:
    snapshot = make_snapshot([make_service(status=["198.51.100.1"])])
    targets, _ = settled(snapshot)
    targets.broken = frozenset({make_vip()})
    assert [type(step) for step in one_pass(targets, snapshot)] == [Withdraw]


def test_a_restarted_agent_that_has_proven_nothing_yet_withdraws_nothing() -> None:
    snapshot = make_snapshot([make_service(status=["198.51.100.1"])])
    targets, _ = settled(snapshot)
    assert planned(snapshot, replace(targets.observed(), proven=frozenset())) == []


def test_an_unproven_vip_is_not_announced() -> None:
    snapshot = make_snapshot([make_service(status=["198.51.100.1"])])
    targets, _ = settled(snapshot)
    observed = replace(targets.observed(), routes=frozenset(), proven=frozenset())
    assert planned(snapshot, observed) == []


def test_a_kernel_that_lost_a_vip_is_repaired_without_touching_the_route() -> None:
    snapshot = make_snapshot([make_service(status=["198.51.100.1"])])
    targets, _ = settled(snapshot)
    observed = replace(targets.observed(), forwards={}, proven=frozenset())
    assert [type(step) for step in planned(snapshot, observed)] == [Program]


def test_a_kernel_that_lost_a_ring_gets_it_again() -> None:
    snapshot = make_snapshot([make_service(status=["198.51.100.1"])])
    targets, _ = settled(snapshot)
    observed = replace(targets.observed(), rings=frozenset())
    assert [type(step) for step in planned(snapshot, observed)] == [Program]


def test_a_draining_host_withdraws_everything_and_forgets_nothing() -> None:
    snapshot = make_snapshot([make_service(status=["198.51.100.1"])])
    targets, desired = settled(snapshot)
    settle(targets, replace(snapshot, draining=True))
    assert targets.routes == {}
    assert targets.forwards == desired.forwards


def test_only_the_lease_holder_writes_to_the_cluster() -> None:
    snapshot = make_snapshot([make_service()], is_leader=False)
    assert list(steps(Observed(), desire(snapshot), snapshot)) == []


def test_a_status_that_says_the_same_is_not_written_again() -> None:
    snapshot = make_snapshot([make_service(status=["198.51.100.1"])])
    assert not [step for step in planned(snapshot, Observed()) if isinstance(step, Assign)]


def test_a_wrong_ip_mode_is_written_again() -> None:
    snapshot = make_snapshot([make_service(status=["198.51.100.1"], ip_mode=None)])
    assert [step.assignment.addresses for step in planned(snapshot, Observed()) if isinstance(step, Assign)] == [
        ("198.51.100.1",)
    ]


def test_a_deleted_service_is_released_only_when_this_host_has_let_go() -> None:
    service = make_service(status=["198.51.100.1"])
    targets, _ = settled(make_snapshot([service]))
    going = make_snapshot([replace(service, deleting=True)])
    arrive(targets, going)
    kinds = []
    for _ in range(4):
        kinds.append([type(step) for step in one_pass(targets, going)])
        targets.tick()
    assert kinds == [[Withdraw], [Unprogram], [Release], []]


def test_a_deleted_service_does_not_wait_for_another_that_took_over_its_address() -> None:
    heir = make_service("a", status=["198.51.100.1"], created=1)
    targets, _ = settled(make_snapshot([heir]))
    going = make_service("b", status=["198.51.100.1"], created=2, deleting=True)
    kinds = [type(step) for step in planned(make_snapshot([heir, going]), targets.observed())]
    assert kinds == [Release]


def test_a_service_that_changes_its_type_loses_our_finalizer_then_our_condition() -> None:
    condition = Condition(type=CONDITION, status="True", reason="satisfied")
    service = make_service(type="ClusterIP", finalizers=(FINALIZER,), conditions=(condition,))
    snapshot = make_snapshot([service])
    assert [type(step) for step in steps(Observed(), desire(snapshot), snapshot)] == [Release]
    snapshot = make_snapshot([replace(service, finalizers=())])
    assert [type(step) for step in steps(Observed(), desire(snapshot), snapshot)] == [Report]
    snapshot = make_snapshot([replace(service, conditions=())])  # somebody else's finalizer
    assert list(steps(Observed(), desire(snapshot), snapshot)) == []


def test_satisfied_is_reported_only_once_it_is_announced() -> None:
    snapshot = make_snapshot([make_service(status=["198.51.100.1"])])
    targets, desired = settled(snapshot)
    assert [type(step) for step in steps(targets.observed(), desired, snapshot)] == [Report]
    silent = replace(targets.observed(), routes=frozenset())
    assert not [step for step in steps(silent, desired, snapshot) if isinstance(step, Report)]
