# SPDX-License-Identifier: Apache-2.0
"""Mode nat: to the node port and back."""

import pytest
from scapy.packet import Packet

from tests.ebpf.scene import TCP, UDP, Dot1AD, Dot1Q, Ether, Raw, Row, Scene, Verdict, check, rows, w
from tests.ebpf.world import World

pytestmark = pytest.mark.bpf


def tagged(packet: Packet, *vlans: int, outer: type[Packet] = Dot1Q) -> Packet:
    """The same frame with VLAN tags, outer first."""
    ether, inside = packet[Ether].copy(), packet[Ether].payload
    ether.remove_payload()
    del ether.type
    for i, vlan in enumerate(vlans):
        ether = ether / (outer if i == 0 and len(vlans) > 1 else Dot1Q)(vlan=vlan)
    return ether / inside


def no_checksum(packet: Packet) -> Packet:
    packet[UDP].chksum = 0
    return packet


def state_is(state: str) -> "object":
    def check_state(scene: Scene) -> object:
        return scene.nat_state() == state or scene.nat_state()

    return check_state


FORWARD = [
    Row("a SYN is sent to the node port", lambda s: s.to_vip(80), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80), learns=True, then=state_is("syn")),
    Row("a SYN sent again takes the same slot", lambda s: s.to_vip(80), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80), given=lambda s: s.open(80), then=lambda s: s.nat_flows() == 1),
    Row("UDP is sent to the node port", lambda s: s.to_vip(80, proto=UDP), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80, proto=UDP), learns=True, then=state_is("udp")),
    Row("the rest of a connection follows its SYN", lambda s: s.to_vip(80, flags="PA", payload=b"x" * 700),
        Verdict.NAT_FORWARD, lambda s: s.to_node(80, flags="PA", payload=b"x" * 700),
        given=lambda s: s.establish(80), then=state_is("established")),
    Row("an odd number of bytes keeps its checksum right", lambda s: s.to_vip(80, payload=b"x" * 33),
        Verdict.NAT_FORWARD, lambda s: s.to_node(80, payload=b"x" * 33), learns=True),
    Row("no payload at all", lambda s: s.to_vip(80, payload=b""), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80, payload=b""), learns=True),
    Row("TCP options stay", lambda s: s.to_vip(80, options=[("MSS", 1460), ("SAckOK", b""), ("WScale", 7)]),
        Verdict.NAT_FORWARD, lambda s: s.to_node(80, options=[("MSS", 1460), ("SAckOK", b""), ("WScale", 7)]),
        learns=True),
    Row("the class of service stays", lambda s: s.to_vip(80, tos=0xB8), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80, tos=0xB8), learns=True),
    Row("UDP without a checksum stays without", lambda s: no_checksum(s.to_vip(80, proto=UDP)),
        Verdict.NAT_FORWARD, lambda s: no_checksum(s.to_node(80, proto=UDP)), learns=True, families=(4,)),
    Row("a packet with TTL 2 arrives with 1", lambda s: s.to_vip(80, ttl=2), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80, ttl=1), learns=True),
    Row("a packet with TTL 255 arrives with 254", lambda s: s.to_vip(80, ttl=255), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80, ttl=254), learns=True),
    Row("a tagged frame leaves without its tag", lambda s: tagged(s.to_vip(80), 300), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80), learns=True),
    Row("a frame with two tags leaves without them", lambda s: tagged(s.to_vip(80), 300, 301, outer=Dot1AD),
        Verdict.NAT_FORWARD, lambda s: s.to_node(80), learns=True),
    Row("a frame for a node behind a tag gets it", lambda s: s.to_vip(88), Verdict.NAT_FORWARD,
        lambda s: tagged(s.to_node(88), 100), learns=True),
    Row("a tagged frame changes its tag", lambda s: tagged(s.to_vip(88), 300), Verdict.NAT_FORWARD,
        lambda s: tagged(s.to_node(88), 100), learns=True),
    Row("a frame with two tags keeps one", lambda s: tagged(s.to_vip(88), 300, 301), Verdict.NAT_FORWARD,
        lambda s: tagged(s.to_node(88), 100), learns=True),
    Row("a frame for a node behind two tags gets both", lambda s: s.to_vip(89), Verdict.NAT_FORWARD,
        lambda s: tagged(s.to_node(89), 100, 200, outer=Dot1AD), learns=True),
    Row("UDP for a node behind two tags", lambda s: s.to_vip(89, proto=UDP), Verdict.NAT_FORWARD,
        lambda s: tagged(s.to_node(89, proto=UDP), 100, 200, outer=Dot1AD), learns=True),
    Row("a TCP packet of no known connection is answered with a reset", lambda s: s.to_vip(80, flags="A"),
        Verdict.NO_FLOW_RESET),
    Row("a FIN of no known connection is answered with a reset", lambda s: s.to_vip(80, flags="FA"),
        Verdict.NO_FLOW_RESET),
    Row("a reset of no known connection is dropped", lambda s: s.to_vip(80, flags="R"), Verdict.NO_FLOW),
    Row("nobody serves it", lambda s: s.to_vip(86), Verdict.NO_BACKEND, then=lambda s: s.nat_flows() == 0),
    Row("nobody serves it by UDP", lambda s: s.to_vip(86, proto=UDP), Verdict.NO_BACKEND),
    Row("no way leads to the node", lambda s: s.to_vip(87), Verdict.NO_NEXTHOP),
    Row("the TTL ends here: the sender is told", lambda s: s.to_vip(80, ttl=1), Verdict.TTL_ANSWERED),
    Row("a reset ends the connection", lambda s: s.to_vip(80, flags="R"), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80, flags="R"), given=lambda s: s.establish(80), then=state_is("closed")),
    Row("the client's FIN half-closes", lambda s: s.to_vip(80, flags="FA"), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80, flags="FA"), given=lambda s: s.establish(80), then=state_is("fin_client")),
    Row("a client that answers no SYN-ACK stays half-open", lambda s: s.to_vip(80), Verdict.NAT_FORWARD,
        given=lambda s: (s.open(80), s.send(s.reply(80), w.NODES)), then=state_is("syn_ack")),
    Row("an ACK without the node's SYN-ACK establishes nothing", lambda s: s.to_vip(80, flags="A"),
        Verdict.NAT_FORWARD, given=lambda s: s.open(80), then=state_is("syn")),
]  # fmt: skip


@rows(FORWARD)
def test_towards_the_node(world: World, row: Row, family: int) -> None:
    check(world, row, family)


REPLY = [
    Row("a SYN-ACK returns to the client", lambda s: s.reply(80), Verdict.NAT_REPLY, lambda s: s.to_client(80),
        given=lambda s: s.open(80), arrives=w.NODES, then=state_is("syn_ack")),
    Row("UDP returns to the client", lambda s: s.reply(80, proto=UDP), Verdict.NAT_REPLY,
        lambda s: s.to_client(80, proto=UDP), given=lambda s: s.open(80, proto=UDP), arrives=w.NODES,
        then=state_is("udp_stream")),
    Row("data returns", lambda s: s.reply(80, flags="PA", payload=b"y" * 901), Verdict.NAT_REPLY,
        lambda s: s.to_client(80, flags="PA", payload=b"y" * 901), given=lambda s: s.establish(80), arrives=w.NODES),
    Row("TTL goes down on the way back", lambda s: s.reply(80, ttl=10), Verdict.NAT_REPLY,
        lambda s: s.to_client(80, ttl=9), given=lambda s: s.open(80), arrives=w.NODES),
    Row("UDP without a checksum returns without", lambda s: no_checksum(s.reply(80, proto=UDP)), Verdict.NAT_REPLY,
        lambda s: no_checksum(s.to_client(80, proto=UDP)), given=lambda s: s.open(80, proto=UDP), arrives=w.NODES,
        families=(4,)),
    Row("a reply goes to the router that brought the flow", lambda s: s.reply(80), Verdict.NAT_REPLY,
        lambda s: s.to_client(80, router=w.ROUTER2), given=lambda s: open_from(s, w.ROUTER2), arrives=w.NODES),
    Row("of a tagged router's flow the reply is tagged", lambda s: s.reply(80), Verdict.NAT_REPLY,
        lambda s: tagged(s.to_client(80, router=w.ROUTER2), 300), given=lambda s: open_from(s, w.ROUTER2, 300),
        arrives=w.NODES),
    Row("an unknown router's flow is answered by the default way", lambda s: s.reply(80), Verdict.NAT_REPLY,
        lambda s: s.to_client(80), given=lambda s: open_from(s, "02:00:00:00:09:09"), arrives=w.NODES),
    Row("a reply from a node behind a tag loses it", lambda s: tagged(s.reply(88), 100), Verdict.NAT_REPLY,
        lambda s: s.to_client(88), given=lambda s: s.open(88), arrives=w.NODES),
    Row("the node's FIN half-closes", lambda s: s.reply(80, flags="FA"), Verdict.NAT_REPLY,
        lambda s: s.to_client(80, flags="FA"), given=lambda s: s.establish(80), arrives=w.NODES,
        then=state_is("fin_backend")),
    Row("both FINs close", lambda s: s.reply(80, flags="FA"), Verdict.NAT_REPLY,
        given=lambda s: (s.establish(80), s.send(s.to_vip(80, flags="FA"))), arrives=w.NODES,
        then=state_is("closed")),
    Row("the node's reset closes", lambda s: s.reply(80, flags="RA"), Verdict.NAT_REPLY,
        lambda s: s.to_client(80, flags="RA"), given=lambda s: s.open(80), arrives=w.NODES, then=state_is("closed")),
    Row("the last ACK still passes", lambda s: s.to_vip(80, flags="A"), Verdict.NAT_FORWARD,
        lambda s: s.to_node(80, flags="A"), given=lambda s: close_both(s), then=state_is("closed")),
    Row("a packet to a SNAT port nobody holds is the kernel's", lambda s: s.reply(80), Verdict.NO_SLOT,
        given=lambda s: unused_slot(s), arrives=w.NODES),
    Row("another machine's packet to the slot is the kernel's", lambda s: s.reply(80, node=2), Verdict.NO_SLOT,
        given=lambda s: s.open(80), arrives=w.NODES),
    Row("another port of the node is the kernel's", lambda s: s.reply(81), Verdict.NO_SLOT,
        given=lambda s: s.open(80), arrives=w.NODES),
    Row("another protocol to the slot is the kernel's", lambda s: s.reply(80, proto=UDP), Verdict.NO_SLOT,
        given=lambda s: s.open(80), arrives=w.NODES),
    Row("below the SNAT ports begins the kernel's own", lambda s: to_port(s, w.PORT_FIRST - 1), Verdict.NO_SLOT,
        given=lambda s: s.open(80), arrives=w.NODES),
    Row("above the SNAT ports begins the kernel's own", lambda s: to_port(s, w.PORT_FIRST + 4096), Verdict.NO_SLOT,
        given=lambda s: s.open(80), arrives=w.NODES),
    Row("the TTL of a reply ends here: the node is told", lambda s: s.reply(80, ttl=1), Verdict.TTL_ANSWERED,
        given=lambda s: s.open(80), arrives=w.NODES),
]  # fmt: skip


def open_from(scene: Scene, router: str, *vlans: int) -> None:
    packet = scene.to_vip(80)
    packet[Ether].src = router
    scene.learn(scene.send(tagged(packet, *vlans) if vlans else packet))


def close_both(scene: Scene) -> None:
    scene.establish(80)
    scene.send(scene.to_vip(80, flags="FA"))
    scene.send(scene.reply(80, flags="FA"), w.NODES)


def unused_slot(scene: Scene) -> None:
    scene.snat, scene.slot = (w.SNAT6 if scene.v6 else w.SNAT4)[1], w.PORT_FIRST + 17


def to_port(scene: Scene, port: int) -> Packet:
    packet = scene.reply(80)
    packet[TCP].dport = port
    return packet


@rows(REPLY)
def test_back_to_the_client(world: World, row: Row, family: int) -> None:
    check(world, row, family)


# --- what lasts longer than a packet --------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
def test_a_closed_connections_port_is_used_again_for_a_new_one(world: World, family: int) -> None:
    scene = Scene(world, family == 6)
    close_both(scene)
    slot = scene.slot
    scene.open(80)
    assert (scene.slot, scene.nat_state()) == (slot, "syn")


@pytest.mark.parametrize("family", [4, 6])
def test_a_live_slot_is_never_taken(world: World, family: int) -> None:
    """More connections than slots: the established ones all live, the others are refused."""
    scene = Scene(world, family == 6)
    small = w.Settings(snat_addresses=(*w.SNAT4, *w.SNAT6), port_first=w.PORT_FIRST, port_count=32)
    world.tables.configure(small)
    try:
        held, refused = {}, 0
        for sport in range(1024, 1024 + 200):
            outcome = scene.send(scene.to_vip(80, sport=sport))
            if outcome.verdict is Verdict.NAT_FULL:
                refused += 1
                continue
            scene.learn(outcome)
            scene.send(scene.reply(80), w.NODES)
            scene.send(scene.to_vip(80, sport=sport, flags="A"))
            held[sport] = scene.snat, scene.slot
        assert refused + len(held) == 200
        assert 48 <= len(held) <= 64
        assert len(set(held.values())) == len(held)
        for sport, (scene.snat, scene.slot) in held.items():
            assert scene.send(scene.to_vip(80, sport=sport, flags="A")).verdict is Verdict.NAT_FORWARD
            assert scene.nat_state() == "established"
    finally:
        world.tables.configure(world.settings)


@pytest.mark.parametrize("family", [4, 6])
def test_a_flood_of_syns_leaves_established_connections_alone(world: World, family: int) -> None:
    scene = Scene(world, family == 6)
    scene.establish(80)
    kept = scene.snat, scene.slot
    for number in range(3000):
        source = f"2001:db8:f::{number:x}" if scene.v6 else f"100.64.{number >> 8}.{number & 255}"
        scene.send(scene.to_vip(80, source=source))
    outcome = scene.send(scene.to_vip(80, flags="A"))
    scene.learn(outcome)
    assert (scene.snat, scene.slot) == kept
    assert scene.nat_state() == "established"


@pytest.mark.parametrize(
    ("state", "lives_s", "ends_s"),
    [("syn", 5, 12), ("established", 7000, 7500), ("closed", 50, 62), ("udp", 25, 32), ("udp_stream", 110, 125)],
)
def test_a_slot_is_free_after_its_time(world: World, state: str, lives_s: float, ends_s: float) -> None:
    """With one bucket and three live neighbours, the fourth slot is taken only when its time is over."""
    scene = Scene(world, v6=False)
    one_bucket = w.Settings(
        snat_addresses=(w.SNAT4[0],), port_first=w.PORT_FIRST, port_count=4, pressure_s={state: 100_000}
    )
    world.tables.configure(one_bucket)
    try:
        proto = UDP if state.startswith("udp") else TCP
        scene.open(80, proto=proto)
        if state in ("established", "closed"):
            scene.establish(80)
        if state == "closed":
            scene.send(scene.to_vip(80, flags="R"))
        if state == "udp_stream":
            scene.send(scene.reply(80, proto=UDP), w.NODES)
        assert scene.nat_state() == state
        slot = scene.slot
        world.expire(lives_s)
        for sport in (1, 2, 3):
            Scene(world, v6=False).establish(80, sport=sport)
        assert scene.send(scene.to_vip(80, sport=9)).verdict is Verdict.NAT_FULL
        world.expire(ends_s - lives_s)
        for sport in (1, 2, 3):
            scene.send(scene.to_vip(80, sport=sport, flags="A"))
        scene.open(80, sport=9)
        assert scene.slot == slot
    finally:
        world.tables.configure(world.settings)


@pytest.mark.parametrize("family", [4, 6])
def test_many_clients_get_many_ports(world: World, family: int) -> None:
    scene = Scene(world, family == 6)
    used = set()
    for sport in range(2000, 2600):
        scene.open(80, sport=sport)
        used.add((scene.snat, scene.slot))
    assert len(used) == 600
    assert {snat for snat, _ in used} == set(w.SNAT6 if scene.v6 else w.SNAT4)


def test_a_frame_is_not_longer_than_what_it_was(world: World) -> None:
    """Ethernet padding behind a short packet is carried, not counted."""
    scene = Scene(world, v6=False)
    packet = scene.to_vip(80, payload=b"")
    outcome = world.send(bytes(packet) + bytes(6))
    scene.learn(outcome)
    assert outcome.packet == bytes(scene.to_node(80, payload=b"")) + bytes(6)
    assert world.counters.vips([world.tables.vip_id(w.served()[0][0].vip)]).popitem()[1].bytes == 40
    assert Raw not in Ether(bytes(packet))
