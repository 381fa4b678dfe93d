# SPDX-License-Identifier: Apache-2.0
"""What probing costs: ``python -m bench.probe`` prints the section "Probes" of docs/benchmarks.md.

1,000 targets (127.1.0.1 ...) are probed twice a second on loopback; the servers run in another
process. CPU is user + system time of the probing process, which on loopback pays for both ends of
each TCP handshake. The rivals do the same requests at the same pace by other means.
"""

import asyncio
import contextlib
import heapq
import itertools
import os
import platform
import random
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import aiohttp

from lbagent import config, log
from lbagent.metrics import Metrics
from lbagent.model.state import ProbeTarget
from lbagent.probe.schedule import Prober

TARGETS = 1000
SETTINGS = config.Probe()
SECONDS = 10.0
ADDRESSES = [f"127.1.{i // 250}.{i % 250 + 1}" for i in range(TARGETS)]
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n"
    b"X-Load-Balancing-Endpoint-Weight: 3\r\nDate: Thu, 26 Nov 2026 12:00:00 GMT\r\nContent-Length: 92\r\n\r\n"
    b'{"service":{"namespace":"default","name":"web"},"localEndpoints":3,"serviceProxyHealthy":true}'
)
REQUEST = b"GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where the servers listen: one answers at once, one after 0 to 20 ms, one never."""

    prompt: int
    scattered: int
    hanging: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one run. Times in seconds."""

    probes: int
    took_s: float
    user_s: float
    system_s: float

    def row(self, title: str) -> str:
        each_us = (self.user_s + self.system_s) / self.probes * 1e6
        share = (self.user_s + self.system_s) / self.took_s
        return (
            f"| {title} | {self.probes / self.took_s:,.0f} | {self.user_s / self.probes * 1e6:.0f}"
            f" | {self.system_s / self.probes * 1e6:.0f} | {each_us:.0f} | {share:.1%} | {each_us * 2000 / 1e6:.1%} |"
        )


class _Meter:
    """CPU time of this process from ``start`` to ``stop``."""

    def start(self) -> None:
        self._usage, self._began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()

    def stop(self, probes: int) -> Cost:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Cost(
            probes=probes,
            took_s=time.monotonic() - self._began,
            user_s=usage.ru_utime - self._usage.ru_utime,
            system_s=usage.ru_stime - self._usage.ru_stime,
        )


# -- ours


async def ours(targets: frozenset[ProbeTarget]) -> Cost:
    """Two seconds to settle, then measure. Judging and counting are included."""
    metrics = Metrics(version="bench", process=False)
    count = 0

    def probed(kind: str, *, outcome: str, took_s: float) -> None:
        nonlocal count
        count += 1
        metrics.probed(kind, outcome=outcome, took_s=took_s)

    prober = Prober(SETTINGS, clock=time.monotonic, source=random.random, changed=lambda: None, probed=probed)
    prober.want(targets)
    meter = _Meter()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(prober.run())
        await asyncio.sleep(2.0)
        count = 0
        meter.start()
        await asyncio.sleep(SECONDS)
        cost = meter.stop(count)
        task.cancel()
    if len(prober.pulses) != len(targets):
        raise RuntimeError(f"only {len(prober.pulses)} of {len(targets)} targets have a pulse")
    return cost


async def outage(
    targets: frozenset[ProbeTarget], victims: frozenset[ProbeTarget], server: int, settings: config.Probe
) -> str:
    """The victims' server (a pid) is stopped and goes on again; a row of when they went down and came up."""
    prober = Prober(
        settings,
        clock=time.monotonic,
        source=random.random,
        changed=lambda: None,
        probed=lambda kind, *, outcome, took_s: None,
    )
    prober.want(targets | victims)

    async def until(up: bool) -> list[float]:
        async with asyncio.timeout(60):
            while any(t not in prober.pulses or prober.pulses[t].up is not up for t in victims):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return sorted(prober.pulses[t].since for t in victims)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(prober.run())
        await until(True)
        os.kill(server, signal.SIGSTOP)
        stopped = time.monotonic()
        try:
            down = [since - stopped for since in await until(False)]
        finally:
            os.kill(server, signal.SIGCONT)
        went_on = time.monotonic()
        up = [since - went_on for since in await until(True)]
        task.cancel()
    figures = " | ".join(f"{statistics.median(x):.2f} s | {x[-1]:.2f} s" for x in (down, up))
    return f"| {len(victims):,} of {len(targets | victims):,} | {settings.concurrency:,} | {figures} |"


# -- rivals

Fetch = Callable[[str, int], Awaitable[None]]


async def by_aiohttp(session: aiohttp.ClientSession, address: str, port: int) -> None:
    async with session.get(f"http://{address}:{port}/", allow_redirects=False) as response:
        await response.content.read(4096)


async def by_streams(address: str, port: int) -> None:
    async with asyncio.timeout(SETTINGS.timeout_s):
        reader, writer = await asyncio.open_connection(address, port)
        writer.write(REQUEST)
        await reader.read(4096)
        writer.transport.abort()


class _Get(asyncio.Protocol):
    def __init__(self, answered: asyncio.Future[bytes]) -> None:
        self._answered = answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(REQUEST)

    def data_received(self, data: bytes) -> None:
        if not self._answered.done():
            self._answered.set_result(data)
        self._transport.abort()


async def by_protocol(address: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(SETTINGS.timeout_s):
        answered: asyncio.Future[bytes] = loop.create_future()
        await loop.create_connection(lambda: _Get(answered), address, port)
        await answered


async def rival(fetch: Fetch, port: int) -> Cost:
    """One task per target, each at its own phase."""
    count = 0
    end = time.monotonic() + SECONDS

    async def course(address: str, phase_s: float) -> None:
        nonlocal count
        await asyncio.sleep(phase_s)
        due = time.monotonic()
        while due < end:
            with contextlib.suppress(OSError, aiohttp.ClientError):  # a busy machine
                await fetch(address, port)
            count += 1
            due += SETTINGS.interval_s
            await asyncio.sleep(due - time.monotonic())

    meter = _Meter()
    meter.start()
    async with asyncio.TaskGroup() as group:
        for number, address in enumerate(ADDRESSES):
            group.create_task(course(address, number / TARGETS * SETTINGS.interval_s))
    return meter.stop(count)


async def rival_aiohttp(port: int) -> Cost:
    connector = aiohttp.TCPConnector(force_close=True, limit=SETTINGS.concurrency)
    timeout = aiohttp.ClientTimeout(total=SETTINGS.timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        return await rival(lambda address, port: by_aiohttp(session, address, port), port)


# -- the other end


def _listen() -> socket.socket:
    listener = socket.create_server(("0.0.0.0", 0), backlog=4096)
    listener.setblocking(False)
    return listener


def serve() -> None:
    """Answer until stdin is closed. Prints the three ports first."""
    prompt, scattered, hanging = (_listen() for _ in range(3))
    print(*(s.getsockname()[1] for s in (prompt, scattered, hanging)), flush=True)
    poller = select.epoll()
    for fd in (prompt.fileno(), scattered.fileno(), sys.stdin.fileno()):
        poller.register(fd, select.EPOLLIN)
    peers: dict[int, tuple[socket.socket, bool]] = {}
    waiting: list[tuple[float, int, socket.socket]] = []
    order = itertools.count()
    while True:
        for fd, _ in poller.poll(0.001 if waiting else -1):
            if fd == sys.stdin.fileno():
                return
            if fd in (prompt.fileno(), scattered.fileno()):
                _accept(prompt if fd == prompt.fileno() else scattered, poller, peers, fd == scattered.fileno())
                continue
            peer, late = peers[fd]
            if not _received(peer):
                peer.close()
                del peers[fd]
            elif late:
                heapq.heappush(waiting, (time.monotonic() + random.uniform(0, 0.02), next(order), peer))
            else:
                _answer(peer)
        while waiting and waiting[0][0] <= time.monotonic():
            _answer(heapq.heappop(waiting)[2])


def _accept(
    listener: socket.socket, poller: select.epoll, peers: dict[int, tuple[socket.socket, bool]], late: bool
) -> None:
    while True:
        try:
            peer, _ = listener.accept()
        except BlockingIOError:
            return
        peer.setblocking(False)
        peers[peer.fileno()] = peer, late
        poller.register(peer.fileno(), select.EPOLLIN)


def _received(peer: socket.socket) -> bytes:
    try:
        return peer.recv(4096)
    except OSError:
        return b""


def _answer(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        peer.send(ANSWER)


# -- all


def main() -> None:
    """Print the section."""
    log.configure(level="error")
    with _server() as (_, ports), _server() as (other, other_ports):
        print(section(ports, other, other_ports))


@contextlib.contextmanager
def _server() -> Iterator[tuple[int, Ports]]:
    server = subprocess.Popen(
        [sys.executable, "-m", "bench.probe", "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin
    assert server.stdout
    try:
        prompt, scattered, hanging = map(int, server.stdout.readline().split())
        yield server.pid, Ports(prompt=prompt, scattered=scattered, hanging=hanging)
    finally:
        server.stdin.close()
        server.wait(timeout=5)


def section(ports: Ports, other: int, other_ports: Ports) -> str:
    """Run everything, one after the other."""

    def targets(kind: str, port: int, addresses: list[str] = ADDRESSES) -> frozenset[ProbeTarget]:
        return frozenset(ProbeTarget(address, kind, port) for address in addresses)

    half = TARGETS // 2
    cases = {
        "HTTP, answered at once": targets("local", ports.prompt),
        "HTTP, answered after 0 to 20 ms": targets("local", ports.scattered),
        "TCP": targets("tcp", ports.prompt),
        "HTTP, half of the nodes hang": targets("local", ports.prompt, ADDRESSES[:half])
        | targets("local", ports.hanging, ADDRESSES[half:]),
        "HTTP, all nodes hang": targets("local", ports.hanging),
    }
    lines = [
        f"{TARGETS:,} targets every {SETTINGS.interval_s:g} s, timeout {SETTINGS.timeout_s:g} s, {SECONDS:g} s each;"
        f" Python {platform.python_version()}, Linux {platform.release()}, {_processor()}.",
        "",
        "| lbagent's prober | probes/s | user us | system us | us per probe | of one core | at 2,000/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, wanted in cases.items():
        lines.append(asyncio.run(ours(wanted)).row(title))
    lines += [
        "",
        "| the same HTTP requests by | probes/s | user us | system us | us per probe | of one core | at 2,000/s |",
        "|---|---|---|---|---|---|---|",
        asyncio.run(rival(by_protocol, ports.prompt)).row("asyncio.Protocol"),
        asyncio.run(rival(by_streams, ports.prompt)).row("asyncio streams"),
        asyncio.run(rival_aiohttp(ports.prompt)).row("aiohttp"),
    ]
    few = TARGETS // 10
    lines += [
        "",
        "| nodes that fall silent | concurrency | down, median | worst | up again, median | worst |",
        "|---|---|---|---|---|---|",
    ]
    wide = SETTINGS.model_copy(update={"concurrency": 1024})
    for number, settings in ((1, SETTINGS), (few, SETTINGS), (TARGETS, SETTINGS), (TARGETS, wide)):
        others = targets("local", ports.prompt, ADDRESSES[number:])
        victims = targets("local", other_ports.prompt, ADDRESSES[:number])
        lines.append(asyncio.run(outage(others, victims, other, settings)))
    return "\n".join(lines)


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.machine()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
