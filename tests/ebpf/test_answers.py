# SPDX-License-Identifier: Apache-2.0
"""What the sender is told, what is dropped, and what is none of our business."""

import pytest
from scapy.layers.inet import IPOption_NOP
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting
from scapy.layers.l2 import ARP
from scapy.packet import Packet

from lbagent.xdp import bpf, testrun
from tests.ebpf.scene import (
    ICMP,
    IP,
    TCP,
    UDP,
    Ether,
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
    Raw,
    Row,
    Scene,
    Verdict,
    assert_same,
    check,
    rows,
    w,
)  # fmt: skip
from tests.ebpf.test_nat import tagged
from tests.ebpf.world import World

pytestmark = pytest.mark.bpf


def reset(scene: Scene, port: int, *, seq: int, ack: int, flags: str) -> Packet:
    """From the VIP to the client."""
    return (Ether(src=w.LB_CLIENTS, dst=w.ROUTER1) / answer_ip(scene, scene.vip, scene.client)
            / TCP(sport=port, dport=40000, seq=seq, ack=ack, flags=flags, window=0))  # fmt: skip


def answer_ip(scene: Scene, source: str, destination: str) -> Packet:
    ip = scene.ip(source, destination)
    if not scene.v6:
        ip.flags = "DF"
    return ip


def told(scene: Scene, message: Packet, packet: Packet, *, ether: Ether | None = None, source: str = "") -> Packet:
    """An ICMP error with the IP header and eight bytes of the packet."""
    layer = packet[IPv6 if scene.v6 else IP]
    shown = bytes(packet[Ether].payload)[: (40 if scene.v6 else 20) + 8]
    head = ether or Ether(src=w.LB_CLIENTS, dst=w.ROUTER1)
    return head / answer_ip(scene, source or layer.dst, layer.src) / message / Raw(shown)


def unreachable(scene: Scene) -> Packet:
    return ICMPv6DestUnreach(code=4) if scene.v6 else ICMP(type=3, code=3)


def too_big(scene: Scene, mtu: int) -> Packet:
    return ICMPv6PacketTooBig(mtu=mtu) if scene.v6 else ICMP(type=3, code=4, nexthopmtu=mtu)


def time_exceeded(scene: Scene) -> Packet:
    return ICMPv6TimeExceeded() if scene.v6 else ICMP(type=11)


def narrow(scene: Scene, bytes_: int, port: int = 99, *, flags: str = "S") -> Packet:
    """A packet of so many bytes (IP)."""
    return scene.to_vip(port, flags=flags, payload=bytes(bytes_ - (60 if scene.v6 else 40)))


def to_node_of(scene: Scene, port: int, **kw: object) -> Packet:
    """Mode nat through the interface of the clients: ports 94 and 99."""
    packet = scene.to_node(port, **kw)
    packet[Ether].src = w.LB_CLIENTS
    return packet


REFUSED = [
    Row("a SYN to a port nobody serves is reset", lambda s: s.to_vip(7, payload=b""), Verdict.PORT_REFUSED,
        lambda s: reset(s, 7, seq=0, ack=101, flags="RA")),
    Row("a SYN with data is reset", lambda s: s.to_vip(7, payload=b"12345"), Verdict.PORT_REFUSED,
        lambda s: reset(s, 7, seq=0, ack=106, flags="RA")),
    Row("a FIN counts as well", lambda s: s.to_vip(7, payload=b"", flags="F"), Verdict.PORT_REFUSED,
        lambda s: reset(s, 7, seq=0, ack=101, flags="RA")),
    Row("an ACK is reset with its own number", lambda s: s.to_vip(7, flags="A"), Verdict.PORT_REFUSED,
        lambda s: reset(s, 7, seq=200, ack=0, flags="R")),
    Row("data is reset", lambda s: s.to_vip(7, flags="PA", payload=b"x" * 1000), Verdict.PORT_REFUSED,
        lambda s: reset(s, 7, seq=200, ack=0, flags="R")),
    Row("TCP options do not matter", lambda s: s.to_vip(7, payload=b"", options=[("MSS", 1460), ("WScale", 7)]),
        Verdict.PORT_REFUSED, lambda s: reset(s, 7, seq=0, ack=101, flags="RA")),
    Row("a tagged SYN is reset tagged", lambda s: tagged(s.to_vip(7, payload=b""), 300), Verdict.PORT_REFUSED,
        lambda s: tagged(reset(s, 7, seq=0, ack=101, flags="RA"), 300)),
    Row("a SYN with two tags is reset with two", lambda s: tagged(s.to_vip(7, payload=b""), 300, 301),
        Verdict.PORT_REFUSED, lambda s: tagged(reset(s, 7, seq=0, ack=101, flags="RA"), 300, 301)),
    Row("a reset is not answered", lambda s: s.to_vip(7, flags="R"), Verdict.NO_PORT),
    Row("UDP to a port nobody serves", lambda s: s.to_vip(7, proto=UDP), Verdict.PORT_REFUSED,
        lambda s: told(s, unreachable(s), s.to_vip(7, proto=UDP))),
    Row("empty UDP", lambda s: s.to_vip(7, proto=UDP, payload=b""), Verdict.PORT_REFUSED,
        lambda s: told(s, unreachable(s), s.to_vip(7, proto=UDP, payload=b""))),
    Row("long UDP", lambda s: s.to_vip(7, proto=UDP, payload=bytes(1200)), Verdict.PORT_REFUSED,
        lambda s: told(s, unreachable(s), s.to_vip(7, proto=UDP, payload=bytes(1200)))),
    Row("UDP with a tag", lambda s: tagged(s.to_vip(7, proto=UDP), 300), Verdict.PORT_REFUSED,
        lambda s: tagged(told(s, unreachable(s), s.to_vip(7, proto=UDP)), 300)),
    Row("UDP with two tags", lambda s: tagged(s.to_vip(7, proto=UDP), 300, 301), Verdict.PORT_REFUSED,
        lambda s: tagged(told(s, unreachable(s), s.to_vip(7, proto=UDP)), 300, 301)),
    Row("nat: a connection that we do not know is reset", lambda s: s.to_vip(80, flags="A"), Verdict.NO_FLOW_RESET,
        lambda s: reset(s, 80, seq=200, ack=0, flags="R")),
]  # fmt: skip

TOLD = [
    Row("nat: the TTL ends here", lambda s: s.to_vip(80, ttl=1), Verdict.TTL_ANSWERED,
        lambda s: told(s, time_exceeded(s), s.to_vip(80, ttl=1))),
    Row("L2: the TTL ends here", lambda s: s.to_vip(81, ttl=1), Verdict.TTL_ANSWERED,
        lambda s: told(s, time_exceeded(s), s.to_vip(81, ttl=1))),
    Row("UDP: the TTL ends here", lambda s: s.to_vip(82, ttl=1, proto=UDP), Verdict.TTL_ANSWERED,
        lambda s: told(s, time_exceeded(s), s.to_vip(82, ttl=1, proto=UDP))),
    Row("a reply's TTL ends here: the node is told", lambda s: s.reply(80, ttl=1), Verdict.TTL_ANSWERED,
        lambda s: told(s, time_exceeded(s), s.reply(80, ttl=1), ether=Ether(src=w.LB_NODES, dst=w.NODE[s.node])),
        given=lambda s: s.open(80), arrives=w.NODES),
    Row("nat: as long as the way to the node carries", lambda s: narrow(s, 1400), Verdict.NAT_FORWARD,
        lambda s: to_node_of(s, 99, payload=bytes(1400 - (60 if s.v6 else 40))), learns=True),
    Row("nat: one byte too long", lambda s: narrow(s, 1401), Verdict.TOO_BIG_ANSWERED,
        lambda s: told(s, too_big(s, 1400), narrow(s, 1401))),
    Row("IPIP: one byte too long", lambda s: narrow(s, 1401 - (40 if s.v6 else 20), 94), Verdict.TOO_BIG_ANSWERED,
        lambda s: told(s, too_big(s, 1400 - (40 if s.v6 else 20)), narrow(s, 1401 - (40 if s.v6 else 20), 94))),
    Row("IPIP: one byte too long with a tag", lambda s: tagged(narrow(s, 1401 - (40 if s.v6 else 20), 94), 300),
        Verdict.TOO_BIG_ANSWERED,
        lambda s: tagged(
            told(s, too_big(s, 1400 - (40 if s.v6 else 20)), narrow(s, 1401 - (40 if s.v6 else 20), 94)), 300)),
]  # fmt: skip


def other_protocol(scene: Scene) -> Packet:
    ip = scene.ip(scene.client, scene.vip)
    if scene.v6:
        ip.nh = 132
    else:
        ip.proto = 132
    return Ether(src=w.ROUTER1, dst=w.LB_CLIENTS) / ip / Raw(bytes(40))


def with_options(scene: Scene) -> Packet:
    packet = scene.to_vip(80)
    packet[IP].options = [IPOption_NOP()] * 4
    return packet


def with_extension(scene: Scene, header: Packet) -> Packet:
    head = Ether(src=w.ROUTER1, dst=w.LB_CLIENTS) / IPv6(src=scene.client, dst=scene.vip)
    return head / header / TCP(sport=40000, dport=80)


def cut_to(scene: Scene, size: int, *, proto: type[Packet] = TCP) -> Packet:
    """Only so many bytes of the frame arrived."""
    return Raw(bytes(scene.to_vip(80, proto=proto))[:size])


def bad_header_length(scene: Scene) -> Packet:
    packet = scene.to_vip(80)
    packet[IP].ihl = 4
    return packet


def wrong_version(scene: Scene) -> Packet:
    packet = scene.to_vip(80)
    layer = packet[IPv6 if scene.v6 else IP]
    layer.version = 5
    return packet


def elsewhere(scene: Scene, **kw: object) -> Packet:
    return scene.to_vip(80, vip=scene.stranger, **kw)


DROPPED = [
    Row("SCTP to a VIP", other_protocol, Verdict.PROTOCOL),
    Row("IPv4 options", with_options, Verdict.IP_OPTIONS, families=(4,)),
    Row("a destination options header", lambda s: with_extension(s, IPv6ExtHdrDestOpt()), Verdict.EXTENSION_HEADER,
        families=(6,)),
    Row("a hop-by-hop header", lambda s: with_extension(s, IPv6ExtHdrHopByHop()), Verdict.EXTENSION_HEADER,
        families=(6,)),
    Row("a routing header", lambda s: with_extension(s, IPv6ExtHdrRouting()), Verdict.EXTENSION_HEADER,
        families=(6,)),
    Row("half a TCP header", lambda s: cut_to(s, (54 if s.v6 else 34) + 19), Verdict.MALFORMED),
    Row("no TCP header at all", lambda s: cut_to(s, 54 if s.v6 else 34), Verdict.MALFORMED),
    Row("half a UDP header", lambda s: cut_to(s, (54 if s.v6 else 34) + 7, proto=UDP), Verdict.MALFORMED),
    Row("a header length below 20", bad_header_length, Verdict.MALFORMED, families=(4,)),
]  # fmt: skip

NOT_OURS = [
    Row("ARP", lambda s: Ether(src=w.ROUTER1, dst="ff:ff:ff:ff:ff:ff") / ARP(pdst=s.vip), Verdict.NOT_IP,
        families=(4,)),
    Row("LLDP", lambda s: Ether(src=w.ROUTER1, dst="01:80:c2:00:00:0e", type=0x88CC) / Raw(bytes(40)),
        Verdict.NOT_IP, families=(4,)),
    Row("a third VLAN tag", lambda s: tagged(s.to_vip(80), 1, 2, 3), Verdict.NOT_IP),
    Row("half an Ethernet header", lambda s: Raw(bytes(14)), Verdict.NOT_IP, families=(4,)),
    Row("half a VLAN tag", lambda s: Raw(bytes(12) + b"\x81\x00\x00"), Verdict.NOT_IP, families=(4,)),
    Row("half an IP header", lambda s: cut_to(s, (54 if s.v6 else 34) - 1), Verdict.NOT_OURS),
    Row("another IP version than the Ethertype says", wrong_version, Verdict.NOT_OURS),
    Row("TCP to another address", elsewhere, Verdict.NOT_OURS),
    Row("UDP to another address", lambda s: elsewhere(s, proto=UDP), Verdict.NOT_OURS),
    Row("tagged TCP to another address", lambda s: tagged(elsewhere(s), 300), Verdict.NOT_OURS),
    Row("TCP to a SNAT address", lambda s: s.to_vip(22, vip=(w.SNAT6 if s.v6 else w.SNAT4)[1]), Verdict.NO_SLOT),
]  # fmt: skip


@rows(REFUSED)
def test_refused_ports(world: World, row: Row, family: int) -> None:
    check(world, row, family)


@rows(TOLD)
def test_told_to_the_sender(world: World, row: Row, family: int) -> None:
    check(world, row, family)


@rows(DROPPED)
def test_dropped(world: World, row: Row, family: int) -> None:
    check(world, row, family)


@rows(NOT_OURS)
def test_not_ours(world: World, row: Row, family: int) -> None:
    check(world, row, family)


@pytest.fixture
def policy(world: World):
    """Other policies for one test."""

    def choose(**changed: object) -> None:
        fields = {name: getattr(world.settings, name) for name in world.settings.__dataclass_fields__}
        world.tables.configure(w.Settings(**{**fields, **changed}))

    yield choose
    world.tables.configure(world.settings)


@pytest.mark.parametrize("family", [4, 6])
def test_silence_about_ports_is_a_policy(world: World, policy, family: int) -> None:
    policy(no_port="drop")
    scene = Scene(world, family == 6)
    assert scene.send(scene.to_vip(7)).verdict is Verdict.NO_PORT
    assert scene.send(scene.to_vip(7, proto=UDP)).verdict is Verdict.NO_PORT
    assert scene.send(scene.to_vip(80, flags="A")).verdict is Verdict.NO_FLOW


def test_options_may_be_left_to_the_kernel(world: World, policy) -> None:
    policy(options="pass")
    assert Scene(world, v6=False).send(with_options(Scene(world, v6=False))).verdict is Verdict.NOT_OURS
    scene = Scene(world, v6=True)
    assert scene.send(with_extension(scene, IPv6ExtHdrDestOpt())).verdict is Verdict.NOT_OURS


@pytest.mark.parametrize("family", [4, 6])
def test_resets_are_limited(world: World, policy, family: int) -> None:
    policy(answers_per_s=5)
    scene = Scene(world, family == 6)
    verdicts = [scene.send(scene.to_vip(7)).verdict for _ in range(40)]
    assert verdicts.count(Verdict.PORT_REFUSED) in range(5, 16)  # a tick or two may begin meanwhile
    assert verdicts.count(Verdict.ICMP_LIMIT) == 40 - verdicts.count(Verdict.PORT_REFUSED)


@pytest.fixture(scope="module")
def frags(loaded: World) -> int:
    """The same program, loaded for packets in several buffers."""
    code = loaded.code.bound({name: m.fd for name, m in loaded.maps.items()})
    return bpf.load_program(code, name="lb_frags", flags=bpf.ProgramFlag.FRAGS)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("size", [1000, 3000, 8000])
def test_a_jumbo_frame_is_answered_in_one_small_frame(world: World, frags: int, family: int, size: int) -> None:
    scene = Scene(world, family == 6)
    refused = scene.to_vip(7, proto=UDP, payload=bytes(size))
    action, packet = world.on_thread(lambda: testrun.run_on(frags, bytes(refused), w.CLIENTS))
    assert action == "tx"
    assert_same(packet, told(scene, unreachable(scene), refused))
    refused = scene.to_vip(7, flags="A", payload=bytes(size))
    action, packet = world.on_thread(lambda: testrun.run_on(frags, bytes(refused), w.CLIENTS))
    assert_same(packet, reset(scene, 7, seq=200, ack=0, flags="R"))


@pytest.mark.parametrize("family", [4, 6])
def test_a_jumbo_frame_too_long_for_the_way_is_told_the_mtu(world: World, frags: int, family: int) -> None:
    scene = Scene(world, family == 6)
    packet = scene.to_vip(82, flags="A", payload=bytes(8000))
    action, out = world.on_thread(lambda: testrun.run_on(frags, bytes(packet), w.CLIENTS))
    assert action == "tx"
    assert_same(out, told(scene, too_big(scene, 1500 - (40 if scene.v6 else 20)), packet))
