# SPDX-License-Identifier: Apache-2.0
"""Who may talk to a VIP, who keeps whom: source ranges, affinity, limits, drained and dead nodes."""

import dataclasses

import pytest
from scapy.packet import Packet

from lbagent.model.vip import Backend, BackendState, Forward, Ring
from tests.ebpf.scene import TCP, UDP, Ether, Row, Scene, Verdict, check, rows, w
from tests.ebpf.test_dsr import by_mac, node_of
from tests.ebpf.world import World

pytestmark = pytest.mark.bpf

SOURCES = [
    Row("nat: a source in the ranges", lambda s: s.to_vip(84), Verdict.NAT_FORWARD, lambda s: s.to_node(84),
        learns=True),
    Row("nat: a source outside", lambda s: s.to_vip(84, source=s.stranger), Verdict.SOURCE_DENIED,
        then=lambda s: s.nat_flows() == 0),
    Row("nat: by UDP outside", lambda s: s.to_vip(84, source=s.stranger, proto=UDP), Verdict.SOURCE_DENIED),
    Row("nat: the first address of the range", lambda s: s.to_vip(84, source=edge(s, 0)), Verdict.NAT_FORWARD),
    Row("nat: the last address of the range", lambda s: s.to_vip(84, source=edge(s, 1)), Verdict.NAT_FORWARD),
    Row("nat: one address beyond", lambda s: s.to_vip(84, source=edge(s, 2)), Verdict.SOURCE_DENIED),
    Row("L2: a source in the ranges", lambda s: s.to_vip(85), Verdict.DSR_L2, lambda s: by_mac(s.to_vip(85, ttl=63))),
    Row("L2: a source outside", lambda s: s.to_vip(85, source=s.stranger), Verdict.SOURCE_DENIED),
    Row("L2: outside in the middle of a connection", lambda s: s.to_vip(85, source=s.stranger, flags="A"),
        Verdict.SOURCE_DENIED),
    Row("a VIP without ranges serves everybody", lambda s: s.to_vip(80, source=s.stranger), Verdict.NAT_FORWARD),
]  # fmt: skip


def edge(scene: Scene, which: int) -> str:
    return (
        ("2001:db8:c::", "2001:db8:c:ffff:ffff:ffff:ffff:ffff", "2001:db8:d::")
        if scene.v6
        else ("192.0.2.0", "192.0.2.255", "192.0.3.0")
    )[which]


@rows(SOURCES)
def test_source_ranges(world: World, row: Row, family: int) -> None:
    check(world, row, family)


# --- affinity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("port", [92, 93])
@pytest.mark.parametrize("proto", [TCP, UDP])
def test_a_client_keeps_its_node_over_all_its_connections(
    world: World, family: int, port: int, proto: type[Packet]
) -> None:
    scene = Scene(world, family == 6)
    for client in range(20):
        source = f"2001:db8:c::{client:x}" if scene.v6 else f"192.0.2.{client}"
        seen = {node_of(scene, scene.to_vip(port, sport=p, source=source, proto=proto)) for p in range(2000, 2010)}
        assert len(seen) == 1


def test_a_client_that_comes_back_in_time_finds_its_node_again(changing: "Changing") -> None:
    """Its node is not the ring's any more, but takes new flows: affinity beats the ring until it times out."""
    scene = Scene(changing.world, v6=False)
    forward = changing.forward(93)
    before = node_of(scene, scene.to_vip(93))
    number = next(n for n in (1, 2, 3) if w.NODE[n] == before)
    others = tuple(Backend(address=w.NODE4[n]) for n in (1, 2, 3) if n != number)
    reweighed = w.ring(501, *others, Backend(address=w.NODE4[number]))
    slots = w.array("H", [1 + i % 2 for i in range(w.RING_SLOTS)])  # the last one has no slot, but is active
    changing.program(forward, dataclasses.replace(reweighed, slots=slots))
    assert node_of(scene, scene.to_vip(93, sport=2)) == before
    changing.world.expire(700)
    assert node_of(scene, scene.to_vip(93, sport=3)) != before


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("port", [100, 101])
def test_new_flows_of_a_source_prefix_are_limited(world: World, family: int, port: int) -> None:
    scene = Scene(world, family == 6)
    verdicts = []
    for number in range(60):  # a new host of the same prefix each time
        source = f"2001:db8:c:0:{number:x}::7" if scene.v6 else f"192.0.2.{number}"
        verdicts.append(scene.send(scene.to_vip(port, source=source)).verdict)
    passed = sum(v.is_forward for v in verdicts)
    assert passed in range(10, 32)  # a tick or two may begin meanwhile
    assert verdicts.count(Verdict.NEW_FLOW_LIMIT) == 60 - passed
    assert scene.send(scene.to_vip(port, source=scene.stranger)).verdict.is_forward, "another prefix is free"


def test_established_flows_do_not_count_against_the_limit(world: World) -> None:
    scene = Scene(world, v6=False)
    scene.establish(100)
    for _ in range(50):
        assert scene.send(scene.to_vip(100, flags="A")).verdict is Verdict.NAT_FORWARD


# --- drained and dead nodes -------------------------------------------------------------------------


class Changing:
    """Rings of one test; the world is as it was afterwards."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.forwards, self.rings = w.served()

    def forward(self, port: int, *, vip: str = w.VIP4) -> Forward:
        return next(f for f in self.forwards if f.vip.port == port and f.vip.address == vip)

    def program(self, forward: Forward, ring: Ring) -> None:
        changed = dataclasses.replace(forward, ring=ring.fingerprint)
        assert self.world.tables.program([changed], {ring.fingerprint: ring}) == {}
        assert self.world.tables.read()[forward.vip] == changed


@pytest.fixture
def changing(world: World):
    yield Changing(world)
    w.populate(world)


def with_states(fingerprint: int, **states: BackendState) -> Ring:
    backends = [Backend(address=w.NODE4[n], state=states.get(f"node{n}", BackendState.ACTIVE)) for n in (1, 2, 3)]
    return w.ring(fingerprint, *backends)


@pytest.mark.parametrize("port", [90, 91])
def test_a_draining_node_keeps_its_flows_and_gets_no_new_ones(changing: Changing, port: int) -> None:
    scene = Scene(changing.world, v6=False)
    node_by_port = {}
    for sport in range(1000, 1030):
        scene.send(scene.to_vip(port, sport=sport))
        scene_node = node_of(scene, scene.to_vip(port, sport=sport, flags="A" if port == 91 else "S"))
        node_by_port[sport] = scene_node
    changing.program(changing.forward(port), with_states(502, node1=BackendState.DRAINING))
    for sport, mac in node_by_port.items():
        assert node_of(scene, scene.to_vip(port, sport=sport, flags="A")) == mac
    fresh = {node_of(scene, scene.to_vip(port, sport=sport)) for sport in range(3000, 3060)}
    assert fresh == {w.NODE[2], w.NODE[3]}


@pytest.mark.parametrize("port", [90, 91])
def test_a_dead_nodes_flows_move_at_once_and_only_those(changing: Changing, port: int) -> None:
    scene = Scene(changing.world, v6=False)
    node_by_port = {}
    for sport in range(1000, 1030):
        scene.send(scene.to_vip(port, sport=sport))
        node_by_port[sport] = node_of(scene, scene.to_vip(port, sport=sport, flags="A" if port == 91 else "S"))
    changing.program(changing.forward(port), with_states(503, node1=BackendState.DOWN))
    for sport, mac in node_by_port.items():
        now = node_of(scene, scene.to_vip(port, sport=sport, flags="A"))
        assert now != w.NODE[1]
        assert mac in (w.NODE[1], now)


def test_a_vip_programmed_anew_does_not_know_the_flows_of_the_one_before(changing: Changing) -> None:
    scene = Scene(changing.world, v6=False)
    scene.establish(90)
    forward = changing.forward(90)
    changing.world.tables.unprogram([forward.vip])
    assert scene.send(scene.to_vip(90, flags="A")).verdict is Verdict.PORT_REFUSED
    assert scene.send(scene.reply(90), w.NODES).verdict is Verdict.NO_SLOT
    changing.program(forward, with_states(504))
    assert scene.send(scene.to_vip(90, flags="A")).verdict is Verdict.NO_FLOW_RESET
    assert scene.send(scene.reply(90), w.NODES).verdict is Verdict.NO_SLOT


def test_the_last_vip_of_an_address_takes_the_address_with_it(changing: Changing) -> None:
    scene = Scene(changing.world, v6=False)
    changing.world.tables.unprogram([f.vip for f in changing.forwards if f.vip.address == w.VIP4])
    assert scene.send(scene.to_vip(80)).verdict is Verdict.NOT_OURS
    assert Scene(changing.world, v6=True).send(Scene(changing.world, v6=True).to_vip(80)).verdict.is_forward


def test_a_node_whose_mac_changes_gets_its_packets_there(changing: Changing) -> None:
    scene = Scene(changing.world, v6=False)
    changing.world.tables.set_hop(w.NODE4[1], w.hop("02:00:00:00:02:99"))
    assert node_of(scene, scene.to_vip(81)) == "02:00:00:00:02:99"
    changing.world.tables.set_hop(w.NODE4[1], None)
    assert scene.send(scene.to_vip(81)).verdict is Verdict.NO_NEXTHOP


def test_a_lost_router_is_replaced_by_the_default_way(changing: Changing) -> None:
    scene = Scene(changing.world, v6=False)
    packet = scene.to_vip(80)
    packet[Ether].src = w.ROUTER2
    scene.learn(scene.send(packet))
    assert node_reply(scene) == w.ROUTER2
    changing.world.tables.set_router("10.0.1.2", None)
    assert node_reply(scene) == w.ROUTER1


def node_reply(scene: Scene) -> str:
    mac: str = Ether(scene.send(scene.reply(80), w.NODES).packet).dst
    return mac
