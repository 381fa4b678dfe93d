# SPDX-License-Identifier: Apache-2.0
from typing import get_args

from lbagent.model.route import Route
from lbagent.model.step import Program, Step, Unprogram, Withdraw
from tests.builders import make_vip


def test_the_list_of_steps_is_closed() -> None:
    names = {kind.__name__ for kind in get_args(Step)}
    assert names == {"Program", "Announce", "Withdraw", "Unprogram", "Assign", "Release", "Report"}


def test_a_step_prints_without_its_tables() -> None:
    assert "rings" not in repr(Program(forwards=(), rings=()))


def test_steps_compare_by_what_they_do() -> None:
    assert Unprogram(vips=(make_vip(),)) == Unprogram(vips=(make_vip(),))
    assert Withdraw(route=Route(prefix="a/32")) != Withdraw(route=Route(prefix="b/32"))
