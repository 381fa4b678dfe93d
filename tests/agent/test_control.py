# SPDX-License-Identifier: Apache-2.0
"""The control socket: what it answers, to whom, and what it survives."""

import asyncio
import json
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lbagent.agent.control import REQUEST_BYTES, Control, Verb
from lbagent.errors import ControlError


async def _echo(arguments: Mapping[str, Any]) -> Any:
    return dict(arguments)


async def _refuse(arguments: Mapping[str, Any]) -> Any:
    raise ControlError("no such thing", hint="try another")


async def _bug(arguments: Mapping[str, Any]) -> Any:
    raise ZeroDivisionError("oops")


VERBS = {
    "echo": Verb(answer=_echo),
    "refuse": Verb(answer=_refuse),
    "bug": Verb(answer=_bug),
    "reload": Verb(answer=_echo, changes=True),
}


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(Control(path=path, verbs=VERBS).run())
        while not path.exists():
            await asyncio.sleep(0.001)
        yield
        task.cancel()


async def say(path: Path, line: bytes) -> dict[str, Any]:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(line)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    reply: dict[str, Any] = json.loads(answer)
    return reply


async def test_a_request_is_answered_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        assert await say(path, b'{"verb":"echo","args":{"a":1}}\n') == {"ok": True, "result": {"a": 1}}
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


async def test_an_expected_refusal_keeps_its_hint(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        assert await say(path, b'{"verb":"refuse"}\n') == {"ok": False, "error": "no such thing", "hint": "try another"}


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b'{"verb":1}\n',
        b'{"verb":"echo","args":[]}\n',
        b"\xff\xfe\n",
        b"[" * 50_000 + b"\n",
    ],
)
async def test_garbage_is_refused_and_the_next_request_is_served(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "s"
    async with serving(path):
        assert not (await say(path, line))["ok"]
        assert (await say(path, b'{"verb":"echo"}\n'))["ok"]


async def test_an_oversized_request_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"x" * (REQUEST_BYTES + 10_000))
        assert not json.loads(await reader.readline())["ok"]
        writer.close()


async def test_a_bug_in_a_verb_does_not_end_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        reply = await say(path, b'{"verb":"bug"}\n')
        assert "ZeroDivisionError" in reply["error"]
        assert (await say(path, b'{"verb":"echo"}\n'))["ok"]


async def test_an_unknown_verb_names_the_known_ones() -> None:
    reply = await Control(path=Path("/nowhere"), verbs=VERBS).answer(b'{"verb":"dance"}', uid=0)
    assert "echo" in reply["hint"]


async def test_only_root_may_change_something() -> None:
    control = Control(path=Path("/nowhere"), verbs=VERBS)
    assert not (await control.answer(b'{"verb":"reload"}', uid=12345))["ok"]
    assert (await control.answer(b'{"verb":"reload"}', uid=0))["ok"]
    assert (await control.answer(b'{"verb":"echo"}', uid=12345))["ok"]


async def test_a_second_agent_refuses_to_start(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        with pytest.raises(ControlError, match="another lbagent"):
            await Control(path=path, verbs=VERBS).run()
        assert (await say(path, b'{"verb":"echo"}\n'))["ok"]


async def test_a_stale_socket_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        pass
    path.touch()
    async with serving(path):
        await asyncio.sleep(0.01)
        assert (await say(path, b'{"verb":"echo"}\n'))["ok"]
