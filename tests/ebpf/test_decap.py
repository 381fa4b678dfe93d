# SPDX-License-Identifier: Apache-2.0
"""What the tunnel of dsr-ipip put around a packet, decap.c takes off again."""

import pytest
from scapy.packet import Packet

from lbagent.xdp import bpf
from lbagent.xdp import compile as compiler
from tests.ebpf.scene import IP, TCP, UDP, Ether, IPv6, Raw, Scene, w
from tests.ebpf.test_dsr import in_tunnel
from tests.ebpf.test_nat import tagged
from tests.ebpf.world import EBPF, World

pytestmark = pytest.mark.bpf
LIMITED = {
    "DECAP_SOURCE4": 0x0A000900,
    "DECAP_MASK4": 0xFFFFFF00,
    "DECAP_SOURCE6": 0xFD00000900000000,
    "DECAP_MASK6": 0xFFFFFFFF00000000,
}


@pytest.fixture(scope="module")
def decap() -> int:
    code = compiler.build(EBPF, main="decap.c", function="decap", constants=LIMITED, maps=[])
    return bpf.load_program(code.bound({}), name="decap")


def opened(program: int, packet: Packet | bytes) -> bytes:
    run = bpf.run_packet(program, bytes(packet))
    assert run.verdict == 2, "everything goes to the kernel"
    return run.packet


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("port", [82, 83])
@pytest.mark.parametrize("proto", [TCP, UDP])
@pytest.mark.parametrize("vlans", [(), (100,), (100, 200)])
def test_what_left_in_a_tunnel_arrives_as_it_was(
    world: World, decap: int, family: int, port: int, proto: type[Packet], vlans: tuple[int, ...]
) -> None:
    scene = Scene(world, family == 6)
    sent = scene.to_vip(port, proto=proto)
    outcome = scene.send(sent)
    assert outcome.action == "redirect"
    frame = Ether(outcome.packet)
    arrived = opened(decap, tagged(frame, *vlans) if vlans else frame)
    wanted = Ether(src=w.LB_NODES, dst=w.NODE[1]) / scene.to_vip(port, proto=proto, ttl=63)[Ether].payload
    assert arrived == bytes(tagged(wanted, *vlans) if vlans else wanted)


def test_a_tunnel_of_somebody_else_stays_closed(world: World, decap: int) -> None:
    scene = Scene(world, v6=False)
    for packet in (
        in_tunnel(scene, scene.to_vip(82), w.NODE4[1]),
        in_tunnel(scene, scene.to_vip(83), w.NODE6[1]),
    ):
        layer = packet[Ether].payload
        layer.src = "10.0.8.1" if IP in packet and layer.version == 4 else "fd00:8::1"
        assert opened(decap, packet) == bytes(packet)


@pytest.mark.parametrize(
    "packet",
    [
        Ether() / IP(src="10.0.9.1") / TCP(),
        Ether() / IPv6(src="fd00:9::1") / UDP() / Raw(bytes(9)),
        Ether(type=0x0806) / Raw(bytes(28)),
        Ether() / IP(src="10.0.9.1", proto=4, flags="MF") / Raw(bytes(40)),
        Raw(bytes(14)),
    ],
    ids=["TCP", "UDP over IPv6", "ARP", "a fragment", "a bare header"],
)
def test_anything_else_passes_as_it_is(decap: int, packet: Packet) -> None:
    assert opened(decap, packet) == bytes(packet)
