# SPDX-License-Identifier: Apache-2.0
"""ExaBGP with our relay inside, and the routers behind it, as far as order matters. No I/O, no clock.

It has the habits that make BGP through ExaBGP hard, each measured on 5.0.15:

- ``done`` is said when a change is in memory;
- an announcement that repeats what it holds is dropped without a word;
- what is in memory is written in groups of equal attributes, in the order in which the groups
  appeared, so two changes of one prefix may be written in the wrong order;
- changes that arrive during a flush wait for the next one;
- the first flush of a session drops withdrawals.
"""

import json
import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from lbagent.bgp import relay
from lbagent.bgp.command import Attributes, _read_attributes

WITHDRAWN = Attributes(next_hop="0.0.0.0")
"""The attributes a withdrawal is grouped by."""


@dataclass
class Peer:
    """A neighbor: ExaBGP's memory of it, and the router's table."""

    address: str
    held: dict[str, Attributes] = field(default_factory=dict)  # adj-rib-out
    groups: dict[Attributes, dict[str, bool]] = field(default_factory=dict)  # prefix -> is it an announcement
    latest: dict[str, Attributes] = field(default_factory=dict)
    flushing: deque[tuple[str, Attributes, bool]] = field(default_factory=deque)
    is_up: bool = False
    is_first_flush: bool = False
    router: dict[str, Attributes] = field(default_factory=dict)
    updates: int = 0

    def change(self, prefix: str, attributes: Attributes, *, is_announced: bool) -> None:
        if is_announced:
            if self.held.get(prefix) == attributes:
                return
            self.held[prefix] = attributes
        else:
            self.held.pop(prefix, None)
        self.groups.setdefault(attributes, {})[prefix] = is_announced
        self.latest[prefix] = attributes

    def resend(self) -> None:
        """Behind what is queued, as ``flush adj-rib out`` does."""
        for prefix, attributes in self.held.items():
            if prefix not in self.latest:
                self.groups.setdefault(attributes, {})[prefix] = True
                self.latest[prefix] = attributes

    def write(self) -> tuple[str, Attributes, bool] | None:
        """The next UPDATE, None when there is nothing to write."""
        if not self.is_up:
            return None
        if not self.flushing:
            if not any(self.groups.values()):
                return None
            for attributes, group in self.groups.items():
                for prefix, is_announced in group.items():
                    if is_announced or not self.is_first_flush:
                        self.flushing.append((prefix, attributes, is_announced))
            self.groups, self.latest = {}, {}
            self.is_first_flush = False
            if not self.flushing:
                return None
        prefix, attributes, is_announced = self.flushing.popleft()
        if is_announced:
            self.router[prefix] = attributes
        else:
            self.router.pop(prefix, None)
        self.updates += 1
        return prefix, attributes, is_announced


class FakeExabgp:
    """``lines`` are what the relay tells its one client, oldest first."""

    def __init__(self, addresses: list[str]) -> None:
        self.peers = {address: Peer(address) for address in addresses}
        self.lines: deque[bytes] = deque()
        self.queue: deque[tuple[int, str]] = deque()
        self.epoch = 1
        self.most_waiting = 0
        self._sessions: dict[str, relay.Session] = {}

    # What the test does to it

    def accept(self) -> None:
        """Take one command from the queue into memory, and answer."""
        if self.queue:
            number, line = self.queue.popleft()
            self._tell({"id": number, "result": self._obey(line), "lines": self._said})

    def write(self, address: str) -> None:
        """Write one UPDATE of that peer, or notice that there is none."""
        if written := self.peers[address].write():
            prefix, attributes, is_announced = written
            family = "ipv6 unicast" if ":" in prefix else "ipv4 unicast"
            update: dict[str, Any] = {"withdraw": {family: [{"nlri": prefix}]}}
            if is_announced:
                entries = {attributes.next_hop: [{"nlri": prefix}]}
                update = {"attribute": _json(attributes), "announce": {family: entries}}
            self._event(address, "update", direction="send", message={"update": update})

    def session_up(self, address: str) -> None:
        peer = self.peers[address]
        if not peer.is_up:
            peer.is_up = peer.is_first_flush = True
            agreed = {"families": ["ipv4 unicast", "ipv6 unicast"], "hold_time": 9}
            self._event(address, "negotiated", negotiated=agreed)
            self._event(address, "state", state="up")
            peer.groups, peer.latest = {}, {}
            peer.resend()

    def session_down(self, address: str) -> None:
        peer = self.peers[address]
        if peer.is_up:
            self._drop(peer)
            self._event(address, "state", state="down", reason="notification received (6,4)")

    def restart(self) -> None:
        """ExaBGP dies and is started again; nothing of it is left."""
        self.epoch += 1
        for peer in self.peers.values():
            self._drop(peer)
            peer.held.clear()
        self.queue.clear()
        self.lines.clear()
        self._sessions.clear()

    def lose_relay(self, *, remembers: bool) -> None:
        """The client's connection breaks; the relay keeps its memory unless it was the relay that died."""
        self.lines.clear()
        for _, line in self.queue:  # they are in ExaBGP's pipe; the answers will go nowhere
            self._obey(line)
        self.queue.clear()
        if not remembers:
            self._sessions.clear()

    def clear(self, address: str) -> None:
        """The dead-man's ``clear adj-rib out``."""
        for prefix in list(self.peers[address].held):
            self.peers[address].change(prefix, WITHDRAWN, is_announced=False)

    # The client

    def connect(self) -> None:
        """What the relay says to a client that comes."""
        self._tell({"hello": {"epoch": f"{self.epoch}-0"}})
        self.heartbeat()
        followed = {address: session for address, session in self._sessions.items() if session.state}
        for address, session in followed.items():
            for event in session.replay(address):
                self.lines.append(f'{{"event": {event}}}\n'.encode())
        self._tell({"replayed": list(followed)})

    def heartbeat(self) -> None:
        rows = [
            {"state": "up" if peer.is_up else "down", "duration": 0, "peer": {"address": address}}
            for address, peer in self.peers.items()
        ]
        self._tell({"sessions": rows})

    def send(self, line: bytes) -> None:
        """What the client writes."""
        message = json.loads(line)
        if "command" in message:
            assert relay.ALLOWED.fullmatch(message["command"]), message["command"]
            self.queue.append((message["id"], message["command"]))
            self.most_waiting = max(self.most_waiting, len(self.queue))
        else:
            self._tell({"control": True})

    # Inside

    def _drop(self, peer: Peer) -> None:
        peer.is_up = False
        peer.router.clear()
        peer.flushing.clear()
        peer.groups, peer.latest = {}, {}

    def _obey(self, line: str) -> str:
        self._said: list[str] = []
        if match := re.fullmatch(r"show adj-rib out (\S+) extensive", line):
            for prefix, attributes in self.peers[match[1]].held.items():
                family = "ipv6" if ":" in prefix else "ipv4"
                text = str(attributes).replace("as-path [", "as-path (")
                text = re.sub(r"(as-path \([^]]*)\]", r"\1)", text)
                self._said.append(f"neighbor {match[1]} local-ip x in-open {family} unicast {prefix} {text}")
            return "done"
        match = re.fullmatch(r"neighbor (\S+) (announce|withdraw) attributes (.*) nlri (.*)", line)
        if match:
            peer, is_announced = self.peers[match[1]], match[2] == "announce"
            attributes = _read_attributes(match[3]) if is_announced else WITHDRAWN
            for prefix in match[4].split():
                peer.change(prefix, attributes, is_announced=is_announced)
            return "done"
        match = re.fullmatch(r"neighbor (\S+) (flush adj-rib out|announce eor ipv[46] unicast)", line)
        assert match, line
        peer = self.peers[match[1]]
        if not peer.is_up:
            return "error"
        if match[2].startswith("flush"):
            peer.resend()
        return "done"

    def _event(self, address: str, kind: str, **neighbor: Any) -> None:
        event = {"type": kind, "neighbor": {"address": {"peer": address}, **neighbor}}
        line = json.dumps(event)
        self._sessions.setdefault(address, relay.Session()).follow(event, line, 0.0)
        self.lines.append(f'{{"event": {line}}}\n'.encode())

    def _tell(self, message: dict[str, Any]) -> None:
        self.lines.append(json.dumps(message).encode() + b"\n")


def _json(attributes: Attributes) -> dict[str, Any]:
    """Attributes as ExaBGP prints them."""
    text: dict[str, Any] = {"origin": "igp"}
    if attributes.as_path:
        text["as-path"] = {"0": {"element": "as-sequence", "value": list(attributes.as_path)}}
    standard = [[int(part) for part in c.split(":")] for c in attributes.communities if c.count(":") == 1]
    large = [[int(part) for part in c.split(":")] for c in attributes.communities if c.count(":") == 2]
    text |= {"community": standard} if standard else {}
    text |= {"large-community": large} if large else {}
    text |= {"med": attributes.med} if attributes.med is not None else {}
    text |= {"local-preference": attributes.local_preference} if attributes.local_preference is not None else {}
    return text
