# SPDX-License-Identifier: Apache-2.0
"""What was counted, read from shared memory: no system call per entry, and none at all per read.

Every CPU counts in its own lines of lb_counters, so a sum may miss the packets of this instant.
"""

import mmap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lbagent.xdp import codec
from lbagent.xdp.bpf import Map
from lbagent.xdp.maps import COUNTER_VERDICTS, Sizes
from lbagent.xdp.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Count:
    """Since the maps were made. Bytes are those of IP packets as they arrived.

    ``replies`` come from backends (mode nat). ``flows`` are new ones: a TCP SYN in the DSR modes.
    """

    packets: int = 0
    bytes: int = 0
    replies: int = 0
    reply_bytes: int = 0
    flows: int = 0
    drops: int = 0


class Counters:
    """lb_counters, lb_flows and lb_nat in memory."""

    def __init__(self, maps: Mapping[str, Map], *, sizes: Sizes) -> None:
        self._sizes = sizes
        self._lines = sizes.counters
        self._memory = maps["lb_counters"].map_memory()
        self._cpus = maps["lb_counters"].spec.entries // self._lines
        self._flows, self._nat = maps["lb_flows"], maps["lb_nat"]  # large: in memory only while they are read

    def close(self) -> None:
        self._memory.close()

    def verdicts(self) -> dict[Verdict, Count]:
        """Every verdict, also those that never were."""
        return {verdict: self._sum(int(verdict)) for verdict in Verdict}

    def vips(self, ids: Iterable[int]) -> dict[int, Count]:
        """By the ids that ``Tables.vip_id`` gives."""
        return {number: self._sum(COUNTER_VERDICTS + number) for number in ids}

    def backends(self, ids: Iterable[int]) -> dict[int, Count]:
        """By the ids that ``Tables.backend_ids`` gives."""
        first = COUNTER_VERDICTS + self._sizes.vips + 1
        return {number: self._sum(first + number) for number in ids}

    def dsr_flows(self) -> dict[int, int]:
        """Tracked DSR flows by backend id: 1 M flows take a tenth of a second, so ask rarely."""
        with self._flows.map_memory() as flows:
            return _tally(_words(flows, start=0, step=4))

    def nat_flows(self) -> dict[int, int]:
        """Tracked NAT flows by backend id, whatever their state."""
        with self._nat.map_memory() as nat:
            backends = _words(nat, start=10, step=16)
            states = _words(nat, start=12, step=16)
        return _tally([backend for backend, state in zip(backends, states, strict=True) if state & 0xFF])

    def _sum(self, line: int) -> Count:
        totals = [0] * 8
        for cpu in range(self._cpus):
            values = codec.COUNTER.unpack_from(self._memory, (cpu * self._lines + line) * codec.COUNTER.size)
            totals = [total + value for total, value in zip(totals, values, strict=True)]
        return Count(*totals[:6])


def _words(memory: mmap.mmap, *, start: int, step: int) -> list[int]:
    """Every ``step``-th 16-bit word."""
    with memoryview(memory) as whole, whole.cast("H") as words:
        return words[start::step].tolist()


def _tally(backends: Iterable[int]) -> dict[int, int]:
    tally = Counter(backends)
    tally.pop(0, None)
    return dict(tally)
