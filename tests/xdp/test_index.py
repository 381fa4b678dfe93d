# SPDX-License-Identifier: Apache-2.0
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbagent.errors import TableFull
from lbagent.xdp.index import PROBES, TAG, Index, index_hash


def table(entries: int = 64) -> Index:
    return Index(memoryview(array("Q", bytes(8 * entries))))


def keys(count: int) -> Iterator[int]:
    return (index_hash(f"192.0.2.{n % 250}", n, 6) for n in range(count))


def test_an_entry_is_found_changed_and_removed() -> None:
    index, (key,) = table(), keys(1)
    assert index.find(key) == 0
    index.set(key, 7)
    assert index.find(key) == 7
    index.set(key, 8)
    assert index.find(key) == 8
    assert index.words() == [key & TAG | 8]
    index.remove(key)
    index.remove(key)
    assert index.words() == []


hashes = st.lists(st.integers(1, (1 << 64) - 1), unique_by=lambda h: h >> 16, max_size=40)


@given(hashes, st.randoms(use_true_random=False))
def test_a_table_is_a_dictionary_whatever_comes_and_goes(wanted: list[int], random: object) -> None:
    index, held = table(256), {}
    for number, key in enumerate(wanted, 1):
        index.set(key, number)
        held[key] = number
        if random.random() < 0.4:
            gone = random.choice(sorted(held))
            index.remove(gone)
            del held[gone]
    assert {key: index.find(key) for key in wanted} == {key: held.get(key, 0) for key in wanted}
    assert len(index.words()) == len(held)


@given(st.lists(st.integers(0, 7), min_size=2, max_size=12))
def test_entries_that_share_a_place_stand_behind_one_another(tags: list[int]) -> None:
    """All keys have the same home: removing any leaves the others to be found."""
    index = table(64)
    distinct = {(5 << 58) | tag << 20: number for number, tag in enumerate(dict.fromkeys(tags), 1)}
    for key, number in distinct.items():
        index.set(key, number)
    for gone in list(distinct):
        index.remove(gone)
        del distinct[gone]
        assert {key: index.find(key) for key in distinct} == distinct


def test_the_chain_goes_round_the_end_of_the_table() -> None:
    index = table(64)
    last = [(63 << 58) | tag << 20 for tag in range(1, 5)]
    for number, key in enumerate(last, 1):
        index.set(key, number)
    index.remove(last[0])
    assert [index.find(key) for key in last] == [0, 2, 3, 4]


def test_no_search_is_longer_than_the_kernels() -> None:
    index = table(64)
    for tag in range(PROBES):
        index.set((5 << 58) | (tag + 1) << 20, 1)
    with pytest.raises(TableFull, match=r"raise xdp\.limits\.vips"):
        index.set((5 << 58) | (PROBES + 1) << 20, 1)


def test_a_table_of_another_size_takes_over_all_entries() -> None:
    small, large = table(64), table(1024)
    held = {key: number for number, key in enumerate(keys(12), 1)}
    for key, number in held.items():
        small.set(key, number)
    large.take_over(small)
    assert {key: large.find(key) for key in held} == held
