# SPDX-License-Identifier: Apache-2.0
"""What somebody else, or a bug, did to the maps behind our back: found, named, made good.

VIPs are read back whole and compared by the planner. This module looks after what stands behind
them: a ring's slots and the backends they name (``Rings``), and everything that the forwarder can
simply write again (``changed_by``).
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from lbagent.xdp import codec
from lbagent.xdp.bpf import Map, MapType

_OURS = ("lb_config", "lb_filter", "lb_index", "lb_backends", "lb_routers", "lb_snats")


def changed_by(write: Callable[[], None], maps: Mapping[str, Map]) -> tuple[str, ...]:
    """Write again what should be there -> names of the maps in which it was not."""
    before = {name: _checksum(maps[name]) for name in _OURS}
    write()
    return tuple(name for name in _OURS if _checksum(maps[name]) != before[name])


def _checksum(table: Map) -> int:
    if table.spec.type is MapType.ARRAY:
        with table.map_memory() as memory, memoryview(memory) as view:
            return zlib.crc32(view)
    return zlib.crc32(b"".join(key + value for key, value in sorted(table.items())))


class Rings:
    """Every ring as it was when first seen whole: its slots, its members, and who they are.

    The reference is a checksum, so an earlier daemon's rings are trusted as found, unless one names
    a backend that does not exist.
    """

    def __init__(self, maps: Mapping[str, Map]) -> None:
        backends = maps["lb_backends"].spec.entries
        self._maps = maps
        self._member_bytes = codec.member_lines(backends) * codec.LINE
        self._ring_bytes = codec.ring_lines(backends) * codec.LINE
        self._checksum_by_ring: dict[tuple[int, str], int] = {}

    def unname_spoilt(self) -> tuple[str, ...]:
        """Take the name off every ring that is not as it was -> their fingerprints.

        A VIP of such a ring then reads back without one, so that the planner gives it again, aside.
        """
        spoilt = []
        with ExitStack() as stack:
            memory = stack.enter_context(self._maps["lb_rings"].map_memory())
            rings = stack.enter_context(memoryview(memory))
            backends = stack.enter_context(memoryview(stack.enter_context(self._maps["lb_backends"].map_memory())))
            seen: dict[tuple[int, str], int] = {}
            for number in range(len(rings) // self._ring_bytes):
                at = number * self._ring_bytes
                (name,) = struct.unpack_from("<Q", rings, at)
                if not name:
                    continue
                ring = number, f"{name:016x}"
                checksum = self._checksum(rings[at : at + self._ring_bytes], backends)
                if checksum is None or self._checksum_by_ring.get(ring, checksum) != checksum:
                    struct.pack_into("<Q", memory, at, 0)
                    spoilt.append(ring[1])
                else:
                    seen[ring] = checksum
        self._checksum_by_ring = seen
        return tuple(spoilt)

    def _checksum(self, ring: memoryview, backends: memoryview) -> int | None:
        """Of a ring and of the addresses behind its ids; None when an id has no address."""
        checksum = zlib.crc32(ring)
        members = int.from_bytes(ring[-2 * self._member_bytes : -self._member_bytes], "little")
        while members:
            number = (members & -members).bit_length() - 1
            members &= members - 1
            address, _, family, _, _ = codec.NEIGHBOUR.unpack_from(backends, number * codec.LINE)
            if family not in (4, 6):
                return None
            checksum = zlib.crc32(address, checksum)
        return checksum
