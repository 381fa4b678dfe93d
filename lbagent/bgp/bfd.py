# SPDX-License-Identifier: Apache-2.0
"""What FRR's bfdd knows: is the path to each router alive?

bfdd runs as a unit of its own and acts without us: the *router* drops the BGP session when BFD fails.
We only look, over bfdd's vty socket: a command ends with NUL; so does the reply, followed by three
bytes of which the last is the command's outcome (FRR, lib/vty.c).
"""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

VTY = "bfdd.vty"
TIMEOUT_S = 2.0
REPLY_LIMIT = 1 << 22


async def peer_states(folder: Path) -> Mapping[str, str]:
    """State per address of a router, in bfdd's words; empty when it does not answer, or not as it should."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(str(folder / VTY), limit=REPLY_LIMIT)
            try:
                await _ask(reader, writer, "enable")
                rows = json.loads(await _ask(reader, writer, "show bfd peers json"))
            finally:
                writer.close()
        return {str(row["peer"]): str(row["status"]) for row in rows}
    except (OSError, TimeoutError, EOFError, ValueError, KeyError, TypeError, asyncio.LimitOverrunError):
        return {}


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str) -> bytes:
    writer.write(command.encode("ascii") + b"\0")
    reply = await reader.readuntil(b"\0")
    await reader.readexactly(3)
    return reply[:-1]
