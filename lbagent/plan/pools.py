# SPDX-License-Identifier: Apache-2.0
"""Pools as the allocator sees them: whose an address is, whom a pool admits, what is free next.

Ranges are pairs of integers, so a /64 costs as much as a /32. Rules are MetalLB's: namespaces and
namespace selectors are alternatives, service selectors a further condition; pools that name
anybody come before pools for all, by ascending priority with 0 last.
"""

from bisect import bisect_right
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import lru_cache

from lbagent.model.pool import AddressRange, LabelSelector, Pool
from lbagent.model.service import Service


@dataclass(frozen=True, slots=True)
class PoolIndex:
    """Which pool holds an address. Ranges never overlap (``lbagent check`` refuses that)."""

    pools: tuple[Pool, ...]
    by_name: Mapping[str, Pool]
    _ranges: Mapping[int, tuple[tuple[AddressRange, Pool], ...]]
    _firsts: Mapping[int, tuple[int, ...]]

    def find(self, family: int, value: int) -> Pool | None:
        """The pool that holds the address, None when it lies outside of all."""
        at = bisect_right(self._firsts[family], value) - 1
        if at < 0:
            return None
        found, pool = self._ranges[family][at]
        return pool if value <= found.last else None


@lru_cache(maxsize=8)
def index(pools: tuple[Pool, ...]) -> PoolIndex:
    """The index over the configured pools."""
    ranges: dict[int, tuple[tuple[AddressRange, Pool], ...]] = {}
    for family in (4, 6):
        pairs = [(r, pool) for pool in pools for r in pool.ranges if r.family == family]
        ranges[family] = tuple(sorted(pairs, key=lambda pair: pair[0]))
    return PoolIndex(
        pools=tuple(sorted(pools, key=_order)),
        by_name={pool.name: pool for pool in pools},
        _ranges=ranges,
        _firsts={family: tuple(r.first for r, _ in pairs) for family, pairs in ranges.items()},
    )


def _order(pool: Pool) -> tuple[bool, bool, int, str]:
    pinned = bool(pool.namespaces or pool.namespace_selectors or pool.service_selectors)
    return (not pinned, pool.priority == 0, pool.priority, pool.name)


def has_family(pool: Pool, family: int) -> bool:
    """Does the pool hold addresses of the family?"""
    return any(r.family == family for r in pool.ranges)


def size(pool: Pool, family: int) -> int:
    """How many addresses the pool may give in a family."""
    return sum(r.last - r.first + 1 - _buggy_count(r, pool) for r in pool.ranges if r.family == family)


def admits(pool: Pool, service: Service, namespace_labels: Mapping[str, str]) -> bool:
    """May the pool serve this Service?"""
    if (pool.namespaces or pool.namespace_selectors) and not (
        service.key.namespace in pool.namespaces
        or any(matches(selector, namespace_labels) for selector in pool.namespace_selectors)
    ):
        return False
    return not pool.service_selectors or any(matches(s, service.labels) for s in pool.service_selectors)


def matches(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Kubernetes' rule: all requirements hold; NotIn is also true of a label that is not there."""
    if any(labels.get(key) != value for key, value in selector.labels):
        return False
    for key, operator, values in selector.expressions:
        value = labels.get(key)
        holds = {
            "In": value in values,
            "NotIn": value is None or value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not holds[operator]:
            return False
    return True


def is_buggy(family: int, value: int) -> bool:
    """Does an IPv4 address end in .0 or .255? Some old routers and clients take those for something else."""
    return family == 4 and value & 0xFF in (0, 0xFF)


def _buggy_count(found: AddressRange, pool: Pool) -> int:
    if not pool.avoid_buggy_ips or found.family == 6:
        return 0
    return sum(_multiples(found.first, found.last, rest) for rest in (0, 0xFF))


def _multiples(first: int, last: int, rest: int) -> int:
    """How many integers from first to last leave ``rest`` when divided by 256."""
    return (last - rest) // 256 - (first - 1 - rest) // 256


class Cursor:
    """Where the next free address of a pool and family is; only ever moves forward over taken ones."""

    def __init__(self, pool: Pool, family: int) -> None:
        self._ranges = [r for r in pool.ranges if r.family == family]
        self._skip_buggy = pool.avoid_buggy_ips
        self._family = family
        self._next = self._ranges[0].first if self._ranges else 0

    def peek(self, taken: Container[int]) -> int | None:
        """The first free address, None when there is none. It stays the first until it is taken."""
        while self._ranges:
            last = self._ranges[0].last
            while self._next <= last:
                if self._next not in taken and not (self._skip_buggy and is_buggy(self._family, self._next)):
                    return self._next
                self._next += 1
            del self._ranges[0]
            if self._ranges:
                self._next = self._ranges[0].first
        return None
