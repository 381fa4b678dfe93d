# SPDX-License-Identifier: Apache-2.0
from random import Random

from lbagent.plan.facts import establish
from lbagent.plan.register import Register, may_be_given
from tests.builders import make_key, make_pool, make_service, make_settings
from tests.plan.worlds import a_service

SETTINGS = make_settings(make_pool("p", "198.51.100.0/24"))
A = "198.51.100.1"


def register(*services: object) -> Register:
    found = Register()
    for service in services:
        found.note(establish(service, {}, SETTINGS))
    return found


def test_an_address_that_two_claim_is_contested_until_one_leaves() -> None:
    found = register(make_service("a", status=[A]), make_service("b", status=[A]))
    assert found.contested == {A}
    found.forget(make_key("a"))
    assert (found.contested, found.claimants) == (set(), {A: {make_key("b")}})


def test_services_are_sorted_by_what_the_allocator_must_know() -> None:
    found = register(
        make_service("foreign", status=[A], load_balancer_class="x/y"),
        make_service("lingering", status=["203.0.113.1"]),
        make_service("sharer", annotations={"lbagent.io/allow-shared-ip": "k"}, status=["198.51.100.2"]),
        make_service("refused", source_ranges=("x",)),
        make_service("new"),
    )
    assert found.foreign == {make_key("foreign")}
    assert found.lingering == {make_key("lingering")}
    assert found.sharers == {make_key("sharer")}
    assert found.unsettled == {make_key("lingering"), make_key("new")}


def test_only_services_of_ours_that_could_be_forwarded_may_be_given_anything() -> None:
    def may(**fields: object) -> bool:
        return may_be_given(establish(make_service(**fields), {}, SETTINGS))

    assert may()
    assert not may(type="ClusterIP")
    assert not may(deleting=True)
    assert not may(source_ranges=("x",))


def test_what_is_struck_out_leaves_no_trace() -> None:
    for seed in range(200):
        pick = Random(seed).choice
        kept, gone = a_service(pick, "a"), a_service(pick, "b")
        found = register(kept, gone)
        found.forget(gone.key)
        found.forget(make_key("never-there"))
        assert found == register(kept), f"world {seed}"
