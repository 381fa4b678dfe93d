# SPDX-License-Identifier: Apache-2.0
"""What is shown is what the last pass decided and found."""

import pytest

from lbagent.agent import views
from lbagent.errors import ControlError
from lbagent.model.route import PeerState, SessionState
from tests.agent.machine import Machine, one_service


async def test_a_vip_that_is_not_wanted_any_more_is_shown_until_it_is_gone() -> None:
    machine = Machine(one_service())
    await machine.settle()
    machine.cluster.services.clear()
    last = await machine.settle()
    (row,) = views.vips(last)
    assert (row["wanted"], row["programmed"], row["service"]) == (False, True, "")


async def test_a_route_that_waits_says_for_what() -> None:
    machine = Machine(one_service())
    last = await machine.settle()
    (vip,) = machine.kernel.forwards
    machine.kernel.broken[vip] = "dropped"
    last = await machine.settle()
    (row,) = views.routes(last)
    assert (row["wanted"], row["announced"], row["waits_for"]) == (True, False, [str(vip)])
    (shown,) = views.vips(last)
    assert shown["problem"] == "dropped"


async def test_a_node_without_next_hop_is_shown_as_unreachable() -> None:
    machine = Machine(one_service())
    machine.kernel.unresolved.add("10.0.2.1")
    last = await machine.settle()
    (row,) = views.backends(last)
    assert (row["reachable"], row["state"]) == (False, "down")


async def test_the_steps_of_a_pass_are_words() -> None:
    machine = Machine(one_service())
    machine.cluster.leads = True
    first = machine.loop.one_pass()
    assert views.diff(first) == ["assign 192.0.2.0 to default/web"]


async def test_counts_are_by_reason() -> None:
    machine = Machine(one_service())
    assert views.counts(await machine.settle()) == {"satisfied": 1}


async def test_an_unknown_service_is_an_error_with_a_hint() -> None:
    machine = Machine(one_service())
    last = await machine.settle()
    with pytest.raises(ControlError) as refused:
        views.find(last, "nosuch")
    assert "lbctl show services" in refused.value.hint


def test_a_session_is_shown_with_its_age() -> None:
    peer = PeerState(name="tor1", address="10.0.1.2", session=SessionState.UP, since=90.0, flaps=2)
    (row,) = views.peers({"tor1": peer}, 100.0)
    assert (row["session"], row["for_s"], row["flaps"]) == ("up", 10.0, 2)
