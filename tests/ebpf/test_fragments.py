# SPDX-License-Identifier: Apache-2.0
"""Fragments: the first one decides, the others follow; what is lost is counted."""

import pytest
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.packet import Packet

from tests.ebpf.scene import (
    ICMP,
    IP,
    TCP,
    UDP,
    Ether,
    ICMPv6EchoRequest,
    IPv6,
    Raw,
    Row,
    Scene,
    Verdict,
    check,
    rows,
    w,
)
from tests.ebpf.test_dsr import by_mac, in_tunnel
from tests.ebpf.world import World

pytestmark = pytest.mark.bpf

CUT = 800  # bytes of transport in the first fragment


def cut(scene: Scene, packet: Packet, number: int, *, ident: int = 77) -> Packet:
    """The first (0) or second (1) fragment of a packet."""
    layer = packet[IPv6 if scene.v6 else IP]
    whole = bytes(layer.__class__(bytes(layer)).payload)
    part = whole[:CUT] if number == 0 else whole[CUT:]
    offset, more = (0, 1) if number == 0 else (CUT // 8, 0)
    head = Ether(src=packet[Ether].src, dst=packet[Ether].dst)
    if scene.v6:
        ip = IPv6(src=layer.src, dst=layer.dst, hlim=layer.hlim)
        upper = 6 if TCP in packet else 17
        return head / ip / IPv6ExtHdrFragment(nh=upper, offset=offset, m=more, id=ident) / Raw(part)
    upper = 6 if TCP in packet else 17
    ip = IP(src=layer.src, dst=layer.dst, ttl=layer.ttl, id=ident, frag=offset, flags=more, proto=upper)
    return head / ip / Raw(part)


def big(scene: Scene, port: int, *, proto: type[Packet] = UDP, ttl: int = 64, flags: str = "A") -> Packet:
    return scene.to_vip(port, proto=proto, flags=flags, payload=b"z" * 1200, ttl=ttl)


def opened(scene: Scene, port: int, *, ident: int = 77) -> None:
    scene.open(port, proto=UDP)
    assert scene.send(cut(scene, big(scene, port), 0, ident=ident)).verdict is Verdict.NAT_FORWARD


def answered(scene: Scene) -> None:
    """The node's long answer: its first fragment went back."""
    scene.open(80, proto=UDP)
    outcome = scene.send(cut(scene, scene.reply(80, proto=UDP, payload=b"r" * 1200), 0), w.NODES)
    assert outcome.verdict is Verdict.NAT_REPLY


def first_ping(scene: Scene) -> Packet:
    head = Ether(src=w.ROUTER1, dst=w.LB_CLIENTS) / scene.ip(scene.client, scene.vip)
    if scene.v6:
        echo = bytes(ICMPv6EchoRequest(id=1, seq=1, cksum=0)) + bytes(1200)
        return head / IPv6ExtHdrFragment(nh=58, offset=0, m=1, id=5) / Raw(echo)
    head[IP].flags, head[IP].proto = 1, 1
    return head / Raw(bytes(ICMP(type=8)) + bytes(1200))


TABLE = [
    Row("nat: the first fragment goes to the node", lambda s: cut(s, big(s, 80), 0), Verdict.NAT_FORWARD,
        lambda s: cut(s, s.to_node(80, proto=UDP, payload=b"z" * 1200), 0), given=lambda s: s.open(80, proto=UDP)),
    Row("nat: the second follows it", lambda s: cut(s, big(s, 80), 1), Verdict.FRAGMENT_FORWARD,
        lambda s: cut(s, s.to_node(80, proto=UDP, payload=b"z" * 1200), 1), given=lambda s: opened(s, 80)),
    Row("nat: fragments of TCP", lambda s: cut(s, big(s, 80, proto=TCP), 0), Verdict.NAT_FORWARD,
        lambda s: cut(s, s.to_node(80, flags="A", payload=b"z" * 1200), 0), given=lambda s: s.establish(80)),
    Row("nat: the first fragment of a reply", lambda s: cut(s, s.reply(80, proto=UDP, payload=b"r" * 1200), 0),
        Verdict.NAT_REPLY, lambda s: cut(s, s.to_client(80, proto=UDP, payload=b"r" * 1200), 0),
        given=lambda s: s.open(80, proto=UDP), arrives=w.NODES),
    Row("nat: the second fragment of a reply", lambda s: cut(s, s.reply(80, proto=UDP, payload=b"r" * 1200), 1),
        Verdict.FRAGMENT_FORWARD, lambda s: cut(s, s.to_client(80, proto=UDP, payload=b"r" * 1200), 1),
        given=answered, arrives=w.NODES),
    Row("L2: the first fragment", lambda s: cut(s, big(s, 81), 0), Verdict.DSR_L2,
        lambda s: by_mac(cut(s, big(s, 81, ttl=63), 0))),
    Row("L2: the second follows it", lambda s: cut(s, big(s, 81), 1), Verdict.FRAGMENT_FORWARD,
        lambda s: by_mac(cut(s, big(s, 81, ttl=63), 1)), given=lambda s: s.send(cut(s, big(s, 81), 0))),
    Row("IPIP: the first fragment", lambda s: cut(s, big(s, 82), 0), Verdict.DSR_IPIP,
        lambda s: in_tunnel(s, cut(s, big(s, 82, ttl=63), 0), s.nodes[1])),
    Row("IPIP: the second follows it", lambda s: cut(s, big(s, 82), 1), Verdict.FRAGMENT_FORWARD,
        given=lambda s: s.send(cut(s, big(s, 82), 0))),
    Row("a second fragment alone is lost", lambda s: cut(s, big(s, 80), 1), Verdict.FRAGMENT_LOST),
    Row("a second fragment of another packet is lost", lambda s: cut(s, big(s, 80), 1, ident=78),
        Verdict.FRAGMENT_LOST, given=lambda s: opened(s, 80)),
    Row("a second fragment long after the first is lost", lambda s: cut(s, big(s, 80), 1), Verdict.FRAGMENT_LOST,
        given=lambda s: (opened(s, 80), s.world.expire(40))),
    Row("a second fragment to the SNAT address that follows nothing is the kernel's",
        lambda s: cut(s, s.reply(80, proto=UDP, payload=b"r" * 1200), 1), Verdict.NOT_OURS,
        given=lambda s: s.open(80, proto=UDP), arrives=w.NODES),
    Row("a first fragment to a port nobody serves", lambda s: cut(s, big(s, 7), 0), Verdict.NO_PORT),
    Row("a ping in fragments is not answered", first_ping, Verdict.PROTOCOL),
    Row("the TTL of a second fragment ends here, and no error is sent about it",
        lambda s: cut(s, big(s, 80, ttl=1), 1), Verdict.TTL_EXPIRED, given=lambda s: opened(s, 80)),
]  # fmt: skip


@rows(TABLE)
def test_fragments(world: World, row: Row, family: int) -> None:
    check(world, row, family)


def test_the_table_of_fragments_forgets_the_oldest(world: World) -> None:
    scene = Scene(world, v6=False)
    for ident in range(5000):
        scene.send(cut(scene, big(scene, 81), 0, ident=ident))
    assert scene.send(cut(scene, big(scene, 81), 1, ident=4999)).verdict is Verdict.FRAGMENT_FORWARD
    assert len(list(world.maps["lb_fragments"].items())) <= 4096
