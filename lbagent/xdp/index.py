# SPDX-License-Identifier: Apache-2.0
"""lb_index: from (address, port, protocol) to an id, by open addressing in shared memory.

The twin of ``find_id`` in ``ebpf/lb.c``. An entry is one 64-bit word, tag | id, so a key appears and
disappears by one store, and a search never meets half a change: an entry that has to move closer to
its place is written there before it goes from here.
"""

import functools
import ipaddress
import struct

from lbagent.errors import TableFull

PROBES = 16
KEY_VIP_ADDRESS, KEY_SNAT = 0, 255
"""Protocols of the two keys, with port 0, that say what a bare address is."""

_MASK = (1 << 64) - 1
TAG = ~0xFFFF & _MASK
"""What an entry keeps of its hash."""


def mix(x: int) -> int:
    """``mix`` of hash.h."""
    x ^= x >> 32
    x = x * 0xD6E8FEB86659FD93 & _MASK
    x ^= x >> 32
    x = x * 0xD6E8FEB86659FD93 & _MASK
    return x ^ x >> 32


def mix_address(words: tuple[int, ...], x: int) -> int:
    """``mix_address`` of hash.h, over the four words of an IPv6 address."""
    x = (x ^ (words[0] << 32 | words[1])) * 0xE7037ED1A0B428DB & _MASK
    x ^= x >> 32
    x = (x ^ (words[2] << 32 | words[3])) * 0x8EBC6AF09C88C6E3 & _MASK
    return x ^ x >> 32


@functools.lru_cache(maxsize=1 << 16)
def index_hash(address: str, port: int, protocol: int) -> int:
    """``index_hash`` of hash.h."""
    packed = ipaddress.ip_address(address).packed
    words: tuple[int, ...] = struct.unpack(f"<{len(packed) // 4}I", packed)
    x = int.from_bytes(port.to_bytes(2, "big"), "little") << 16 | protocol
    if len(words) == 4:
        return mix_address(words, x)
    x = (x | words[0] << 32) * 0xD6E8FEB86659FD93 & _MASK
    return x ^ x >> 32


class Index:
    """The table over its memory (64-bit words, a power of two of them)."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._last = len(words) - 1
        self._shift = 64 - self._last.bit_length()

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()

    def words(self) -> list[int]:
        """Every entry."""
        return [word for word in self._words.tolist() if word]

    def take_over(self, other: "Index") -> None:
        """Every entry of another table, which may have another size."""
        for word in other.words():
            self.set(word, word & 0xFFFF)

    def find(self, key: int) -> int:
        """The id under this hash, 0 when there is none."""
        place = self._place(key)
        return self._words[place] & 0xFFFF if place is not None else 0

    def set(self, key: int, number: int) -> None:
        """Point the hash to an id, new or not."""
        place = self._place(key)
        if place is None:
            place = self._first_empty(key)
        self._words[place] = key & TAG | number

    def remove(self, key: int) -> None:
        """Forget the hash; entries that had to stand behind it move up."""
        place = self._place(key)
        if place is None:
            return
        gap = place
        for step in range(1, self._last):
            at = (place + step) & self._last
            word = self._words[at]
            if not word:
                break
            home = word >> self._shift
            if (at - home) & self._last >= (at - gap) & self._last:  # its search passes the gap
                self._words[gap] = word
                gap = at
        self._words[gap] = 0

    def _place(self, key: int) -> int | None:
        for probe in range(PROBES):
            at = ((key >> self._shift) + probe) & self._last
            word = self._words[at]
            if not word:
                return None
            if (word ^ key) & TAG == 0:
                return at
        return None

    def _first_empty(self, key: int) -> int:
        for probe in range(PROBES):
            at = ((key >> self._shift) + probe) & self._last
            if not self._words[at]:
                return at
        raise TableFull("no place for another Vip in the kernel's index", hint="raise xdp.limits.vips")
