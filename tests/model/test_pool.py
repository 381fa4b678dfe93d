# SPDX-License-Identifier: Apache-2.0
from lbagent.model.pool import AddressRange, Assignment, LabelSelector, Pool
from tests.builders import make_key, make_range


def test_ranges_sort_by_family_then_by_where_they_begin() -> None:
    ranges = [make_range("2001:db8::/64"), make_range("192.0.2.9-192.0.2.10"), make_range("192.0.2.1/32")]
    assert sorted(ranges) == [ranges[2], ranges[1], ranges[0]]
    assert ranges[1] == AddressRange(4, 0xC0000209, 0xC000020A)


def test_pools_and_selectors_can_be_keys() -> None:
    selector = LabelSelector(labels=(("a", "b"),), expressions=(("k", "In", ("x", "y")),))
    pool = Pool(name="p", ranges=(make_range("192.0.2.0/24"),), service_selectors=(selector,))
    assert len({pool, Pool(name="p", ranges=pool.ranges, service_selectors=(selector,))}) == 1


def test_assignments_compare_by_what_they_say() -> None:
    one = Assignment(service=make_key("web"), addresses=("192.0.2.1",), pools=("p",))
    assert one == Assignment(service=make_key("web"), addresses=("192.0.2.1",), pools=("p",))
    assert one != Assignment(service=make_key("web"), addresses=("192.0.2.2",), pools=("p",))
