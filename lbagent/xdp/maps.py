# SPDX-License-Identifier: Apache-2.0
"""The kernel's maps: what they are made of, and how they change so that no packet sees half of it.

``Tables`` keeps no truth of its own: every id is found again in the maps when they are opened, so
an agent that starts continues where the last one was killed. Changes follow one pattern: write
aside, then make it hold by one aligned store, then take the old one out. An id that was taken out
is not given again within ``_REST_S``, so that a packet that still holds it finds nothing strange.
"""

import ipaddress
import math
import secrets
import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lbagent.errors import TableFull, XdpError
from lbagent.model.vip import Forward, Ring, Vip
from lbagent.xdp import codec
from lbagent.xdp.bpf import Map, MapFlag, MapSpec, MapType, possible_cpus
from lbagent.xdp.index import KEY_SNAT, KEY_VIP_ADDRESS, TAG, Index, index_hash
from lbagent.xdp.nexthop import NextHop
from lbagent.xdp.settings import Settings, settings_bytes

COUNTER_VERDICTS = 64
ROUTERS = 1024
SNATS = 256
DEFAULT_ROUTERS = {"0.0.0.0": 0, "::": 1}
"""Routers 0 and 1: where packets to clients go when nothing better is known."""

_REST_S = 0.1
_RANGE_ENTRIES = 1 << 17
_AFFINITY_ENTRIES = 1 << 16
_FRAGMENT_ENTRIES = 1 << 12
_LIMIT_ENTRIES = 1 << 16
_SHARED = (
    "lb_config",
    "lb_filter",
    "lb_index",
    "lb_vips",
    "lb_rings",
    "lb_backends",
    "lb_routers",
    "lb_snats",
    "lb_counters",
)
_MARK = struct.pack("<I", 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the maps are created for. A change of any of these makes other maps (and a new pin path).

    ``snat_addresses``: how many, of both families together. ``snat_ports``: how many each has.
    """

    vips: int = 4096
    backends: int = 4096
    rings: int = 64
    flows: int = 1 << 20
    snat_addresses: int = 1
    snat_ports: int = 64512

    @property
    def flow_lines(self) -> int:
        return 1 << max(0, -(-self.flows // 8) - 1).bit_length()

    @property
    def nat_shift(self) -> int:
        """2^n buckets for each SNAT address."""
        return max(0, self.snat_ports // codec.NAT_WAYS - 1).bit_length()

    @property
    def index_bits(self) -> int:
        """2^n entries of lb_index: eight times the VIPs, their addresses and the SNAT addresses."""
        return (8 * (2 * self.vips + SNATS) - 1).bit_length()

    @property
    def counters(self) -> int:
        """Counters of one CPU."""
        return COUNTER_VERDICTS + (self.vips + 1) + (self.backends + 1)


def tick_shift(hz: int) -> int:
    """A tick is 2^n jiffies, about a second."""
    return max(0, hz.bit_length() - 1) if hz & (hz - 1) == 0 else hz.bit_length()


def constants(sizes: Sizes, *, hz: int) -> dict[str, int]:
    """The ``-D`` of lb.c that say how large the maps are."""
    return {
        "LB_VIPS": sizes.vips + 1,
        "LB_BACKENDS": sizes.backends + 1,
        "LB_FLOW_LINES": sizes.flow_lines,
        "LB_INDEX_BITS": sizes.index_bits,
        "LB_NAT_SHIFT": sizes.nat_shift,
        "LB_TICK_SHIFT": tick_shift(hz),
    }


def specs(sizes: Sizes) -> tuple[MapSpec, ...]:
    """All maps of lb.c."""

    def array(name: str, value_bytes: int, entries: int) -> MapSpec:
        return MapSpec(
            name=name,
            type=MapType.ARRAY,
            key_bytes=4,
            value_bytes=value_bytes,
            entries=entries,
            flags=MapFlag.MMAPABLE,
        )

    def table(name: str, kind: MapType, key_bytes: int, value_bytes: int, entries: int) -> MapSpec:
        flags = MapFlag.NO_PREALLOC if kind is MapType.LPM_TRIE else MapFlag.NONE
        return MapSpec(name=name, type=kind, key_bytes=key_bytes, value_bytes=value_bytes, entries=entries, flags=flags)

    backends = sizes.backends + 1
    return (
        array("lb_config", codec.CONFIG.size, 1),
        array("lb_filter", codec.LINE, codec.HINTS // 32),
        array("lb_index", 8, 1 << sizes.index_bits),
        array("lb_vips", codec.VIP.size, sizes.vips + 1),
        array("lb_rings", codec.LINE, (sizes.rings + 1) * codec.ring_lines(backends)),
        array("lb_backends", codec.NEIGHBOUR.size, backends),
        array("lb_routers", codec.NEIGHBOUR.size, ROUTERS),
        table("lb_router_ids", MapType.HASH, codec.ROUTER_KEY.size, 4, 4 * ROUTERS),
        array("lb_snats", codec.SNAT.size, SNATS),
        array("lb_nat", codec.NAT_WAYS * codec.NAT_ENTRY.size, max(1, sizes.snat_addresses) << sizes.nat_shift),
        array("lb_flows", codec.LINE, sizes.flow_lines),
        table("lb_ranges4", MapType.LPM_TRIE, codec.RANGE4.size, 4, _RANGE_ENTRIES),
        table("lb_ranges6", MapType.LPM_TRIE, codec.RANGE6.size, 4, _RANGE_ENTRIES),
        table("lb_affinity", MapType.LRU_HASH, codec.CLIENT_KEY_BYTES, codec.CLIENT_BYTES, _AFFINITY_ENTRIES),
        table("lb_fragments", MapType.LRU_HASH, codec.FRAGMENT_KEY_BYTES, codec.FRAGMENT_BYTES, _FRAGMENT_ENTRIES),
        table("lb_limits", MapType.LRU_HASH, codec.LIMIT_KEY_BYTES, codec.LIMIT_BYTES, _LIMIT_ENTRIES),
        array("lb_answers", codec.LIMIT_BYTES, possible_cpus()),
        table("lb_scratch", MapType.PERCPU_ARRAY, 4, codec.SCRATCH_BYTES, 1),
        array("lb_counters", codec.COUNTER.size, possible_cpus() * sizes.counters),
    )


class _Ids:
    """Free ids of a table. One that was given back rests before it is given again."""

    def __init__(self, what: str, numbers: Iterable[int], clock: Callable[[], float]) -> None:
        self._what = what
        self._fresh = iter(numbers)
        self._resting: deque[tuple[int, float]] = deque()
        self._clock = clock

    def take(self) -> int:
        number = next(self._fresh, None)
        if number is not None:
            return number
        if not self._resting or self._resting[0][1] > self._clock():
            raise TableFull(f"no room for another {self._what}", hint=f"raise xdp.limits ({self._what}s)")
        return self._resting.popleft()[0]

    def take_all(self, count: int) -> list[int]:
        """So many, or none at all."""
        taken: list[int] = []
        try:
            while len(taken) < count:
                taken.append(self.take())
        except TableFull:
            self._resting.extendleft((number, 0.0) for number in taken)
            raise
        return taken

    def give_back(self, number: int) -> None:
        self._resting.append((number, self._clock() + _REST_S))


class Tables:
    """The open maps of one data path, and every change to them.

    ``maps`` by name, as ``specs`` made them. ``tick_s``: length of a tick, ``2**tick_shift(hz)/hz``.
    """

    def __init__(self, maps: Mapping[str, Map], *, sizes: Sizes, tick_s: float, clock: Callable[[], float]) -> None:
        self._maps = maps
        self._sizes = sizes
        self._tick_s = tick_s
        self._clock = clock
        self._memory = {name: maps[name].map_memory() for name in _SHARED}
        self._index = Index(memoryview(self._memory["lb_index"]).cast("Q"))
        self._hops: dict[str, NextHop | None] = {}
        self._settings = Settings()
        self._load()

    def close(self) -> None:
        self._index.close()
        for memory in self._memory.values():
            memory.close()

    # --- what is there ---------------------------------------------------------------------

    def _load(self) -> None:
        """Find every id again in the maps."""
        sizes = self._sizes
        self._ring_size = codec.ring_lines(sizes.backends + 1) * codec.LINE
        self._record_by_id = self._read_records()
        self._id_by_vip = {record.vip: number for number, record in self._record_by_id.items()}
        served = {codec.vip_hash(vip) & TAG for vip in self._id_by_vip}
        self._address_keys = {word & TAG for word in self._index.words()} - served
        self._backend_id = self._read_addresses("lb_backends", range(1, sizes.backends + 1))
        self._router_id = {**DEFAULT_ROUTERS, **self._read_addresses("lb_routers", range(2, ROUTERS))}
        self._ring_id = self._read_rings()
        self._ranges_by_id = self._read_ranges()

        def free(what: str, last: int, used: Iterable[int], first: int = 1) -> _Ids:
            taken = set(used)
            return _Ids(what, (n for n in range(first, last + 1) if n not in taken), self._clock)

        self._free_vips = free("vip", sizes.vips, self._record_by_id)
        self._free_backends = free("backend", sizes.backends, self._backend_id.values())
        self._free_rings = free("ring", sizes.rings, self._ring_id.values())
        self._free_routers = free("router", ROUTERS - 1, self._router_id.values(), 2)
        self._free_ranges = free("source range set", 65535, self._ranges_by_id)

    def _read_records(self) -> dict[int, codec.VipRecord]:
        """The VIPs that a packet would find: a sound record that the index points to."""
        found = {}
        for number in {word & 0xFFFF for word in self._index.words()}:
            if number <= self._sizes.vips:
                at = number * codec.LINE
                record = codec.vip_record(self._memory["lb_vips"][at : at + codec.LINE])
                if record is not None and self._index.find(codec.vip_hash(record.vip)) == number:
                    found[number] = record
        return found

    def _read_rings(self) -> dict[str, int]:
        """Rings by their fingerprints."""
        found = {}
        for number in range(1, self._sizes.rings + 1):
            if name := self._ring_name(number):
                found[name] = number
        return found

    def _ring_name(self, number: int) -> str:
        """The fingerprint in a ring's head; '' when there is no ring, or drift.py found it spoilt."""
        (fingerprint,) = struct.unpack_from("<Q", self._memory["lb_rings"], number * self._ring_size)
        return f"{fingerprint:016x}" if fingerprint else ""

    def _read_ranges(self) -> dict[int, tuple[str, ...]]:
        found: dict[int, list[str]] = {}
        for name in ("lb_ranges4", "lb_ranges6"):
            for entry in self._maps[name].items():
                number, network = codec.range_of(entry[0])
                found.setdefault(number, []).append(network)
        return {number: codec.canonical_ranges(networks) for number, networks in found.items()}

    def _read_addresses(self, name: str, numbers: Iterable[int]) -> dict[str, int]:
        found = {}
        for number in numbers:
            packed, _, family, _, _ = codec.NEIGHBOUR.unpack_from(self._memory[name], number * codec.LINE)
            if family in (4, 6):
                found[codec.address_text(packed, family)] = number
        return found

    def read(self) -> dict[Vip, Forward]:
        """What the kernel serves, from the maps themselves; a spoilt ring has no fingerprint."""
        fingerprint_by_id = {number: fingerprint for fingerprint, number in self._read_rings().items()}
        ranges_by_id = self._read_ranges()
        return {
            record.vip: codec.forward(
                record,
                fingerprint=fingerprint_by_id.get(record.ring_id, ""),
                ranges=ranges_by_id.get(record.ranges_id, ()),
            )
            for record in self._read_records().values()
        }

    def rings(self) -> frozenset[str]:
        """Fingerprints of the rings that VIPs use."""
        used = {record.ring_id for record in self._read_records().values()}
        return frozenset(fingerprint for fingerprint, number in self._read_rings().items() if number in used)

    def vip_id(self, vip: Vip) -> int:
        """Its id, which names its counters; 0 when it is not served."""
        return self._id_by_vip.get(vip, 0)

    def backend_ids(self) -> dict[str, int]:
        """Backends by address; the ids name their counters."""
        return dict(self._backend_id)

    # --- settings --------------------------------------------------------------------------

    def configure(self, settings: Settings) -> None:
        """Write the configuration. Before the first VIP, and again when it changes."""
        self._settings = settings
        ordered = sorted(settings.snat_addresses, key=lambda a: ipaddress.ip_address(a).version)
        if len(ordered) > min(SNATS, self._sizes.snat_addresses):
            raise TableFull(f"{len(ordered)} SNAT addresses, made for {self._sizes.snat_addresses}")
        for number in range(SNATS):
            packed = bytes(codec.SNAT.size)
            if number < len(ordered):
                family = ipaddress.ip_address(ordered[number]).version
                packed = codec.SNAT.pack(codec.address_bytes(ordered[number]), family)
            at = number * codec.SNAT.size
            self._memory["lb_snats"][at : at + codec.SNAT.size] = packed
        self._memory["lb_config"][: codec.CONFIG.size] = settings_bytes(settings, self._tick_s)
        self._write_addresses()

    def _write_addresses(self) -> None:
        """What each address is: exactly in the index, as a hint in the filter."""
        ordered = sorted(self._settings.snat_addresses, key=lambda a: ipaddress.ip_address(a).version)
        wanted: dict[int, int] = {}
        hints = array("H", bytes(2 * codec.HINTS))
        for number, address in enumerate(ordered, 1):
            wanted[index_hash(address, 0, KEY_SNAT) & TAG] = number
            hints[codec.hint_index(address)] = number
        for address, number in {vip.address: number for vip, number in self._id_by_vip.items()}.items():
            wanted[index_hash(address, 0, KEY_VIP_ADDRESS) & TAG] = number
            hints[codec.hint_index(address)] |= codec.HINT_VIP
        for gone in self._address_keys - wanted.keys():
            self._index.remove(gone)
        for key, number in wanted.items():
            if self._index.find(key) != number:
                self._index.set(key, number)
        self._address_keys = set(wanted)
        with memoryview(self._memory["lb_filter"]) as whole, whole.cast("H") as words:
            if words.tobytes() != hints.tobytes():
                for at, hint in enumerate(hints):
                    words[at] = hint

    # --- ways ------------------------------------------------------------------------------

    def set_hop(self, address: str, hop: NextHop | None) -> None:
        """The way to a backend, None when there is none now. Remembered for backends still to come."""
        self._hops[address] = hop
        if address in self._backend_id:
            self._write_neighbour("lb_backends", self._backend_id[address], address, hop)

    def forget_hop(self, address: str) -> None:
        """The address is not a backend any more."""
        self._hops.pop(address, None)

    def set_router(self, address: str, hop: NextHop | None) -> None:
        """A machine that may send us clients' packets: replies go back to the one they came from.

        ``0.0.0.0`` and ``::`` are the defaults for clients whose router is not known.
        """
        number = self._router_id.get(address)
        if number is None:
            number = self._free_routers.take()
            self._router_id[address] = number
        mark = struct.pack("<I", number)
        ids, before = self._maps["lb_router_ids"], self._router_key(number)
        self._write_neighbour("lb_routers", number, address, hop)
        if hop is None or address in DEFAULT_ROUTERS:
            return
        ids.update(codec.router_key(hop), mark)
        if before != codec.router_key(hop) and ids.lookup(before) == mark:
            ids.delete(before)  # its frames look different now, and another machine may get that MAC

    def _router_key(self, number: int) -> bytes:
        """How frames from this router looked when its way was last known."""
        _, path, _, *hops = codec.NEIGHBOUR.unpack_from(self._memory["lb_routers"], number * codec.LINE)
        known = hops[path & codec.PATH_SECOND] if path & codec.PATH_USABLE else hops[not path & codec.PATH_SECOND]
        ifindex, mac, _, vlan, _ = codec.HOP.unpack(known)
        return codec.ROUTER_KEY.pack(ifindex, mac, vlan)

    def _write_neighbour(self, name: str, number: int, address: str, hop: NextHop | None) -> None:
        memory, at = self._memory[name], number * codec.LINE
        old_address, path, family, *hops = codec.NEIGHBOUR.unpack_from(memory, at)
        second = bool(path & codec.PATH_SECOND)
        packed = codec.address_bytes(address)
        wanted_path = codec.neighbour_path(hop, second=second)
        is_same = (old_address, family, path) == (packed, 6 if ":" in address else 4, wanted_path)
        if is_same and (hop is None or hops[second] == codec.hop_bytes(hop)):
            return
        hops[not second] = codec.hop_bytes(hop)
        with memoryview(memory) as whole, whole.cast("I") as words:
            if old_address != packed:
                words[(at + 16) // 4] = 0  # nobody follows it while its address changes
            head = codec.NEIGHBOUR.pack(packed, 0, 6 if ":" in address else 4, *hops)
            memory[at : at + 16] = head[:16]
            memory[at + 20 : at + codec.LINE] = head[20:]
            words[(at + 16) // 4] = codec.neighbour_path(hop, second=not second)

    # --- changes ---------------------------------------------------------------------------

    def program(self, forwards: Iterable[Forward], rings: Mapping[str, Ring]) -> dict[Vip, XdpError]:
        """Serve these VIPs as said. -> what went wrong, by VIP; the others are served.

        Rings and backends first, then VIPs, then what nobody uses any more is taken out.
        """
        failed: dict[Vip, XdpError] = {}
        fresh: dict[int, codec.VipRecord] = {}
        for forward in forwards:
            try:
                number, record = self._prepare(forward, rings)
            except XdpError as error:
                failed[forward.vip] = error
                continue
            self._record_by_id[number] = record
            self._id_by_vip[forward.vip] = number
            self._write_vip(number, record)
            if self._index.find(codec.vip_hash(forward.vip)) != number:
                fresh[number] = record
        if fresh:
            self._write_addresses()
            for number, record in fresh.items():
                self._index.set(codec.vip_hash(record.vip), number)
        self._collect()
        return failed

    def unprogram(self, vips: Iterable[Vip]) -> None:
        """Stop serving these VIPs; their ids rest before they are used again."""
        known = [vip for vip in dict.fromkeys(vips) if vip in self._id_by_vip]
        for vip in known:
            self._index.remove(codec.vip_hash(vip))
            number = self._id_by_vip.pop(vip)
            self._memory["lb_vips"][number * codec.LINE : (number + 1) * codec.LINE] = bytes(codec.LINE)
            del self._record_by_id[number]
            self._free_vips.give_back(number)
        if known:
            self._write_addresses()
        self._collect()

    def _prepare(self, forward: Forward, rings: Mapping[str, Ring]) -> tuple[int, codec.VipRecord]:
        """Everything the VIP refers to is in the kernel when this returns."""
        ring_id = self._install_ring(forward.ring, rings)
        ranges_id = self._install_ranges(forward.source_ranges)
        number = self._id_by_vip.get(forward.vip)
        if number is None:
            number = self._free_vips.take()
            self._clear_counter(COUNTER_VERDICTS + number)
        old = self._record_by_id.get(number)
        record = codec.VipRecord(
            vip=forward.vip,
            mode=forward.mode,
            node_port=forward.node_port,
            ring_id=ring_id,
            ranges_id=ranges_id,
            affinity_s=forward.affinity_timeout_s,
            affinity_ticks=math.ceil(forward.affinity_timeout_s / self._tick_s),
            salt=old.salt if old else secrets.randbits(64),
            new_flows_per_tick=forward.new_flows_per_s,  # a tick is a second or a little more
        )
        return number, record

    def _write_vip(self, number: int, record: codec.VipRecord) -> None:
        """Another target, by one store, when the VIP is there already; else all of it."""
        memory, at = self._memory["lb_vips"], number * codec.LINE
        packed = record.packed()
        if memory[at + 8 : at + 36] != packed[8:36]:
            memory[at : at + codec.LINE] = packed
            return
        memory[at + 36 : at + codec.LINE] = packed[36:]
        with memoryview(memory) as whole, whole.cast("Q") as words:
            words[at // 8] = record.target

    def _install_ring(self, fingerprint: str, rings: Mapping[str, Ring]) -> int:
        if not fingerprint:
            return 0
        known = self._ring_id.get(fingerprint)
        if known is not None and self._ring_name(known) == fingerprint:
            return known
        if fingerprint not in rings:
            raise XdpError(f"ring {fingerprint} is not in the kernel and was not given")
        ring = rings[fingerprint]
        self._install_backends([b.address for b in ring.backends if b.address not in self._backend_id])
        packed = codec.ring_bytes(ring, self._backend_id, self._sizes.backends + 1)
        number = self._free_rings.take()
        at = number * self._ring_size
        self._memory["lb_rings"][at : at + self._ring_size] = packed
        self._ring_id[fingerprint] = number
        if known is not None:
            self._free_rings.give_back(known)
        return number

    def _install_backends(self, addresses: Sequence[str]) -> None:
        for address, number in zip(addresses, self._free_backends.take_all(len(addresses)), strict=True):
            self._backend_id[address] = number
            self._clear_counter(COUNTER_VERDICTS + self._sizes.vips + 1 + number)
            self._write_neighbour("lb_backends", number, address, self._hops.get(address))

    def _clear_counter(self, line: int) -> None:
        """Start at zero: the id belonged to somebody else."""
        for cpu in range(self._maps["lb_counters"].spec.entries // self._sizes.counters):
            at = (cpu * self._sizes.counters + line) * codec.COUNTER.size
            self._memory["lb_counters"][at : at + codec.COUNTER.size] = bytes(codec.COUNTER.size)

    def _install_ranges(self, ranges: tuple[str, ...]) -> int:
        if not ranges:
            return 0
        wanted = codec.canonical_ranges(ranges)
        for number, held in self._ranges_by_id.items():
            if held == wanted:
                return number
        number = self._free_ranges.take()
        for network in wanted:
            name = "lb_ranges6" if ":" in network else "lb_ranges4"
            self._maps[name].update(codec.range_key(network, number), _MARK)
        self._ranges_by_id[number] = wanted
        return number

    def _collect(self) -> None:
        """Take out rings, sets of ranges and backends that nothing refers to."""
        used_rings = {record.ring_id for record in self._record_by_id.values()}
        for fingerprint, number in list(self._ring_id.items()):
            if number not in used_rings:
                struct.pack_into("<Q", self._memory["lb_rings"], number * self._ring_size, 0)
                del self._ring_id[fingerprint]
                self._free_rings.give_back(number)
        used_ranges = {record.ranges_id for record in self._record_by_id.values()}
        for number, ranges in list(self._ranges_by_id.items()):
            if number not in used_ranges:
                for network in ranges:
                    name = "lb_ranges6" if ":" in network else "lb_ranges4"
                    self._maps[name].delete(codec.range_key(network, number))
                del self._ranges_by_id[number]
                self._free_ranges.give_back(number)
        members = 0
        size = codec.member_lines(self._sizes.backends + 1) * codec.LINE
        for number in self._ring_id.values():
            at = number * self._ring_size + (1 + codec.SLOT_LINES) * codec.LINE
            members |= int.from_bytes(self._memory["lb_rings"][at : at + size], "little")
        for address, number in list(self._backend_id.items()):
            if not members >> number & 1:
                at = number * codec.LINE
                self._memory["lb_backends"][at : at + codec.LINE] = bytes(codec.LINE)
                del self._backend_id[address]
                self._free_backends.give_back(number)
