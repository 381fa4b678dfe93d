# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any

import pytest

from lbagent.model.state import Observed, Snapshot
from lbagent.model.step import Program, Report, Step, Unprogram, Withdraw
from lbagent.plan.desire import desire
from lbagent.plan.guard import Guarded, guard
from lbagent.plan.steps import steps
from tests.builders import make_endpoint, make_service, make_settings, make_snapshot

COUNT = 20


def world(*, serving: int = COUNT, share: float = 0.5, at_least: int = 3, **fields: Any) -> Snapshot:
    """Twenty announced Services; ``serving`` of them still have endpoints."""
    services = [make_service(f"s{n:02}", status=[f"198.51.100.{n}"]) for n in range(COUNT)]
    return make_snapshot(
        services,
        endpoints={f"s{n:02}": [make_endpoint()] if n < serving else [] for n in range(COUNT)},
        settings=make_settings(guard_withdraw_share=share, guard_withdraw_at_least=at_least),
        is_leader=False,
        **fields,
    )


def announced() -> Observed:
    desired = desire(world())
    return Observed(
        forwards=desired.forwards,
        rings=frozenset(desired.rings),
        proven=frozenset(desired.forwards),
        routes=frozenset(desired.routes),
    )


def guarded(snapshot: Snapshot, **fields: Any) -> Guarded:
    desired, observed = desire(snapshot), announced()
    return guard(steps(observed, desired, snapshot), observed, desired, snapshot, **fields)


def kinds(found: tuple[Step, ...]) -> list[type]:
    return [type(step) for step in found if not isinstance(step, Report)]


def test_as_many_as_allowed_go_freely() -> None:
    result = guarded(world(serving=10))
    assert kinds(result.steps) == [Withdraw] * 10
    assert (result.held, result.why) == ((), "")


def test_one_more_and_all_are_held_back_and_it_says_so() -> None:
    result = guarded(world(serving=9))
    assert result.steps == ()
    assert kinds(result.held) == [Withdraw] * 11
    assert result.why == "one pass would withdraw 11 of 20 addresses; 10 are allowed"


def test_an_empty_list_of_services_takes_nothing_away() -> None:
    snapshot = replace(world(), services={}, endpoints={})
    assert guarded(snapshot).steps == ()


def test_a_few_may_always_go() -> None:
    assert guarded(world(serving=17, share=0.01)).why == ""
    assert guarded(world(serving=16, share=0.01)).why


def test_probes_that_all_fail_at_once_empty_no_ring() -> None:
    snapshot = world(unreachable=frozenset({"10.0.0.1", "10.0.0.2", "10.0.0.3"}))
    result = guarded(snapshot)
    assert kinds(result.steps) == []
    assert set(kinds(result.held)) == {Withdraw}  # and no Program is even planned while packets arrive


def test_what_harms_nobody_goes_on() -> None:
    snapshot = world(serving=5)
    key, service = next(iter(snapshot.services.items()))
    snapshot = replace(snapshot, services={**snapshot.services, key: replace(service, affinity_timeout_s=60)})
    assert kinds(guarded(snapshot).steps) == [Program]


@pytest.mark.parametrize("fields", [{"draining": True}, {"stale": True}])
def test_a_host_that_is_meant_to_leave_may_withdraw_everything(fields: dict[str, bool]) -> None:
    assert kinds(guarded(world(**fields)).steps) == [Withdraw] * COUNT


def test_what_an_operator_confirms_goes() -> None:
    assert kinds(guarded(world(serving=0), confirmed=True).steps) == [Withdraw] * COUNT


def test_vips_that_provably_fail_are_withdrawn_without_asking() -> None:
    snapshot = world()
    snapshot = replace(snapshot, unproven=dict.fromkeys(desire(snapshot).forwards, "the program is gone"))
    assert [kind for kind in kinds(guarded(snapshot).steps) if kind is Withdraw] == [Withdraw] * COUNT


def test_held_addresses_are_not_forgotten_by_the_kernel() -> None:
    result = guarded(replace(world(), services={}, endpoints={}))
    assert Unprogram not in kinds(result.steps)
