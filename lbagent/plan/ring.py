# SPDX-License-Identifier: Apache-2.0
"""Weighted backends -> consistent-hash ring, the same on every LB host.

Two-tier Maglev (NSDI '16, section 3.4; measured in docs/benchmarks.md). Table 1 is over all
*configured* backends; a slot whose owner is not active takes the answer of table 2, which is over
the active ones. So a backend that goes down or drains moves nobody but its own flows, and gets
exactly its old slots back when it returns; only a change of membership or weight pays Maglev's
few per mille. A pure function of the set: neither order nor history of events matters.

Both tables use the same permutations. That table 2 then agrees with table 1 nearly everywhere is
the point: the victims' slots fall evenly on the others, where an independent table would scatter
them like dice.
"""

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from lbagent.model.vip import RING_SLOTS, Backend, BackendState, Ring

_ALGORITHM = b"lbagent two-tier maglev 1\n"
"""Part of every fingerprint: hosts that build rings by another rule must not look alike."""

CACHED_TABLES = 64
"""131 kB each."""

Content = tuple[tuple[str, int, BackendState], ...]
"""What a ring depends on: (address, weight, state), sorted by address."""


def fingerprint(backends: Iterable[Backend]) -> str:
    """First 16 hex digits of SHA-256 over the content; the kernel stores it as u64."""
    return _fingerprint(_content(backends))


def ring(backends: Iterable[Backend]) -> Ring:
    """The Ring over ``backends``, whose addresses are distinct. Weight 0 gets no slot.

    Limit: 65,535 backends, for a slot has 16 bits.
    """
    ordered = tuple(sorted(backends))
    content = _content(ordered)
    return Ring(fingerprint=_fingerprint(content), backends=ordered, slots=_slots(content))


class Rings(Mapping[str, Ring]):
    """Rings by fingerprint, each table built when somebody asks for it.

    A thousand rings the kernel already holds then cost their fingerprints only.
    """

    def __init__(self, backends_by_fingerprint: Mapping[str, tuple[Backend, ...]]) -> None:
        self.backends_by_fingerprint = backends_by_fingerprint

    def __getitem__(self, fingerprint: str) -> Ring:
        return ring(self.backends_by_fingerprint[fingerprint])

    def __contains__(self, fingerprint: object) -> bool:
        return fingerprint in self.backends_by_fingerprint

    def __iter__(self) -> Iterator[str]:
        return iter(self.backends_by_fingerprint)

    def __len__(self) -> int:
        return len(self.backends_by_fingerprint)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rings):
            return self.backends_by_fingerprint == other.backends_by_fingerprint
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Rings({', '.join(self)})"


def _content(backends: Iterable[Backend]) -> Content:
    return tuple(sorted((b.address, b.weight, b.state) for b in backends))


def _fingerprint(content: Content) -> str:
    text = "".join(f"{address} {weight} {state.value}\n" for address, weight, state in content)
    return hashlib.sha256(_ALGORITHM + text.encode()).hexdigest()[:16]


@lru_cache(maxsize=CACHED_TABLES)
def _slots(content: Content) -> "array[int]":
    configured = tuple((address, weight) for address, weight, _ in content)
    table = _maglev(configured)
    active = [state is BackendState.ACTIVE for _, _, state in content]
    if all(active):
        return table
    fallback = _maglev(tuple((a, w if up else 0) for (a, w), up in zip(configured, active, strict=True)))
    answers = [0, *(number if up else 0 for number, up in enumerate(active, start=1))]
    return array("H", [answers[owner] or other for owner, other in zip(table, fallback, strict=True)])


def _maglev(weighted: tuple[tuple[str, int], ...]) -> "array[int]":
    """Slots of 1 + index into ``weighted``; all 0 when nobody has a weight.

    Backends of equal weight share one account, so that a round costs as many steps as there are
    distinct weights (a Service with 1 pod here and 100 there has thousands of rounds).
    """
    table = array("H", bytes(2 * RING_SLOTS))
    weights = sorted({weight for _, weight in weighted if weight > 0}, reverse=True)
    if not weights:
        return table
    divisor = math.gcd(*weights)  # doubling every weight must move nobody
    shares = [weight // divisor for weight in weights]
    walkers_by_weight: dict[int, list[list[int]]] = {weight: [] for weight in weights}
    for index, (address, weight) in enumerate(weighted):
        if weight > 0:
            offset, skip = _permutation(address)
            walkers_by_weight[weight].append([index + 1, offset, skip])
    groups = [(share, walkers_by_weight[weight]) for share, weight in zip(shares, weights, strict=True)]
    accounts = [0] * len(groups)
    largest = shares[0]
    free = RING_SLOTS
    while True:
        for number, (share, walkers) in enumerate(groups):
            accounts[number] += share
            if accounts[number] < largest:
                continue
            accounts[number] -= largest
            for walker in walkers:
                owner, slot, skip = walker
                while table[slot]:
                    slot += skip
                    if slot >= RING_SLOTS:
                        slot -= RING_SLOTS
                table[slot] = owner
                walker[1] = slot
                free -= 1
                if not free:
                    return table


@lru_cache(maxsize=8192)
def _permutation(address: str) -> tuple[int, int]:
    """Where a backend starts in the table and how far it steps."""
    digest = hashlib.sha256(address.encode()).digest()
    offset = int.from_bytes(digest[:8], "big") % RING_SLOTS
    skip = int.from_bytes(digest[8:16], "big") % (RING_SLOTS - 1) + 1
    return offset, skip
