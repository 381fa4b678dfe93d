# SPDX-License-Identifier: Apache-2.0
"""How a packet leaves for a node or a router: interface, MACs, VLAN tags, MTU, kept current.

The kernel program does not look routes up (36 ns, measured); it reads a finished answer, and this
module keeps that answer true. ``Facts`` is the pure half: links, neighbours and routes as last
heard, and ``resolve`` on top of them. ``NextHops`` is the other half: it hears rtnetlink, asks for
the routes of the tracked addresses, and keeps their neighbour entries alive by NTF_USE, with which
the kernel itself resolves, paces and gives up.
"""

import asyncio
import contextlib
import errno
import ipaddress
import socket
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pyroute2 import AsyncIPRoute
from pyroute2.netlink import rtnl
from pyroute2.netlink.exceptions import NetlinkError

from lbagent import log
from lbagent.backoff import Backoff

_LOG = log.get("xdp")
_GROUPS = (
    rtnl.RTMGRP_LINK
    | rtnl.RTMGRP_NEIGH
    | rtnl.RTMGRP_IPV4_ROUTE
    | rtnl.RTMGRP_IPV6_ROUTE
    | rtnl.RTMGRP_IPV4_RULE
    | rtnl.RTMGRP_IPV6_RULE
)
_FIB_MATCH = 0x2000  # RTM_F_FIB_MATCH: the whole route with all its ways, not one hashed choice
_NTF_USE = 0x01
_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000
_UNICAST = 1
_INET, _INET6 = int(socket.AF_INET), int(socket.AF_INET6)
_NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES, errno.ENODEV}  # EINVAL: blackhole
_SO_RCVBUFFORCE = 33
_EVENT_BYTES = 8 << 20  # a thousand neighbours in one breath are 1.5 MB
_PAUSE_S = 0.01
_POKE_S = 1.0  # how often we look for neighbours to poke
_POKES = 64  # at most so many each time: one broadcast per node and second while it is unknown
_AGAIN_S = 30.0  # everything is asked anew this often, should an event have been lost
_LONGEST_WAIT_S = 8.0  # between two pokes of a neighbour that does not answer

NUD_INCOMPLETE, NUD_REACHABLE, NUD_FAILED, NUD_NOARP, NUD_PERMANENT = 0x01, 0x02, 0x20, 0x40, 0x80
NUD_VALID = 0xDE  # permanent, noarp, reachable, probe, stale, delay: there is a MAC to send to

DEFAULT4, DEFAULT6 = "0.0.0.0", "::"
"""Tracked always: the gateways of the default routes."""

Message: TypeAlias = Any  # pyroute2 types nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class NextHop:
    """A resolved way. ``vlans``: ids outer first; ``ifindex`` is the device below them. MTU without tags."""

    ifindex: int
    destination_mac: bytes
    source_mac: bytes
    mtu: int
    vlans: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A network device. ``vlan`` is None unless it is a tag on ``parent``."""

    ifindex: int
    name: str
    mac: bytes
    mtu: int
    is_up: bool
    vlan: int | None = None
    parent: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """One way of a route. ``gateway`` '': the destination is on the segment. ``mtu`` 0: the link's."""

    ifindex: int
    gateway: str = ""
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour entry: NUD state and MAC (empty while unknown)."""

    state: int
    mac: bytes


@dataclass(slots=True)
class Facts:
    """What the kernel last told us. ``interfaces``: names that carry the program."""

    interfaces: frozenset[str]
    link_by_index: dict[int, Link] = field(default_factory=dict)
    neighbour_by_key: dict[tuple[int, str], Neighbour] = field(default_factory=dict)
    ways_by_address: dict[str, tuple[Way, ...]] = field(default_factory=dict)

    def resolve(self, address: str) -> NextHop | str:
        """The way to this address, or what stands in between, in words.

        Of several ways the first that is whole, counted from one that the address itself chooses:
        different nodes spread over equal ways, and a lost link moves only those who used it.
        """
        ways = self.ways_by_address.get(address, ())
        if not ways:
            return "no route"
        first = zlib.crc32(address.encode()) % len(ways)
        complaints = []
        for way in (*ways[first:], *ways[:first]):
            outcome = self._try(way, way.gateway or address)
            if isinstance(outcome, NextHop):
                return outcome
            complaints.append(outcome)
        return "; ".join(dict.fromkeys(complaints))

    def neighbours_of(self, address: str) -> tuple[tuple[int, str], ...]:
        """Keys of the neighbour entries that the ways to this address need."""
        ways = self.ways_by_address.get(address, ())
        return tuple((w.ifindex, w.gateway or address) for w in ways if w.gateway or not _is_default(address))

    def _try(self, way: Way, neighbour_address: str) -> NextHop | str:
        link = self.link_by_index.get(way.ifindex)
        if link is None:
            return f"interface {way.ifindex} is gone"
        vlans: list[int] = []
        device: Link | None = link
        while device is not None and device.vlan is not None:
            vlans.insert(0, device.vlan)
            if not device.is_up:
                break
            device = self.link_by_index.get(device.parent)
        if device is None or not device.is_up:
            return f"link {link.name} is down"
        if device.name not in self.interfaces:
            return f"its route leaves by {device.name}, which is not among xdp.interfaces"
        if len(vlans) > 2:
            return f"{link.name} has more than two VLAN tags"
        neighbour = self.neighbour_by_key.get((way.ifindex, neighbour_address))
        if neighbour is None or not neighbour.state & NUD_VALID or len(neighbour.mac) != 6:
            return f"{neighbour_address} does not answer on {link.name}"
        return NextHop(
            ifindex=device.ifindex,
            destination_mac=neighbour.mac,
            source_mac=link.mac,
            vlans=tuple(vlans),
            mtu=min(link.mtu, way.mtu or link.mtu),
        )


def _is_default(address: str) -> bool:
    return address in (DEFAULT4, DEFAULT6)


# --- from pyroute2's messages to our values ------------------------------------------------------


def link_of(message: Message) -> Link:
    """RTM_NEWLINK."""
    details = message.get_attr("IFLA_LINKINFO")
    vlan = None
    if details is not None and details.get_attr("IFLA_INFO_KIND") == "vlan":
        vlan = int(details.get_attr("IFLA_INFO_DATA").get_attr("IFLA_VLAN_ID"))
    return Link(
        ifindex=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        mac=_mac(message.get_attr("IFLA_ADDRESS")),
        mtu=message.get_attr("IFLA_MTU") or 0,
        is_up=message["flags"] & (_IFF_UP | _IFF_LOWER_UP) == _IFF_UP | _IFF_LOWER_UP,
        vlan=vlan,
        parent=message.get_attr("IFLA_LINK") or 0,
    )


def neighbour_of(message: Message) -> tuple[tuple[int, str], Neighbour] | None:
    """RTM_NEWNEIGH, RTM_DELNEIGH -> key and entry; None for what is no IP neighbour (bridge tables)."""
    address = message.get_attr("NDA_DST")
    if address is None:
        return None
    entry = Neighbour(message["state"], _mac(message.get_attr("NDA_LLADDR")))
    return (message["ifindex"], str(ipaddress.ip_address(address))), entry


def ways_of(message: Message) -> tuple[Way, ...]:
    """RTM_NEWROUTE -> its ways in a stable order; none unless it is a unicast route."""
    if message["type"] != _UNICAST:
        return ()
    metrics = message.get_attr("RTA_METRICS")
    mtu = (metrics.get_attr("RTAX_MTU") if metrics is not None else 0) or 0
    hops = message.get_attr("RTA_MULTIPATH") or [message]
    ways = [Way(_oif(hop), _gateway(hop), mtu) for hop in hops]
    return tuple(sorted(ways, key=lambda way: (way.ifindex, way.gateway)))


def covers(message: Message, address: str) -> bool:
    """Whether this route's prefix holds the address."""
    family = 4 if message["family"] == _INET else 6
    if (6 if ":" in address else 4) != family:
        return False
    if _is_default(address):
        return bool(message["dst_len"] == 0)
    prefix = message.get_attr("RTA_DST") or (DEFAULT4 if family == 4 else DEFAULT6)
    network = ipaddress.ip_network(f"{prefix}/{message['dst_len']}", strict=False)
    return ipaddress.ip_address(address) in network


def _mac(text: str | None) -> bytes:
    return bytes.fromhex(text.replace(":", "")) if text else b""


def _oif(hop: Message) -> int:
    return int(hop["oif"] if "oif" in hop else hop.get_attr("RTA_OIF") or 0)


def _gateway(hop: Message) -> str:
    via = hop.get_attr("RTA_VIA")
    gateway = via["addr"] if via is not None else hop.get_attr("RTA_GATEWAY")
    return str(ipaddress.ip_address(gateway)) if gateway else ""


# --- the half that talks to the kernel -----------------------------------------------------------


class NextHops:
    """Next hops of the tracked addresses, current while ``run`` runs.

    The state is ``facts`` and two sets: what is tracked, and whose routes must be asked (``_stale``).
    """

    def __init__(self, interfaces: Iterable[str]) -> None:
        self.facts = Facts(interfaces=frozenset(interfaces))
        self._tracked = frozenset({DEFAULT4, DEFAULT6})
        self._stale = set(self._tracked)
        self._work = asyncio.Event()
        self._moved = asyncio.Event()
        self._silence_by_key: dict[tuple[int, str], _Silence] = {}
        self._is_crowded = False  # said once

    def track(self, addresses: frozenset[str]) -> None:
        """Keep next hops for exactly these addresses (and the default routes)."""
        tracked = addresses | {DEFAULT4, DEFAULT6}
        if tracked == self._tracked:
            return
        for gone in self._tracked - tracked:
            self.facts.ways_by_address.pop(gone, None)
        self._stale |= tracked - self._tracked
        self._tracked = tracked
        self._work.set()

    def hops(self) -> Mapping[str, NextHop]:
        """Every tracked address that can be reached now, with its way."""
        outcomes = ((address, self.facts.resolve(address)) for address in sorted(self._tracked))
        return {address: hop for address, hop in outcomes if isinstance(hop, NextHop)}

    def concluded(self) -> frozenset[str]:
        """Tracked addresses about which everything has been heard: reachable, or not."""
        facts = self.facts

        def is_heard(key: tuple[int, str]) -> bool:
            neighbour = facts.neighbour_by_key.get(key)
            return neighbour is not None and neighbour.state != NUD_INCOMPLETE

        return frozenset(
            address
            for address in self._tracked & facts.ways_by_address.keys()
            if all(map(is_heard, facts.neighbours_of(address)))
        )

    def obstacle(self, address: str) -> str:
        """Why a tracked address cannot be reached, '' when it can."""
        outcome = self.facts.resolve(address)
        return outcome if isinstance(outcome, str) else ""

    async def run(self, changed: Callable[[], None]) -> None:
        """Follow the kernel for ever; ``changed`` is called after facts have moved.

        A lost event socket (ENOBUFS) is nothing but a reason to ask everything anew.
        """
        backoff = Backoff(first_s=0.1, cap_s=5.0)
        while True:
            try:
                async with AsyncIPRoute() as ears, AsyncIPRoute() as mouth:
                    with contextlib.suppress(PermissionError):  # else what net.core.rmem_max allows
                        ears.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BYTES)
                    await ears.bind(_GROUPS)
                    await self._ask_everything(mouth)
                    backoff.succeeded()
                    self._moved.set()
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._listen(ears))
                        group.create_task(self._look_up(mouth))
                        group.create_task(self._keep_alive(mouth))
                        group.create_task(self._tell(changed))
            except* (NetlinkError, OSError) as lost:
                _LOG.warning("rtnetlink lost, asking anew", error=str(lost.exceptions[0]))
                await asyncio.sleep(backoff.failed())

    async def _ask_everything(self, mouth: AsyncIPRoute) -> None:
        self.facts.link_by_index = {m["index"]: link_of(m) async for m in await mouth.link("dump")}
        entries = [neighbour_of(m) async for m in await mouth.neigh("dump")]
        self.facts.neighbour_by_key = dict(entry for entry in entries if entry is not None)
        self._stale = set(self._tracked)
        await self._ask_routes(mouth)

    async def _ask_routes(self, mouth: AsyncIPRoute) -> None:
        """Ask the routes of every stale address and poke neighbours that are needed and unknown."""
        while self._stale:
            address = self._stale.pop()
            ways = await self._routes_of(mouth, address)
            if address not in self._tracked:
                continue
            self.facts.ways_by_address[address] = ways
            for key in self.facts.neighbours_of(address):
                if key not in self.facts.neighbour_by_key:
                    await self._poke(mouth, key)

    async def _routes_of(self, mouth: AsyncIPRoute, address: str) -> tuple[Way, ...]:
        family = _INET6 if ":" in address else _INET
        if _is_default(address):
            defaults = [m async for m in await mouth.route("dump", family=family, dst_len=0, table=254)]
            defaults = [m for m in defaults if m["dst_len"] == 0 and ways_of(m)]
            best = min(defaults, key=lambda m: m.get_attr("RTA_PRIORITY") or 0, default=None)
            return ways_of(best) if best is not None else ()
        try:
            answers = await mouth.route("get", dst=address, flags=_FIB_MATCH)
        except NetlinkError as error:
            if error.code in _NO_ROUTE:
                return ()
            raise
        return ways_of(answers[0])

    async def _listen(self, ears: AsyncIPRoute) -> None:
        while True:
            async for message in ears.get():
                if self._hear(message):
                    self._moved.set()
            if self._stale:
                self._work.set()

    async def _tell(self, changed: Callable[[], None]) -> None:
        """The first move at once, those that follow together: a thousand nodes may move within a second."""
        clock = asyncio.get_running_loop().time
        while True:
            await self._moved.wait()
            self._moved.clear()
            started = clock()
            changed()
            await asyncio.sleep(max(_PAUSE_S, 3 * (clock() - started)))

    def _hear(self, message: Message) -> bool:
        """Take an event in -> whether a link or a neighbour moved."""
        facts = self.facts
        match message["event"]:
            case "RTM_NEWLINK" | "RTM_DELLINK" as event:
                # The kernel flushes the IPv4 routes of a link that goes down without a word.
                self._stale |= self._tracked
                if event == "RTM_DELLINK":
                    return facts.link_by_index.pop(message["index"], None) is not None
                link = link_of(message)
                moved = facts.link_by_index.get(link.ifindex) != link
                facts.link_by_index[link.ifindex] = link
                return moved
            case "RTM_NEWNEIGH" | "RTM_DELNEIGH" as event:
                found = neighbour_of(message)
                if found is None:
                    return False
                key, entry = found
                before = facts.neighbour_by_key.pop(key, None)
                if event == "RTM_NEWNEIGH":
                    facts.neighbour_by_key[key] = entry
                    return before is None or _usable(before) != _usable(entry)
                return before is not None
            case "RTM_NEWROUTE" | "RTM_DELROUTE":
                self._stale |= {address for address in self._tracked if covers(message, address)}
            case "RTM_NEWRULE" | "RTM_DELRULE":
                self._stale |= self._tracked
        return False

    async def _look_up(self, mouth: AsyncIPRoute) -> None:
        while True:
            try:
                async with asyncio.timeout(_AGAIN_S):
                    await self._work.wait()
            except TimeoutError:
                self._stale |= self._tracked
            self._work.clear()
            await self._ask_routes(mouth)
            self._moved.set()

    async def _keep_alive(self, mouth: AsyncIPRoute) -> None:
        """Make the kernel confirm what it only believes: one unicast each half minute per neighbour.

        A neighbour that does not answer is asked ever more rarely, up to every 8 s.
        """
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_POKE_S)
            now = clock()
            needed = {key for address in self._tracked for key in self.facts.neighbours_of(address)}
            self._silence_by_key = {key: s for key, s in self._silence_by_key.items() if key in needed}
            due = [key for key in sorted(needed) if self._is_due(key, now)]
            due.sort(key=lambda key: self._silence_by_key[key].next)
            for key in due[:_POKES]:
                silence = self._silence_by_key[key]
                silence.wait_s = min(2 * silence.wait_s, _LONGEST_WAIT_S)
                silence.next = now + silence.wait_s
                await self._poke(mouth, key)

    def _is_due(self, key: tuple[int, str], now: float) -> bool:
        neighbour = self.facts.neighbour_by_key.get(key)
        if neighbour is not None and neighbour.state & (NUD_REACHABLE | NUD_PERMANENT | NUD_NOARP):
            self._silence_by_key.pop(key, None)
            return False
        return self._silence_by_key.setdefault(key, _Silence(now, _POKE_S)).next <= now

    async def _poke(self, mouth: AsyncIPRoute, key: tuple[int, str]) -> None:
        """As if the kernel itself had a packet for that neighbour."""
        ifindex, address = key
        family = _INET6 if ":" in address else _INET
        try:
            await mouth.neigh("replace", family=family, dst=address, ifindex=ifindex, flags=_NTF_USE, state=0)
        except NetlinkError as error:
            if error.code == errno.ENOBUFS and not self._is_crowded:
                self._is_crowded = True
                hint = f"sysctl net.{'ipv6' if family == _INET6 else 'ipv4'}.neigh.default.gc_thresh3: 4 × the nodes"
                _LOG.error("the kernel has no room for our neighbours", hint=hint)
            _LOG.debug("neighbour not poked", address=address, ifindex=ifindex, error=str(error))


@dataclass(slots=True)
class _Silence:
    next: float
    wait_s: float


def _usable(neighbour: Neighbour) -> tuple[bool, bool, bytes]:
    """What of a neighbour matters: whether it can be reached, whether we know it cannot, and where."""
    return bool(neighbour.state & NUD_VALID), bool(neighbour.state & NUD_FAILED), neighbour.mac
