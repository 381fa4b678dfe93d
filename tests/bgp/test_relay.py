# SPDX-License-Identifier: Apache-2.0
"""The relay as ExaBGP starts it, with a scripted ExaBGP at its pipes and a client at its socket."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from lbagent.bgp import relay

LIMIT_S = 10.0
UP = '{ "exabgp": "5.0.0", "type": "state", "neighbor": { "address": { "peer": "10.0.1.2" }, "state": "up" } }'
DOWN = UP.replace('"up"', '"down", "reason": "x"')
AGREED = '{ "exabgp": "5.0.0", "type": "negotiated", "neighbor": { "address": { "peer": "10.0.1.2" }, "negotiated": '
AGREED += '{ "families": ["ipv4 unicast"], "hold_time": 9 } } }'
ANNOUNCE = "neighbor 10.0.1.2 announce attributes next-hop 10.0.1.1 nlri 192.0.2.1/32"
FLUSH = "neighbor 10.0.1.2 flush adj-rib out"
TABLE = '[{"peer": {"address": "10.0.1.2"}, "state": "up", "duration": 3}]'


def sent(prefix: str, *, med: int | None = None, withdrawn: bool = False) -> str:
    update: dict[str, Any] = {"withdraw": {"ipv4 unicast": [{"nlri": prefix}]}}
    if not withdrawn:
        update = {"attribute": {"med": med}, "announce": {"ipv4 unicast": {"10.0.1.1": [{"nlri": prefix}]}}}
    neighbor = {"address": {"peer": "10.0.1.2"}, "direction": "send", "message": {"update": update}}
    return json.dumps({"exabgp": "5.0.0", "type": "update", "neighbor": neighbor}).replace('{"', '{ "', 1)


class ScriptedExabgp:
    """The parent of a real relay. Nothing is answered unless the test says so."""

    def __init__(self, socket_path: Path, *options: str) -> None:
        self.socket_path = socket_path
        argv = [sys.executable, "-I", relay.__file__, "--socket", str(socket_path), *options]
        self.child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._unread = b""

    def say(self, *lines: str) -> None:
        assert self.child.stdin
        self.child.stdin.write("".join(line + "\n" for line in lines).encode())
        self.child.stdin.flush()

    def heard(self) -> str:
        """The next line of the relay."""
        assert self.child.stdout
        deadline = time.monotonic() + LIMIT_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the relay says nothing"
            self._unread += os.read(self.child.stdout.fileno(), 65536)
        line, self._unread = self._unread.split(b"\n", 1)
        return line.decode()

    def is_silent(self) -> bool:
        """Nothing within a moment in which it would have spoken."""
        assert self.child.stdout
        return not self._unread and not select.select([self.child.stdout], [], [], 0.3)[0]

    def beat(self) -> None:
        """Answer the heartbeat that opens every conversation."""
        assert self.heard() == relay.HEARTBEAT
        self.say(TABLE, "done")

    def worker(self) -> int:
        text = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text()
        return int(text.split()[0])

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.child.communicate(timeout=LIMIT_S)


class Client:
    """A client of the relay's socket."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + LIMIT_S
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                self.socket.close()
                assert time.monotonic() < deadline, "no socket"
                time.sleep(0.02)
        self.socket.settimeout(LIMIT_S)
        self.file = self.socket.makefile("rw")

    def ask(self, **message: object) -> None:
        self.file.write(json.dumps(message) + "\n")
        self.file.flush()

    def until(self, key: str) -> list[dict[str, Any]]:
        """Messages up to the first that has ``key``."""
        messages: list[dict[str, Any]] = []
        while not messages or key not in messages[-1]:
            line = self.file.readline()
            assert line, f"closed while waiting for {key}"
            messages.append(json.loads(line))
        return messages

    def control(self) -> Self:
        self.ask(control=True)
        assert self.until("control")[-1] == {"control": True}
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.socket.close()


Start = Callable[..., ScriptedExabgp]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[ScriptedExabgp] = []

    def start(*options: str) -> ScriptedExabgp:
        running.append(ScriptedExabgp(tmp_path / "bgp.sock", "--heartbeat-s", "60", *options))
        return running[-1]

    yield start
    for exabgp in running:
        exabgp.stop()


def test_commands_go_through_and_answers_come_back_with_their_number(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    with Client(exabgp.socket_path).control() as client:
        client.ask(id=7, command=ANNOUNCE)
        assert exabgp.heard() == ANNOUNCE
        exabgp.say("done")
        assert client.until("id")[-1] == {"id": 7, "result": "done", "lines": []}
        client.ask(id="x", command="show adj-rib out 10.0.1.2 extensive")
        exabgp.heard()
        exabgp.say("neighbor 10.0.1.2 a", UP, "neighbor 10.0.1.2 b", "done")
        assert client.until("id")[-1] == {
            "id": "x",
            "result": "done",
            "lines": ["neighbor 10.0.1.2 a", "neighbor 10.0.1.2 b"],
        }


def test_never_more_than_the_window_is_unanswered(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    with Client(exabgp.socket_path).control() as client:
        for number in range(5):
            client.ask(id=number, command=ANNOUNCE)
        assert [exabgp.heard() for _ in range(relay.WINDOW)] == [ANNOUNCE] * relay.WINDOW
        assert exabgp.is_silent()
        exabgp.say("error")
        assert client.until("id")[-1]["result"] == "error"
        assert exabgp.heard() == ANNOUNCE
        assert exabgp.is_silent()


def test_what_may_be_answered_out_of_turn_is_asked_alone(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    with Client(exabgp.socket_path).control() as client:
        client.ask(id=1, command=ANNOUNCE)
        client.ask(id=2, command=FLUSH)
        client.ask(id=3, command=ANNOUNCE)
        assert exabgp.heard() == ANNOUNCE
        assert exabgp.is_silent()
        exabgp.say("done")
        assert exabgp.heard() == FLUSH
        assert exabgp.is_silent()
        exabgp.say("error")
        assert [client.until("id")[-1]["result"] for _ in range(2)] == ["done", "error"]
        assert exabgp.heard() == ANNOUNCE


@pytest.mark.parametrize("wrong", ["neighbor 10.0.1.2 a", "[]"])
def test_a_reply_that_fits_no_question_means_pairing_again(start: Start, wrong: str) -> None:
    exabgp = start()
    exabgp.beat()
    with Client(exabgp.socket_path).control() as client:
        client.ask(id=1, command=ANNOUNCE)
        exabgp.heard()
        exabgp.say(wrong)
        assert client.until("id")[-1] == {"id": 1, "result": "lost", "lines": []}
        client.ask(id=2, command=ANNOUNCE)
        assert exabgp.heard() == relay.HEARTBEAT
        exabgp.say("done", "error", "done")  # answers to questions that nobody remembers
        assert exabgp.is_silent()
        exabgp.say(TABLE, "done")
        assert exabgp.heard() == ANNOUNCE
        exabgp.say("done")
        assert client.until("id")[-1] == {"id": 2, "result": "done", "lines": []}


def test_a_new_worker_does_not_take_the_answers_of_the_old_one_for_its_own(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    with Client(exabgp.socket_path).control() as client:
        client.ask(id=1, command=ANNOUNCE)
        exabgp.heard()
        os.kill(exabgp.worker(), signal.SIGKILL)
        with pytest.raises(AssertionError, match="closed"):
            client.until("id")
    assert exabgp.heard() == relay.HEARTBEAT
    with Client(exabgp.socket_path).control() as client:
        client.ask(id=2, command=ANNOUNCE)
        exabgp.say("error")  # the old worker's
        assert exabgp.is_silent()
        exabgp.say(TABLE, "done")
        assert exabgp.heard() == ANNOUNCE
        exabgp.say("done")
        assert client.until("id")[-1] == {"id": 2, "result": "done", "lines": []}


def test_a_client_that_comes_late_is_told_what_is_on_the_wire(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    exabgp.say(AGREED, UP, sent("192.0.2.1/32"), sent("192.0.2.2/32"), sent("192.0.2.3/32", med=5))
    exabgp.say(sent("192.0.2.1/32", med=5), sent("192.0.2.2/32", withdrawn=True))
    with Client(exabgp.socket_path) as first:
        first.until("replayed")
        exabgp.say(sent("192.0.2.4/32"))
        first.until("event")
    with Client(exabgp.socket_path) as client:
        hello, table, *events, replayed = client.until("replayed")
    assert hello["hello"]["epoch"].startswith(f"{os.getpid()}-")
    assert table == {"sessions": json.loads(TABLE)}
    assert replayed == {"replayed": ["10.0.1.2"]}
    kinds = [event["event"]["type"] for event in events]
    assert kinds == ["negotiated", "state", "update", "update"]
    wire = {
        entry["nlri"]: update["attribute"]["med"]
        for update in (event["event"]["neighbor"]["message"]["update"] for event in events[2:])
        for entry in update["announce"]["ipv4 unicast"]["10.0.1.1"]
    }
    assert wire == {"192.0.2.1/32": 5, "192.0.2.3/32": 5, "192.0.2.4/32": None}


def test_a_session_that_went_down_holds_nothing(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    exabgp.say(AGREED, UP, sent("192.0.2.1/32"), DOWN)
    with Client(exabgp.socket_path) as first:
        first.until("replayed")
        exabgp.say(sent("192.0.2.9/32"))
        first.until("event")
    with Client(exabgp.socket_path) as client:
        kinds = [message["event"]["type"] for message in client.until("replayed") if "event" in message]
    assert kinds == ["negotiated", "state"]


def test_a_session_from_before_the_worker_was_born_is_not_told_about(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    exabgp.say(AGREED, UP)
    os.kill(exabgp.worker(), signal.SIGKILL)
    exabgp.beat()
    exabgp.say(sent("192.0.2.1/32"))
    with Client(exabgp.socket_path) as client:
        assert client.until("replayed")[-1] == {"replayed": []}


def test_the_newest_controller_wins(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    with Client(exabgp.socket_path).control() as old, Client(exabgp.socket_path).control() as new:
        assert old.until("control")[-1] == {"control": False}
        old.ask(id=1, command=ANNOUNCE)
        assert old.until("id")[-1]["lines"] == ["not the controller"]
        new.ask(id=2, command=ANNOUNCE)
        assert exabgp.heard() == ANNOUNCE


def test_a_controller_that_leaves_takes_its_waiting_commands_along(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    with Client(exabgp.socket_path).control() as client:
        for number in range(5):
            client.ask(id=number, command=ANNOUNCE)
        exabgp.heard()
        exabgp.heard()
    with Client(exabgp.socket_path).control() as client:
        client.ask(id=9, command=FLUSH)
        exabgp.say("done", "done")
        assert exabgp.heard() == FLUSH


def test_an_exabgp_that_reads_nothing_costs_commands_but_no_memory(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    with Client(exabgp.socket_path).control() as client:
        for number in range(relay.QUEUE_LIMIT + 10):
            client.ask(id=number, command=ANNOUNCE)
        refused = [client.until("id")[-1] for _ in range(8)]
    assert {answer["lines"][0] for answer in refused} == {"too many commands are waiting"}


def test_a_flood_of_events_is_read_while_a_client_does_not_read(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    with Client(exabgp.socket_path):
        exabgp.say(AGREED, UP, *(sent(f"10.{n // 250}.{n % 250}.1/32") for n in range(20000)))
        with Client(exabgp.socket_path) as late:
            last = late.until("replayed")
    assert last[-1] == {"replayed": ["10.0.1.2"]}


def test_without_an_agent_for_its_grace_everything_is_withdrawn_once(start: Start) -> None:
    exabgp = start("--agent-grace-s", "0.5")
    exabgp.beat()
    with Client(exabgp.socket_path).control():
        time.sleep(1.2)
        assert exabgp.is_silent()
    assert exabgp.heard() == relay.WITHDRAW_ALL
    exabgp.say("done")
    time.sleep(1.2)
    assert exabgp.is_silent()


def test_a_session_nobody_ended_gets_its_end_of_rib(start: Start) -> None:
    exabgp = start("--eor-s", "0.5")
    exabgp.beat()
    exabgp.say(AGREED, UP)
    assert exabgp.heard() == "neighbor 10.0.1.2 announce eor ipv4 unicast"


def test_the_relay_ends_when_exabgp_is_gone(start: Start) -> None:
    exabgp = start()
    exabgp.beat()
    worker = exabgp.worker()
    exabgp.stop()
    assert exabgp.child.returncode == 0
    assert not Path(f"/proc/{worker}").exists()


def test_a_socket_left_behind_is_replaced(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "bgp.sock"))
    exabgp = start()
    exabgp.beat()
    with Client(exabgp.socket_path) as client:
        assert "hello" in client.until("replayed")[0]
    assert (tmp_path / "bgp.sock").stat().st_mode & 0o777 == 0o660


def test_a_folder_that_is_missing_or_cleaned_costs_clients_only(tmp_path: Path) -> None:
    exabgp = ScriptedExabgp(tmp_path / "run/bgp.sock")
    try:
        exabgp.beat()
        exabgp.say(*(sent(f"10.{n // 250}.{n % 250}.1/32") for n in range(5000)))  # more than a pipe holds
        (tmp_path / "run").mkdir()
        Client(exabgp.socket_path).socket.close()
        exabgp.socket_path.unlink()
        with Client(exabgp.socket_path) as client:
            assert "hello" in client.until("replayed")[0]
    finally:
        exabgp.stop()


@pytest.mark.parametrize(
    "line",
    [
        "shutdown",
        "version",
        "neighbor 10.0.1.2 teardown 2",
        "withdraw route 192.0.2.1/32",
        "neighbor * withdraw route 192.0.2.1/32",
        "neighbor 10.0.1.2, neighbor 10.0.1.3 withdraw route 192.0.2.1/32",
        "show neighbor summary",
        "# comment",
        "",
        ANNOUNCE + "\nshutdown",
        ANNOUNCE + "; shutdown",
        ANNOUNCE + " \u00e9",
        ANNOUNCE + " 192.0.2.2/32" * 400,
    ],
)
def test_only_queued_commands_of_one_line_for_one_neighbor_are_let_through(line: str) -> None:
    assert not relay.ALLOWED.fullmatch(line) or len(line) >= relay.LINE_LIMIT
