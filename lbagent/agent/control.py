# SPDX-License-Identifier: Apache-2.0
"""The UNIX socket behind lbctl: one JSON line in, one JSON line out, then closed.

    {"verb": "status", "args": {...}}  ->  {"ok": true, "result": ...}
                                       ->  {"ok": false, "error": "...", "hint": "..."}

The socket's group may look; only root and the daemon's own user may change anything, which the
kernel tells us (SO_PEERCRED). A request is at most 64 KiB and must arrive within 5 s.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbagent import log
from lbagent.errors import ConfigError, ControlError, LbagentError

_log = log.get("agent")

REQUEST_BYTES = 65_536
REQUEST_S = 5.0
Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """What a request may ask for. ``answer`` gives JSON's types; ``changes`` needs root."""

    answer: Callable[[Arguments], Awaitable[Any]]
    changes: bool = False


class Control:
    """Serves ``verbs`` on ``path`` (mode 0660)."""

    def __init__(self, *, path: Path, verbs: Mapping[str, Verb]) -> None:
        self._path = path
        self._verbs = verbs

    async def run(self) -> None:
        """Serve for ever. Raises ControlError when another agent already serves this path."""
        await refuse_second(self._path)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        try:
            server = await asyncio.start_unix_server(self._serve, self._path, limit=REQUEST_BYTES)
            self._path.chmod(0o660)
        except OSError as error:
            raise ControlError(f"cannot serve {self._path}: {error}", hint="see paths.run") from error
        async with server:
            await server.serve_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                line = await reader.readline()
            reply = await self.answer(line, uid=_uid(writer))
        except (TimeoutError, ValueError, OSError):
            reply = _refusal(ControlError(f"no request of at most {REQUEST_BYTES} bytes within {REQUEST_S:g} s"))
        with contextlib.suppress(OSError):
            writer.write(json.dumps(reply, separators=(",", ":")).encode() + b"\n")
            await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def answer(self, line: bytes, *, uid: int) -> dict[str, Any]:
        """The reply to one request line of a client with this uid."""
        try:
            request = json.loads(line)
            verb, arguments = request["verb"], request.get("args", {})
            if not isinstance(verb, str) or not isinstance(arguments, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return _refusal(ControlError('a request is {"verb": "...", "args": {...}}'))
        known = self._verbs.get(verb)
        if known is None:
            return _refusal(
                ControlError(f"unknown verb {verb[:40]!r}", hint="one of " + ", ".join(sorted(self._verbs)))
            )
        if known.changes and uid not in (0, os.geteuid()):
            return _refusal(ControlError(f"{verb} changes something and is for root", hint=f"sudo lbctl {verb}"))
        try:
            return {"ok": True, "result": await known.answer(arguments)}
        except LbagentError as error:
            return _refusal(error)
        except Exception as error:  # a bug in a view must not end the daemon
            _log.error("request failed", verb=verb, exc_info=error)
            return _refusal(ControlError(f"{verb} failed: {type(error).__name__}: {error}", hint="see the log"))


def _refusal(error: LbagentError) -> dict[str, Any]:
    lines = [error.message, *error.problems] if isinstance(error, ConfigError) else [error.message]
    return {"ok": False, "error": "\n".join(lines), "hint": error.hint}


def _uid(writer: asyncio.StreamWriter) -> int:
    peer: socket.socket = writer.get_extra_info("socket")
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


async def refuse_second(path: Path) -> None:
    """Raises ControlError when another agent serves this path.

    Ask before anything else is opened: connecting to the relay takes its control from the agent that runs.
    """
    if await _answers(path):
        raise ControlError(f"another lbagent serves {path}", hint="one agent per host: systemctl status lbagent")


async def _answers(path: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
