# SPDX-License-Identifier: Apache-2.0
"""How a row of a packet table is written and checked.

A Row says: in this state (``given``) this packet (``packet``) has this verdict and leaves like that
(``out``, checksums computed anew by Scapy), and afterwards this holds (``then``). Rows are written
once and run for both families. Every row is also tried out first, and a trial leaves no trace.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
)
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from lbagent.xdp import codec
from lbagent.xdp.settings import NAT_STATES
from lbagent.xdp.verdict import Verdict
from tests.ebpf import world as w
from tests.ebpf.world import World


@dataclass
class Scene:
    """One family's view of the world, and the NAT flow that was opened last."""

    world: World
    v6: bool
    snat: str = ""
    slot: int = 0
    node: int = 1

    @property
    def vip(self) -> str:
        return w.VIP6 if self.v6 else w.VIP4

    @property
    def client(self) -> str:
        return w.CLIENT6 if self.v6 else w.CLIENT4

    @property
    def stranger(self) -> str:
        return "2001:db8:d::9" if self.v6 else "198.51.100.9"

    @property
    def nodes(self) -> dict[int, str]:
        return w.NODE6 if self.v6 else w.NODE4

    def ip(self, source: str, destination: str, *, ttl: int = 64, tos: int = 0) -> Packet:
        if self.v6:
            return IPv6(src=source, dst=destination, hlim=ttl, tc=tos)
        return IP(src=source, dst=destination, ttl=ttl, tos=tos, id=0)

    def to_vip(
        self,
        port: int,
        *,
        proto: type[Packet] = TCP,
        flags: str = "S",
        sport: int = 40000,
        ttl: int = 64,
        source: str = "",
        payload: bytes = b"hello",
        vip: str = "",
        tos: int = 0,
        **fields: object,
    ) -> Packet:
        """From the client, over router 1."""
        upper = TCP(sport=sport, dport=port, flags=flags, seq=100, ack=200, **fields) if proto is TCP else None
        upper = upper or UDP(sport=sport, dport=port, **fields)
        ip = self.ip(source or self.client, vip or self.vip, ttl=ttl, tos=tos)
        return Ether(src=w.ROUTER1, dst=w.LB_CLIENTS) / ip / upper / Raw(payload)

    def to_node(
        self, port: int, *, proto: type[Packet] = TCP, flags: str = "S", ttl: int = 63, node: int = 0, **kw: object
    ) -> Packet:
        """The same in mode nat, as it leaves for the node: from the SNAT address and the slot's port."""
        packet = self.to_vip(port, proto=proto, flags=flags, ttl=ttl, **kw)
        packet[Ether].src, packet[Ether].dst = w.LB_NODES, w.NODE[node or self.node]
        layer = packet[IPv6 if self.v6 else IP]
        layer.src, layer.dst = self.snat, self.nodes[node or self.node]
        packet[proto].sport, packet[proto].dport = self.slot, 30000 + port
        return packet

    def reply(
        self,
        port: int,
        *,
        proto: type[Packet] = TCP,
        flags: str = "SA",
        ttl: int = 64,
        node: int = 0,
        payload: bytes = b"world",
    ) -> Packet:
        """What the node answers."""
        number = node or self.node
        upper = TCP(sport=30000 + port, dport=self.slot, flags=flags, seq=1, ack=2) if proto is TCP else None
        upper = upper or UDP(sport=30000 + port, dport=self.slot)
        ip = self.ip(self.nodes[number], self.snat, ttl=ttl)
        return Ether(src=w.NODE[number], dst=w.LB_NODES) / ip / upper / Raw(payload)

    def to_client(
        self,
        port: int,
        *,
        proto: type[Packet] = TCP,
        flags: str = "SA",
        sport: int = 40000,
        ttl: int = 63,
        router: str = w.ROUTER1,
        payload: bytes = b"world",
    ) -> Packet:
        """The same as it leaves for the client."""
        upper = TCP(sport=port, dport=sport, flags=flags, seq=1, ack=2) if proto is TCP else None
        upper = upper or UDP(sport=port, dport=sport)
        return Ether(src=w.LB_CLIENTS, dst=router) / self.ip(self.vip, self.client, ttl=ttl) / upper / Raw(payload)

    def send(self, packet: Packet, ifindex: int = w.CLIENTS) -> w.Outcome:
        return self.world.send(bytes(packet), ifindex)

    def learn(self, outcome: w.Outcome) -> None:
        """Remember SNAT address, port and node of what left."""
        assert outcome.verdict is Verdict.NAT_FORWARD, outcome.verdict
        packet = Ether(outcome.packet)
        layer = packet[IPv6 if self.v6 else IP]
        self.snat, self.slot = layer.src, layer.payload.sport
        self.node = next(n for n, a in self.nodes.items() if a == layer.dst)

    def open(self, port: int, *, proto: type[Packet] = TCP, **kw: object) -> None:
        """The first packet of a NAT flow."""
        self.learn(self.send(self.to_vip(port, proto=proto, **kw)))

    def establish(self, port: int, **kw: object) -> None:
        """The whole handshake of a NAT flow."""
        self.open(port, **kw)
        assert self.send(self.reply(port), w.NODES).verdict is Verdict.NAT_REPLY
        assert self.send(self.to_vip(port, flags="A", **kw)).verdict is Verdict.NAT_FORWARD

    def nat_state(self) -> str:
        """Of the flow that was opened last."""
        number = [*w.SNAT4, *w.SNAT6].index(self.snat)
        slot = self.slot - w.PORT_FIRST
        at = ((number << self.world.sizes.nat_shift + 2) + slot) * codec.NAT_ENTRY.size
        _, _, _, life = codec.NAT_ENTRY.unpack_from(self.world.memory["lb_nat"], at)
        return NAT_STATES[life & 0xF]

    def dsr_flows(self) -> int:
        return sum(self.world.counters.dsr_flows().values())

    def nat_flows(self) -> int:
        return sum(self.world.counters.nat_flows().values())


Act = Callable[[Scene], object]
Make = Callable[[Scene], Packet]


@dataclass
class Row:
    """One line of a table. ``out`` None: a drop, or a pass, which leaves the packet as it was."""

    title: str
    packet: Make
    verdict: Verdict
    out: Make | None = None
    given: Act | None = None
    then: Act | None = None
    arrives: int = w.CLIENTS
    families: tuple[int, ...] = (4, 6)
    learns: bool = field(default=False, kw_only=True)  # out depends on the slot this packet gets


def rows(table: Iterable[Row]) -> pytest.MarkDecorator:
    """Parametrise a test by a table, for each family."""
    params = [pytest.param(row, family, id=f"IPv{family}: {row.title}") for row in table for family in row.families]
    return pytest.mark.parametrize(("row", "family"), params)


def check(world: World, row: Row, family: int) -> None:
    scene = Scene(world, family == 6)
    if row.given:
        row.given(scene)
    packet = bytes(row.packet(scene))
    before = world.trace()
    tried = world.try_out(packet)
    assert world.trace() == before, "a trial left a trace"
    outcome = world.send(packet, row.arrives)
    assert outcome.verdict is row.verdict
    assert tried.verdict is row.verdict, "a trial decides otherwise"
    if row.learns:
        scene.learn(outcome)
    if row.out is not None:
        wanted = row.out(scene)
        assert_same(outcome.packet, wanted)
        tx = wanted[Ether].src == (w.LB_CLIENTS if row.arrives == w.CLIENTS else w.LB_NODES)
        assert outcome.action == ("tx" if tx else "redirect")
    elif row.verdict.is_drop:
        assert outcome.action == "drop"
    elif not row.verdict.is_forward and row.verdict <= Verdict.NO_SLOT:
        assert outcome.action == "pass"
        assert outcome.packet == packet, "what is not ours stays as it was"
    if row.then:
        held = row.then(scene)
        assert held is None or held is True, held


def assert_same(got: bytes, wanted: Packet) -> None:
    """Byte by byte; Scapy computes the wanted checksums."""
    built = bytes(wanted)
    if got != built:
        assert Ether(got).show2(dump=True) == Ether(built).show2(dump=True)
    assert got == built


__all__ = [
    "ICMP",
    "IP",
    "TCP",
    "UDP",
    "Dot1AD",
    "Dot1Q",
    "Ether",
    "ICMPv6DestUnreach",
    "ICMPv6EchoReply",
    "ICMPv6EchoRequest",
    "ICMPv6PacketTooBig",
    "ICMPv6TimeExceeded",
    "IPv6",
    "Raw",
    "Row",
    "Scene",
    "Verdict",
    "assert_same",
    "check",
    "rows",
    "w",
]
