# SPDX-License-Identifier: Apache-2.0
"""What counts as a proof that a VIP works, decided without a kernel."""

import ipaddress
import struct

import pytest

from lbagent.model.service import Protocol, ServiceKey
from lbagent.model.vip import Forward, Mode, Vip
from lbagent.xdp.nexthop import NextHop
from lbagent.xdp.proof import Outgoing, complaint, outgoing, sample
from lbagent.xdp.testrun import Trial, packet_to
from lbagent.xdp.verdict import Verdict

VIP = Vip(address="203.0.113.1", protocol=Protocol.TCP, port=80)
VIP6 = Vip(address="2001:db8:1::1", protocol=Protocol.UDP, port=53)
NODE, NODE_PORT = "10.0.0.7", 30080
MAC = b"\2\0\0\0\0\7"
HOP = NextHop(ifindex=2, destination_mac=MAC, source_mac=b"\2\0\0\0\0\1", mtu=1500)
VERDICT = {Mode.NAT: Verdict.NAT_FORWARD, Mode.DSR_L2: Verdict.DSR_L2, Mode.DSR_IPIP: Verdict.DSR_IPIP}


def forward(mode: Mode = Mode.NAT, vip: Vip = VIP, **changes: object) -> Forward:
    port = NODE_PORT if mode is Mode.NAT else 0
    return Forward(vip=vip, service=ServiceKey("", ""), mode=mode, ring="r", node_port=port, **changes)  # type: ignore[arg-type]


def frame(address: str, port: int, *, mac: bytes = MAC, tags: bytes = b"", protocol: int = 6) -> bytes:
    destination = ipaddress.ip_address(address).packed
    if len(destination) == 4:
        head = b"\x45".ljust(9, b"\0") + bytes([protocol]) + bytes(6) + destination
        ethertype = b"\x08\x00"
    else:
        head = b"\x60".ljust(6, b"\0") + bytes([protocol]) + bytes(17) + destination
        ethertype = b"\x86\xdd"
    return mac + bytes(6) + tags + ethertype + head + struct.pack("!HH", 40000, port)


def outcome(packet: bytes, *, verdict: Verdict = Verdict.NAT_FORWARD, backend_id: int = 3) -> Trial:
    return Trial(action="redirect", verdict=verdict, backend_id=backend_id, packet=packet)


def said(wanted: Forward, result: Trial, hop: NextHop = HOP) -> str:
    return complaint(wanted, result, {3: NODE}, {NODE: hop})


@pytest.mark.parametrize(
    ("mode", "address", "port"),
    [(Mode.NAT, NODE, NODE_PORT), (Mode.DSR_L2, VIP.address, VIP.port), (Mode.DSR_IPIP, NODE, 0)],
)
def test_a_packet_that_left_as_it_must_is_a_proof(mode: Mode, address: str, port: int):
    protocol = 4 if mode is Mode.DSR_IPIP else 6
    assert said(forward(mode), outcome(frame(address, port, protocol=protocol), verdict=VERDICT[mode])) == ""


def test_another_verdict_is_told_in_its_own_words():
    result = outcome(frame(NODE, NODE_PORT), verdict=Verdict.NO_BACKEND)
    assert said(forward(), result) == f"a test packet was {Verdict.NO_BACKEND.sentence}"


def test_a_backend_that_nobody_knows_is_no_proof():
    assert "backend 9" in said(forward(), outcome(frame(NODE, NODE_PORT), backend_id=9))


@pytest.mark.parametrize(("address", "port"), [("10.0.0.8", NODE_PORT), (NODE, 80)])
def test_a_packet_for_somebody_else_is_no_proof(address: str, port: int):
    assert f"was sent to {address} port {port}" in said(forward(), outcome(frame(address, port)))


def test_a_dsr_packet_must_keep_its_address_and_port():
    assert "was changed" in said(forward(Mode.DSR_L2), outcome(frame(NODE, 80), verdict=Verdict.DSR_L2))


def test_a_tunnel_must_lead_to_the_chosen_backend():
    result = outcome(frame("10.0.0.8", 0, protocol=4), verdict=Verdict.DSR_IPIP)
    assert "tunnelled to 10.0.0.8" in said(forward(Mode.DSR_IPIP), result)


def test_the_mac_must_be_the_next_hops():
    strange = frame(NODE, NODE_PORT, mac=b"\2\0\0\0\0\x66")
    assert "02:00:00:00:00:66, not 02:00:00:00:00:07" in said(forward(), outcome(strange))


def test_the_tags_must_be_the_next_hops():
    tagged = frame(NODE, NODE_PORT, tags=b"\x81\x00\x00\x07")
    hop = NextHop(ifindex=2, destination_mac=MAC, source_mac=MAC, mtu=1500, vlans=(7,))
    assert said(forward(), outcome(tagged), hop) == ""
    assert said(forward(), outcome(tagged)) != ""


def test_a_frame_tells_where_it_is_bound_through_two_tags_and_over_ipv6():
    tags = b"\x88\xa8\x00\x05\x81\x00\x00\x07"
    assert outgoing(frame(NODE, 80, tags=tags)) == Outgoing(MAC, (5, 7), NODE, 80)
    assert outgoing(frame("2001:db8::7", 53, protocol=17)) == Outgoing(MAC, (), "2001:db8::7", 53)
    assert outgoing(frame(NODE, 80, protocol=4)).port == 0


@pytest.mark.parametrize(
    ("vip", "ranges", "client"),
    [
        (VIP, (), "192.0.2.1"),
        (VIP6, (), "2001:db8::1"),
        (VIP, ("198.51.100.0/24",), "198.51.100.1"),
        (VIP, ("198.51.100.7/32",), "198.51.100.7"),
        (VIP, ("192.0.0.0/8", "198.51.100.0/24"), "192.0.2.1"),
        (VIP6, ("198.51.100.0/24", "2001:db8:9::/64"), "2001:db8:9::1"),
    ],
)
def test_the_test_packet_comes_from_a_client_the_ranges_admit(vip: Vip, ranges: tuple[str, ...], client: str):
    assert sample(forward(vip=vip, source_ranges=ranges)) == packet_to(vip, source=client)
