#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The small process ExaBGP starts: joins ExaBGP's pipes to a UNIX socket for the agent.

ExaBGP writes to its child with blocking writes and gives up for good when the child dies six times
within a minute. So this file is stdlib only, always reads, never blocks, and runs as two
processes: the *keeper*, which ExaBGP started, only waits and forks the *worker* again should it die.

Towards ExaBGP: lines of an allow-list, at most WINDOW of them unanswered, because ExaBGP answers
without naming the question: order is all there is. A reply of the wrong shape means that the order
is lost; the worker then fails what is unanswered, asks for the session table and pairs from there.

Towards clients: one JSON object a line. The relay sends, on connect,

    {"hello": {...}}  {"sessions": [...]}  {"event": {...}} ...  {"replayed": ["10.0.1.2", ...]}

The events replayed are the shortest that tell what is on the wire now; ``replayed`` names the peers
whose session the relay has followed since it came up. Later: every event as ExaBGP tells it, the
session table every ``heartbeat_s``, and ``{"control": false}`` to a controller that was replaced.
Clients may send ``{"control": true}`` (newest wins) and then ``{"id": 1, "command": "..."}``, answered
``{"id": 1, "result": "done" | "error" | "refused" | "lost", "lines": [...]}``. ``done`` means that
ExaBGP has it in memory, nothing more.
"""

import argparse
import contextlib
import json
import os
import re
import selectors
import socket
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

WINDOW = 2  # more unanswered lines make ExaBGP slower (measured: 50 would still be safe)
LINE_LIMIT = 4096  # PIPE_BUF: a write of at most this is whole or not at all
QUEUE_LIMIT = 64  # commands waiting; a client that keeps two outstanding never sees it
CLIENT_LIMIT = 32 << 20  # bytes a client may leave unread before it is dropped

_ROUTE_WORDS = r"[0-9a-zA-Z.:/\[\]() -]+"
ALLOWED = re.compile(
    r"neighbor [0-9a-fA-F.:]+ ("
    rf"(announce|withdraw) (route|attributes) {_ROUTE_WORDS}"
    r"|announce eor ipv[46] unicast"
    r"|(flush|clear) adj-rib out"
    r")|show adj-rib out [0-9a-fA-F.:]+ extensive"
)
HEARTBEAT = "show neighbor json"
WITHDRAW_ALL = "clear adj-rib out"


@dataclass
class Question:
    """A line for ExaBGP. ``client`` None: the relay itself asks."""

    line: str
    client: "Client | None" = None
    number: object = None
    lines: list[str] = field(default_factory=list)

    @property
    def alone(self) -> bool:
        """Flush and clear may answer at once, overtaking what is queued."""
        return self.line.endswith(("flush adj-rib out", "clear adj-rib out"))


@dataclass
class Client:
    """A connection. ``may_control``: by its credentials."""

    connection: socket.socket
    may_control: bool
    unread: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)


@dataclass
class Session:
    """One peer's session as its events tell it: the last of each kind, and what is on the wire.

    A session that was up before this worker was born is not ours to tell about: ``state`` stays empty.
    """

    state: str = ""
    negotiated: str = ""
    is_up: bool = False
    up_since: float = 0.0
    families: tuple[str, ...] = ()
    eor: dict[str, str] = field(default_factory=dict)
    wire: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def follow(self, event: dict[str, Any], line: str, now: float) -> None:
        neighbor = event["neighbor"]
        kind = event["type"]
        if kind == "state" and neighbor["state"] in ("up", "down"):
            self.state, self.is_up, self.up_since = line, neighbor["state"] == "up", now
            self.wire.clear()
            self.eor.clear()
        elif kind == "negotiated":
            self.negotiated, self.families = line, tuple(neighbor["negotiated"]["families"])
        elif kind == "update" and neighbor.get("direction") == "send" and self.is_up:
            self._follow_update(neighbor["message"], line)

    def _follow_update(self, message: dict[str, Any], line: str) -> None:
        if "eor" in message:
            self.eor["{afi} {safi}".format(**message["eor"])] = line
        update = message.get("update", {})
        attribute = json.dumps(update.get("attribute", {}), sort_keys=True)
        for family, prefixes in update.get("withdraw", {}).items():
            for entry in prefixes:
                self.wire.pop((family, entry["nlri"]), None)
        for family, prefixes_by_hop in update.get("announce", {}).items():
            for hop, prefixes in prefixes_by_hop.items():
                for entry in prefixes:
                    self.wire[family, entry["nlri"]] = (hop, attribute)

    def replay(self, peer: str) -> list[str]:
        """The shortest list of events that leads to this state."""
        events = [line for line in (self.negotiated, self.state) if line]
        prefixes_by_path: dict[tuple[str, str, str], list[dict[str, str]]] = {}
        for (family, prefix), (hop, attribute) in self.wire.items():
            prefixes_by_path.setdefault((family, hop, attribute), []).append({"nlri": prefix})
        for (family, hop, attribute), prefixes in prefixes_by_path.items():
            update = {"attribute": json.loads(attribute), "announce": {family: {hop: prefixes}}}
            neighbor = {"address": {"peer": peer}, "direction": "send", "message": {"update": update}}
            events.append(json.dumps({"type": "update", "neighbor": neighbor}))
        return events + list(self.eor.values())


class Relay:
    """The worker: one selector over ExaBGP's two pipes, the listening socket and the clients.

    Mutable state: ``_waiting`` and ``_asked`` (questions before and after they were written),
    ``_sessions`` by peer, ``_clients`` by socket, ``_controller``.
    """

    def __init__(self, options: argparse.Namespace, *, keeper: int) -> None:
        self._options = options
        self._keeper = keeper
        self._selector = selectors.DefaultSelector()
        self._waiting: deque[Question] = deque()
        self._asked: deque[Question] = deque()
        self._is_paired = False
        self._sessions: dict[str, Session] = {}
        self._table = ""
        self._clients: dict[socket.socket, Client] = {}
        self._controller: Client | None = None
        self._listener: socket.socket | None = None
        self._next_look = 0.0
        self._unread = bytearray()
        now = time.monotonic()
        self._next_beat = now
        self._beat_answered = 0.0
        self._alone_since = now
        self._has_withdrawn = False
        self._is_ready = False
        self._epoch = _epoch(options.exabgp_pid)

    def run(self) -> None:
        """Until ExaBGP closes our stdin, or the keeper is gone."""
        os.set_blocking(0, False)
        os.set_blocking(1, False)
        self._selector.register(0, selectors.EVENT_READ)
        while os.getppid() == self._keeper:
            self._listen_if_needed(time.monotonic())
            for key, ready in self._selector.select(timeout=self._idle_s()):
                if key.fileobj == 0:
                    if not self._read_exabgp():
                        return
                elif key.fileobj is self._listener:
                    self._accept(self._listener)
                elif isinstance(key.data, Client) and key.data.connection in self._clients:
                    self._serve(key.data, ready)
            self._tick(time.monotonic())
            self._ask()

    def _idle_s(self) -> float:
        return min(1.0, max(0.0, self._next_beat - time.monotonic()))

    # ExaBGP's side

    def _read_exabgp(self) -> bool:
        try:
            chunk = os.read(0, 1 << 20)
        except BlockingIOError:
            return True
        self._unread += chunk
        *lines, rest = self._unread.split(b"\n")
        self._unread = bytearray(rest)
        for line in lines:
            self._hear(line.decode("ascii", "replace").strip())
        return bool(chunk)

    def _hear(self, line: str) -> None:
        if line.startswith('{ "exabgp"'):
            self._follow(line)
        elif not self._is_paired:
            self._pair(line)
        elif line in ("done", "error"):
            self._answered(line)
        elif line:
            self._answer_line(line)

    def _follow(self, line: str) -> None:
        try:
            event = json.loads(line)
            if "neighbor" in event:
                peer = event["neighbor"]["address"]["peer"]
                self._sessions.setdefault(peer, Session()).follow(event, line, time.monotonic())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log(f"an event was not understood ({error!r}): {line[:300]}")
            return
        self._tell_all(f'{{"event": {line}}}')

    def _pair(self, line: str) -> None:
        """Find the place in the order of replies: after the answer to our one heartbeat."""
        if line.startswith("["):
            self._asked[0].lines.append(line)
        elif line == "done" and self._asked and self._asked[0].lines:
            self._is_paired = True
            self._answered(line)

    def _answer_line(self, line: str) -> None:
        head = self._asked[0] if self._asked else None
        is_table = line.startswith("[")
        if head and ((head.line == HEARTBEAT) == is_table) and (is_table or head.line.startswith("show adj-rib")):
            head.lines.append(line)
        else:
            self._lose_order(line)

    def _answered(self, word: str) -> None:
        if not self._asked or (self._asked[0].line == HEARTBEAT and not self._asked[0].lines):
            self._lose_order(word)
            return
        question = self._asked.popleft()
        if question.line == HEARTBEAT:
            self._beaten(question.lines[0])
        else:
            self._reply(question, word)

    def _lose_order(self, line: str) -> None:
        _log(f"replies lost their order at {line[:60]!r}: pairing again")
        for question in self._asked:
            self._reply(question, "lost")
        self._asked.clear()
        self._is_paired = False

    def _beaten(self, table: str) -> None:
        self._table = table
        self._beat_answered = time.monotonic()
        self._tell_all(f'{{"sessions": {table}}}')
        with contextlib.suppress(ValueError, KeyError, TypeError):
            # A session known only from before a reload that removed its peer.
            known = {str(entry["peer"]["address"]) for entry in json.loads(table)}
            for peer in self._sessions.keys() - known:
                del self._sessions[peer]
        up = sum(session.is_up for session in self._sessions.values())
        agent = "agent connected" if self._controller else "no agent"
        ready = "" if self._is_ready else "READY=1\n"
        self._is_ready = True
        _notify(f"{ready}WATCHDOG=1\nSTATUS={up} sessions followed and up, {agent}")

    def _ask(self) -> None:
        """Write what may be written: pairing first, then the queue within the window."""
        if not self._is_paired:
            if not self._asked:
                self._write(Question(line=HEARTBEAT))
            return
        while self._waiting and len(self._asked) < WINDOW:
            if self._asked and (self._waiting[0].alone or self._asked[0].alone):
                return
            if not self._write(self._waiting[0]):
                return
            self._waiting.popleft()

    def _write(self, question: Question) -> bool:
        try:
            os.write(1, question.line.encode("ascii") + b"\n")  # whole or not at all: LINE_LIMIT
        except BlockingIOError:
            return False
        self._asked.append(question)
        return True

    def _tick(self, now: float) -> None:
        """What happens by time: heartbeat, End-of-RIB in the agent's place, dead-man."""
        if now >= self._next_beat:
            self._next_beat = now + self._options.heartbeat_s
            unanswered = [*self._waiting, *self._asked]
            if self._is_paired and not any(question.line == HEARTBEAT for question in unanswered):
                self._waiting.appendleft(Question(line=HEARTBEAT))
        for peer, session in self._sessions.items():
            if session.is_up and now - session.up_since > self._options.eor_s:
                session.up_since = now
                for family in set(session.families) - set(session.eor):
                    self._waiting.append(Question(line=f"neighbor {peer} announce eor {family}"))
        grace = self._options.agent_grace_s
        if self._controller or not grace or self._has_withdrawn:
            return
        if now - self._alone_since > grace:
            _log(f"no agent for {grace:g} s: withdrawing every route, as agent_grace_s says")
            self._has_withdrawn = True
            self._waiting.append(Question(line=WITHDRAW_ALL))

    # The clients' side

    def _listen_if_needed(self, now: float) -> None:
        """Keep a socket at our path, whatever happens to its folder; reading ExaBGP does not wait for it."""
        if now < self._next_look or (self._listener and os.path.exists(self._options.socket)):
            return
        self._next_look = now + 1.0
        if self._listener:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        try:
            self._listener = _listen(self._options.socket)
        except OSError as error:
            _log(f"cannot listen at {self._options.socket}: {error}")
        else:
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.setblocking(False)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            _, uid, gid = struct.unpack("3i", credentials)
            client = Client(connection, may_control=uid in (0, os.geteuid()) or gid == os.getegid())
            self._clients[connection] = client
            self._selector.register(connection, selectors.EVENT_READ, client)
            hello = {"epoch": self._epoch, "relay_pid": os.getpid(), "agent_grace_s": self._options.agent_grace_s}
            self._tell(client, json.dumps({"hello": hello}))
            if self._table:
                self._tell(client, f'{{"sessions": {self._table}}}')
            followed = {peer: session for peer, session in self._sessions.items() if session.state}
            for peer, session in followed.items():
                for event in session.replay(peer):
                    self._tell(client, f'{{"event": {event}}}')
            self._tell(client, json.dumps({"replayed": list(followed)}))

    def _serve(self, client: Client, ready: int) -> None:
        """Whatever goes wrong with a client costs the client, never ExaBGP."""
        try:
            if ready & selectors.EVENT_WRITE:
                self._flush(client)
            if ready & selectors.EVENT_READ:
                self._read_client(client)
        except Exception as error:
            _log(f"client dropped: {error!r}")
            self._drop(client)

    def _read_client(self, client: Client) -> None:
        chunk = client.connection.recv(1 << 16)
        if not chunk:
            self._drop(client)
            return
        client.unread += chunk
        *lines, rest = client.unread.split(b"\n")
        client.unread = bytearray(rest)
        if len(rest) > 2 * LINE_LIMIT:
            raise ValueError("a line without an end")
        for line in lines:
            self._obey(client, json.loads(line))

    def _obey(self, client: Client, wish: dict[str, Any]) -> None:
        if wish.get("control"):
            if client.may_control:
                self._hand_over(client)
            self._tell(client, json.dumps({"control": client is self._controller}))
            return
        line = wish["command"]
        question = Question(line=line, client=client, number=wish.get("id"))
        if refusal := self._refusal(client, line):
            question.lines.append(refusal)
            self._reply(question, "refused")
        else:
            self._waiting.append(question)

    def _refusal(self, client: Client, line: str) -> str:
        if client is not self._controller:
            return "not the controller"
        if len(line) >= LINE_LIMIT or not line.isascii() or not ALLOWED.fullmatch(line):
            return "not an allowed command"
        if len(self._waiting) >= QUEUE_LIMIT:
            return "too many commands are waiting"
        return ""

    def _hand_over(self, client: Client) -> None:
        if self._controller not in (None, client):
            self._tell(self._controller, '{"control": false}')
        self._controller = client
        self._has_withdrawn = False

    def _reply(self, question: Question, word: str) -> None:
        if question.client and question.client.connection in self._clients:
            answer = {"id": question.number, "result": word, "lines": question.lines}
            self._tell(question.client, json.dumps(answer))

    def _tell_all(self, text: str) -> None:
        for client in list(self._clients.values()):
            self._tell(client, text)

    def _tell(self, client: Client, text: str) -> None:
        client.unsent += text.encode("ascii", "backslashreplace") + b"\n"
        if len(client.unsent) > CLIENT_LIMIT:
            _log("client dropped: it does not read")
            self._drop(client)
        elif client.connection in self._clients:
            self._watch(client)

    def _flush(self, client: Client) -> None:
        with contextlib.suppress(BlockingIOError):
            sent = client.connection.send(client.unsent[: 1 << 20])
            del client.unsent[:sent]
        self._watch(client)

    def _watch(self, client: Client) -> None:
        writing = selectors.EVENT_WRITE if client.unsent else 0
        self._selector.modify(client.connection, selectors.EVENT_READ | writing, client)

    def _drop(self, client: Client) -> None:
        if self._clients.pop(client.connection, None) is None:
            return
        self._selector.unregister(client.connection)
        client.connection.close()
        self._waiting = deque(question for question in self._waiting if question.client is not client)
        if self._controller is client:
            self._controller = None
            self._alone_since = time.monotonic()


def _listen(path: str) -> socket.socket:
    """A listening socket at ``path``, put there in one step whatever stood there before."""
    os.umask(0o117)  # ExaBGP's own umask would leave the mode to chance
    fresh = f"{path}.{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    listener.bind(fresh)
    listener.listen(16)
    listener.setblocking(False)
    os.rename(fresh, path)
    return listener


def _epoch(pid: int) -> str:
    """Names one life of ExaBGP: a pid and when it started (clock ticks since boot)."""
    with open(f"/proc/{pid}/stat") as stat:
        return f"{pid}-{stat.read().rpartition(')')[2].split()[19]}"


def _notify(message: str) -> None:
    """Tell systemd, if it asked to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(message.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def _log(message: str) -> None:
    """To stderr, which is ExaBGP's own, so the journal of its unit."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"relay: {message}\n")
        sys.stderr.flush()


def keep(options: argparse.Namespace) -> None:
    """Fork the worker, wait for it, and again when it died. Holds the pipes open meanwhile."""
    keeper = os.getpid()
    while True:
        worker = os.fork()
        if not worker:
            Relay(options, keeper=keeper).run()
            return
        _, status = os.waitpid(worker, 0)
        if status == 0 or os.getppid() != options.exabgp_pid:
            return
        _log(f"worker {worker} ended (status {status}): starting another")
        time.sleep(0.1)


def main() -> None:
    """Started by ExaBGP, see bgp/exabgp.conf.j2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--socket", required=True, help="path of the UNIX socket")
    parser.add_argument("--heartbeat-s", type=float, default=5.0)
    parser.add_argument("--agent-grace-s", type=float, default=0.0, help="withdraw all without agent; 0 never")
    parser.add_argument("--eor-s", type=float, default=30.0, help="send End-of-RIB in the agent's place after")
    options = parser.parse_args()
    options.exabgp_pid = os.getppid()
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        keep(options)


if __name__ == "__main__":
    main()
