# SPDX-License-Identifier: Apache-2.0
"""Model values <-> bytes in the kernel's maps: the Python twin of ``ebpf/layout.h``.

Pure. Addresses and ports are in wire order, all else in the machine's (little-endian) order.
"""

import functools
import ipaddress
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from lbagent.model.service import Protocol, ServiceKey
from lbagent.model.vip import RING_SLOTS, BackendState, Forward, Mode, Ring, Vip
from lbagent.xdp.index import index_hash
from lbagent.xdp.nexthop import NextHop

LAYOUT = 1
"""LB_LAYOUT: part of the path the maps are pinned at."""

LINE = 64
SLOTS_PER_LINE = 32
SLOT_LINES = -(-RING_SLOTS // SLOTS_PER_LINE)
HINTS = 32768
HINT_VIP = 0x8000
PATH_SECOND, PATH_USABLE = 0x1, 0x2
NAT_WAYS = 4
_REMEMBERED = 1 << 16  # all VIPs there can be: they are read back in every pass, and seldom change
NAT_STATES = 16

_MODE = {Mode.NAT: 1, Mode.DSR_L2: 2, Mode.DSR_IPIP: 3}
_MODE_BY_NUMBER = {number: mode for mode, number in _MODE.items()}
_PROTOCOL = {Protocol.TCP: 6, Protocol.UDP: 17}
_PROTOCOL_BY_NUMBER = {number: protocol for protocol, number in _PROTOCOL.items()}

VIP = struct.Struct("<QQ16s2sBBIII16x")
NEIGHBOUR = struct.Struct("<16sIB3x20s20s")
HOP = struct.Struct("<I6s6s2s2s")
ROUTER_KEY = struct.Struct("<I6s2s")
SNAT = struct.Struct("<16sB15x")
NAT_ENTRY = struct.Struct("<QQQQ")
RANGE4 = struct.Struct("<II4s")
RANGE6 = struct.Struct("<II16s")
CONFIG = struct.Struct("<Q HHHH HH BBBx 4s4s16s4s III 16I 16I")
RING_HEAD = struct.Struct("<QI")
COUNTER = struct.Struct("<8Q")
CLIENT_KEY_BYTES, CLIENT_BYTES = 20, 8
FRAGMENT_KEY_BYTES, FRAGMENT_BYTES = 40, 48
LIMIT_KEY_BYTES, LIMIT_BYTES = 12, 8
SCRATCH_BYTES = 160


def address_bytes(address: str) -> bytes:
    """Four words in wire order; an IPv4 address is the first one."""
    return ipaddress.ip_address(address).packed.ljust(16, b"\0")


def address_text(packed: bytes, family: int) -> str:
    """The reverse; canonical text."""
    return str(ipaddress.ip_address(packed[:4] if family == 4 else packed))


@functools.lru_cache(maxsize=1 << 16)
def hint_index(address: str) -> int:
    """Place of an address in lb_filter (``hint_index4`` and ``6`` of hash.h)."""
    words: tuple[int, ...] = struct.unpack("<4I", address_bytes(address))
    folded = words[0]
    for word, turn in zip(words[1:], (7, 14, 21), strict=True):
        folded ^= (word << turn | word >> (32 - turn)) & 0xFFFFFFFF
    return (folded * 0x9E3779B1 & 0xFFFFFFFF) >> 17


@lru_cache(_REMEMBERED)
def vip_hash(vip: Vip) -> int:
    """Under which hash lb_index knows a Vip."""
    return index_hash(vip.address, vip.port, _PROTOCOL[vip.protocol])


# --- VIPs --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VipRecord:
    """A VIP as the kernel holds it; rings and sets of source ranges are ids."""

    vip: Vip
    mode: Mode
    node_port: int
    ring_id: int
    ranges_id: int
    affinity_s: int
    affinity_ticks: int
    salt: int
    new_flows_per_tick: int = 0

    @property
    def target(self) -> int:
        """The one word that the data path reads at once."""
        wire_port = int.from_bytes(self.node_port.to_bytes(2, "big"), "little")
        return self.ring_id | wire_port << 16 | _MODE[self.mode] << 32 | self.ranges_id << 48

    def packed(self) -> bytes:
        return VIP.pack(
            self.target,
            self.salt,
            address_bytes(self.vip.address),
            self.vip.port.to_bytes(2, "big"),
            _PROTOCOL[self.vip.protocol],
            self.vip.family,
            self.affinity_ticks,
            self.new_flows_per_tick,
            self.affinity_s,
        )


@lru_cache(_REMEMBERED)
def vip_record(packed: bytes) -> VipRecord | None:
    """None: not a record we could have written."""
    target, salt, address, port, protocol, family, ticks, limit, affinity_s = VIP.unpack(packed)
    mode = _MODE_BY_NUMBER.get(target >> 32 & 0xFF)
    if mode is None or protocol not in _PROTOCOL_BY_NUMBER or family not in (4, 6):
        return None
    vip = Vip(
        address=address_text(address, family),
        protocol=_PROTOCOL_BY_NUMBER[protocol],
        port=int.from_bytes(port, "big"),
    )
    return VipRecord(
        vip=vip,
        mode=mode,
        node_port=int.from_bytes((target >> 16 & 0xFFFF).to_bytes(2, "little"), "big"),
        ring_id=target & 0xFFFF,
        ranges_id=target >> 48,
        affinity_s=affinity_s,
        affinity_ticks=ticks,
        salt=salt,
        new_flows_per_tick=limit,
    )


def forward(record: VipRecord, *, fingerprint: str, ranges: tuple[str, ...]) -> Forward:
    """What the record means. The kernel does not know the Service."""
    return Forward(
        vip=record.vip,
        service=ServiceKey("", ""),
        mode=record.mode,
        ring=fingerprint,
        node_port=record.node_port,
        source_ranges=ranges,
        affinity_timeout_s=record.affinity_s,
        new_flows_per_s=record.new_flows_per_tick,
    )


# --- source ranges -----------------------------------------------------------------------------


def canonical_ranges(ranges: Iterable[str]) -> tuple[str, ...]:
    """Sorted, without host bits and duplicates: the only form that can be read back equal."""
    networks = {ipaddress.ip_network(r, strict=False) for r in ranges}
    return tuple(str(n) for n in sorted(networks, key=lambda n: (n.version, n.network_address.packed, n.prefixlen)))


def range_key(network: str, set_id: int) -> bytes:
    """Key of lb_ranges4 or 6."""
    net = ipaddress.ip_network(network)
    layout = RANGE4 if net.version == 4 else RANGE6
    return layout.pack(32 + net.prefixlen, set_id, net.network_address.packed)


def range_of(key: bytes) -> tuple[int, str]:
    """(set id, network)."""
    bits, set_id, address = (RANGE4 if len(key) == RANGE4.size else RANGE6).unpack(key)
    return set_id, f"{ipaddress.ip_address(address)}/{bits - 32}"


# --- rings -------------------------------------------------------------------------------------


def member_lines(backends: int) -> int:
    """LB_MEMBER_LINES for an lb_backends of this many entries."""
    return -(-backends // 512)


def ring_lines(backends: int) -> int:
    """LB_RING_LINES: head, slots, who keeps flows, who gets new ones."""
    return 1 + SLOT_LINES + 2 * member_lines(backends)


def ring_bytes(ring: Ring, id_by_address: Mapping[str, int], backends: int) -> bytes:
    """A whole ring as it lies in lb_rings; ``backends`` is the size of lb_backends."""
    ids = (0, *(id_by_address[b.address] for b in ring.backends))
    kept = active = 0
    for backend, number in zip(ring.backends, ids[1:], strict=True):
        if backend.state is not BackendState.DOWN:
            kept |= 1 << number
        if backend.state is BackendState.ACTIVE:
            active |= 1 << number
    slots = struct.pack(f"<{len(ring.slots)}H", *map(ids.__getitem__, ring.slots))
    size = member_lines(backends) * LINE
    return b"".join(
        (
            RING_HEAD.pack(int(ring.fingerprint, 16), len(ring.backends)).ljust(LINE, b"\0"),
            slots.ljust(SLOT_LINES * LINE, b"\0"),
            kept.to_bytes(size, "little"),
            active.to_bytes(size, "little"),
        )
    )


# --- neighbours --------------------------------------------------------------------------------


def hop_bytes(hop: NextHop | None) -> bytes:
    """A struct hop; nothing when there is no way."""
    if hop is None:
        return bytes(HOP.size)
    outer, inner = (*hop.vlans, 0, 0)[:2]
    return HOP.pack(
        hop.ifindex, hop.destination_mac, hop.source_mac, outer.to_bytes(2, "big"), inner.to_bytes(2, "big")
    )


def neighbour_path(hop: NextHop | None, *, second: bool) -> int:
    """The word that names the hop that holds."""
    path = PATH_SECOND if second else 0
    return path if hop is None else path | PATH_USABLE | min(hop.mtu, 0xFFFF) << 16


def router_key(hop: NextHop) -> bytes:
    """How frames from this machine look: key of lb_router_ids."""
    vlan = hop.vlans[0] if hop.vlans else 0
    return ROUTER_KEY.pack(hop.ifindex, hop.destination_mac, vlan.to_bytes(2, "big"))
