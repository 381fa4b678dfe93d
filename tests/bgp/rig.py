# SPDX-License-Identifier: Apache-2.0
"""A real ExaBGP with our relay on one machine, a real router on another, one cable between them."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from lbagent.bgp import launch
from lbagent.bgp.speaker import Speaker, SpeakerState
from lbagent.config import Bgp, Paths
from tests.lab.frr import Frr
from tests.lab.netns import Namespace, Port, cable

LB4, TOR4, LB6, TOR6 = "10.0.1.1", "10.0.1.2", "fd00:1::1", "fd00:1::2"

FRR = f"""
router bgp 65101
 bgp router-id 10.0.1.2
 no bgp ebgp-requires-policy
 no bgp default ipv4-unicast
 bgp bestpath as-path multipath-relax
 neighbor {LB4} remote-as external
 neighbor {LB4} timers connect 1
 address-family ipv4 unicast
  neighbor {LB4} activate
  neighbor {LB4} soft-reconfiguration inbound
 exit-address-family
"""


class Rig:
    """LB host ``number`` and a router. ``bgp``: arguments of the Bgp section; a peer ``tor`` unless given.

    A second LB host gets the first one's ``tor``; its addresses are 10.0.2.1, fd00:2::1 and so on.
    """

    def __init__(self, tag: str, run: Path, *, number: int = 1, tor: Namespace | None = None, **bgp: Any) -> None:
        self.lb, self.tor = Namespace(f"b{tag}l{number}"), tor or Namespace(f"b{tag}t")
        self.cable = Port(self.lb, "eth0"), Port(self.tor, f"eth{number}")
        self.lb4, self.tor4 = f"10.0.{number}.1", f"10.0.{number}.2"
        self.lb6, self.tor6 = f"fd00:{number}::1", f"fd00:{number}::2"
        self.paths = Paths(run=run)
        self.bgp = self.bgp_section(**bgp)
        self.exabgp: subprocess.Popen[bytes] | None = None

    def bgp_section(self, **bgp: Any) -> Bgp:
        peer = {"name": "tor", "address": self.tor4, "local_address": self.lb4, "peer_as": 65101}
        return Bgp(**{"local_as": 65001, "router_id": self.lb4, "peers": (peer,), **bgp})

    def build(self) -> None:
        self.lb.create()
        if not self.tor.exists:
            self.tor.create()
        cable(*self.cable)
        self.cable[0].up(f"{self.lb4}/24", f"{self.lb6}/64")
        self.cable[1].up(f"{self.tor4}/24", f"{self.tor6}/64")

    def clear(self) -> None:
        self.stop_exabgp(signal.SIGKILL)
        for namespace in (self.lb, self.tor):
            namespace.delete()

    @property
    def log(self) -> Path:
        return self.paths.run / "exabgp.log"

    def start_exabgp(self) -> None:
        how = launch.install(self.bgp, self.paths, self.paths.run)
        with self.log.open("ab") as log:
            self.exabgp = subprocess.Popen(
                self.lb.command(*how.argv), env=how.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop_exabgp(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.exabgp:
            self.exabgp.send_signal(how)
            try:
                self.exabgp.wait(15)
            except subprocess.TimeoutExpired:
                self.exabgp.kill()
                self.exabgp.wait()
            self.exabgp = None

    def children(self, pid: int) -> list[int]:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def relay_pids(self) -> tuple[int, int]:
        """Keeper and worker; raises IndexError while one of them is missing."""
        assert self.exabgp
        (keeper, *_) = self.children(self.exabgp.pid)
        return keeper, self.children(keeper)[0]

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def speaking(rig: Rig) -> AsyncIterator[Speaker]:
    """An agent's Speaker, ended the hard way (its task is cancelled, nothing is said to anybody)."""
    speaker = Speaker(rig.bgp, rig.paths)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(speaker.run())
        try:
            yield speaker
        finally:
            task.cancel()


async def until(
    what: str, look: Callable[[], Any], expected: Any = True, *, limit_s: float = 40, log: Path | None = None
) -> Any:
    """Look until it is as expected. In the loop's own thread: a Speaker belongs to one."""
    seen: Any = None
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while True:
                seen = look()
                if seen == expected:
                    return seen
                await asyncio.sleep(0.05)
    tail = "\n".join(log.read_text().splitlines()[-25:]) if log and log.exists() else ""
    raise AssertionError(f"{what}: expected {expected!r}, last seen {seen!r}\n{tail}")


def is_synced(speaker: Speaker) -> Callable[[], bool]:
    def look() -> bool:
        state: SpeakerState = speaker.observed()
        return state.synced and all(peer.session == "up" for peer in state.peers.values())

    return look


_WITH_KEEPALIVES = ("keepalivesRecv", "totalRecv")


def received(frr: Frr, neighbor: str = LB4) -> dict[str, int]:
    """BGP messages FRR received from us, by type, without keepalives."""
    counters = frr.json(f"show bgp neighbors {neighbor}")[neighbor]["messageStats"]
    return {key: value for key, value in counters.items() if key.endswith("Recv") and key not in _WITH_KEEPALIVES}
