# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbagent.model.vip import RING_SLOTS, BackendState, Ring
from lbagent.plan.ring import Rings, fingerprint, ring
from tests.builders import make_backend

DOWN, DRAINING = BackendState.DOWN, BackendState.DRAINING


def owners(found: Ring) -> list[str]:
    """Address by slot, '' for nobody."""
    names = ["", *(backend.address for backend in found.backends)]
    return [names[number] for number in found.slots]


def shares(found: Ring) -> Counter[str]:
    return Counter(owners(found))


def fleet(count: int, **fields: object) -> list:
    return [make_backend(number, **fields) for number in range(1, count + 1)]


def test_every_slot_has_an_owner_and_there_are_65537() -> None:
    found = ring(fleet(3))
    assert len(found.slots) == RING_SLOTS
    assert "" not in owners(found)


def test_a_hundred_equal_backends_are_even_within_one_percent() -> None:
    counts = shares(ring(fleet(100)))
    assert max(counts.values()) / (RING_SLOTS / 100) <= 1.01


@pytest.mark.parametrize("weights", [(1, 9), (1, 2, 3, 4), (100, 1, 1), (7, 7, 7, 1)])
def test_weights_are_honoured_within_one_percent(weights: tuple[int, ...]) -> None:
    backends = [make_backend(number, weight=weight) for number, weight in enumerate(weights, start=1)]
    counts = shares(ring(backends))
    for backend in backends:
        fair = RING_SLOTS * backend.weight / sum(weights)
        assert counts[backend.address] == pytest.approx(fair, rel=0.01)


def test_doubling_every_weight_moves_nobody() -> None:
    once = [make_backend(n, weight=n) for n in (1, 2, 3)]
    twice = [make_backend(n, weight=2 * n) for n in (1, 2, 3)]
    assert ring(once).slots == ring(twice).slots


def test_a_backend_that_goes_down_moves_only_its_own_flows() -> None:
    before = ring(fleet(20))
    after = ring([make_backend(n, state=DOWN if n == 7 else BackendState.ACTIVE) for n in range(1, 21)])
    for old, new in zip(owners(before), owners(after), strict=True):
        assert new == old if old != "10.0.0.7" else new not in ("", "10.0.0.7")


def test_a_backend_that_returns_gets_exactly_its_old_slots_back() -> None:
    ring(fleet(20, state=DOWN))
    assert ring(fleet(20)).slots == ring(fleet(20)).slots


def test_the_flows_of_a_dead_backend_fall_evenly_on_the_others() -> None:
    counts = shares(ring([make_backend(n, state=DOWN if n == 50 else BackendState.ACTIVE) for n in range(1, 101)]))
    assert max(counts.values()) / (RING_SLOTS / 99) <= 1.02


def test_a_draining_backend_gets_no_slot() -> None:
    counts = shares(ring([make_backend(1), make_backend(2, state=DRAINING)]))
    assert counts == {"10.0.0.1": RING_SLOTS}


def test_a_backend_of_weight_zero_gets_no_slot() -> None:
    assert shares(ring([make_backend(1), make_backend(2, weight=0)])) == {"10.0.0.1": RING_SLOTS}


def test_nobody_active_leaves_every_slot_empty() -> None:
    assert shares(ring(fleet(3, state=DOWN))) == {"": RING_SLOTS}
    assert shares(ring([])) == {"": RING_SLOTS}


def test_when_one_of_a_hundred_leaves_under_one_percent_of_the_others_slots_move() -> None:
    before, after = owners(ring(fleet(100))), owners(ring(fleet(99)))
    moved = sum(1 for old, new in zip(before, after, strict=True) if old != new and old != "10.0.0.100")
    assert moved / RING_SLOTS < 0.01


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.builds(
            make_backend,
            st.integers(1, 40),
            weight=st.integers(0, 5),
            state=st.sampled_from(list(BackendState)),
        ),
        max_size=8,
        unique_by=lambda backend: backend.address,
    ),
    st.integers(),
)
def test_the_order_of_backends_changes_nothing(backends: list, seed: int) -> None:
    shuffled = list(backends)
    Random(seed).shuffle(shuffled)
    assert ring(backends) == ring(shuffled)
    assert ring(backends).slots == ring(shuffled).slots


def test_the_fingerprint_is_of_the_content_and_not_of_node_names() -> None:
    assert fingerprint([make_backend(1, node="a")]) == fingerprint([make_backend(1, node="b")])
    names = {
        fingerprint(backends)
        for backends in (
            [],
            fleet(1),
            fleet(2),
            fleet(1, weight=2),
            fleet(1, state=DOWN),
            fleet(1, state=DRAINING),
        )
    }
    assert len(names) == 6
    assert all(len(name) == 16 and int(name, 16) >= 0 for name in names)


def test_the_fingerprint_is_the_same_for_ever() -> None:
    """Hosts of different releases compare them; a new rule needs a new _ALGORITHM line and a new value here."""
    assert fingerprint([make_backend(1), make_backend(2, weight=3, state=DRAINING)]) == "5432366ea4067d0d"
    assert list(ring(fleet(5)).slots[:12]) == [1, 5, 5, 4, 2, 4, 1, 1, 1, 5, 2, 3]


def test_rings_are_a_mapping_that_builds_on_demand() -> None:
    backends = tuple(fleet(2))
    rings = Rings({fingerprint(backends): backends})
    assert list(rings) == [fingerprint(backends)]
    assert len(rings) == 1
    assert fingerprint(backends) in rings
    assert rings[fingerprint(backends)] == ring(backends)
    assert rings == Rings({fingerprint(backends): backends})
    assert rings != Rings({})
