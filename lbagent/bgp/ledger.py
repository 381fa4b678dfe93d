# SPDX-License-Identifier: Apache-2.0
"""One peer's books: what it should hold, what ExaBGP was told, what went over the wire. Pure.

ExaBGP answers ``done`` when it has a change in memory; and two changes of one prefix that meet in
one flush may reach the router in the wrong order (ExaBGP 5.0.15, the end state is the opposite).
Hence the three rules of this file:

1. The truth is the wire: the UPDATEs ExaBGP reports as written.
2. A prefix has at most one unconfirmed change; a newer wish waits and overwrites older wishes.
3. Three books that agree need no order. Books that disagree need exactly one, and which one follows
   from the books alone, so it does not matter how they came to disagree:

       wanted differs from issued                        change it
       issued, but not so on the wire                    flush (ExaBGP sends everything again)
       on the wire, but neither issued nor wanted        withdraw (ExaBGP always sends a withdrawal)

Time comes in as ``now`` (monotonic seconds).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from lbagent.bgp import command
from lbagent.bgp.command import Attributes, Neighbor
from lbagent.model.route import PeerState, SessionState

QUIET_S = 1.0
"""A session that wrote no UPDATE for this long has written all it had."""
CONFIRM_S = 3.0
"""A change that a quiet session did not write within this time is looked into."""
MEND_S = 10.0
"""At most one flush, and one repeated refused change, in this time."""
SINCE_S = 2.0
"""ExaBGP tells ages in whole seconds."""
FORGET_S = 600.0
"""How long the time of a withdrawal is remembered."""

UNKNOWN = Attributes(next_hop="unknown")
"""On the wire, perhaps: nobody saw whether its withdrawal was written."""


class Kind(StrEnum):
    """What an Order asks of ExaBGP."""

    ANNOUNCE = "announce"
    WITHDRAW = "withdraw"
    FLUSH = "flush"
    AUDIT = "audit"
    END_OF_RIB = "end-of-rib"


Wish = tuple[Kind, Attributes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One line for ExaBGP; its answer comes back to the ledger that gave it."""

    peer: str
    number: int
    kind: Kind
    line: str
    prefixes: tuple[str, ...] = ()
    attributes: Attributes | None = None


@dataclass(slots=True)
class Change:
    """Of one prefix, not yet confirmed. ``order``: its number, 0 when ExaBGP sends it by itself.

    ``is_accepted``: ExaBGP said done.
    """

    attributes: Attributes | None
    since: float
    order: int = 0
    is_accepted: bool = True


@dataclass(slots=True)
class Session:
    """What is known of the BGP session."""

    state: SessionState = SessionState.UNKNOWN
    since: float = 0.0
    families: tuple[int, ...] = ()
    hold_time_s: int = 0
    flaps: int = 0
    last_error: str = ""
    sent_at: float = 0.0
    ended_families: set[int] = field(default_factory=set)
    updates: int = 0


class Ledger:
    """Mutable state: the books ``wanted``, ``issued`` and ``wire``, and ``unconfirmed`` between them.

    ``wanted`` None: nobody has said yet what should be announced, so nothing is changed.
    ``gone_at``: when the router let go of a prefix, at the latest.
    """

    def __init__(self, neighbor: Neighbor) -> None:
        self.neighbor = neighbor
        self.session = Session()
        self.wanted: dict[str, Attributes] | None = None
        self.issued: dict[str, Attributes] = {}
        self.wire: dict[str, Attributes] = {}
        self.unconfirmed: dict[str, Change] = {}
        self.gone_at: dict[str, float] = {}
        self.refused: dict[str, tuple[Attributes | None, float]] = {}
        self.mended = 0
        self.is_audited = False
        self._wire_is_known = False  # else: what ExaBGP holds is taken for it once the session is quiet
        self._held_before: set[str] = set()  # on the wire when we lost sight of it
        self._to_withdraw: dict[str, None] = {}
        self._to_announce: dict[Attributes, dict[str, None]] = {}
        self._singly: set[str] = set()  # in a line that was refused: which of them was it?
        self._orders = 0
        self._in_flight = 0
        self._wants_audit = True
        self._is_auditing = False
        self._wants_flush = False
        self._mended_at = -math.inf
        self._was_notified = False

    # What should be

    def want(self, wanted: Mapping[str, Attributes]) -> None:
        """The complete set of paths this peer should hold."""
        before, self.wanted = self.wanted, dict(wanted)
        if before is None:
            self._consider_all()
            return
        for prefix in sorted(before.keys() | self.wanted.keys()):
            if before.get(prefix) != self.wanted.get(prefix):
                self._consider(prefix)

    # What happens

    def relay_lost(self) -> None:
        """Nothing more is heard. What was on the wire may stay there."""
        self._held_before |= self._maybe_held()
        self._in_flight = 0
        self._is_auditing = False
        self._wants_audit = True
        self.is_audited = False
        self._wire_is_known = False
        self.session.state = SessionState.UNKNOWN

    def speaker_restarted(self, now: float) -> None:
        """Another ExaBGP: it holds nothing, and every session of the old one has ended."""
        self.down(now, "ExaBGP restarted")
        self.issued.clear()
        self.unconfirmed.clear()
        self.refused.clear()

    def negotiated(self, families: tuple[int, ...], hold_time_s: int) -> None:
        """Told just before ``up``."""
        self.session.families = families
        self.session.hold_time_s = hold_time_s

    def up(self, now: float) -> None:
        """The session stands; ExaBGP sends all that was issued, and each UPDATE will confirm its part.

        A relay that we connect to tells the session from here, so what was held before may be stale.
        """
        self._held_before |= self._maybe_held()
        if self.session.state is not SessionState.UP:
            self.session.since = now
        self.session.state, self.session.sent_at = SessionState.UP, now
        self.session.ended_families.clear()
        self._wire_is_known = True
        self.wire.clear()
        self._expect_all(now)

    def down(self, now: float, reason: str) -> None:
        """The session ended. The router lets go at once or, at the latest, when its hold timer ends."""
        session = self.session
        if session.state is SessionState.UP:
            session.flaps += 1
        if session.state is not SessionState.DOWN:
            session.since = now
        is_attempt = session.state is SessionState.DOWN and "NOTIFICATION" not in reason
        if not self._was_notified and not (is_attempt and session.last_error):
            session.last_error = reason
        self._was_notified = False
        self._let_go(now, self._maybe_held())
        self.wire.clear()
        self.unconfirmed = {p: change for p, change in self.unconfirmed.items() if not change.is_accepted}
        session.state = SessionState.DOWN
        self._wire_is_known = True
        self._consider_all()

    def notified(self, text: str) -> None:
        """A NOTIFICATION says more than the ``down`` that follows."""
        self.session.last_error = text
        self._was_notified = True

    def found(self, *, is_up: bool, duration_s: float, now: float) -> bool:
        """ExaBGP's session table lists this peer. Corrects what no event has told; whether anything was."""
        session = self.session
        # An event between the death of a relay and the birth of the next is told to nobody.
        is_new = session.state is not (SessionState.UP if is_up else SessionState.DOWN)
        is_older = is_up and abs(session.since - (now - duration_s)) > SINCE_S
        if is_older:
            session.since = now - duration_s
        if is_new:
            self._wants_audit = True
            if is_up:
                session.state, session.sent_at = SessionState.UP, now
                session.families = session.families or tuple(self.neighbor.next_hop_by_family)
                self._wire_is_known = False
            else:
                self.down(now, session.last_error)
        return is_new or is_older

    def absent(self, now: float) -> bool:
        """ExaBGP does not know this peer (yet, or any more): nothing can be asked. Whether that is news."""
        if self.session.state is SessionState.UNKNOWN and not self._maybe_held():
            return False
        self.down(now, "not configured in ExaBGP")
        self.session.state = SessionState.UNKNOWN
        self.issued.clear()
        self.unconfirmed.clear()
        return True

    def sent(self, announced: Mapping[str, Attributes], withdrawn: tuple[str, ...], now: float) -> None:
        """An UPDATE was written."""
        self.session.sent_at = now
        self.session.updates += 1
        for prefix in withdrawn:
            self.wire.pop(prefix, None)
            self._held_before.discard(prefix)
            self.gone_at[prefix] = now
            self._confirm(prefix, None)
        for prefix, attributes in announced.items():
            self.wire[prefix] = attributes
            self._confirm(prefix, attributes)

    def end_of_rib(self, family: int) -> None:
        """End-of-RIB was written."""
        self.session.ended_families.add(family)

    def answered(self, order: Order, result: str, lines: list[str], now: float) -> None:
        """ExaBGP's answer (``done``, ``error``) or the relay's (``refused``, ``lost``)."""
        self._in_flight -= 1
        if order.kind is Kind.AUDIT:
            self._is_auditing = False
            if result == "done":
                self._audited(command.read_adj_rib_out(lines, self.neighbor.address), now)
                return
        elif order.kind in (Kind.ANNOUNCE, Kind.WITHDRAW) and result != "lost":
            self._answered_change(order, result == "done", now)
            return
        self._wants_audit = self._wants_audit or result != "done"

    def tick(self, now: float) -> bool:
        """What follows from time alone; whether anything did."""
        if not self.is_audited:
            return False
        is_quiet = self.session.state is SessionState.UP and now - self.session.sent_at >= QUIET_S
        happened = is_quiet and self._settle(now)
        for prefix in [p for p, (_, at) in self.refused.items() if now - at > MEND_S]:
            del self.refused[prefix]
            self._consider(prefix)
        for prefix in [p for p, at in self.gone_at.items() if now - at > FORGET_S]:
            del self.gone_at[prefix]
        return happened

    def audit(self) -> None:
        """Read back what ExaBGP holds, soon."""
        self._wants_audit = True

    # What to do

    def next_order(self, now: float) -> Order | None:
        """The next line for ExaBGP, withdrawals first. The caller sends it and brings the answer."""
        if self._is_auditing or self.session.state is SessionState.UNKNOWN:
            return None
        order = self._audit() if self._wants_audit or not self.is_audited else self._next_change(now)
        if order:
            self._in_flight += 1
        return order

    def _audit(self) -> Order | None:
        if self._in_flight:  # alone, so that its answer is about all of our orders
            return None
        self._wants_audit, self._is_auditing = False, True
        return self._order(Kind.AUDIT, command.show_adj_rib_out(self.neighbor.address))

    def _next_change(self, now: float) -> Order | None:
        address = self.neighbor.address
        if prefixes := self._take(self._to_withdraw, (Kind.WITHDRAW, None)):
            return self._change(Kind.WITHDRAW, prefixes, None, command.withdraw(address, prefixes), now)
        for attributes in list(self._to_announce):
            if prefixes := self._take(self._to_announce[attributes], (Kind.ANNOUNCE, attributes)):
                line = command.announce(address, attributes, prefixes)
                return self._change(Kind.ANNOUNCE, prefixes, attributes, line, now)
            del self._to_announce[attributes]
        if self._in_flight:
            return None
        return self._mend(now) or self._end()

    def _take(self, waiting: dict[str, None], wish: Wish) -> tuple[str, ...]:
        """Prefixes of one family for one line, leaving out those that need something else by now."""
        taken: list[str] = []
        for prefix in list(waiting):
            if self._decide(prefix) != wish:
                del waiting[prefix]
            elif not taken or (":" in prefix) == (":" in taken[0]):
                if taken and prefix in self._singly:
                    break
                taken.append(prefix)
                del waiting[prefix]
                if prefix in self._singly or len(taken) == command.PREFIXES_PER_LINE:
                    break
        return tuple(taken)

    def _mend(self, now: float) -> Order | None:
        """Send everything again, when a path is not on the wire as ExaBGP has it."""
        if not self._wants_flush or now - self._mended_at < MEND_S or self.session.state is not SessionState.UP:
            return None
        self._wants_flush = False
        self._mended_at = now
        self.mended += 1
        self._expect_all(now)
        return self._order(Kind.FLUSH, command.flush(self.neighbor.address))

    def _end(self) -> Order | None:
        """Graceful restart: the router may forget stale routes when all that is wanted has been sent."""
        session = self.session
        left = set(session.families) - session.ended_families
        if not self.neighbor.graceful_restart_s or session.state is not SessionState.UP or not left:
            return None
        if not self.is_settled:
            return None
        family = min(left)
        session.ended_families.add(family)
        return self._order(Kind.END_OF_RIB, command.end_of_rib(self.neighbor.address, family))

    # Looking

    @property
    def is_settled(self) -> bool:
        """Wanted, issued and (while the session is up) the wire agree."""
        if not self.is_audited or self.wanted is None or self.unconfirmed or self.wanted != self.issued:
            return False
        if self.session.state is not SessionState.UP:
            return True
        return self._wire_is_known and self.wire == {p: a for p, a in self.issued.items() if self._is_carried(p)}

    def attracting(self) -> dict[str, float]:
        """Prefix -> until when the router may use it; ``math.inf`` while it may still hold it."""
        return {**self.gone_at, **dict.fromkeys(self._maybe_held(), math.inf)}

    def peer_state(self) -> PeerState:
        session = self.session
        return PeerState(
            name=self.neighbor.name,
            address=self.neighbor.address,
            session=session.state,
            since=session.since,
            flaps=session.flaps,
            last_error=session.last_error,
            families=session.families,
            hold_time_s=session.hold_time_s,
            sent=len(self.wire),
            acknowledged=len(self.issued),
        )

    # Inside

    def _order(self, kind: Kind, line: str, prefixes: tuple[str, ...] = (), wish: Attributes | None = None) -> Order:
        self._orders += 1
        address = self.neighbor.address
        return Order(peer=address, number=self._orders, kind=kind, line=line, prefixes=prefixes, attributes=wish)

    def _change(
        self, kind: Kind, prefixes: tuple[str, ...], attributes: Attributes | None, line: str, now: float
    ) -> Order:
        order = self._order(kind, line, prefixes, attributes)
        for prefix in prefixes:
            self.unconfirmed[prefix] = Change(attributes, now, order.number, is_accepted=False)
        return order

    def _decide(self, prefix: str) -> Wish | None:
        """What this prefix needs now, from the books alone (see the table at the top)."""
        if self.wanted is None or prefix in self.unconfirmed:
            return None
        want, issued = self.wanted.get(prefix), self.issued.get(prefix)
        if want != issued:
            if prefix in self.refused and self.refused[prefix][0] == want:
                return None
            return (Kind.ANNOUNCE, want) if want else (Kind.WITHDRAW, None)
        can_tell = self.session.state is SessionState.UP and self._wire_is_known and self._is_carried(prefix)
        if can_tell and self.wire.get(prefix) != issued:
            return (Kind.FLUSH if issued else Kind.WITHDRAW, None)
        return None

    def _consider(self, prefix: str) -> None:
        match self._decide(prefix):
            case (Kind.WITHDRAW, _):
                self._to_withdraw[prefix] = None
            case (Kind.ANNOUNCE, attributes) if attributes:
                self._to_announce.setdefault(attributes, {})[prefix] = None
            case (Kind.FLUSH, _):
                self._wants_flush = True

    def _consider_all(self) -> None:
        for prefix in {**self.issued, **self.wire, **(self.wanted or {})}:
            self._consider(prefix)

    def _confirm(self, prefix: str, attributes: Attributes | None) -> None:
        change = self.unconfirmed.get(prefix)
        if change and change.attributes == attributes:
            del self.unconfirmed[prefix]
            self._hold(prefix, attributes)
        self._consider(prefix)

    def _hold(self, prefix: str, attributes: Attributes | None) -> None:
        if attributes:
            self.issued[prefix] = attributes
        else:
            self.issued.pop(prefix, None)

    def _answered_change(self, order: Order, is_done: bool, now: float) -> None:
        for prefix in order.prefixes:
            change = self.unconfirmed.get(prefix)
            if change is None or change.order != order.number:
                continue  # the wire was faster than the answer
            if not is_done:
                del self.unconfirmed[prefix]
                if len(order.prefixes) == 1:
                    self.refused[prefix] = (order.attributes, now)
                self._singly.add(prefix)
            else:
                change.is_accepted = True
                self._singly.discard(prefix)
                self._hold(prefix, order.attributes)
                if self.session.state is not SessionState.UP or not self._is_carried(prefix):
                    del self.unconfirmed[prefix]  # no UPDATE will tell; the session's start will
            self._consider(prefix)

    def _audited(self, held: dict[str, Attributes], now: float) -> None:
        """What ExaBGP holds; all of our orders were answered before."""
        self.is_audited = True
        self.issued = held
        if self.session.state is not SessionState.UP:
            self._let_go(now, self._held_before)
        self.unconfirmed = {p: c for p, c in self.unconfirmed.items() if c.attributes == held.get(p)}
        for change in self.unconfirmed.values():
            change.is_accepted = True
        if not self._wire_is_known:
            self._expect_all(now)
        elif self.session.state is SessionState.UP:
            self._expect_the_rest(now)
        self._consider_all()

    def _expect_the_rest(self, now: float) -> None:
        """What ExaBGP holds and has not written yet may be on its way: it gets its time."""
        for prefix, attributes in self.issued.items():
            if self._is_carried(prefix) and self.wire.get(prefix) != attributes:
                self.unconfirmed.setdefault(prefix, Change(attributes, now))

    def _expect_all(self, now: float) -> None:
        """Everything issued will be written, or has been, at an unknown time: nothing is changed meanwhile."""
        for prefix, attributes in self.issued.items():
            if self._is_carried(prefix) and prefix not in self.unconfirmed:
                self.unconfirmed[prefix] = Change(attributes, now)

    def _settle(self, now: float) -> bool:
        """A quiet session has written all it had: what it did not write is not on its way."""
        late = [p for p, c in self.unconfirmed.items() if c.is_accepted and now - c.since >= CONFIRM_S]
        happened = bool(late or self._held_before) or not self._wire_is_known
        if not self._wire_is_known:
            self._wire_is_known = True
            self.wire = {p: a for p, a in self.issued.items() if self._is_carried(p)}
            # What we knew of and ExaBGP no longer holds may be there still: withdrawing it costs nothing.
            self.wire |= dict.fromkeys(self._held_before - self.issued.keys(), UNKNOWN)
            self.unconfirmed = {p: c for p, c in self.unconfirmed.items() if not c.is_accepted}
            self._consider_all()
        for prefix in self._held_before - self.wire.keys():
            self.gone_at[prefix] = now
        self._held_before.clear()
        for prefix in late:
            self.unconfirmed.pop(prefix, None)
            self._consider(prefix)
        return happened

    def _let_go(self, now: float, held: set[str]) -> None:
        """The session has ended; the router may not have noticed, and may wait for a restart."""
        linger_s = (self.session.hold_time_s or self.neighbor.hold_time_s) + self.neighbor.graceful_restart_s
        for prefix in held:
            self.gone_at[prefix] = max(now + linger_s, self.gone_at.get(prefix, 0.0))
        self._held_before.clear()

    def _is_carried(self, prefix: str) -> bool:
        return (6 if ":" in prefix else 4) in self.session.families

    def _maybe_held(self) -> set[str]:
        """What the router holds, or may get at any moment because ExaBGP has it."""
        asked = {prefix for prefix, change in self.unconfirmed.items() if change.attributes}
        return self._held_before | self.wire.keys() | self.issued.keys() | asked
