# SPDX-License-Identifier: Apache-2.0
"""Modes dsr-l2 and dsr-ipip: the packet reaches the node as the client wrote it."""

import ipaddress

import pytest
from scapy.packet import Packet

from tests.ebpf.scene import IP, UDP, Dot1AD, Ether, IPv6, Row, Scene, Verdict, check, rows, w
from tests.ebpf.test_nat import tagged
from tests.ebpf.world import World

pytestmark = pytest.mark.bpf


def by_mac(packet: Packet, node: int = 1, *, source: str = w.LB_NODES) -> Packet:
    """As it leaves for a node on the segment."""
    packet[Ether].src, packet[Ether].dst = source, w.NODE[node]
    return packet


def in_tunnel(scene: Scene, packet: Packet, node: str, number: int = 1, *, tos: int = 0, sport: int = 40000) -> Packet:
    """As it leaves in a tunnel. The outer source is spread over a prefix by the flow."""
    inner = packet[Ether].payload
    client = ipaddress.ip_address(scene.client).packed
    spread = int.from_bytes(client[-4:], "little") ^ int.from_bytes(sport.to_bytes(2, "big"), "little") << 16
    spread_wire = int.from_bytes(spread.to_bytes(4, "little"), "big")
    if ":" in node:
        source = ipaddress.ip_address(int(ipaddress.ip_address("fd00:9::")) | spread_wire & 0xFFFF)
        outer = IPv6(src=str(source), dst=node, hlim=64, tc=tos, fl=spread_wire & 0xFFFFF)
        outer.nh = 41 if scene.v6 else 4
    else:
        source = ipaddress.ip_address(int(ipaddress.ip_address("10.0.9.0")) | spread_wire & 0xFF)
        outer = IP(src=str(source), dst=node, ttl=64, tos=tos, id=0, flags="DF")
        outer.proto = 41 if scene.v6 else 4
    return Ether(src=w.LB_NODES, dst=w.NODE[number]) / outer / inner


TABLE = [
    Row("L2: a SYN goes to the node's MAC, and is not remembered", lambda s: s.to_vip(81), Verdict.DSR_L2,
        lambda s: by_mac(s.to_vip(81, ttl=63)), then=lambda s: s.dsr_flows() == 0),
    Row("L2: what follows is remembered", lambda s: s.to_vip(81, flags="A"), Verdict.DSR_L2,
        lambda s: by_mac(s.to_vip(81, flags="A", ttl=63)), then=lambda s: s.dsr_flows() == 1),
    Row("L2: UDP is remembered at once", lambda s: s.to_vip(81, proto=UDP), Verdict.DSR_L2,
        lambda s: by_mac(s.to_vip(81, proto=UDP, ttl=63)), then=lambda s: s.dsr_flows() == 1),
    Row("L2: the second packet of a flow takes no second entry", lambda s: s.to_vip(81, flags="PA"), Verdict.DSR_L2,
        lambda s: by_mac(s.to_vip(81, flags="PA", ttl=63)), given=lambda s: s.send(s.to_vip(81, flags="A")),
        then=lambda s: s.dsr_flows() == 1),
    Row("L2: a FIN keeps its way", lambda s: s.to_vip(81, flags="FA"), Verdict.DSR_L2,
        lambda s: by_mac(s.to_vip(81, flags="FA", ttl=63)), given=lambda s: s.send(s.to_vip(81, flags="A"))),
    Row("L2: a tagged frame loses its tag", lambda s: tagged(s.to_vip(81), 300), Verdict.DSR_L2,
        lambda s: by_mac(s.to_vip(81, ttl=63))),
    Row("L2: a node behind a tag gets it", lambda s: s.to_vip(97), Verdict.DSR_L2,
        lambda s: tagged(by_mac(s.to_vip(97, ttl=63), 5), 100)),
    Row("L2: UDP to a node behind a tag", lambda s: s.to_vip(97, proto=UDP), Verdict.DSR_L2,
        lambda s: tagged(by_mac(s.to_vip(97, proto=UDP, ttl=63), 5), 100)),
    Row("L2: nobody serves it", lambda s: s.to_vip(95), Verdict.NO_BACKEND),
    Row("L2: nobody serves it by UDP", lambda s: s.to_vip(95, proto=UDP), Verdict.NO_BACKEND,
        then=lambda s: s.dsr_flows() == 0),
    Row("L2: no way leads to the node", lambda s: s.to_vip(96), Verdict.NO_NEXTHOP),
    Row("L2: the TTL ends here", lambda s: s.to_vip(81, ttl=1), Verdict.TTL_ANSWERED),
    Row("L2: TTL 0 is not sent on either", lambda s: s.to_vip(81, ttl=0), Verdict.TTL_ANSWERED),
    Row("IPIP: a SYN travels in a tunnel", lambda s: s.to_vip(82), Verdict.DSR_IPIP,
        lambda s: in_tunnel(s, s.to_vip(82, ttl=63), s.nodes[1]), then=lambda s: s.dsr_flows() == 0),
    Row("IPIP: data is remembered", lambda s: s.to_vip(82, flags="A"), Verdict.DSR_IPIP,
        lambda s: in_tunnel(s, s.to_vip(82, flags="A", ttl=63), s.nodes[1]), then=lambda s: s.dsr_flows() == 1),
    Row("IPIP: UDP", lambda s: s.to_vip(82, proto=UDP), Verdict.DSR_IPIP,
        lambda s: in_tunnel(s, s.to_vip(82, proto=UDP, ttl=63), s.nodes[1])),
    Row("IPIP: the outer source follows the port", lambda s: s.to_vip(82, sport=51234), Verdict.DSR_IPIP,
        lambda s: in_tunnel(s, s.to_vip(82, sport=51234, ttl=63), s.nodes[1], sport=51234)),
    Row("IPIP: the class of service is shown outside", lambda s: s.to_vip(82, tos=0x2E << 2), Verdict.DSR_IPIP,
        lambda s: in_tunnel(s, s.to_vip(82, tos=0x2E << 2, ttl=63), s.nodes[1], tos=0x2E << 2)),
    Row("IPIP: an IPv4 packet in an IPv6 tunnel", lambda s: s.to_vip(83), Verdict.DSR_IPIP,
        lambda s: in_tunnel(s, s.to_vip(83, ttl=63), w.NODE6[1])),
    Row("IPIP: UDP in an IPv6 tunnel", lambda s: s.to_vip(83, proto=UDP), Verdict.DSR_IPIP,
        lambda s: in_tunnel(s, s.to_vip(83, proto=UDP, ttl=63), w.NODE6[1])),
    Row("IPIP: a tagged frame", lambda s: tagged(s.to_vip(82), 300), Verdict.DSR_IPIP,
        lambda s: in_tunnel(s, s.to_vip(82, ttl=63), s.nodes[1])),
    Row("IPIP: to a node behind a tag", lambda s: s.to_vip(98), Verdict.DSR_IPIP,
        lambda s: tagged(in_tunnel(s, s.to_vip(98, ttl=63), s.nodes[5], 5), 100)),
    Row("IPIP: two tags become one", lambda s: tagged(s.to_vip(98), 300, 301, outer=Dot1AD), Verdict.DSR_IPIP,
        lambda s: tagged(in_tunnel(s, s.to_vip(98, ttl=63), s.nodes[5], 5), 100)),
    Row("IPIP: as long as the tunnel carries",
        lambda s: s.to_vip(82, flags="A", payload=bytes(1480 - (80 if s.v6 else 40))), Verdict.DSR_IPIP),
    Row("IPIP: one byte too long, the client is told",
        lambda s: s.to_vip(82, flags="A", payload=bytes(1481 - (80 if s.v6 else 40))),
        Verdict.TOO_BIG_ANSWERED),
    Row("IPIP: the TTL ends here", lambda s: s.to_vip(82, ttl=1), Verdict.TTL_ANSWERED),
]  # fmt: skip


@rows(TABLE)
def test_dsr(world: World, row: Row, family: int) -> None:
    check(world, row, family)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("port", [90, 91])
def test_new_flows_spread_over_all_nodes(world: World, family: int, port: int) -> None:
    scene = Scene(world, family == 6)
    seen = {Ether(scene.send(scene.to_vip(port, sport=sport)).packet).dst for sport in range(1000, 1100)}
    assert seen == {w.NODE[n] for n in (1, 2, 3)}


@pytest.mark.parametrize("family", [4, 6])
def test_the_ring_gives_a_syn_and_the_first_packet_after_it_the_same_node(world: World, family: int) -> None:
    scene = Scene(world, family == 6)
    for sport in range(1000, 1050):
        syn = Ether(scene.send(scene.to_vip(91, sport=sport)).packet).dst
        assert Ether(scene.send(scene.to_vip(91, sport=sport, flags="A")).packet).dst == syn


@pytest.mark.parametrize("family", [4, 6])
def test_a_flood_of_single_packets_pushes_out_no_flow_that_was_seen_twice(world: World, family: int) -> None:
    scene = Scene(world, family == 6)
    for flags in ("A", "A"):
        for sport in range(100):
            scene.send(scene.to_vip(91, sport=1000 + sport, flags=flags))
    kept = dict(world.counters.dsr_flows())
    before = bytes(world.memory["lb_flows"])
    for number in range(6000):
        source = f"2001:db8:f::{number:x}" if scene.v6 else f"100.64.{number >> 8}.{number & 255}"
        scene.send(scene.to_vip(91, source=source, flags="A"))
    after = bytes(world.memory["lb_flows"])
    words = {before[i : i + 8] for i in range(0, len(before), 8)} - {bytes(8)}
    left = {after[i : i + 8] for i in range(0, len(after), 8)}
    tags = {int.from_bytes(word, "little") >> 30 for word in words} - {
        int.from_bytes(word, "little") >> 30 for word in left
    }
    assert not tags, f"{len(tags)} of {sum(kept.values())} flows were pushed out"


def move_elsewhere(world: World) -> str:
    """Change the one remembered flow's node -> the new node's MAC."""
    number_by_mac = {w.NODE[n]: world.tables.backend_ids()[w.NODE4[n]] for n in (1, 2, 3)}
    with memoryview(world.memory["lb_flows"]).cast("Q") as words:
        (at,) = [i for i, word in enumerate(words.tolist()) if word]
        mac, number = next((m, n) for m, n in number_by_mac.items() if n != words[at] & 0xFFFF)
        words[at] = words[at] & ~0xFFFF | number
    return mac


def node_of(scene: Scene, packet: Packet) -> str:
    mac: str = Ether(scene.send(packet).packet).dst
    return mac


def test_an_idle_udp_flow_is_chosen_anew(world: World) -> None:
    """It was sent to a node by an entry, not by the ring: after its time the ring decides again."""
    scene = Scene(world, v6=False)
    by_ring = node_of(scene, scene.to_vip(91, proto=UDP))
    moved = move_elsewhere(world)
    assert node_of(scene, scene.to_vip(91, proto=UDP)) == moved
    world.expire(70)
    assert node_of(scene, scene.to_vip(91, proto=UDP)) == by_ring


def test_an_idle_tcp_flow_keeps_its_node(world: World) -> None:
    scene = Scene(world, v6=False)
    scene.send(scene.to_vip(91, flags="A"))
    moved = move_elsewhere(world)
    world.expire(3000)
    assert node_of(scene, scene.to_vip(91, flags="A")) == moved
