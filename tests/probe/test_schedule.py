# SPDX-License-Identifier: Apache-2.0
"""The clock stands still until a test moves it; the sockets are real.

No server needs to run: a TCP target that listens is up though nobody accepts, an HTTP target that
listens hangs, and a port where nobody listens refuses.
"""

import asyncio
import errno
import os
import random
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
from structlog.testing import capture_logs

from lbagent.config import Probe
from lbagent.model.state import ProbeTarget, Pulse
from lbagent.probe import schedule
from lbagent.probe.schedule import BATCH_S, LATE_S, Prober

PATIENCE_S = 5.0
INTERVAL_S = 0.5
TIMEOUT_S = 0.4
LOOPBACK = [f"127.0.{i // 250}.{i % 250 + 1}" for i in range(1000)]


class Room:
    """A Prober with a clock of its own, and what it said."""

    def __init__(self, settings: Probe, *, phases: tuple[float, ...]) -> None:
        self.now = 1000.0
        self.changes = 0
        self.probes: list[tuple[str, str, float]] = []
        self.prober = Prober(
            settings, clock=lambda: self.now, source=cycle(phases).__next__, changed=self._changed, probed=self._probed
        )

    def _changed(self) -> None:
        self.changes += 1

    def _probed(self, kind: str, *, outcome: str, took_s: float) -> None:
        self.probes.append((kind, outcome, took_s))

    @property
    def outcomes(self) -> list[str]:
        return [outcome for _, outcome, _ in self.probes]

    def settle(self, until: Callable[[], bool]) -> None:
        """Turn without moving the clock, until the sockets have told what ``until`` waits for."""
        patience = time.monotonic() + PATIENCE_S
        while True:
            self.prober.turn()
            if until():
                return
            assert time.monotonic() < patience, (dict(self.prober.pulses), self.probes)
            select.select([], [], [], 0.001)

    def quiet(self) -> None:
        """Settle until nothing is under way."""
        self.settle(lambda: self.prober.under_way == 0)

    def rounds(self, number: int) -> None:
        """So many intervals, one attempt each at every target; all of them end."""
        for _ in range(number):
            self.quiet()
            self.now += INTERVAL_S


@pytest.fixture
def make() -> Iterator[Callable[..., Room]]:
    rooms: list[Room] = []

    def make(*, phases: tuple[float, ...] = (0.0,), **fields: object) -> Room:
        settings = Probe.model_validate({"interval_s": INTERVAL_S, "timeout_s": TIMEOUT_S, **fields})
        rooms.append(Room(settings, phases=phases))
        return rooms[-1]

    yield make
    for room in rooms:
        room.prober.close()


@pytest.fixture
def room(make: Callable[..., Room]) -> Room:
    return make()


def listen() -> socket.socket:
    """On every address of loopback, and on no other."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    listener.bind(("0.0.0.0", 0))
    listener.listen(4096)
    return listener


@pytest.fixture
def port() -> Iterator[int]:
    """Somebody listens there, and nobody ever accepts."""
    with listen() as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with listen() as listener:
        return int(listener.getsockname()[1])


def targets(kind: str, port: int, number: int = 1) -> frozenset[ProbeTarget]:
    return frozenset(ProbeTarget(address, kind, port) for address in LOOPBACK[:number])


def target(kind: str, port: int) -> ProbeTarget:
    return ProbeTarget(LOOPBACK[0], kind, port)


# -- when


def test_each_target_has_its_phase_and_is_probed_once_per_interval(make: Callable[..., Room], port: int) -> None:
    room = make(phases=(0.0, 0.25, 0.75, 0.75))
    room.prober.want(targets("tcp", port, 4))
    ended = []
    for _ in range(12):
        before = len(room.probes)
        room.quiet()
        ended.append(len(room.probes) - before)
        room.now += INTERVAL_S / 4
    assert ended == [1, 1, 0, 2] * 3


def test_a_late_turn_neither_makes_up_for_what_it_missed_nor_loses_the_phase(room: Room, port: int) -> None:
    room.prober.want(targets("tcp", port))
    room.quiet()
    room.now += 7.3 * INTERVAL_S  # due at 1 ... 7
    room.quiet()
    assert len(room.probes) == 2
    assert room.prober.turn() == pytest.approx(0.7 * INTERVAL_S)


def test_to_want_a_target_again_changes_neither_its_phase_nor_its_pulse(
    room: Room, port: int, closed_port: int
) -> None:
    room.prober.want(targets("tcp", port))
    room.quiet()
    pulse = room.prober.pulses[target("tcp", port)]
    room.now += INTERVAL_S / 2
    room.prober.want(targets("tcp", port) | targets("tcp", closed_port))
    room.quiet()
    assert room.outcomes == ["up", "down"]  # the new one only
    assert room.prober.pulses[target("tcp", port)] is pulse


def test_with_too_many_targets_rounds_become_longer_and_the_rate_stays(
    make: Callable[..., Room], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "MAX_RATE", 40.0)
    room = make(phases=tuple((i + 0.5) / 80 for i in range(80)))
    with capture_logs() as lines:
        room.prober.want(targets("tcp", port, 80))
    assert [(line["event"], line["targets"], line["period_s"]) for line in lines] == [("probing slowed down", 80, 2.0)]
    assert room.prober.period_s == 2.0
    for _ in range(40):
        room.now += 0.1
        room.quiet()
    assert len(room.probes) == 2 * 80


def test_the_prober_sleeps_until_something_is_due(make: Callable[..., Room], port: int) -> None:
    room = make(phases=(0.5,))
    assert room.prober.turn() is None
    room.prober.want(targets("local", port))
    assert room.prober.turn() == pytest.approx(0.5 * INTERVAL_S)
    room.now += 0.5 * INTERVAL_S
    assert room.prober.turn() == pytest.approx(TIMEOUT_S)


def test_probes_that_fall_due_within_a_few_milliseconds_begin_together(make: Callable[..., Room], port: int) -> None:
    room = make(phases=(0.0, BATCH_S / 4 / INTERVAL_S, BATCH_S / 2 / INTERVAL_S))
    room.prober.want(targets("local", port, 3))
    room.prober.turn()
    assert room.prober.under_way == 1
    room.now += 0.75 * BATCH_S
    assert room.prober.turn() == pytest.approx(0.25 * BATCH_S)
    assert room.prober.under_way == 1
    room.now += 0.25 * BATCH_S
    room.prober.turn()
    assert room.prober.under_way == 3


# -- how many at once


def test_a_target_that_hangs_is_down_when_its_time_is_up_and_not_before(room: Room, port: int) -> None:
    room.prober.want(targets("local", port))
    room.prober.turn()
    room.now += TIMEOUT_S - 0.001
    room.prober.turn()
    assert room.probes == []
    room.now += 0.001
    room.prober.turn()
    [(kind, outcome, took_s)] = room.probes
    assert (kind, outcome) == ("local", "down")
    assert took_s == pytest.approx(TIMEOUT_S)
    assert room.prober.under_way == 0
    assert "within 0.4 s" in room.prober.pulses[target("local", port)].detail


def test_no_more_are_under_way_than_configured_and_all_get_their_turn(make: Callable[..., Room], port: int) -> None:
    room = make(concurrency=8)
    room.prober.want(targets("local", port, 50))
    most = 0
    for _ in range(1000):
        room.prober.turn()
        most = max(most, room.prober.under_way)
        room.now += 0.01
    assert most == 8
    assert room.prober.under_way == 7  # known to be slow: all but one place
    assert len(room.prober.pulses) == 50


def test_targets_that_hang_do_not_delay_those_that_answer(make: Callable[..., Room], port: int) -> None:
    """Forty hang, and would need 32 places to be probed in time; there are eight."""
    room = make(concurrency=8, phases=tuple(random.random() for _ in range(44)))
    room.prober.want(targets("local", port, 40) | targets("tcp", port, 4))

    def answered() -> bool:
        return all(attempt.question.request for attempt in room.prober._attempt_by_fd.values())

    def run(*, for_s: float) -> None:
        for _ in range(round(for_s / 0.01)):
            room.settle(answered)
            room.now += 0.01

    run(for_s=4.0)
    assert len(room.prober.pulses) == 44
    room.probes.clear()
    run(for_s=10.0)
    assert Counter(room.outcomes)["up"] == 4 * 10.0 / INTERVAL_S
    assert {p.up for t, p in room.prober.pulses.items() if t.kind == "local"} == {False}


# -- what is believed


def test_a_target_goes_down_after_fall_failures_and_up_after_rise_successes(room: Room) -> None:
    listener = listen()
    it = target("tcp", listener.getsockname()[1])
    room.prober.want(frozenset({it}))
    room.rounds(2)
    assert room.prober.pulses[it] == Pulse(up=True, since=1000.0, detail="up")
    assert room.changes == 1
    listener.close()
    room.rounds(2)
    assert room.prober.pulses[it].up
    assert room.changes == 1
    room.rounds(1)
    assert room.prober.pulses[it] == Pulse(up=False, since=1000.0 + 4 * INTERVAL_S, detail="connection refused")
    assert room.changes == 2
    with socket.create_server(("127.0.0.1", it.port)):
        room.rounds(2)
    assert room.prober.pulses[it].up
    assert room.changes == 3


def test_each_change_is_one_line_and_a_steady_target_is_none(room: Room, closed_port: int) -> None:
    with capture_logs() as lines:
        room.prober.want(targets("tcp", closed_port))
        room.rounds(10)
    assert [(line["event"], line["log_level"], line["target"], line["answer"]) for line in lines] == [
        ("pulse changed", "warning", f"tcp 127.0.0.1:{closed_port}", "down")
    ]


def test_kube_proxy_that_refuses_has_no_opinion(room: Room, closed_port: int) -> None:
    room.prober.want(targets("proxy", closed_port))
    room.quiet()
    pulse = room.prober.pulses[target("proxy", closed_port)]
    assert (pulse.up, pulse.closing, pulse.offered) == (False, False, False)


def test_both_families_of_a_node_are_probed_apart(room: Room, port: int) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        port6 = listener.getsockname()[1]
        room.prober.want(frozenset({ProbeTarget("::1", "tcp", port6), ProbeTarget("127.0.0.1", "tcp", port6)}))
        room.quiet()
    up = {t.address: pulse.up for t, pulse in room.prober.pulses.items()}
    assert up == {"::1": True, "127.0.0.1": False}


def test_a_target_that_is_no_longer_wanted_has_no_pulse_and_is_left_alone(room: Room, port: int) -> None:
    room.prober.want(targets("tcp", port, 2))
    room.rounds(1)
    room.prober.want(targets("tcp", port, 1))
    assert room.prober.pulses.keys() == targets("tcp", port, 1)
    room.rounds(3)
    assert len(room.probes) == 2 + 3


def test_an_attempt_that_ends_after_its_target_went_is_counted_and_forgotten(room: Room, port: int) -> None:
    room.prober.want(targets("local", port))
    room.prober.turn()
    room.prober.want(frozenset())
    room.now += TIMEOUT_S
    room.prober.turn()
    assert room.outcomes == ["down"]
    assert room.prober.pulses == {}
    assert room.changes == 0


def test_a_target_that_comes_back_starts_afresh_and_is_not_probed_twice(
    room: Room, port: int, closed_port: int
) -> None:
    room.prober.want(targets("tcp", closed_port))
    room.rounds(1)
    room.prober.want(frozenset())
    room.prober.want(targets("tcp", closed_port))
    assert room.prober.pulses == {}
    room.rounds(1)
    assert room.prober.pulses[target("tcp", closed_port)].since == 1000.0 + INTERVAL_S
    room.probes.clear()
    room.rounds(4)
    assert len(room.probes) == 4


# -- what cannot be done


def test_a_target_that_cannot_be_probed_is_named_once_and_stops_no_other(room: Room, port: int) -> None:
    bad = ProbeTarget("node1.example", "tcp", 80)
    with capture_logs() as lines:
        room.prober.want(targets("tcp", port) | {bad})
        room.prober.want(targets("tcp", port, 2) | {bad})
    assert [line["event"] for line in lines] == ["target not probed"]
    room.quiet()
    assert room.prober.pulses[bad] == Pulse(
        up=False, since=1000.0, offered=False, detail="'node1.example' is not an IP address"
    )
    assert room.prober.pulses[target("tcp", port)].up


def test_while_this_host_cannot_probe_nobody_goes_down_and_it_is_said_once(
    room: Room, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    room.prober.want(targets("tcp", port, 3))
    room.rounds(1)
    with capture_logs() as lines:
        with monkeypatch.context() as patched:
            patched.setattr(socket, "socket", refuse)
            room.rounds(10)
        assert Counter(room.outcomes) == {"up": 3, "untried": 30}
        room.rounds(2)
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("probing hindered", "error"),
        ("probing hindered no more", "info"),
    ]
    assert all(pulse.up and pulse.since == 1000.0 for pulse in room.prober.pulses.values())
    assert room.changes == 3


def test_a_hindrance_that_went_with_its_target_is_said_again_when_it_comes_back(
    room: Room, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socket", refuse)
    with capture_logs() as lines:
        for _ in range(2):
            room.prober.want(targets("tcp", port))
            room.rounds(2)
            room.prober.want(frozenset())
    assert [line["event"] for line in lines] == ["probing hindered"] * 2


def test_what_an_agent_that_was_busy_missed_is_not_held_against_the_nodes(room: Room, port: int) -> None:
    room.prober.want(targets("local", port))
    room.prober.turn()
    room.now += TIMEOUT_S + LATE_S + 0.001  # nobody looked in the meantime
    with capture_logs() as lines:
        room.prober.turn()
    assert room.outcomes == ["untried"]
    assert room.prober.pulses == {}
    assert [(line["event"], line["why"]) for line in lines] == [
        ("probing hindered", "this host was too busy to listen")
    ]


def test_an_answer_that_came_while_the_agent_was_busy_counts_before_the_clock_does(room: Room, port: int) -> None:
    room.prober.want(targets("tcp", port))
    room.prober.turn()
    [fd] = room.prober._attempt_by_fd
    assert select.select([], [fd], [], PATIENCE_S)[1]
    room.now += 10.0
    room.prober.turn()
    assert room.outcomes == ["up"]


def test_a_full_epoll_is_a_hindrance_and_leaves_no_socket_open(room: Room, port: int) -> None:
    class Full:
        def register(self, fd: int, events: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def poll(self, timeout: float) -> list[tuple[int, int]]:
            return []

    poller, room.prober._poller = room.prober._poller, Full()  # type: ignore[assignment]
    room.prober.want(targets("tcp", port))
    before = len(os.listdir("/proc/self/fd"))
    room.rounds(3)
    assert room.outcomes == ["untried"] * 3
    assert len(os.listdir("/proc/self/fd")) == before
    room.prober._poller = poller


def test_a_prober_that_is_switched_off_probes_nobody_until_it_is_switched_on(
    make: Callable[..., Room], port: int
) -> None:
    room = make(enabled=False)
    room.prober.want(targets("tcp", port))
    room.rounds(2)
    assert room.probes == []
    room.prober.configure(Probe(enabled=True))
    room.rounds(1)
    assert room.prober.pulses[target("tcp", port)].up
    room.prober.configure(Probe(enabled=False))
    assert room.prober.pulses == {}


def test_new_settings_count_from_the_next_probe_on(room: Room, closed_port: int) -> None:
    with listen() as listener:
        it = target("tcp", listener.getsockname()[1])
        room.prober.want(frozenset({it}))
        room.rounds(1)
    room.prober.configure(Probe(interval_s=INTERVAL_S, timeout_s=TIMEOUT_S, fall=1))
    room.rounds(1)
    assert not room.prober.pulses[it].up


# -- in the agent


class Node:
    """An HTTP server that answers what it is told; ``answer`` None: never."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            if self.answer is not None:
                writer.write(self.answer)
            await reader.read()
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.001)


def real(changed: Callable[[], None] = lambda: None) -> Prober:
    """On the real clock, ten times as fast as by default."""
    return Prober(
        Probe(interval_s=0.05, timeout_s=0.04),
        clock=time.monotonic,
        source=random.random,
        changed=changed,
        probed=lambda kind, *, outcome, took_s: None,
    )


async def test_good_silent_and_odd_nodes_are_probed_side_by_side_for_ever(closed_port: int) -> None:
    nodes = {
        "good": Node(b"HTTP/1.1 200 OK\r\nX-Load-Balancing-Endpoint-Weight: 2\r\n\r\n"),
        "closing": Node(b'HTTP/1.1 503 No\r\n\r\n{"localEndpoints":0}'),
        "redirect": Node(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n"),
        "garbage": Node(b"\x16\x03\x01\x02\x00" * 10),
        "huge": Node(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000_000),
        "silent": Node(None),
    }
    servers = {name: await asyncio.start_server(node, "127.0.0.1", 0) for name, node in nodes.items()}
    target_by_name = {name: target("local", s.sockets[0].getsockname()[1]) for name, s in servers.items()}
    target_by_name["refusing"] = target("local", closed_port)
    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    prober = real(changed)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(prober.run())
        await asyncio.sleep(0)
        prober.want(frozenset(target_by_name.values()))  # wakes it
        await until(lambda: len(prober.pulses) == len(target_by_name))

        pulses = {name: prober.pulses[it] for name, it in target_by_name.items()}
        assert {name for name, pulse in pulses.items() if pulse.up} == {"good", "huge"}
        assert {name for name, pulse in pulses.items() if pulse.closing} == {
            "closing", "redirect", "garbage", "refusing",
        }  # fmt: skip
        assert pulses["good"].weight == 2
        assert changes == len(target_by_name)

        nodes["good"].answer = b"HTTP/1.1 200 OK\r\nX-Load-Balancing-Endpoint-Weight: 5\r\n\r\n"
        await until(lambda: prober.pulses[target_by_name["good"]].weight == 5)
        nodes["good"].answer = None
        await until(lambda: not prober.pulses[target_by_name["good"]].up)
        assert changes == len(target_by_name) + 2
        running.cancel()
    for server in servers.values():
        server.close()


async def test_a_cancelled_prober_leaves_no_socket_and_no_task(port: int) -> None:
    tasks = asyncio.all_tasks()
    fds = len(os.listdir("/proc/self/fd"))
    prober = real()
    prober.want(targets("local", port, 100))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(prober.run())
        await until(lambda: prober.under_way > 20)
        assert asyncio.all_tasks() == tasks | {running}
        running.cancel()
    assert asyncio.all_tasks() == tasks
    assert len(os.listdir("/proc/self/fd")) == fds


async def test_a_bug_in_what_it_calls_ends_the_prober_and_is_not_hidden(port: int) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    prober = real(broken)
    prober.want(targets("tcp", port))
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(PATIENCE_S):
            await prober.run()
