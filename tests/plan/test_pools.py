# SPDX-License-Identifier: Apache-2.0
import pytest

from lbagent.model.pool import LabelSelector
from lbagent.plan.pools import Cursor, admits, index, matches, size
from lbagent.plan.request import parse_address
from tests.builders import make_pool, make_selector, make_service


def number(text: str) -> int:
    parsed = parse_address(text)
    assert parsed
    return parsed[1]


def test_an_address_is_found_in_the_range_that_holds_it() -> None:
    found = index((make_pool("a", "192.0.2.0/28", "192.0.2.32-192.0.2.40"), make_pool("b", "2001:db8::/64")))
    cases = {
        "192.0.2.0": "a",
        "192.0.2.15": "a",
        "192.0.2.16": None,
        "192.0.2.31": None,
        "192.0.2.32": "a",
        "192.0.2.40": "a",
        "192.0.2.41": None,
        "2001:db8::1": "b",
        "2001:db8:0:1::": None,
        "::1": None,
    }
    for text, name in cases.items():
        pool = found.find(6 if ":" in text else 4, number(text))
        assert (pool.name if pool else None) == name, text


def test_pinned_pools_come_first_then_priority_with_zero_last_then_name() -> None:
    pools = (
        make_pool("z", "192.0.2.0/32"),
        make_pool("open5", "192.0.2.1/32", priority=5),
        make_pool("pinned0", "192.0.2.2/32", namespaces=("shop",)),
        make_pool("pinned9", "192.0.2.3/32", namespaces=("shop",), priority=9),
        make_pool("pinned1", "192.0.2.4/32", service_selectors=(make_selector(a="b"),), priority=1),
    )
    assert [pool.name for pool in index(pools).pools] == ["pinned1", "pinned9", "pinned0", "open5", "z"]


def test_namespaces_and_namespace_selectors_are_alternatives() -> None:
    pool = make_pool(namespaces=("shop",), namespace_selectors=(make_selector(team="red"),))
    assert admits(pool, make_service("shop/web"), {})
    assert admits(pool, make_service("other/web"), {"team": "red"})
    assert not admits(pool, make_service("other/web"), {"team": "blue"})


def test_service_selectors_are_a_further_condition() -> None:
    pool = make_pool(namespaces=("shop",), service_selectors=(make_selector(tier="web"), make_selector(tier="api")))
    assert admits(pool, make_service("shop/a", labels={"tier": "api"}), {})
    assert not admits(pool, make_service("shop/a", labels={"tier": "db"}), {})
    assert not admits(pool, make_service("other/a", labels={"tier": "api"}), {})


@pytest.mark.parametrize(
    ("expression", "with_a", "with_b", "without"),
    [
        (("k", "In", ("a",)), True, False, False),
        (("k", "NotIn", ("a",)), False, True, True),
        (("k", "Exists", ()), True, True, False),
        (("k", "DoesNotExist", ()), False, False, True),
    ],
)
def test_selector_expressions_follow_kubernetes(
    expression: tuple[str, str, tuple[str, ...]], with_a: bool, with_b: bool, without: bool
) -> None:
    selector = LabelSelector(expressions=(expression,))
    assert [matches(selector, labels) for labels in ({"k": "a"}, {"k": "b"}, {})] == [with_a, with_b, without]


def test_an_empty_selector_matches_everything() -> None:
    assert matches(LabelSelector(), {})


def test_buggy_addresses_are_neither_given_nor_counted_where_the_pool_avoids_them() -> None:
    pool = make_pool("p", "192.0.2.254-192.0.3.1", avoid_buggy_ips=True)
    cursor, taken = Cursor(pool, 4), set()
    while (value := cursor.peek(taken)) is not None:
        taken.add(value)
    assert taken == {number("192.0.2.254"), number("192.0.3.1")}
    assert size(pool, 4) == 2
    assert size(make_pool("p", "192.0.2.254-192.0.3.1"), 4) == 4
    assert size(make_pool("p", "10.0.0.0/8", avoid_buggy_ips=True), 4) == 2**24 - 2 * 2**16


def test_the_first_free_address_stays_the_first_until_it_is_taken() -> None:
    cursor = Cursor(make_pool("p", "192.0.2.1-192.0.2.2"), 4)
    assert cursor.peek(set()) == cursor.peek(set()) == number("192.0.2.1")
    assert cursor.peek({number("192.0.2.1")}) == number("192.0.2.2")
    assert cursor.peek({number("192.0.2.1"), number("192.0.2.2")}) is None


def test_a_huge_pool_costs_nothing() -> None:
    pool = make_pool("p", "2001:db8::/32")
    assert size(pool, 6) == 2**96
    assert Cursor(pool, 6).peek(set()) == number("2001:db8::")
