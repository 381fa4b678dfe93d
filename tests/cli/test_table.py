# SPDX-License-Identifier: Apache-2.0
"""Tables for people: nothing is truncated, emptiness is a dash."""

from typing import Any

import pytest

from lbagent.cli import table


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "-"),
        ("", "-"),
        ([], "-"),
        ({}, "-"),
        (0, "0"),
        (True, "yes"),
        (False, "no"),
        (0.3333, "0.3333"),
        (2.0, "2"),
        (["a", None, "b"], "a,-,b"),
        ({"eth0": "native"}, "eth0=native"),
        ("2001:db8:1111:2222:3333:4444:5555:6666/128", "2001:db8:1111:2222:3333:4444:5555:6666/128"),
    ],
)
def test_a_value_is_one_word_or_a_comma_list(value: Any, said: str) -> None:
    assert table.cell(value) == said


def test_columns_come_from_the_first_row_and_are_as_wide_as_their_widest_cell() -> None:
    assert table.rows([{"node": "n1", "hold_time_s": 9}, {"node": "a-long-name", "hold_time_s": None}]) == (
        "NODE         HOLD-TIME-S\nn1           9\na-long-name  -"
    )


def test_no_rows_are_said_to_be_none() -> None:
    assert table.rows([]) == "(none)"


def test_facts_are_aligned() -> None:
    assert table.facts({"a": 1, "last_error": ""}) == "a           1\nlast error  -"


def test_machine_formats_keep_everything() -> None:
    assert table.machine({"a": [1, None]}, "json") == '{\n  "a": [\n    1,\n    null\n  ]\n}'
    assert table.machine({"b": 1, "a": 2}, "yaml") == "b: 1\na: 2"
