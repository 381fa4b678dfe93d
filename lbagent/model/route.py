# SPDX-License-Identifier: Apache-2.0
"""What BGP carries: Route and its PathPolicy; Peer and what a session looks like now."""

from dataclasses import dataclass, field, replace
from enum import StrEnum


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class PathPolicy:
    """Attributes of an announcement, named by the operator.

    ``communities`` are ``65001:100``, ``65001:1:2`` (large) or well-known words such as
    ``no-export``. ``peers`` empty: every peer. ``prepend`` repeats the local AS that many times.
    """

    name: str = field(compare=False, default="default")  # BGP does not carry it
    communities: tuple[str, ...] = ()
    local_preference: int | None = None
    med: int | None = None
    prepend: int = 0
    peers: tuple[str, ...] = ()

    def softened(self, by: "PathPolicy") -> "PathPolicy":
        """Made less attractive: communities united, numbers of ``by`` win, prepends add up."""
        return replace(
            self,
            communities=tuple(sorted({*self.communities, *by.communities})),
            local_preference=self.local_preference if by.local_preference is None else by.local_preference,
            med=self.med if by.med is None else by.med,
            prepend=self.prepend + by.prepend,
        )


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Route:
    """A prefix to announce: ``192.0.2.1/32``. ``next_hop`` empty: this host, per session."""

    prefix: str
    policy: PathPolicy = field(default_factory=PathPolicy)
    next_hop: str = ""

    @property
    def family(self) -> int:
        return 6 if ":" in self.prefix else 4

    @property
    def address(self) -> str:
        return self.prefix.partition("/")[0]


class SessionState(StrEnum):
    """``up`` only when ExaBGP says so; ``connected`` is not reliable (facts, ExaBGP 4.5)."""

    UP = "up"
    DOWN = "down"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerState:
    """A session as observed. ``since`` is on the clock of Snapshot.now.

    ``bfd`` is bfdd's word (``up``, ``down``, ``init``), ``unknown`` when it does not answer, empty without BFD.
    """

    name: str
    address: str
    session: SessionState = SessionState.UNKNOWN
    since: float = 0.0
    flaps: int = 0
    last_error: str = ""
    families: tuple[int, ...] = ()
    hold_time_s: int = 0
    sent: int = 0
    acknowledged: int = 0
    bfd: str = ""
