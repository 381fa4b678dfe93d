# SPDX-License-Identifier: Apache-2.0
"""ExaBGP's language, pure: what we say to it (lines), and what it says (events, adj-rib-out) as values.

Everything is explicit in a command: next hop, AS path, local preference. So what ExaBGP says it put
on the wire is equal to what we asked for, attribute by attribute, and nothing depends on its defaults
(its ``next-hop self`` silently becomes the router id when families are mixed).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lbagent.config import Bgp, Family, Peer
from lbagent.model.route import PathPolicy, Route

PREFIXES_PER_LINE = 45  # measured: with two lines unanswered this is the fastest, 10,000 routes in 0.9 s
LINE_LIMIT = 4000  # the relay refuses lines that do not fit into one atomic write (4096 bytes)
DEFAULT_LOCAL_PREFERENCE = 100

NUMBER_BY_WORD = {
    "graceful-shutdown": "65535:0",
    "blackhole": "65535:666",
    "no-export": "65535:65281",
    "no-advertise": "65535:65282",
    "no-export-subconfed": "65535:65283",
}
WORD_BY_NUMBER = {number: word for word, number in NUMBER_BY_WORD.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """A path as one session carries it. ``communities`` are numbers, sorted; large ones have three parts.

    ``local_preference`` is None on eBGP sessions, where it does not travel.
    """

    next_hop: str
    as_path: tuple[int, ...] = ()
    communities: tuple[str, ...] = ()
    local_preference: int | None = None
    med: int | None = None

    def __str__(self) -> str:
        standard = [text for text in self.communities if text.count(":") == 1]
        large = [text for text in self.communities if text.count(":") == 2]
        words = [f"next-hop {self.next_hop} origin igp"]
        if self.as_path:
            words.append(f"as-path [ {' '.join(map(str, self.as_path))} ]")
        if self.local_preference is not None:
            words.append(f"local-preference {self.local_preference}")
        if self.med is not None:
            words.append(f"med {self.med}")
        if standard:
            words.append(f"community [ {' '.join(standard)} ]")
        if large:
            words.append(f"large-community [ {' '.join(large)} ]")
        return " ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbor:
    """A configured peer as far as routes are concerned; defaults filled in."""

    name: str
    address: str
    local_as: int
    peer_as: int
    next_hop_by_family: Mapping[int, str]
    hold_time_s: int
    graceful_restart_s: int = 0
    max_routes: int = 0

    @classmethod
    def of(cls, bgp: Bgp, peer: Peer) -> "Neighbor":
        explicit = {Family.IPV4: peer.next_hop.ipv4, Family.IPV6: peer.next_hop.ipv6}
        return cls(
            name=peer.name,
            address=peer.address,
            local_as=peer.local_as or bgp.local_as,
            peer_as=peer.peer_as,
            next_hop_by_family={
                int(family.value[-1]): explicit[family] or peer.local_address for family in peer.announced_families
            },
            hold_time_s=bgp.hold_time_s if peer.hold_time_s is None else peer.hold_time_s,
            graceful_restart_s=peer.graceful_restart_s,
            max_routes=peer.max_routes,
        )

    @property
    def is_internal(self) -> bool:
        return self.local_as == self.peer_as


def paths(routes: Iterable[Route], neighbor: Neighbor) -> dict[str, Attributes]:
    """What this neighbor should hold, by prefix: its families, its policies, at most ``max_routes``.

    Beyond ``max_routes`` the highest prefixes are left out: a router that parks the whole session
    (maximum-prefix) would cost every route. Several routes for one prefix must not be given; the last wins.
    """
    attributes_by_choice: dict[tuple[PathPolicy, str, int], Attributes] = {}
    wanted: dict[str, Attributes] = {}
    for route in sorted(routes, key=lambda route: route.prefix):
        policy, family = route.policy, route.family
        if family not in neighbor.next_hop_by_family or (policy.peers and neighbor.name not in policy.peers):
            continue
        choice = (policy, route.next_hop, family)
        if choice not in attributes_by_choice:
            attributes_by_choice[choice] = _attributes(policy, route.next_hop, family, neighbor)
        wanted[route.prefix] = attributes_by_choice[choice]
        if len(wanted) == neighbor.max_routes:
            break
    return wanted


def _attributes(policy: PathPolicy, next_hop: str, family: int, neighbor: Neighbor) -> Attributes:
    preference = policy.local_preference
    # ExaBGP takes the AS path as the whole path: on eBGP our own AS comes first even without prepending.
    # On iBGP nothing is prepended: a router refuses a path that holds its own AS.
    repeat = 0 if neighbor.is_internal else 1 + policy.prepend
    return Attributes(
        next_hop=next_hop or neighbor.next_hop_by_family[family],
        as_path=(neighbor.local_as,) * repeat,
        communities=tuple(sorted({NUMBER_BY_WORD.get(text, text) for text in policy.communities})),
        local_preference=(DEFAULT_LOCAL_PREFERENCE if preference is None else preference)
        if neighbor.is_internal
        else None,
        med=policy.med,
    )


def routes(paths_by_neighbor: Iterable[tuple[Neighbor, Mapping[str, Attributes]]]) -> frozenset[Route]:
    """The routes that would have led to these paths: what an agent adopts after its restart.

    Exact up to what BGP does not carry (names of policies, a local preference towards eBGP peers).
    """
    known = list(paths_by_neighbor)
    found: dict[str, list[tuple[Neighbor, Attributes]]] = {}
    for neighbor, path_by_prefix in known:
        for prefix, attributes in path_by_prefix.items():
            found.setdefault(prefix, []).append((neighbor, attributes))
    return frozenset(_route(prefix, holders, [neighbor for neighbor, _ in known]) for prefix, holders in found.items())


def _route(prefix: str, holders: list[tuple[Neighbor, Attributes]], neighbors: list[Neighbor]) -> Route:
    family = 6 if ":" in prefix else 4
    # An internal peer knows more than an external one.
    neighbor, attributes = max(holders, key=lambda holder: holder[0].is_internal)
    could = {n.name for n in neighbors if family in n.next_hop_by_family}
    names = {n.name for n, _ in holders}
    preference = attributes.local_preference
    return Route(
        prefix=prefix,
        next_hop="" if attributes.next_hop == neighbor.next_hop_by_family.get(family) else attributes.next_hop,
        policy=PathPolicy(
            name="adopted",
            communities=tuple(sorted(WORD_BY_NUMBER.get(text, text) for text in attributes.communities)),
            local_preference=None if preference == DEFAULT_LOCAL_PREFERENCE else preference,
            med=attributes.med,
            prepend=max(0, *(len(attributes.as_path) - 1 for _, attributes in holders)),
            peers=() if names == could else tuple(sorted(names)),
        ),
    )


# --- lines for ExaBGP -------------------------------------------------------------------------------


def announce(address: str, attributes: Attributes, prefixes: Iterable[str]) -> str:
    """One line for at most PREFIXES_PER_LINE prefixes of one family that share their attributes."""
    return f"neighbor {address} announce attributes {attributes} nlri {' '.join(prefixes)}"


def withdraw(address: str, prefixes: Iterable[str]) -> str:
    """The next hop is demanded by the grammar and has no meaning; ExaBGP matches the prefix only."""
    prefixes = list(prefixes)
    next_hop = "::" if ":" in prefixes[0] else "0.0.0.0"
    return f"neighbor {address} withdraw attributes next-hop {next_hop} nlri {' '.join(prefixes)}"


def flush(address: str) -> str:
    """Send everything again: the way to mend a path that the router does not hold."""
    return f"neighbor {address} flush adj-rib out"


def end_of_rib(address: str, family: int) -> str:
    return f"neighbor {address} announce eor ipv{family} unicast"


def show_adj_rib_out(address: str) -> str:
    return f"show adj-rib out {address} extensive"


# --- what ExaBGP says -------------------------------------------------------------------------------


def read_adj_rib_out(lines: Iterable[str], address: str) -> dict[str, Attributes]:
    """Paths by prefix of that neighbor; ExaBGP also lists neighbors whose address begins the same."""
    found: dict[str, Attributes] = {}
    for line in lines:
        words = line.split()
        if words[:2] == ["neighbor", address] and "unicast" in words:
            at = words.index("unicast")
            found[words[at + 1]] = _read_attributes(" ".join(words[at + 2 :]))
    return found


@lru_cache(maxsize=1024)
def _read_attributes(text: str) -> Attributes:
    value_by_word: dict[str, list[str]] = {}
    word = ""
    for token in text.split():
        if token in ("[", "]", "(", ")"):
            continue
        if token in ("next-hop", "origin", "as-path", "local-preference", "med", "community", "large-community"):
            word = token
            value_by_word[word] = []
        elif word:
            value_by_word[word].append(token)
    communities = value_by_word.get("community", []) + value_by_word.get("large-community", [])
    return Attributes(
        next_hop="".join(value_by_word.get("next-hop", [])),
        as_path=tuple(int(token) for token in value_by_word.get("as-path", [])),
        communities=tuple(sorted(NUMBER_BY_WORD.get(token, token) for token in communities)),
        local_preference=_number(value_by_word.get("local-preference")),
        med=_number(value_by_word.get("med")),
    )


def _number(tokens: list[str] | None) -> int | None:
    return int(tokens[0]) if tokens else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Up:
    """The session is established; ExaBGP now sends its adj-rib-out again, then End-of-RIB."""

    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Down:
    """The session ended."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Negotiated:
    """What both sides agreed on, told just before Up."""

    peer: str
    families: tuple[int, ...]
    hold_time_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """An UPDATE was written to the peer."""

    peer: str
    announced: Mapping[str, Attributes]
    withdrawn: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndOfRib:
    """End-of-RIB was written to the peer."""

    peer: str
    family: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Notified:
    """A NOTIFICATION was received: why the peer closes, in words."""

    peer: str
    text: str


Event = Up | Down | Negotiated | Sent | EndOfRib | Notified


def read_event(event: Mapping[str, Any]) -> Iterator[Event]:
    """ExaBGP's JSON -> values; events that do not concern us give nothing. Raises KeyError and the like on nonsense."""
    neighbor = event.get("neighbor")
    if neighbor is None:
        return
    peer = neighbor["address"]["peer"]
    kind = event["type"]
    if kind == "state" and neighbor["state"] == "up":
        yield Up(peer=peer)
    elif kind == "state" and neighbor["state"] == "down":
        yield Down(peer=peer, reason=_down_reason(neighbor.get("reason", "")))
    elif kind == "negotiated":
        agreed = neighbor["negotiated"]
        families = tuple(sorted(_family(text) for text in agreed["families"] if text.endswith(" unicast")))
        yield Negotiated(peer=peer, families=families, hold_time_s=int(agreed["hold_time"]))
    elif kind == "notification" and neighbor.get("direction") == "receive":
        told = neighbor["notification"]
        words = told.get("message", "") if str(told.get("message", "")).startswith("Shutdown") else ""
        yield Notified(peer=peer, text=" ".join([_cause(int(told["code"]), int(told["subcode"])), words]).strip())
    elif kind == "update" and neighbor.get("direction") == "send":
        yield from _read_update(peer, neighbor["message"])


def _read_update(peer: str, message: Mapping[str, Any]) -> Iterator[Event]:
    if "eor" in message:
        yield EndOfRib(peer=peer, family=_family(message["eor"]["afi"]))
        return
    update = message["update"]
    announced: dict[str, Attributes] = {}
    for prefixes_by_hop in update.get("announce", {}).values():
        for next_hop, entries in prefixes_by_hop.items():
            attributes = _sent_attributes(update.get("attribute", {}), next_hop)
            announced.update({entry["nlri"]: attributes for entry in entries})
    withdrawn = tuple(entry["nlri"] for entries in update.get("withdraw", {}).values() for entry in entries)
    yield Sent(peer=peer, announced=announced, withdrawn=withdrawn)


def _sent_attributes(attribute: Mapping[str, Any], next_hop: str) -> Attributes:
    segments = attribute.get("as-path", {})
    communities = [*attribute.get("community", ()), *attribute.get("large-community", ())]
    return Attributes(
        next_hop=next_hop,
        as_path=tuple(asn for index in sorted(segments, key=int) for asn in segments[index]["value"]),
        communities=tuple(sorted(":".join(map(str, parts)) for parts in communities)),
        local_preference=attribute.get("local-preference"),
        med=attribute.get("med"),
    )


def _family(text: str) -> int:
    return {"ipv4": 4, "ipv6": 6}[text.split()[0]]


_CAUSES = {
    (1,): "message header error",
    (2, 2): "wrong AS number",
    (2, 3): "bad router id",
    (2, 6): "unacceptable hold time",
    (2,): "OPEN refused",
    (3,): "UPDATE refused",
    (4,): "hold timer expired",
    (5,): "protocol state error",
    (6, 1): "maximum number of prefixes reached",
    (6, 2): "administrative shutdown",
    (6, 3): "peer de-configured",
    (6, 4): "administrative reset",
    (6, 5): "connection rejected",
    (6, 6): "other configuration change",
    (6, 7): "connection collision",
    (6, 8): "out of resources",
    (6, 9): "hard reset",
    (6, 10): "BFD down",
    (6,): "cease",
}
"""NOTIFICATION codes that an operator meets (RFC 4271 4.5, RFC 4486, RFC 8538, RFC 9384)."""


def _cause(code: int, subcode: int) -> str:
    cause = _CAUSES.get((code, subcode)) or _CAUSES.get((code,), "unknown cause")
    return f"{cause} (NOTIFICATION {code}/{subcode})"


def _down_reason(reason: str) -> str:
    """``notification sent (4,0)`` in words; other reasons of ExaBGP are words already."""
    match = re.search(r"notification (sent|received) \((\d+),(\d+)\)", reason)
    if not match:
        return reason
    who = "we closed" if match[1] == "sent" else "the peer closed"
    return f"{who}: {_cause(int(match[2]), int(match[3]))}"
