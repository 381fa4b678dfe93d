# SPDX-License-Identifier: Apache-2.0
"""What BGP costs and how fast it is: ``python -m bench.bgp`` prints the section "BGP" of docs/benchmarks.md.

Needs root. LB host and router are namespaces; the speaker runs in this process as it does in the agent,
ExaBGP and relay are real. Times end when the router's *kernel* has the route (netlink), so they
include the router's own work.
"""

import asyncio
import importlib.metadata
import os
import platform
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lbagent import log
from lbagent.bgp import launch, render
from lbagent.bgp.speaker import Speaker
from lbagent.model.route import Route
from tests.bgp.rig import FRR, Rig, is_synced, received, speaking, until
from tests.lab.bird import Bird
from tests.lab.frr import Frr

BIRD = """
router id 10.0.1.2;
protocol device {}
protocol direct { ipv4; }
protocol kernel { ipv4 { export where source = RTS_BGP; }; }
protocol bgp lb { local 10.0.1.2 as 65101; neighbor 10.0.1.1 as 65001; connect retry time 1; connect delay time 1;
  ipv4 { import all; export none; }; }
"""
SINGLE = 60
"""How often one route is announced and withdrawn."""
DEATHS = (("hold time 9 s", 9, 0), ("hold time 3 s", 3, 0), ("BFD 3 x 100 ms", 9, 100))


def routes(count: int) -> frozenset[Route]:
    return frozenset(Route(prefix=f"10.{50 + n // 62500}.{n // 250 % 250}.{n % 250 + 1}/32") for n in range(count))


class Fib:
    """What the router's kernel adds and deletes, with the time we heard of it."""

    def __init__(self, namespace: str) -> None:
        argv = ["ip", "-n", namespace, "-4", "monitor", "route"]
        self._child = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert self._child.stdout
        os.set_blocking(self._child.stdout.fileno(), False)
        self._rest = b""
        self.prefixes: set[str] = set()
        asyncio.get_running_loop().add_reader(self._child.stdout.fileno(), self._read)
        self._changed = asyncio.Event()

    def _read(self) -> None:
        assert self._child.stdout
        *lines, self._rest = (self._rest + (self._child.stdout.read() or b"")).split(b"\n")
        for line in lines:
            if match := re.match(rb"(Deleted )?(10\.5\d\.\S+)", line):
                (self.prefixes.discard if match[1] else self.prefixes.add)(match[2].decode())
        self._changed.set()

    async def reach(self, count: int, *, limit_s: float = 60) -> float:
        """Until that many routes are there; the time."""
        async with asyncio.timeout(limit_s):
            while len(self.prefixes) != count:
                self._changed.clear()
                await self._changed.wait()
        return time.monotonic()

    def close(self) -> None:
        assert self._child.stdout
        asyncio.get_running_loop().remove_reader(self._child.stdout.fileno())
        self._child.terminate()
        self._child.wait()


@contextmanager
def built(**bgp: Any) -> Iterator[Rig]:
    folder = Path(tempfile.mkdtemp(prefix="lbagent-bench-"))
    rig = Rig(f"{os.getpid() % 100000}{secrets.token_hex(1)}", folder, **bgp)
    try:
        rig.build()
        yield rig
    finally:
        rig.clear()
        shutil.rmtree(folder, ignore_errors=True)


async def quiet(speaker: Speaker) -> None:
    await until("synced", is_synced(speaker), limit_s=300)


def milliseconds(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered) * 1000:.1f} ms | {ordered[int(len(ordered) * 0.99)] * 1000:.1f} ms"


async def latency(name: str, router: Frr | Bird, rig: Rig) -> list[str]:
    """One route, 1,000 and 10,000, there and back."""
    rows = []
    with router:
        fib = Fib(rig.tor.name)
        async with speaking(rig) as speaker:
            await until("up", lambda: speaker.observed().peers["tor"].session, "up", limit_s=30)
            there: list[float] = []
            back: list[float] = []
            for _ in range(SINGLE):
                for wanted, times in ((routes(1), there), (frozenset[Route](), back)):
                    begun = time.monotonic()
                    speaker.want(wanted)
                    times.append(await fib.reach(len(wanted)) - begun)
                    await asyncio.sleep(0.02)
            rows.append(f"| {name} | 1 (n = {SINGLE}) | {milliseconds(there)} | {milliseconds(back)} |")
            for count in (1000, 10000):
                begun = time.monotonic()
                speaker.want(routes(count))
                there_s = await fib.reach(count) - begun
                await quiet(speaker)
                begun = time.monotonic()
                speaker.want(frozenset())
                back_s = await fib.reach(0) - begun
                await quiet(speaker)
                rows.append(f"| {name} | {count:,} | {there_s:.2f} s | | {back_s:.2f} s | |")
        fib.close()
    return rows


async def restarts(rig: Rig) -> list[str]:
    """The agent, then ExaBGP, with 10,000 routes; all fed back by FRR."""
    with Frr(rig.tor.name, FRR) as frr:
        fib = Fib(rig.tor.name)
        async with speaking(rig) as speaker:
            speaker.want(routes(10000))
            await fib.reach(10000)
            await quiet(speaker)
        before = received(frr)
        begun = time.monotonic()
        async with speaking(rig) as speaker:
            await until("adopted", lambda: speaker.observed().adopted)
            adopted_s = time.monotonic() - begun
            speaker.want(routes(10000))
            await quiet(speaker)
            messages = sum(received(frr).values()) - sum(before.values())
            rig.stop_exabgp(signal.SIGKILL)
            await fib.reach(0)
            begun = time.monotonic()
            rig.start_exabgp()
            await until("up", lambda: speaker.observed().peers["tor"].session, "up", limit_s=30)
            up_s = time.monotonic() - begun
            replayed_s = await fib.reach(10000) - begun
            await quiet(speaker)
            mended = speaker.observed().mended
        fib.close()
    return [
        f"| agent restarted at 10,000 routes: BGP messages sent | {messages} |",
        f"| the same: until what ExaBGP holds is adopted | {adopted_s:.2f} s |",
        f"| ExaBGP killed and started at 10,000 routes: session up | {up_s:.2f} s |",
        f"| the same: all 10,000 in the router's kernel again | {replayed_s:.2f} s |",
        f"| routes sent again because the wire differed | {mended} |",
    ]


def four_peers(change: dict[str, Any] | None = None) -> tuple[dict[str, Any], ...]:
    peers: list[dict[str, Any]] = [
        {"name": f"tor{n}", "address": f"10.0.1.{20 + n}", "local_address": f"10.0.1.{10 + n}", "peer_as": 65101}
        for n in range(1, 5)
    ]
    peers[0] |= change or {}
    return tuple(peers)


async def load() -> list[str]:
    """10,000 routes to four peers, and a reload that changes one of them."""
    text = "router bgp 65101\n bgp router-id 10.0.1.2\n no bgp ebgp-requires-policy\n"
    for n in range(1, 5):
        text += f" neighbor 10.0.1.{10 + n} remote-as external\n neighbor 10.0.1.{10 + n} timers connect 1\n"
    with built(peers=four_peers()) as rig:
        rig.cable[0].up(*(f"10.0.1.{10 + n}/24" for n in range(1, 5)))
        rig.cable[1].up(*(f"10.0.1.{20 + n}/24" for n in range(1, 5)))
        rig.start_exabgp()
        with Frr(rig.tor.name, text) as frr:
            async with speaking(rig) as speaker:
                await until("up", is_up(speaker), limit_s=60)
                assert rig.exabgp
                processes = {"ExaBGP": rig.exabgp.pid, "relay": rig.relay_pids()[1], "speaker (and bench)": os.getpid()}
                before = {name: cpu_s(pid) for name, pid in processes.items()}
                begun = time.monotonic()
                speaker.want(routes(10000))
                await quiet(speaker)
                took_s = time.monotonic() - begun - 1  # quiet() also waits for a second of silence
                rows = [f"| 10,000 routes to 4 peers: every UPDATE written and confirmed | {took_s:.1f} s |"]
                for name, pid in processes.items():
                    spent = cpu_s(pid) - before[name]
                    rows.append(f"| {name}: CPU for that, resident memory | {spent:.1f} s, {rss_mb(pid)} MB |")
                before = {name: cpu_s(pid) for name, pid in processes.items()}
                await asyncio.sleep(20)
                for name, pid in processes.items():
                    rows.append(f"| {name}: CPU idle | {(cpu_s(pid) - before[name]) * 5:.1f} % of one core |")
                others = {n: received(frr, f"10.0.1.{10 + n}") for n in range(2, 5)}
                rig.bgp = rig.bgp_section(peers=four_peers({"hold_time_s": 30}))
                launch.install(rig.bgp, rig.paths, rig.paths.run)
                launch.reload(rig.exabgp.pid)
                speaker.reconfigure(rig.bgp)
                await until("changed", lambda: speaker.observed().peers["tor1"].hold_time_s, 30, limit_s=30)
                await quiet(speaker)
                flaps = sum(speaker.observed().peers[f"tor{n}"].flaps for n in range(2, 5))
                same = all(received(frr, f"10.0.1.{10 + n}") == others[n] for n in range(2, 5))
                rows.append(f"| reload that changes one of four peers: flaps of the others | {flaps} |")
                rows.append(f"| the same: did the others get a message | {'no' if same else 'YES'} |")
    return rows


def is_up(speaker: Speaker) -> Callable[[], bool]:
    return lambda: all(peer.session == "up" for peer in speaker.observed().peers.values())


async def death(*, hold_time_s: int, bfd_ms: int) -> float:
    """Silence between host and router, as when the host loses its power behind a switch."""
    peer = {"name": "tor", "address": "10.0.1.2", "local_address": "10.0.1.1", "peer_as": 65101, "bfd_ms": bfd_ms}
    with built(hold_time_s=hold_time_s, peers=(peer,)) as rig:
        rig.start_exabgp()
        daemons = ("zebra", "bfdd", "bgpd") if bfd_ms else ("zebra", "bgpd")
        activate = f" neighbor {rig.lb4} bfd 3 {bfd_ms} {bfd_ms}\n address-family"
        router = FRR.replace(" address-family", activate, 1) if bfd_ms else FRR
        with ExitStack() as stack:
            frr = stack.enter_context(Frr(rig.tor.name, router, daemons=daemons))
            if bfd_ms:
                stack.enter_context(Frr(rig.lb.name, render.bfdd_conf(rig.bgp), daemons=("bfdd",)))
            fib = Fib(rig.tor.name)
            stack.callback(fib.close)
            async with speaking(rig) as speaker:
                speaker.want(routes(1))
                await fib.reach(1)
                if bfd_ms:
                    await until("BFD", lambda: [p["status"] for p in frr.json("show bfd peers")], ["up"])
                await asyncio.sleep(2)
                rules = "table inet dead { chain i { type filter hook input priority 0; policy drop; }; "
                rules += "chain o { type filter hook output priority 0; policy drop; }; }"
                await asyncio.to_thread(rig.lb.run, "nft", rules)
                return -time.monotonic() + await fib.reach(0)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> int:
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) // 1024 if match else 0


async def main() -> None:
    """Print the section."""
    log.configure(level="error")
    rows: list[str] = []
    for name, make in (("BIRD 2", lambda r: Bird(r.tor.name, BIRD)), ("FRR 8", lambda r: Frr(r.tor.name, FRR))):
        with built() as rig:
            rig.start_exabgp()
            rows += await latency(name, make(rig), rig)
    with built() as rig:
        rig.start_exabgp()
        events = await restarts(rig)
    events += await load()
    deaths = []
    for text, hold_time_s, bfd_ms in DEATHS:
        worst_s = max([await death(hold_time_s=hold_time_s, bfd_ms=bfd_ms) for _ in range(3)])
        deaths.append(f"| host dies without a word, {text}: the router lets go (worst of 3) | {worst_s:.2f} s |")
    versions = f"ExaBGP {importlib.metadata.version('exabgp')}, Python {platform.python_version()}"
    print("## BGP\n\n`python -m bench.bgp` ([bench/bgp.py](../bench/bgp.py)), as root. From `Speaker.want` to the")
    print(f"router's kernel. {versions}, Linux {platform.release()}, load {os.getloadavg()[1]:.0f}.\n")
    print("| router | routes | announce, median | p99 | withdraw, median | p99 |\n|---|---|---|---|---|---|")
    print("\n".join(rows) + "\n\n| | |\n|---|---|\n" + "\n".join([*events, *deaths]))


if __name__ == "__main__":
    asyncio.run(main())
