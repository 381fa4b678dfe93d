# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings

from lbagent.model.pool import Assignment, Pool, Reservation
from lbagent.model.reason import Reason
from lbagent.model.service import IpMode, Service
from lbagent.model.state import Desired
from lbagent.model.vip import Mode
from lbagent.plan import assign
from lbagent.plan.desire import desire
from lbagent.plan.facts import establish
from tests.builders import (
    WALL,
    make_key,
    make_pool,
    make_port,
    make_selector,
    make_service,
    make_settings,
    make_snapshot,
)
from tests.plan.worlds import Pick, a_snapshot, picks

V4 = make_pool("v4", "198.51.100.1-198.51.100.4")
V6 = make_pool("v6", "2001:db8::/64")
A, B, C, D = (f"198.51.100.{n}" for n in range(1, 5))


def plan(
    *services: Service, pools: Iterable[Pool] = (V4, V6), quota: dict[str, int] | None = None, **fields: Any
) -> Desired:
    """What the lease holder wants."""
    return desire(make_snapshot(services, settings=make_settings(*pools, namespace_quota=quota or {}), **fields))


def given_to(desired: Desired) -> dict[str, tuple[str, ...]]:
    return {key.name: assignment.addresses for key, assignment in desired.assignments.items()}


def reasons(desired: Desired) -> dict[str, Reason]:
    return {key.name: judgement.reason for key, judgement in desired.judgements.items()}


def may_share(one: Service, other: Service) -> str:
    """Why two Services may not share an address."""
    return assign.may_share(*(establish(service, {}, make_settings(V4, V6)) for service in (one, other)))


def ask(address: str) -> dict[str, str]:
    return {"lbagent.io/load-balancer-ips": address}


def share(key: str = "k") -> dict[str, str]:
    return {"lbagent.io/allow-shared-ip": key}


def pool_of(name: str) -> dict[str, str]:
    return {"lbagent.io/address-pool": name}


# --- the first address ----------------------------------------------------------------------------


def test_a_new_service_gets_the_first_free_address() -> None:
    desired = plan(make_service("a"), make_service("b", status=[A]))
    assert given_to(desired) == {"a": (B,), "b": (A,)}
    assert reasons(desired) == {"a": Reason.PENDING_ASSIGNMENT, "b": Reason.SATISFIED}


def test_older_services_are_served_first() -> None:
    desired = plan(make_service("a", created=2), make_service("b", created=1), pools=[make_pool("one", f"{A}/32")])
    assert given_to(desired) == {"b": (A,)}
    assert reasons(desired)["a"] is Reason.OUT_OF_IPS


def test_services_of_one_age_are_served_by_name() -> None:
    assert given_to(plan(make_service("b"), make_service("a"))) == {"a": (A,), "b": (B,)}


def test_nothing_is_given_before_the_first_complete_list() -> None:
    desired = plan(make_service("a"), listed=False)
    assert desired.assignments == {}
    assert reasons(desired) == {"a": Reason.NOT_LISTED}


def test_only_the_lease_holder_assigns() -> None:
    desired = plan(make_service("a"), make_service("b", status=["203.0.113.1"]), is_leader=False)
    assert (desired.assignments, desired.releases) == ({}, {})
    assert reasons(desired)["a"] is Reason.PENDING_ASSIGNMENT


def test_every_host_can_say_why_there_is_no_address() -> None:
    desired = plan(make_service("a", annotations=ask("203.0.113.1")), is_leader=False)
    assert reasons(desired) == {"a": Reason.OUTSIDE_POOLS}


def test_a_foreign_class_is_never_touched_and_its_address_never_given() -> None:
    desired = plan(make_service("a"), make_service("f", status=[A], load_balancer_class="other.io/lb"))
    assert given_to(desired) == {"a": (B,)}
    assert make_key("f") not in desired.releases


def test_a_service_that_cannot_be_forwarded_is_given_no_address() -> None:
    desired = plan(make_service("a", ports=[make_port(9, protocol="SCTP")]))
    assert desired.assignments == {}
    assert reasons(desired) == {"a": Reason.NO_SUPPORTED_PORT}


def test_a_service_that_cannot_be_forwarded_any_more_keeps_its_address() -> None:
    desired = plan(make_service("a", status=[A], source_ranges=("nonsense",)))
    assert given_to(desired) == {"a": (A,)}
    assert reasons(desired) == {"a": Reason.BAD_SOURCE_RANGES}


def test_an_address_on_its_way_into_a_status_is_given_to_nobody_else() -> None:
    pending = {make_key("a"): Assignment(service=make_key("a"), addresses=(A,), pools=("v4",))}
    desired = plan(make_service("a", created=2), make_service("b", created=1), pending=pending)
    assert given_to(desired) == {"a": (A,), "b": (B,)}


# --- adopt first ----------------------------------------------------------------------------------


def test_what_a_status_holds_is_kept() -> None:
    services = [make_service(name, status=[address]) for name, address in zip("abcd", (D, C, B, A), strict=True)]
    assert given_to(plan(*services)) == {"a": (D,), "b": (C,), "c": (B,), "d": (A,)}


def test_of_two_services_with_one_address_the_older_keeps_it_and_the_other_is_told() -> None:
    desired = plan(make_service("old", status=[A], created=1), make_service("young", status=[A], created=2))
    assert given_to(desired) == {"old": (A,), "young": (B,)}
    assert reasons(desired) == {"old": Reason.SATISFIED, "young": Reason.ALREADY_ALLOCATED}
    assert "default/old" in desired.judgements[make_key("young")].detail


def test_only_the_older_of_them_is_forwarded_on_every_host() -> None:
    desired = plan(
        make_service("old", status=[A], created=1), make_service("young", status=[A], created=2), is_leader=False
    )
    assert {forward.service.name for forward in desired.forwards.values()} == {"old"}


def test_an_address_outside_every_pool_is_replaced() -> None:
    desired = plan(make_service("a", status=["203.0.113.1"]))
    assert given_to(desired) == {"a": (A,)}
    assert reasons(desired) == {"a": Reason.OUTSIDE_POOLS}


def test_an_address_outside_every_pool_is_neither_forwarded_nor_announced() -> None:
    desired = plan(make_service("a", status=["203.0.113.1"]), is_leader=False)
    assert (desired.forwards, desired.routes) == ({}, {})


def test_an_address_that_can_be_neither_kept_nor_replaced_is_released() -> None:
    desired = plan(
        make_service("a", status=["203.0.113.1"]), make_service("b", status=[A]), pools=[make_pool("p", A + "/32")]
    )
    assert desired.releases == {make_key("a"): ("203.0.113.1",)}
    assert reasons(desired)["a"] is Reason.OUT_OF_IPS


def test_an_address_of_a_pool_that_does_not_admit_the_service_any_more_is_replaced() -> None:
    fenced = make_pool("fenced", "192.0.2.0/24", namespaces=("shop",))
    assert given_to(plan(make_service("a", status=["192.0.2.1"]), pools=[fenced, V4])) == {"a": (A,)}


def test_a_disabled_pool_keeps_what_it_gave_and_gives_nothing_new() -> None:
    pool = make_pool("p", "198.51.100.0/24", disabled=True)
    desired = plan(
        make_service("a", status=[A]), make_service("b"), make_service("c", annotations=ask(B)), pools=[pool]
    )
    assert given_to(desired) == {"a": (A,)}
    assert reasons(desired) == {"a": Reason.SATISFIED, "b": Reason.NO_POOL, "c": Reason.NO_POOL}


def test_a_deleted_service_gives_its_address_back_and_holds_it_until_then() -> None:
    desired = plan(make_service("a", status=[A], deleting=True), make_service("b"))
    assert desired.releases == {make_key("a"): (A,)}
    assert given_to(desired) == {"b": (B,)}


# --- requests -------------------------------------------------------------------------------------


def test_a_requested_address_is_given_before_anything_automatic() -> None:
    desired = plan(make_service("a", created=1), make_service("b", created=2, annotations=ask(A)))
    assert given_to(desired) == {"a": (B,), "b": (A,)}


def test_a_requested_address_outside_the_pools_is_refused() -> None:
    desired = plan(make_service("a", annotations=ask("203.0.113.1")))
    assert given_to(desired) == {}
    assert reasons(desired) == {"a": Reason.OUTSIDE_POOLS}


def test_a_requested_address_in_use_without_consent_is_refused() -> None:
    desired = plan(make_service("a", status=[A]), make_service("b", annotations=ask(A)))
    assert given_to(desired) == {"a": (A,)}
    assert reasons(desired)["b"] is Reason.ALREADY_ALLOCATED


def test_a_requested_address_of_a_pool_that_does_not_admit_the_service_is_refused() -> None:
    fenced = make_pool("fenced", "192.0.2.0/24", namespaces=("shop",))
    desired = plan(make_service("a", annotations=ask("192.0.2.1")), pools=[fenced])
    assert reasons(desired) == {"a": Reason.POOL_SELECTOR_MISMATCH}


def test_a_requested_address_and_pool_must_agree() -> None:
    desired = plan(make_service("a", annotations=ask(A) | pool_of("v6")))
    assert reasons(desired) == {"a": Reason.BAD_REQUEST}


def test_a_changed_request_moves_the_service() -> None:
    assert given_to(plan(make_service("a", status=[A], annotations=ask(C)))) == {"a": (C,)}


def test_a_changed_request_that_cannot_be_met_leaves_the_service_where_it_is_and_tells_it() -> None:
    for wish in (ask("203.0.113.1"), ask("nonsense"), ask(B), pool_of("nowhere")):
        desired = plan(make_service("a", status=[A], annotations=wish), make_service("b", status=[B]))
        assert given_to(desired)["a"] == (A,)
        judgement = desired.judgements[make_key("a")]
        assert judgement.reason is not Reason.SATISFIED
        assert f"keeps {A}" in judgement.detail
        assert len(desired.routes) == 2


def test_an_address_that_a_service_moves_away_from_is_not_given_in_the_same_pass() -> None:
    desired = plan(make_service("a", status=[A], annotations=ask(D)), make_service("b"))
    assert given_to(desired) == {"a": (D,), "b": (B,)}


def test_a_requested_pool_is_used_even_when_it_is_not_automatic() -> None:
    pools = [make_pool("manual", "192.0.2.1/32", auto_assign=False), V4]
    desired = plan(make_service("a"), make_service("b", annotations=pool_of("manual")), pools=pools)
    assert given_to(desired) == {"a": (A,), "b": ("192.0.2.1",)}


def test_a_pool_that_is_not_automatic_keeps_what_it_gave() -> None:
    pools = [make_pool("manual", "192.0.2.1/32", auto_assign=False), V4]
    assert given_to(plan(make_service("a", status=["192.0.2.1"]), pools=pools)) == {"a": ("192.0.2.1",)}


def test_a_changed_pool_moves_the_service() -> None:
    pools = [V4, make_pool("other", "192.0.2.1/32")]
    assert given_to(plan(make_service("a", status=[A], annotations=pool_of("other")), pools=pools)) == {
        "a": ("192.0.2.1",)
    }


def test_several_pools_may_be_asked_for_one_per_family() -> None:
    service = make_service("a", families=(4, 6), annotations=pool_of("v4,v6"))
    assert given_to(plan(service)) == {"a": (A, "2001:db8::")}


@pytest.mark.parametrize(
    ("pools", "annotations", "reason"),
    [
        ([V4], pool_of("nowhere"), Reason.UNKNOWN_POOL),
        ([V6], {}, Reason.NO_POOL),
        ([V4, V6], pool_of("v6"), Reason.NO_POOL),
        ([make_pool("p", auto_assign=False)], {}, Reason.NO_POOL),
        ([make_pool("p", disabled=True)], {}, Reason.NO_POOL),
        ([make_pool("p", namespaces=("shop",))], {}, Reason.POOL_SELECTOR_MISMATCH),
        ([make_pool("p", namespaces=("shop",))], pool_of("p"), Reason.POOL_SELECTOR_MISMATCH),
    ],
)
def test_a_service_that_no_pool_may_serve_is_told_why(
    pools: list[Pool], annotations: dict[str, str], reason: Reason
) -> None:
    assert reasons(plan(make_service("a", annotations=annotations), pools=pools)) == {"a": reason}


def test_pinned_pools_come_before_open_ones() -> None:
    pools = [V4, make_pool("pinned", "192.0.2.1/32", service_selectors=(make_selector(tier="web"),))]
    desired = plan(make_service("a", labels={"tier": "web"}), make_service("b"), pools=pools)
    assert given_to(desired) == {"a": ("192.0.2.1",), "b": (A,)}


def test_a_full_pool_is_followed_by_the_next() -> None:
    pools = [make_pool("first", f"{D}/32", priority=1), make_pool("rest", f"{A}-{C}")]
    assert given_to(plan(make_service("a"), make_service("b"), pools=pools)) == {
        "a": (D,),
        "b": (A,),
    }


# --- sharing --------------------------------------------------------------------------------------


def test_services_with_one_key_and_different_ports_share_an_address() -> None:
    desired = plan(
        make_service("a", annotations=share(), status=[B]),
        make_service("b", annotations=share(), ports=[443]),
        make_service("c", annotations=share(), ports=[make_port(80, protocol="UDP")]),
    )
    assert given_to(desired) == {"a": (B,), "b": (B,), "c": (B,)}


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (make_service("b", ports=[443]), Reason.ALREADY_ALLOCATED),
        (make_service("b", ports=[443], annotations=share("other")), Reason.ALREADY_ALLOCATED_INCOMPATIBLE),
        (make_service("b", ports=[80], annotations=share()), Reason.ALREADY_ALLOCATED_INCOMPATIBLE),
        (make_service("b", ports=[443], annotations=share(), policy="Local"), Reason.ALREADY_ALLOCATED_INCOMPATIBLE),
        (make_service("b", ports=[443], annotations=share()), None),
    ],
)
def test_a_shared_address_needs_one_key_different_ports_and_one_policy(other: Service, reason: Reason | None) -> None:
    asking = replace(other, annotations={**other.annotations, **ask(A)})
    desired = plan(make_service("a", annotations=share(), status=[A]), asking)
    if reason is None:
        assert given_to(desired)["b"] == (A,)
    else:
        assert reasons(desired)["b"] is reason
        assert "b" not in given_to(desired)


def test_local_services_share_only_when_they_choose_the_same_pods() -> None:
    def local(name: str, port: int, app: str) -> Service:
        return make_service(name, ports=[port], policy="Local", annotations=share(), selector={"app": app})

    assert may_share(local("a", 80, "x"), local("b", 443, "x")) == ""
    assert "selector" in may_share(local("a", 80, "x"), local("b", 443, "y"))


def test_a_port_clash_under_one_key_gets_another_address() -> None:
    desired = plan(make_service("a", annotations=share(), status=[A]), make_service("b", annotations=share()))
    assert given_to(desired) == {"a": (A,), "b": (B,)}


def test_a_sole_owner_may_change_its_key_in_place() -> None:
    assert given_to(plan(make_service("a", status=[A], annotations=share("new")))) == {"a": (A,)}


def test_sharers_that_come_into_conflict_are_parted_and_the_older_keeps_the_address() -> None:
    desired = plan(
        make_service("old", status=[A], created=1, annotations=share()),
        make_service("young", status=[A], created=2, annotations=share()),
    )
    assert given_to(desired) == {"old": (A,), "young": (B,)}
    assert reasons(desired)["young"] is Reason.ALREADY_ALLOCATED_INCOMPATIBLE


def test_nobody_joins_a_service_that_is_being_deleted() -> None:
    leaving = make_service("a", annotations=share(), status=[A], deleting=True)
    desired = plan(leaving, make_service("b", ports=[443], annotations=share() | ask(A)))
    assert reasons(desired)["b"] is Reason.COOLING_DOWN


def test_a_shared_address_is_announced_for_the_ports_of_all() -> None:
    desired = plan(
        make_service("a", annotations=share(), status=[A]),
        make_service("b", annotations=share(), status=[A], ports=[443]),
    )
    assert [{vip.port for vip in vips} for vips in desired.routes.values()] == [{80, 443}]


# --- families -------------------------------------------------------------------------------------


def test_the_families_may_come_from_different_pools_in_the_order_of_the_service() -> None:
    desired = plan(make_service("a", families=(6, 4)))
    assert given_to(desired) == {"a": ("2001:db8::", A)}
    assert desired.assignments[make_key("a")].pools == ("v6", "v4")


def test_require_dual_stack_gets_both_families_or_none() -> None:
    desired = plan(make_service("a", families=(4, 6)), make_service("b"), pools=[V4])
    assert given_to(desired) == {"b": (A,)}
    assert reasons(desired)["a"] is Reason.NO_POOL


def test_prefer_dual_stack_takes_the_one_family_there_is() -> None:
    service = make_service("a", families=(4, 6), family_policy="PreferDualStack", status=[A])
    desired = plan(service, pools=[V4])
    assert given_to(desired) == {"a": (A,)}
    assert reasons(desired) == {"a": Reason.SATISFIED}
    assert "IPv6" in desired.judgements[make_key("a")].detail


def test_prefer_dual_stack_gets_the_missing_family_later() -> None:
    service = make_service("a", families=(4, 6), family_policy="PreferDualStack", status=[B])
    assert given_to(plan(service)) == {"a": (B, "2001:db8::")}


def test_an_upgrade_to_dual_stack_keeps_the_first_address() -> None:
    assert given_to(plan(make_service("a", families=(4, 6), status=[C]))) == {"a": (C, "2001:db8::")}


def test_an_upgrade_that_cannot_be_met_keeps_the_first_address_and_tells_it() -> None:
    desired = plan(make_service("a", families=(4, 6), status=[C]), pools=[V4])
    assert given_to(desired) == {"a": (C,)}
    assert reasons(desired) == {"a": Reason.NO_POOL}


def test_a_downgrade_gives_back_only_the_family_that_goes() -> None:
    assert given_to(plan(make_service("a", families=(4,), status=["2001:db8::5", C]))) == {"a": (C,)}


# --- time and quota -------------------------------------------------------------------------------


def released(address: str, *, by: str, seconds_ago: float) -> dict[str, Reservation]:
    return {address: Reservation(address=address, service=make_key(by), released=WALL - seconds_ago)}


def test_a_released_address_is_not_given_to_another_within_the_cool_down() -> None:
    assert given_to(plan(make_service("a"), reservations=released(A, by="z", seconds_ago=59))) == {"a": (B,)}
    assert given_to(plan(make_service("a"), reservations=released(A, by="z", seconds_ago=60))) == {"a": (A,)}


def test_a_requested_address_that_cools_down_is_refused_for_that_time() -> None:
    desired = plan(make_service("a", annotations=ask(A)), reservations=released(A, by="z", seconds_ago=1))
    assert reasons(desired) == {"a": Reason.COOLING_DOWN}


def test_a_service_created_again_gets_its_address_back_at_once() -> None:
    assert given_to(plan(make_service("a"), reservations=released(C, by="a", seconds_ago=1))) == {"a": (C,)}


def test_a_full_pool_says_what_is_cooling_down() -> None:
    desired = plan(
        make_service("a"), pools=[make_pool("p", f"{A}/32")], reservations=released(A, by="z", seconds_ago=1)
    )
    assert desired.judgements[make_key("a")].reason is Reason.OUT_OF_IPS
    assert "1 cooling down" in desired.judgements[make_key("a")].detail


def test_a_release_in_the_future_does_not_hold_an_address_for_ever() -> None:
    assert given_to(plan(make_service("a"), reservations=released(A, by="z", seconds_ago=-9))) == {"a": (A,)}


def test_a_namespace_gets_no_more_addresses_than_its_quota() -> None:
    desired = plan(make_service("x/a"), make_service("x/b"), make_service("y/c"), quota={"x": 1})
    assert given_to(desired) == {"a": (A,), "c": (B,)}
    assert reasons(desired)["b"] is Reason.QUOTA_EXCEEDED


def test_a_star_is_the_quota_of_every_other_namespace() -> None:
    desired = plan(make_service("x/a"), make_service("y/b"), quota={"*": 0, "x": 1})
    assert given_to(desired) == {"a": (A,)}


def test_sharing_within_a_namespace_costs_no_quota() -> None:
    desired = plan(
        make_service("a", annotations=share(), status=[A]),
        make_service("b", annotations=share(), ports=[443]),
        quota={"default": 1},
    )
    assert given_to(desired) == {"a": (A,), "b": (A,)}


def test_a_lowered_quota_takes_nothing_away() -> None:
    desired = plan(make_service("a", status=[A]), make_service("b", status=[B]), quota={"default": 1})
    assert given_to(desired) == {"a": (A,), "b": (B,)}


# --- the status -----------------------------------------------------------------------------------


def test_the_assignment_says_the_ip_mode_and_the_errors_of_ports() -> None:
    service = make_service("a", ports=[make_port(), make_port(9, protocol="SCTP"), make_port(81, node_port=0)])
    assignment = plan(service).assignments[make_key("a")]
    assert assignment.ip_mode is IpMode.PROXY
    assert assignment.port_errors == (
        (9, "SCTP", "lbagent.io/ProtocolNotSupported"),
        (81, "TCP", "lbagent.io/NoNodePort"),
    )


def test_the_mode_of_the_pool_is_the_default() -> None:
    pool = make_pool("p", mode=Mode.DSR_L2)
    service = make_service("a", ports=[make_port(node_port=0)])
    assert plan(service, pools=[pool]).assignments[make_key("a")].ip_mode is IpMode.VIP


def test_a_service_without_node_ports_is_given_an_address_of_a_pool_whose_mode_needs_none() -> None:
    pools = [make_pool("nat", f"{A}/32"), make_pool("dsr", f"{B}/32", mode=Mode.DSR_L2)]
    service = make_service("a", ports=[make_port(node_port=0)])
    assert given_to(plan(service, pools=pools)) == {"a": (B,)}
    assert reasons(plan(service, pools=pools[:1])) == {"a": Reason.NO_NODE_PORT}


# --- properties -----------------------------------------------------------------------------------


def after_all_writes(desired: Desired, services: Iterable[Service]) -> dict[str, list[Service]]:
    """Holders by address once the lease holder has written everything."""
    holders: dict[str, list[Service]] = {}
    for service in services:
        assignment = desired.assignments.get(service.key)
        for address in assignment.addresses if assignment else ():
            holders.setdefault(address, []).append(service)
    return holders


def check_assignments(pick: Pick) -> None:
    snapshot = a_snapshot(pick)
    desired = desire(snapshot)
    for address, holders in after_all_writes(desired, snapshot.services.values()).items():
        for i, one in enumerate(holders):
            for other in holders[i + 1 :]:
                assert may_share(one, other) == "", f"{address}: {one.key} and {other.key}"
    for key in snapshot.services:
        judgement = desired.judgements[key]
        announced = {route.address for route in desired.routes} & set(snapshot.services[key].status_addresses)
        assert announced or judgement.reason is not Reason.SATISFIED
    for vip, forward in desired.forwards.items():
        assert vip.address in snapshot.services[forward.service].status_addresses


@settings(max_examples=60, deadline=None)
@given(pick=picks())
def test_no_address_is_given_to_two_services_without_consent(pick: Pick) -> None:
    check_assignments(pick)


def test_no_address_is_given_twice_in_thousands_of_worlds() -> None:
    for seed in range(3_000):
        try:
            check_assignments(Random(seed).choice)
        except AssertionError as error:
            error.add_note(f"world {seed}")
            raise
