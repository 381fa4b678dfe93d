# SPDX-License-Identifier: Apache-2.0
"""What lbctl may ask, over fakes."""

from pathlib import Path
from typing import Any

import pytest

from lbagent.agent.answers import Answers
from lbagent.errors import ControlError
from tests.agent.machine import Machine, one_service


@pytest.fixture
def machine() -> Machine:
    return Machine(one_service())


async def ask(answers: Answers, verb: str, **arguments: Any) -> Any:
    return await answers.verbs()[verb].answer(arguments)


async def test_before_the_first_pass_only_that_is_said(machine: Machine, tmp_path: Path) -> None:
    answers = machine.answers(tmp_path)
    with pytest.raises(ControlError, match="no pass"):
        await ask(answers, "show services")
    assert (await ask(answers, "status"))["vips"]["wanted"] == 0


async def test_every_table_can_be_shown(machine: Machine, tmp_path: Path) -> None:
    await machine.settle()
    answers = machine.answers(tmp_path)
    (service,) = await ask(answers, "show services")
    assert service["reason"] == "satisfied"
    assert service["backends"] == 1
    (vip,) = await ask(answers, "show vips")
    assert (vip["wanted"], vip["programmed"], vip["proven"]) == (True, True, True)
    (backend,) = await ask(answers, "show backends")
    assert (backend["node"], backend["share"]) == ("node1", 1.0)
    (ring,) = await ask(answers, "show rings")
    assert ring["vips"] == 1
    (route,) = await ask(answers, "show routes")
    assert (route["wanted"], route["announced"], route["waits_for"]) == (True, True, [])
    (pool,) = await ask(answers, "show pools")
    assert (pool["addresses"], pool["assigned"]) == (16, 1)
    assert await ask(answers, "show peers") == []
    assert await ask(answers, "show drops") == []
    assert await ask(answers, "diff") == []


async def test_explain_finds_a_service_by_name_and_by_address(machine: Machine, tmp_path: Path) -> None:
    await machine.settle()
    answers = machine.answers(tmp_path)
    by_name = await ask(answers, "explain", name="web")
    (address,) = by_name["addresses"]
    assert await ask(answers, "explain", name=address) == by_name
    changes = [change["step"] for change in by_name["changes"] if change["step"] != "report"]
    assert changes == ["announce", "program", "assign"]
    with pytest.raises(ControlError, match="no Service"):
        await ask(answers, "explain", name="other/web")


async def test_drain_and_undrain_change_the_phase(machine: Machine, tmp_path: Path) -> None:
    answers = machine.answers(tmp_path)
    assert answers.verbs()["drain"].changes
    assert (await ask(answers, "drain"))["phase"] == "softening"
    assert (await ask(answers, "undrain"))["phase"] == "in"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"packet": "zz"}, "not hex"),
        ({"packet": "00"}, "14 to 2048 bytes"),
        ({"source": "192.0.2.9"}, "cannot make a packet"),
        (
            {"source": "x", "source_port": 1, "destination": "y", "destination_port": 1, "protocol": "tcp"},
            "cannot make",
        ),
        (
            {
                "source": "192.0.2.9",
                "source_port": 1,
                "destination": "2001:db8::1",
                "destination_port": 1,
                "protocol": "tcp",
            },
            "different families",
        ),
        (
            {
                "source": "192.0.2.9",
                "source_port": 0,
                "destination": "192.0.2.1",
                "destination_port": 1,
                "protocol": "tcp",
            },
            "0 is not a port",
        ),
        (
            {
                "source": "192.0.2.9",
                "source_port": 1,
                "destination": "192.0.2.1",
                "destination_port": 1,
                "protocol": "sctp",
            },
            "SCTP is not forwarded",
        ),
    ],
)
async def test_a_packet_that_cannot_be_made_is_refused(
    machine: Machine, tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ControlError, match=said):
        await ask(machine.answers(tmp_path), "trace", **arguments)


async def test_the_configuration_is_shown_as_it_is_in_force(machine: Machine, tmp_path: Path) -> None:
    shown = await ask(machine.answers(tmp_path), "show config")
    assert shown["bgp"]["peers"][0]["name"] == "tor1"


async def test_reload_says_what_it_changes(machine: Machine, tmp_path: Path) -> None:
    answers = machine.answers(tmp_path)
    assert await ask(answers, "reload") == {"taken_over": True, "changes": ["cool_down_s: taken over"]}
    assert not (await ask(answers, "reload", check=True))["taken_over"]
