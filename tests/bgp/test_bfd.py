# SPDX-License-Identifier: Apache-2.0
"""BFD beside ExaBGP: bfdd runs from our file, its state is shown, and the router lets go at once."""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from lbagent.bgp import bfd, render
from lbagent.config import Bgp
from lbagent.model.route import Route
from tests.bgp.rig import FRR, LB4, LB6, TOR4, TOR6, Rig, is_synced, speaking, until
from tests.lab.frr import DAEMONS, Frr

BGP = Bgp.model_validate(
    {
        "local_as": 65001,
        "router_id": LB4,
        "peers": [
            {"name": "tor", "address": TOR4, "local_address": LB4, "peer_as": 65101, "bfd_ms": 100},
            {"name": "tor6", "address": TOR6, "local_address": LB6, "peer_as": 65101, "bfd_ms": 300, "multihop_ttl": 2},
            {"name": "plain", "address": "10.9.9.9", "local_address": LB4, "peer_as": 65101},
        ],
    }
)


def test_bfdd_watches_the_peers_that_ask_for_it() -> None:
    lines = [line.strip() for line in render.bfdd_conf(BGP).splitlines() if line.strip().startswith("peer")]
    assert lines == [f"peer {TOR4} local-address {LB4}", f"peer {TOR6} multihop local-address {LB6}"]


async def _peers(folder: Path, answer: Callable[[asyncio.StreamWriter, bytes], Awaitable[None]]) -> dict[str, str]:
    is_over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                await answer(writer, await reader.readuntil(b"\0"))
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()
            await writer.wait_closed()
            is_over.set()

    async with await asyncio.start_unix_server(serve, folder / bfd.VTY):
        states = dict(await bfd.peer_states(folder))
        await is_over.wait()
    return states


async def test_what_bfdd_answers_is_read_whole(tmp_path: Path) -> None:
    async def answer(writer: asyncio.StreamWriter, command: bytes) -> None:
        text = b'[{"peer": "10.0.1.2", "status": "up"}, {"peer": "10.0.2.2", "status": "down"}]'
        reply = text if command.startswith(b"show") else b""
        writer.write(reply[:10])
        await asyncio.sleep(0)
        writer.write(reply[10:] + b"\0\0\0\0")

    assert await _peers(tmp_path, answer) == {"10.0.1.2": "up", "10.0.2.2": "down"}


@pytest.mark.parametrize("reply", [b"% Unknown command\0\0\0\0", b"[1]\0\0\0\0", b"{}\0\0\0\0", b"half"])
async def test_nonsense_from_bfdd_is_no_state(tmp_path: Path, reply: bytes) -> None:
    async def answer(writer: asyncio.StreamWriter, _: bytes) -> None:
        writer.write(reply)
        if reply == b"half":
            writer.close()

    assert await _peers(tmp_path, answer) == {}


async def test_no_bfdd_is_no_state(tmp_path: Path) -> None:
    assert await bfd.peer_states(tmp_path) == {}


@pytest.mark.netns
async def test_a_host_that_dies_without_a_word_is_dropped_long_before_the_hold_time(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    rig.bgp = rig.bgp_section(peers=BGP.peers[:1], hold_time_s=30)
    rig.start_exabgp()
    folder = rig.paths.run / "bfd"
    folder.mkdir()
    (folder / "bfdd.conf").write_text(render.bfdd_conf(rig.bgp))
    rig.paths.run.chmod(0o711)  # bfdd becomes the user frr
    for path in (folder, folder / "bfdd.conf"):
        shutil.chown(path, "frr", "frr")
    argv = [str(DAEMONS / "bfdd"), "-f", str(folder / "bfdd.conf"), "--vty_socket", str(folder)]
    argv += ["-i", str(folder / "pid"), "-P", "0", "--bfdctl", str(folder / "ctl")]
    bfdd = subprocess.Popen(rig.lb.command(*argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    text = FRR.replace(" address-family", f" neighbor {LB4} bfd 3 100 100\n address-family", 1)
    try:
        with Frr(rig.tor.name, text, daemons=("zebra", "bfdd", "bgpd")) as frr:
            async with speaking(rig) as speaker:
                speaker.want(frozenset({Route(prefix="192.0.2.1/32")}))
                await until("announced", lambda: list(frr.bgp_routes()), ["192.0.2.1/32"], log=rig.log)
                await until("seen by us", lambda: speaker.observed().peers["tor"].bfd, "up")
                await until("seen by the router", lambda: [p["status"] for p in frr.json("show bfd peers")], ["up"])
                await until("synced", is_synced(speaker))
                begun = time.monotonic()
                rig.lb.run("nft", "table inet dead { chain i { type filter hook input priority 0; policy drop; }; }")
                rig.lb.run("nft", "table inet dead { chain o { type filter hook output priority 0; policy drop; }; }")
                await until("dropped", lambda: list(frr.bgp_routes()), [])
                assert time.monotonic() - begun < rig.bgp.hold_time_s / 2
                await until("seen by us", lambda: speaker.observed().peers["tor"].bfd, "down")
    finally:
        bfdd.terminate()
        bfdd.wait(10)
