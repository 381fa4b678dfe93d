# SPDX-License-Identifier: Apache-2.0
"""The agent's only door to BGP: ``want`` the complete set of routes, ``observed`` what became of it.

Connects to the relay inside ExaBGP, for ever. Keeps one Ledger per peer, which decides; here lines
are carried to and fro. The first thing after connecting is to learn what ExaBGP announces already,
so an agent that restarts sends nothing but differences, and before the first ``want`` nothing at all.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lbagent import log
from lbagent.backoff import Backoff
from lbagent.bgp import bfd, command
from lbagent.bgp.command import Neighbor
from lbagent.bgp.ledger import Kind, Ledger, Order
from lbagent.bgp.render import SOCKET
from lbagent.config import Bgp, Paths
from lbagent.errors import SpeakerGone
from lbagent.model.route import PeerState, Route, SessionState

WINDOW = 2
TICK_S = 0.25
AUDIT_S = 60.0
BFD_S = 1.0
LINE_LIMIT = 64 << 20  # an audit of 100,000 routes is one line of 25 MB

_log = log.get("bgp")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeakerState:
    """What became of the routes.

    ``connected``: the relay answers. ``adopted``: what ExaBGP held when we connected is known; before
    that ``routes`` and ``attracting`` are silent about the past, so nothing may be unprogrammed.
    ``synced``: every peer holds what is wanted, or is down and will get it.
    ``routes``: wanted, or (before the first ``want``) adopted.
    ``attracting``: address -> time until which a peer may use it, ``math.inf`` while it may hold it.
    ``epoch`` names ExaBGP's life, ``restarts``: how often it was another. ``mended``: how often all
    routes of a peer were sent again because the wire differed.
    """

    connected: bool = False
    adopted: bool = False
    synced: bool = False
    routes: frozenset[Route] = frozenset()
    attracting: Mapping[str, float] = field(default_factory=dict)
    peers: Mapping[str, PeerState] = field(default_factory=dict)
    restarts: int = 0
    mended: int = 0
    epoch: str = ""


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Advertisement:
    """One prefix at one peer. ``acknowledged``: ExaBGP has it; ``sent``: it is on the wire."""

    prefix: str
    peer: str
    intended: bool
    acknowledged: bool
    sent: bool


class Speaker:
    """One per agent. ``changed`` is called whenever ``observed`` may differ; it must only take note."""

    def __init__(
        self,
        bgp: Bgp,
        paths: Paths,
        *,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = str(paths.run / SOCKET)
        self._clock = clock
        self._changed = changed
        self._ledgers: dict[str, Ledger] = {}
        self._routes: frozenset[Route] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._has_control = False
        self._is_replayed = False
        self._orders: dict[int, tuple[Ledger, Order]] = {}
        self._last_id = 0
        self._turn = 0
        self._epoch = ""
        self._restarts = 0
        self._next_audit = 0.0
        self._state: SpeakerState | None = None
        self._bfd_folder = paths.run / "bfd"
        self._bfd_peers: tuple[str, ...] = ()
        self._bfd_states: dict[str, str] = {}
        self.reconfigure(bgp)

    def want(self, routes: frozenset[Route]) -> None:
        """Announce exactly these routes. Give the complete set, once per pass, one Route per prefix."""
        self._routes = routes
        for ledger in self._ledgers.values():
            ledger.want(command.paths(routes, ledger.neighbor))
        self._touch()
        self._pump()

    def reconfigure(self, bgp: Bgp) -> None:
        """Peers were added, removed or changed; the books of the others stay as they are."""
        before, self._ledgers = self._ledgers, {}
        self._bfd_peers = tuple(peer.address for peer in bgp.peers if peer.bfd_ms)
        for peer in bgp.peers:
            neighbor = Neighbor.of(bgp, peer)
            ledger = before.get(neighbor.address) or Ledger(neighbor)
            ledger.neighbor = neighbor
            ledger.audit()
            if self._routes is not None:
                ledger.want(command.paths(self._routes, neighbor))
            self._ledgers[neighbor.address] = ledger
        self._touch()
        self._pump()

    def observed(self) -> SpeakerState:
        """What is known now."""
        if self._state is None:
            self._state = self._look()
        return self._state

    def advertisements(self) -> Iterator[Advertisement]:
        """Every prefix at every peer, sorted by peer and prefix."""
        for ledger in self._ledgers.values():
            wanted = ledger.wanted or {}
            for prefix in sorted({**wanted, **ledger.issued, **ledger.wire}):
                yield Advertisement(
                    prefix=prefix,
                    peer=ledger.neighbor.name,
                    intended=prefix in wanted,
                    acknowledged=prefix in ledger.issued and ledger.issued[prefix] == wanted.get(prefix),
                    sent=prefix in ledger.wire and ledger.wire[prefix] == wanted.get(prefix),
                )

    async def run(self) -> None:
        """Until cancelled: connect to the relay, serve, and again when it is gone."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_connected(), name="relay")
            tasks.create_task(self._watch_bfd(), name="bfd")

    async def _watch_bfd(self) -> None:
        """Look at BFD's sessions, while there are any to look at."""
        while True:
            states = await bfd.peer_states(self._bfd_folder) if self._bfd_peers else {}
            states = {address: states.get(address, "unknown") for address in self._bfd_peers}
            if states != self._bfd_states:
                self._bfd_states = states
                _log.info("bfd changed", **{self._ledgers[a].neighbor.name: state for a, state in states.items()})
                self._touch()
            await asyncio.sleep(BFD_S)

    async def _keep_connected(self) -> None:
        backoff = Backoff(first_s=0.2, cap_s=2.0)
        while True:
            try:
                await self._serve(backoff)
            except SpeakerGone as error:
                if backoff.failures == 0 or self._writer:
                    _log.warning("speaker gone", error=error.message, hint=error.hint)
            finally:
                self._lost()
            await asyncio.sleep(backoff.failed())

    # The connection

    async def _serve(self, backoff: Backoff) -> None:
        try:
            reader, self._writer = await asyncio.open_unix_connection(self._path, limit=LINE_LIMIT)
        except OSError as error:
            hint = "is lbagent-bgp.service running? systemctl status lbagent-bgp"
            raise SpeakerGone(f"no relay at {self._path}: {error}", hint=hint) from error
        self._send({"control": True})
        while True:
            try:
                async with asyncio.timeout(TICK_S):
                    line = await reader.readline()
            except TimeoutError:
                self._tick()  # only when nothing is left to read: silence is then ExaBGP's, not ours
            except (OSError, ValueError) as error:
                raise SpeakerGone(f"the relay cannot be read: {error}") from error
            else:
                if not line.endswith(b"\n"):
                    raise SpeakerGone("the relay closed the connection")
                backoff.succeeded()
                self._hear(line)
            self._pump()

    def _send(self, message: Mapping[str, object]) -> None:
        if self._writer:
            self._writer.write(json.dumps(message).encode("ascii") + b"\n")

    def _lost(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None
        if self._is_replayed:
            for ledger in self._ledgers.values():
                ledger.relay_lost()
        self._is_replayed = self._has_control = False
        self._orders.clear()
        self._touch()

    def _pump(self) -> None:
        """Hand out orders while the window has room, each peer in its turn."""
        if not (self._is_replayed and self._has_control):
            return
        ledgers = list(self._ledgers.values())
        idle = 0
        while len(self._orders) < WINDOW and idle < len(ledgers):
            self._turn = (self._turn + 1) % len(ledgers)
            ledger = ledgers[self._turn]
            if order := ledger.next_order(self._clock()):
                self._last_id += 1
                self._orders[self._last_id] = (ledger, order)
                self._send({"id": self._last_id, "command": order.line})
                idle = 0
            else:
                idle += 1

    def _tick(self) -> None:
        now = self._clock()
        is_audit_due = now >= self._next_audit
        if is_audit_due:
            self._next_audit = now + AUDIT_S
        for ledger in self._ledgers.values():
            if is_audit_due:
                ledger.audit()
            if ledger.tick(now):
                self._touch()

    # What the relay says

    def _hear(self, line: bytes) -> None:
        try:
            message: dict[str, Any] = json.loads(line)
            self._understand(message)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("message not understood", error=repr(error), message=line[:300].decode("ascii", "replace"))

    def _understand(self, message: dict[str, Any]) -> None:
        if "event" in message:
            for event in command.read_event(message["event"]):
                self._happened(event)
        elif "id" in message:
            ledger, order = self._orders.pop(message["id"])
            self._answered(ledger, order, message["result"], message["lines"])
        elif "sessions" in message:
            self._tabled(message["sessions"])
        elif "hello" in message:
            self._met(message["hello"]["epoch"])
        elif "replayed" in message:
            self._is_replayed = True
            _log.info("speaker connected", epoch=self._epoch)
            self._touch()
        elif "control" in message:
            self._has_control = bool(message["control"])
            if not self._has_control:
                _log.error("control of the speaker lost", hint="does another agent run on this host?")

    def _met(self, epoch: str) -> None:
        if self._epoch and epoch != self._epoch:
            self._restarts += 1
            _log.warning("speaker restarted", epoch=epoch, hint="every route is announced again")
            for ledger in self._ledgers.values():
                ledger.speaker_restarted(self._clock())
        self._epoch = epoch

    def _tabled(self, table: list[dict[str, Any]]) -> None:
        now = self._clock()
        row_by_address = {row["peer"]["address"]: row for row in table}
        is_news = False
        for address, ledger in self._ledgers.items():
            if row := row_by_address.get(address):
                is_news |= ledger.found(is_up=row["state"] == "up", duration_s=float(row["duration"]), now=now)
            else:
                is_news |= ledger.absent(now)
        if is_news:
            self._touch()

    def _happened(self, event: command.Event) -> None:
        ledger = self._ledgers.get(event.peer)
        if ledger is None:
            return
        now, peer = self._clock(), ledger.neighbor.name
        match event:
            case command.Sent(announced=announced, withdrawn=withdrawn):
                ledger.sent(announced, withdrawn, now)
            case command.EndOfRib(family=family):
                ledger.end_of_rib(family)
            case command.Negotiated(families=families, hold_time_s=hold_time_s):
                ledger.negotiated(families, hold_time_s)
            case command.Notified(text=text):
                ledger.notified(text)
            case command.Up():
                if self._is_replayed:
                    _log.info("session up", peer=peer, hold_time_s=ledger.session.hold_time_s)
                ledger.up(now)
            case command.Down(reason=reason):
                was_up = ledger.session.state is SessionState.UP
                ledger.down(now, reason)
                if was_up:
                    _log.warning("session down", peer=peer, cause=ledger.session.last_error)
        self._touch()

    def _answered(self, ledger: Ledger, order: Order, result: str, lines: list[str]) -> None:
        ledger.answered(order, result, lines, self._clock())
        peer = ledger.neighbor.name
        if result in ("error", "refused"):
            _log.warning("order refused", peer=peer, order=order.line[:300], result=result, detail=" ".join(lines[:1]))
        elif order.kind in (Kind.ANNOUNCE, Kind.WITHDRAW) and result == "done":
            event = "routes announced" if order.kind is Kind.ANNOUNCE else "routes withdrawn"
            _log.debug(event, peer=peer, count=len(order.prefixes), first=order.prefixes[0])
        elif order.kind is Kind.FLUSH:
            _log.warning("routes sent again", peer=peer, hint="the wire did not carry what ExaBGP holds")
        self._touch()

    # What is observed

    def _touch(self) -> None:
        self._state = None
        self._changed()

    def _look(self) -> SpeakerState:
        ledgers = list(self._ledgers.values())
        known = [ledger for ledger in ledgers if ledger.session.state is not SessionState.UNKNOWN]
        adopted = self._is_replayed and bool(known) and all(ledger.is_audited for ledger in known)
        routes = self._routes
        if routes is None:
            routes = command.routes((ledger.neighbor, ledger.issued) for ledger in known)
        attracting: dict[str, float] = {}
        for ledger in ledgers:
            for prefix, until in ledger.attracting().items():
                address = prefix.partition("/")[0]
                attracting[address] = max(until, attracting.get(address, 0.0))
        return SpeakerState(
            connected=self._is_replayed,
            adopted=adopted,
            synced=adopted and len(known) == len(ledgers) and all(ledger.is_settled for ledger in known),
            routes=routes,
            attracting=attracting,
            peers={
                ledger.neighbor.name: replace(ledger.peer_state(), bfd=self._bfd_states.get(address, ""))
                for address, ledger in self._ledgers.items()
            },
            restarts=self._restarts,
            epoch=self._epoch,
            mended=sum(ledger.mended for ledger in ledgers),
        )
