# SPDX-License-Identifier: Apache-2.0
"""Does a VIP provably work? Pure: which packet to try, and what its outcome says.

A Vip is announced only when a packet of it, sent through the loaded program over the live maps, left
as it must: rewritten for its mode, to a backend the kernel has a way to, at that backend's MAC.
"""

import ipaddress
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from lbagent.model.vip import Forward, Mode
from lbagent.xdp.nexthop import NextHop
from lbagent.xdp.testrun import Trial, packet_to
from lbagent.xdp.verdict import Verdict

_EXAMPLE = {4: "192.0.2.1", 6: "2001:db8::1"}  # nobody's client: RFC 5737, RFC 3849
_FORWARDED = {Mode.NAT: Verdict.NAT_FORWARD, Mode.DSR_L2: Verdict.DSR_L2, Mode.DSR_IPIP: Verdict.DSR_IPIP}
_VLAN_TYPES = (0x8100, 0x88A8)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Where a frame is bound: MAC, tags outer first, address, and port (0: not TCP or UDP)."""

    mac: bytes
    vlans: tuple[int, ...]
    address: str
    port: int


def sample(forward: Forward) -> bytes:
    """A first packet from a client whom the VIP's source ranges admit."""
    return packet_to(forward.vip, source=_client(forward))


def complaint(
    forward: Forward, outcome: Trial, address_by_backend: Mapping[int, str], hop_by_address: Mapping[str, NextHop]
) -> str:
    """What is wrong with the outcome of ``sample``, '' when nothing is."""
    if outcome.verdict is not _FORWARDED[forward.mode]:
        return f"a test packet was {outcome.verdict.sentence}"
    backend = address_by_backend.get(outcome.backend_id)
    if backend is None:
        return f"a test packet went to backend {outcome.backend_id}, which nobody knows"
    out = outgoing(outcome.packet)
    if forward.mode is Mode.NAT and (out.address, out.port) != (backend, forward.node_port):
        return f"a test packet for {backend} port {forward.node_port} was sent to {out.address} port {out.port}"
    if forward.mode is Mode.DSR_L2 and (out.address, out.port) != (forward.vip.address, forward.vip.port):
        return f"a test packet was changed: it is for {out.address} port {out.port} now"
    if forward.mode is Mode.DSR_IPIP and out.address != backend:
        return f"a test packet for {backend} was tunnelled to {out.address}"
    hop = hop_by_address.get(backend)
    if hop is not None and (out.mac, out.vlans) != (hop.destination_mac, hop.vlans):
        return f"a test packet for {backend} was sent to MAC {out.mac.hex(':')}, not {hop.destination_mac.hex(':')}"
    return ""


def outgoing(frame: bytes) -> Outgoing:
    """Read where a frame is bound."""
    at, vlans = 12, []
    while (ethertype := int.from_bytes(frame[at : at + 2], "big")) in _VLAN_TYPES:
        vlans.append(int.from_bytes(frame[at + 2 : at + 4], "big") & 0xFFF)
        at += 4
    packet = frame[at + 2 :]
    if ethertype == 0x0800:
        address, protocol, rest = packet[16:20], packet[9], packet[(packet[0] & 0xF) * 4 :]
    else:
        address, protocol, rest = packet[24:40], packet[6], packet[40:]
    port = struct.unpack_from("!H", rest, 2)[0] if protocol in (6, 17) else 0
    return Outgoing(frame[:6], tuple(vlans), str(ipaddress.ip_address(address)), port)


def _client(forward: Forward) -> str:
    """An address that may talk to the VIP."""
    networks = [ipaddress.ip_network(r, strict=False) for r in forward.source_ranges]
    mine = [n for n in networks if n.version == forward.vip.family]
    example = _EXAMPLE[forward.vip.family]
    if not mine or any(ipaddress.ip_address(example) in n for n in mine):
        return example
    return str(mine[0][min(1, mine[0].num_addresses - 1)])
