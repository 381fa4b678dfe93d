# SPDX-License-Identifier: Apache-2.0
"""ICMP: pings are answered here, errors follow the flow they quote, in both directions."""

import pytest
from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6ParamProblem
from scapy.packet import Packet

from tests.ebpf.scene import (
    ICMP,
    TCP,
    UDP,
    Ether,
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
    Raw,
    Row,
    Scene,
    Verdict,
    check,
    rows,
    w,
)  # fmt: skip
from tests.ebpf.test_dsr import by_mac
from tests.ebpf.test_nat import tagged
from tests.ebpf.world import World

pytestmark = pytest.mark.bpf


def ping(scene: Scene, *, payload: bytes = b"abcdefgh", ttl: int = 64, target: str = "") -> Packet:
    head = Ether(src=w.ROUTER1, dst=w.LB_CLIENTS) / scene.ip(scene.client, target or scene.vip, ttl=ttl)
    if scene.v6:
        return head / ICMPv6EchoRequest(id=7, seq=3, data=payload)
    return head / ICMP(type=8, id=7, seq=3) / Raw(payload)


def pong(scene: Scene, *, payload: bytes = b"abcdefgh") -> Packet:
    head = Ether(src=w.LB_CLIENTS, dst=w.ROUTER1) / scene.ip(scene.vip, scene.client)
    if scene.v6:
        return head / ICMPv6EchoReply(id=7, seq=3, data=payload)
    return head / ICMP(type=0, id=7, seq=3) / Raw(payload)


def router_of(scene: Scene) -> str:
    return "2001:db8:e::1" if scene.v6 else "198.51.100.1"


def error(scene: Scene, kind: str) -> Packet:
    """The head of an ICMP error."""
    if scene.v6:
        by_kind = {
            "too big": ICMPv6PacketTooBig(mtu=1400),
            "unreachable": ICMPv6DestUnreach(code=4),
            "time": ICMPv6TimeExceeded(),
            "parameter": ICMPv6ParamProblem(code=1),
        }
    else:
        by_kind = {
            "too big": ICMP(type=3, code=4, nexthopmtu=1400),
            "unreachable": ICMP(type=3, code=1),
            "time": ICMP(type=11),
            "parameter": ICMP(type=12),
        }
    return by_kind[kind]


def quoting(scene: Scene, kind: str, quoted: Packet, *, source: str, destination: str, ether: Ether, ttl: int = 64,
            length: int | None = None) -> Packet:  # fmt: skip
    """An ICMP error about a packet, of which it shows the first bytes."""
    shown = bytes(quoted[Ether].payload)
    shown = shown[: length or ((40 if scene.v6 else 20) + 28)]
    return ether / scene.ip(source, destination, ttl=ttl) / error(scene, kind) / Raw(shown)


def about_reply(scene: Scene, port: int, kind: str, *, proto: type[Packet] = TCP, ttl: int = 64, **kw: int) -> Packet:
    """From a router on the way to the client, about what it got from the VIP."""
    quoted = scene.to_client(port, proto=proto, flags="A", ttl=40)
    return quoting(scene, kind, quoted, source=router_of(scene), destination=scene.vip,
                   ether=Ether(src=w.ROUTER1, dst=w.LB_CLIENTS), ttl=ttl, **kw)  # fmt: skip


def reaches_node(scene: Scene, port: int, kind: str, *, proto: type[Packet] = TCP) -> Packet:
    """The same for the node: about what it had sent to the slot."""
    quoted = scene.reply(port, proto=proto, flags="A", ttl=40)
    # checksums of a quoted transport are those it left the VIP with; nobody verifies them
    full = bytes(scene.to_client(port, proto=proto, flags="A", ttl=40)[Ether].payload)
    mine = bytearray(bytes(quoted[Ether].payload))
    head = 40 if scene.v6 else 20
    at = head + (16 if proto is TCP else 6)
    mine[at : at + 2] = full[at : at + 2]
    shown = Ether() / Raw(bytes(mine))
    return quoting(scene, kind, shown, source=scene.snat, destination=scene.nodes[scene.node],
                   ether=Ether(src=w.LB_NODES, dst=w.NODE[scene.node]), ttl=63)  # fmt: skip


def about_request(scene: Scene, port: int, kind: str, *, proto: type[Packet] = TCP, **kw: int) -> Packet:
    """From a router on the way to the node, or the node itself, about what we forwarded."""
    quoted = scene.to_node(port, proto=proto, flags="A", ttl=40)
    return quoting(scene, kind, quoted, source=scene.nodes[scene.node], destination=scene.snat,
                   ether=Ether(src=w.NODE[scene.node], dst=w.LB_NODES), **kw)  # fmt: skip


def reaches_client(scene: Scene, port: int, kind: str, *, proto: type[Packet] = TCP) -> Packet:
    quoted = scene.to_vip(port, proto=proto, flags="A", ttl=40)
    theirs = bytes(scene.to_node(port, proto=proto, flags="A", ttl=40)[Ether].payload)
    mine = bytearray(bytes(quoted[Ether].payload))
    head = 40 if scene.v6 else 20
    at = head + (16 if proto is TCP else 6)
    mine[at : at + 2] = theirs[at : at + 2]
    return quoting(scene, kind, Ether() / Raw(bytes(mine)), source=scene.vip, destination=scene.client,
                   ether=Ether(src=w.LB_CLIENTS, dst=w.ROUTER1), ttl=63)  # fmt: skip


def neighbour_solicitation(scene: Scene) -> Packet:
    return Ether(src=w.ROUTER1, dst=w.LB_CLIENTS) / IPv6(src=scene.client, dst=scene.vip) / ICMPv6ND_NS(tgt=scene.vip)


def other_icmp(scene: Scene) -> Packet:
    head = Ether(src=w.ROUTER1, dst=w.LB_CLIENTS) / scene.ip(scene.client, scene.vip)
    return head / (ICMPv6EchoReply() if scene.v6 else ICMP(type=13))


def foreign_quote(scene: Scene) -> Packet:
    """Quotes a packet that our address never sent."""
    packet = about_reply(scene, 80, "unreachable")
    shown = bytearray(bytes(packet[Raw]))
    at = 11 if scene.v6 else 15
    shown[at] ^= 1
    packet[Raw].load = bytes(shown)
    return packet


PINGS = [
    Row("a ping is answered", ping, Verdict.ECHO_ANSWERED, pong),
    Row("an odd ping is answered", lambda s: ping(s, payload=b"odd"), Verdict.ECHO_ANSWERED,
        lambda s: pong(s, payload=b"odd")),
    Row("an empty ping is answered", lambda s: ping(s, payload=b""), Verdict.ECHO_ANSWERED,
        lambda s: pong(s, payload=b"")),
    Row("a long ping is answered", lambda s: ping(s, payload=bytes(range(256)) * 5), Verdict.ECHO_ANSWERED,
        lambda s: pong(s, payload=bytes(range(256)) * 5)),
    Row("a ping is answered whatever its TTL", lambda s: ping(s, ttl=1), Verdict.ECHO_ANSWERED, pong),
    Row("a tagged ping is answered tagged", lambda s: tagged(ping(s), 300), Verdict.ECHO_ANSWERED,
        lambda s: tagged(pong(s), 300)),
    Row("a ping to a SNAT address is the kernel's", lambda s: ping(s, target=(w.SNAT6 if s.v6 else w.SNAT4)[0]),
        Verdict.NOT_OURS),
    Row("a ping to another address is the kernel's", lambda s: ping(s, target=s.stranger), Verdict.NOT_OURS),
    Row("other ICMP to a VIP is dropped", other_icmp, Verdict.ICMP_UNMATCHED),
    Row("neighbour discovery is the kernel's", neighbour_solicitation, Verdict.NOT_OURS, families=(6,)),
]  # fmt: skip

KINDS = ("too big", "unreachable", "time", "parameter")
ERRORS = [
    *(Row(f"nat: about a reply, to the node: {kind}", lambda s, k=kind: about_reply(s, 80, k),
          Verdict.ICMP_TO_BACKEND, lambda s, k=kind: reaches_node(s, 80, k), given=lambda s: s.establish(80),
          then=lambda s: s.nat_state() == "established") for kind in KINDS),
    *(Row(f"nat: about a request, to the client: {kind}", lambda s, k=kind: about_request(s, 80, k),
          Verdict.ICMP_TO_CLIENT, lambda s, k=kind: reaches_client(s, 80, k), given=lambda s: s.establish(80),
          arrives=w.NODES, then=lambda s: s.nat_state() == "established") for kind in KINDS),
    *(Row(f"L2: about a reply, to the node: {kind}", lambda s, k=kind: about_reply(s, 81, k),
          Verdict.ICMP_TO_BACKEND, lambda s, k=kind: by_mac(about_reply(s, 81, k, ttl=63)),
          given=lambda s: s.send(s.to_vip(81, flags="A")), then=lambda s: s.dsr_flows() == 1) for kind in KINDS),
    Row("nat: about a reply by UDP", lambda s: about_reply(s, 80, "too big", proto=UDP), Verdict.ICMP_TO_BACKEND,
        lambda s: reaches_node(s, 80, "too big", proto=UDP), given=lambda s: s.open(80, proto=UDP)),
    Row("nat: about a request by UDP", lambda s: about_request(s, 80, "unreachable", proto=UDP),
        Verdict.ICMP_TO_CLIENT, lambda s: reaches_client(s, 80, "unreachable", proto=UDP),
        given=lambda s: s.open(80, proto=UDP), arrives=w.NODES),
    Row("nat: eight quoted bytes are enough", lambda s: about_reply(s, 80, "too big", length=48 if s.v6 else 28),
        Verdict.ICMP_TO_BACKEND, given=lambda s: s.establish(80)),
    Row("seven quoted bytes are not", lambda s: about_reply(s, 80, "too big", length=47 if s.v6 else 27),
        Verdict.ICMP_UNMATCHED, given=lambda s: s.establish(80)),
    Row("IPIP: about a reply, in the tunnel", lambda s: about_reply(s, 82, "too big"), Verdict.ICMP_TO_BACKEND),
    Row("L2: about a flow nobody remembers, to whom the ring says", lambda s: about_reply(s, 81, "too big"),
        Verdict.ICMP_TO_BACKEND, lambda s: by_mac(about_reply(s, 81, "too big", ttl=63)),
        then=lambda s: s.dsr_flows() == 0),
    Row("nat: about a flow nobody has", lambda s: about_reply(s, 80, "too big"), Verdict.ICMP_UNMATCHED,
        then=lambda s: s.nat_flows() == 0),
    Row("about a port nobody serves", lambda s: about_reply(s, 7, "too big"), Verdict.ICMP_UNMATCHED),
    Row("that quotes a packet we never sent", foreign_quote, Verdict.ICMP_UNMATCHED, given=lambda s: s.establish(80)),
    Row("to a SNAT address about nothing of ours is the kernel's",
        lambda s: about_request(s, 81, "unreachable"), Verdict.NO_SLOT, given=lambda s: s.establish(80),
        arrives=w.NODES),
    Row("the TTL of an error ends here, and no error is sent about it",
        lambda s: about_reply(s, 80, "time", ttl=1), Verdict.TTL_EXPIRED, given=lambda s: s.establish(80)),
]  # fmt: skip


@rows(PINGS)
def test_pings(world: World, row: Row, family: int) -> None:
    check(world, row, family)


@rows(ERRORS)
def test_errors_follow_their_flow(world: World, row: Row, family: int) -> None:
    check(world, row, family)


def test_answers_are_limited(world: World) -> None:
    scene = Scene(world, v6=False)
    limited = w.Settings(**{**_fields(world.settings), "answers_per_s": 5})
    world.tables.configure(limited)
    try:
        verdicts = [scene.send(ping(scene)).verdict for _ in range(40)]
        assert verdicts.count(Verdict.ECHO_ANSWERED) in range(5, 16)  # a tick or two may begin meanwhile
        assert Verdict.ICMP_LIMIT in verdicts
    finally:
        world.tables.configure(world.settings)


def test_pings_may_be_left_unanswered(world: World) -> None:
    scene = Scene(world, v6=False)
    world.tables.configure(w.Settings(**{**_fields(world.settings), "echo": "drop"}))
    try:
        assert scene.send(ping(scene)).verdict is Verdict.PROTOCOL
    finally:
        world.tables.configure(world.settings)


def _fields(settings: w.Settings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}
