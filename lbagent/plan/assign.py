# SPDX-License-Identifier: Apache-2.0
"""Who holds which address (every host), and who gets which (lease holder).

Adopt first: what a status holds is kept whenever it is still legal, older Services before younger
ones, so that nothing moves because an agent restarted. Only then are wishes and gaps served, again
older first, wishes before anything automatic. Rules are MetalLB's where it has one; where we go
further (families from different pools, cool-down, quota) docs/reference/services.md says so.

All hosts come to the same answer from the same Snapshot; only the lease holder acts on it.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from lbagent.model.pool import Assignment, Pool, Reservation
from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import Protocol, ServiceKey, TrafficPolicy
from lbagent.model.state import Settings, Snapshot
from lbagent.plan import request as requests
from lbagent.plan.facts import Facts, Held, Holding, age
from lbagent.plan.pools import Cursor, PoolIndex, admits, has_family, index
from lbagent.plan.register import Register
from lbagent.plan.request import address_text, parse_address


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the allocator says of one Service: its addresses, and what could not be given.

    ``refusal`` is the Reason when the Service lacks something it needs, ``note`` when it lacks
    something it only prefers.
    """

    held: tuple[Held, ...]
    refusal: Judgement | None = None
    note: str = ""


def may_share(one: Facts, other: Facts) -> str:
    """Why two Services may not have one address, '' when they may. Both must consent by one key.

    MetalLB's rule: no port of both, and either all traffic policies are Cluster, or all are Local
    and choose the same pods.
    """
    both = {(p.protocol, p.port) for p in one.service.ports} & {(p.protocol, p.port) for p in other.service.ports}
    return _why_apart(one, other) or _clash(both)


def _why_apart(one: Facts, other: Facts) -> str:
    """Why two Services may not share whatever their ports."""
    key, other_key = one.wish.sharing_key, other.wish.sharing_key
    if not key or not other_key:
        return NO_CONSENT
    if key != other_key:
        return f"the sharing keys differ: {key} and {other_key}"
    policy = one.service.external_traffic_policy
    if policy is not other.service.external_traffic_policy:
        return "the traffic policies differ"
    if policy is TrafficPolicy.LOCAL and dict(one.service.selector) != dict(other.service.selector):
        return "policy Local with different selectors"
    return ""


def _clash(both: Iterable[tuple[Protocol, int]]) -> str:
    named = sorted(f"{port}/{protocol}" for protocol, port in both)
    return f"both use {', '.join(named)}" if named else ""


NO_CONSENT = "no consent: both need a sharing key"


class Occupants:
    """The Services on one address. Thousands may share it, so a newcomer is not held against each."""

    def __init__(self, those: Iterable[Facts] = ()) -> None:
        self._by_profile: dict[object, Facts] = {}
        self._by_port: dict[tuple[Protocol, int], Facts] = {}
        for one in those:
            self.add(one)

    def add(self, one: Facts) -> None:
        """One more."""
        service = one.service
        profile = (one.wish.sharing_key, service.external_traffic_policy, tuple(sorted(service.selector.items())))
        self._by_profile.setdefault(profile, one)
        for port in service.ports:
            self._by_port.setdefault((port.protocol, port.port), one)

    def refusal(self, one: Facts) -> Judgement | None:
        """Why a Service may not join them."""
        for holder in self._by_profile.values():
            why = _why_apart(one, holder)
            if why:
                reason = Reason.ALREADY_ALLOCATED if why == NO_CONSENT else Reason.ALREADY_ALLOCATED_INCOMPATIBLE
                return Judgement(reason=reason, detail=f"{holder.key} holds it; {why}")
        for port in one.service.ports:
            other = self._by_port.get((port.protocol, port.port))
            if other:
                why = may_share(one, other)
                return Judgement(reason=Reason.ALREADY_ALLOCATED_INCOMPATIBLE, detail=f"{other.key} holds it; {why}")
        return None


def adopt(register: Register) -> dict[ServiceKey, Holding]:
    """Conflicts settled: of Services that may not share an address, the older keeps it.

    Returns what is left to those that must give way; everybody else's claim stands.
    """
    result: dict[ServiceKey, Holding] = {}
    for address in sorted(register.contested):
        kept = Occupants()
        claimants = [register.facts[key] for key in register.claimants[address]]
        for one in sorted(claimants, key=lambda one: age(one.service)):
            refusal = kept.refusal(one)
            if refusal is None:
                kept.add(one)
            else:
                result[one.key] = _without(result.get(one.key, one.claim), address, refusal)
    return result


def _without(holding: Holding, address: str, refusal: Judgement) -> Holding:
    said = Judgement(reason=refusal.reason, detail=f"{address}: {refusal.detail}")
    return Holding(
        tuple(h for h in holding.held if h.address != address), (*holding.lost, (address, said)), holding.surplus
    )


class Ledger:
    """Who has what while addresses are given out; lives for one pass.

    What stands in the statuses is looked up in the Register; only what this pass adds is kept here.
    """

    def __init__(self, snapshot: Snapshot, register: Register, giving_way: Mapping[ServiceKey, Holding]) -> None:
        self.pools = index(snapshot.settings.pools)
        self._settings: Settings = snapshot.settings
        self._labels = snapshot.namespace_labels
        self._register = register
        self._facts = register.facts
        self._giving_way = giving_way
        self._joined: dict[str, list[ServiceKey]] = {}
        self._occupants: dict[str, Occupants] = {}
        self._fresh: dict[int, set[int]] = {4: set(), 6: set()}
        self._cooling: dict[int, dict[int, ServiceKey]] = {4: {}, 6: {}}
        self._sticky: dict[ServiceKey, list[tuple[int, int]]] = {}
        self._by_sharing_key: dict[str, list[Held]] = {}
        self._addresses_by_namespace: dict[str, set[str]] = {}
        self._cursors: dict[tuple[str, int], Cursor] = {}
        self._blocked = {f: _Union((register.values[f], self._fresh[f], self._cooling[f])) for f in (4, 6)}
        for key in register.foreign:
            self._block(self._facts[key])
        for key in register.sharers:
            self._invite(self._facts[key], self._holding(key).held)
        if self._settings.namespace_quota:
            for key in self._facts:
                self._count(key, self._holding(key).held)
        self._expect(snapshot.pending)
        for key in sorted(register.lingering | giving_way.keys()):
            holding = self._holding(key)
            for address in (*holding.surplus, *(address for address, _ in holding.lost)):
                if not self._holders(address):
                    self._cool(address, key)  # still written in a status: nobody's yet
        self._reserve(snapshot.reservations, snapshot.wall)

    def _holding(self, key: ServiceKey) -> Holding:
        return self._giving_way.get(key, self._facts[key].claim)

    def _holders(self, address: str) -> list[ServiceKey]:
        """By status and by what was given in this pass, sorted."""
        found = set(self._joined.get(address, ()))
        for key in self._register.claimants.get(address, ()):
            if key not in self._giving_way or any(h.address == address for h in self._giving_way[key].held):
                found.add(key)
        return sorted(found)

    def _expect(self, pending: Mapping[ServiceKey, Assignment]) -> None:
        for key, assignment in pending.items():
            for item in _pending(assignment, self.pools):
                if key in self._facts and key not in self._holders(item.address):
                    self.take(self._facts[key], item)

    def _block(self, foreign: Facts) -> None:
        """What another implementation gave is never given."""
        for address in foreign.service.status_addresses:
            parsed = parse_address(address)
            if parsed:
                self._joined.setdefault(address, []).append(foreign.key)
                self._fresh[parsed[0]].add(parsed[1])

    def _invite(self, one: Facts, held: Iterable[Held]) -> None:
        if one.wish.sharing_key and not one.service.deleting:
            self._by_sharing_key.setdefault(one.wish.sharing_key, []).extend(held)

    def _count(self, key: ServiceKey, held: Iterable[Held]) -> None:
        self._addresses_by_namespace.setdefault(key.namespace, set()).update(item.address for item in held)

    def _reserve(self, reservations: Mapping[str, Reservation], wall: float) -> None:
        for reservation in reservations.values():
            parsed = parse_address(reservation.address)
            if parsed is None or self._holders(reservation.address):
                continue
            self._sticky.setdefault(reservation.service, []).append(parsed)
            is_cooling = 0 <= wall - reservation.released < self._settings.cool_down_s
            if is_cooling and parsed[1] not in self._cooling[parsed[0]]:
                self._cool(reservation.address, reservation.service)

    def _cool(self, address: str, key: ServiceKey) -> None:
        parsed = parse_address(address)
        if parsed:
            cooling = self._cooling[parsed[0]]
            cooling[parsed[1]] = min(cooling.get(parsed[1], key), key)

    def take(self, one: Facts, item: Held) -> None:
        """Note that a Service is given an address."""
        self._joined.setdefault(item.address, []).append(one.key)
        if item.address in self._occupants:
            self._occupants[item.address].add(one)
        self._fresh[item.family].add(item.value)
        self._cooling[item.family].pop(item.value, None)
        self._count(one.key, (item,))
        self._invite(one, (item,))

    def leave(self, key: ServiceKey, item: Held) -> None:
        """Note that a Service moves away from an address: nobody joins it there any more."""
        if self._holders(item.address) == [key]:
            self._cooling[item.family].setdefault(item.value, key)
            for items in self._by_sharing_key.values():
                if item in items:
                    items.remove(item)

    def give_back(self, key: ServiceKey, item: Held) -> None:
        """Undo a ``take``."""
        self._joined[item.address].remove(key)
        self._occupants.pop(item.address, None)
        holders = self._holders(item.address)
        if not any(holder.namespace == key.namespace for holder in holders):
            self._addresses_by_namespace[key.namespace].discard(item.address)
        if not holders:
            self._fresh[item.family].discard(item.value)
            for items in self._by_sharing_key.values():
                if item in items:
                    items.remove(item)

    def request(self, one: Facts, family: int) -> Held | Judgement:
        """The very address a Service asks for, or why not."""
        address = one.wish.address(family)
        parsed = parse_address(address)
        assert parsed is not None  # read() has seen to it
        value = parsed[1]
        pool = self.pools.find(family, value)
        if pool is None:
            return Judgement(reason=Reason.OUTSIDE_POOLS, detail=address)
        if one.wish.pools and pool.name not in one.wish.pools:
            detail = f"{address} is of pool {pool.name}, but pool {', '.join(one.wish.pools)} is asked for too"
            return Judgement(reason=Reason.BAD_REQUEST, detail=detail)
        if not admits(pool, one.service, self._labels.get(one.key.namespace, {})):
            return Judgement(reason=Reason.POOL_SELECTOR_MISMATCH, detail=f"{address} is of pool {pool.name}")
        if pool.disabled:
            return Judgement(reason=Reason.NO_POOL, detail=f"pool {pool.name} is disabled")
        refusal = self._mode_refusal(one, pool)
        if refusal:
            return refusal
        return self._try(one, Held(address, family, value, pool))

    def sticky(self, one: Facts, family: int) -> Held | None:
        """The address a Service of this name had before, when it may have it again."""
        for found, value in self._sticky.get(one.key, ()):
            pool = self.pools.find(found, value)
            if found != family or pool not in self._candidates(one, family):
                continue
            assert pool is not None
            item = self._try(one, Held(address_text(family, value), family, value, pool))
            if isinstance(item, Held):
                return item
        return None

    def any(self, one: Facts, family: int) -> Held | Judgement:
        """An address of the first pool that will do: one it may share by its key, else a free one."""
        candidates = self._candidates(one, family)
        if not candidates:
            return self._why_no_pool(one, family)
        shared = self._by_sharing_key.get(one.wish.sharing_key, ()) if one.wish.sharing_key else ()
        for item in sorted(shared, key=lambda item: item.value):
            if item.family == family and item.pool in candidates and self._judge(one, item) is None:
                return item
        refusal = self._quota(one)
        if refusal:
            return refusal
        for pool in candidates:
            cursor = self._cursors.setdefault((pool.name, family), Cursor(pool, family))
            value = cursor.peek(self._blocked[family])
            if value is not None:
                return Held(address_text(family, value), family, value, pool)
        cooling = sum(1 for v in self._cooling[family] if self.pools.find(family, v) in candidates)
        detail = f"pool {', '.join(p.name for p in candidates)}, IPv{family}"
        return Judgement(reason=Reason.OUT_OF_IPS, detail=f"{detail}; {cooling} cooling down" if cooling else detail)

    def _try(self, one: Facts, item: Held) -> Held | Judgement:
        return self._judge(one, item) or item

    def _judge(self, one: Facts, item: Held) -> Judgement | None:
        """Why a Service may not have this address now."""
        if item.address not in self._occupants:
            self._occupants[item.address] = Occupants(self._facts[key] for key in self._holders(item.address))
        refusal = self._occupants[item.address].refusal(one)
        if refusal:
            return Judgement(reason=refusal.reason, detail=f"{item.address}: {refusal.detail}")
        leaving = self._cooling[item.family].get(item.value)
        if leaving is None and self._is_being_deleted(item.address):
            leaving = self._holders(item.address)[0]
        if leaving is not None and leaving != one.key:
            return Judgement(reason=Reason.COOLING_DOWN, detail=f"{item.address}, lately of {leaving}")
        return self._quota(one, item.address)

    def _is_being_deleted(self, address: str) -> bool:
        """Are all its holders about to go?"""
        holders = self._holders(address) if address not in self._joined else ()
        return bool(holders) and all(self._facts[key].service.deleting for key in holders)

    def _mode_refusal(self, one: Facts, pool: Pool) -> Judgement | None:
        """Why the Service cannot be forwarded from this pool."""
        return requests.ports_refusal(one.service, (one.wish.mode or pool.mode,), self._settings)

    def _quota(self, one: Facts, address: str = "") -> Judgement | None:
        """Why the namespace may not have one address more; ``address`` may be one that it has already."""
        quotas, namespace = self._settings.namespace_quota, one.key.namespace
        quota = quotas.get(namespace, quotas.get("*"))
        has = self._addresses_by_namespace.get(namespace, set())
        if quota is None or address in has or len(has) < quota:
            return None
        return Judgement(reason=Reason.QUOTA_EXCEEDED, detail=f"namespace {namespace} holds {len(has)} of {quota}")

    def _candidates(self, one: Facts, family: int) -> list[Pool]:
        labels = self._labels.get(one.key.namespace, {})
        return [
            pool
            for pool in self.pools.pools
            if has_family(pool, family)
            and not pool.disabled
            and (pool.name in one.wish.pools if one.wish.pools else pool.auto_assign)
            and admits(pool, one.service, labels)
            and not self._mode_refusal(one, pool)
        ]

    def _why_no_pool(self, one: Facts, family: int) -> Judgement:
        unknown = [name for name in one.wish.pools if name not in self.pools.by_name]
        if unknown:
            return Judgement(reason=Reason.UNKNOWN_POOL, detail=", ".join(unknown))
        asked = [pool for pool in self.pools.pools if pool.name in one.wish.pools or not one.wish.pools]
        with_family = [pool for pool in asked if has_family(pool, family)]
        names = ", ".join(pool.name for pool in with_family)
        if not with_family:
            of = f"pool {', '.join(one.wish.pools)}" if one.wish.pools else "no pool"
            detail = f"{of} has no IPv{family} addresses" if one.wish.pools else f"no pool has IPv{family} addresses"
            return Judgement(reason=Reason.NO_POOL, detail=detail)
        labels = self._labels.get(one.key.namespace, {})
        if not any(admits(pool, one.service, labels) for pool in with_family):
            return Judgement(reason=Reason.POOL_SELECTOR_MISMATCH, detail=f"IPv{family}: pool {names}")
        for pool in with_family:
            refusal = self._mode_refusal(one, pool)
            if refusal:
                return refusal
        if all(pool.disabled for pool in with_family):
            return Judgement(reason=Reason.NO_POOL, detail=f"pool {names} is disabled")
        return Judgement(reason=Reason.NO_POOL, detail=f"pool {names} is given on request only (auto_assign: false)")


@dataclass(frozen=True, slots=True)
class _Union:
    """Membership in any of several collections."""

    parts: tuple[Container[int], ...]

    def __contains__(self, value: object) -> bool:
        return any(value in part for part in self.parts)


def _pending(assignment: Assignment, pools: PoolIndex) -> tuple[Held, ...]:
    """The addresses of a status write under way that are still of a pool."""
    found = []
    for address in assignment.addresses:
        parsed = parse_address(address)
        pool = pools.find(*parsed) if parsed else None
        if parsed and pool:
            found.append(Held(address, *parsed, pool))
    return tuple(found)


@dataclass(slots=True)
class _Draft:
    """The addresses of one Service while they are worked out."""

    one: Facts
    by_family: dict[int, Held] = field(default_factory=dict)
    refused: dict[int, Judgement] = field(default_factory=dict)
    fresh: list[Held] = field(default_factory=list)

    @property
    def families(self) -> tuple[int, ...]:
        return self.one.service.ip_families

    def gaps(self) -> list[int]:
        """Families that have neither an address nor a refusal."""
        return [f for f in self.families if f not in self.by_family and f not in self.refused]


def allocate(
    snapshot: Snapshot,
    unsettled: Iterable[ServiceKey],
    register: Register,
    giving_way: Mapping[ServiceKey, Holding],
) -> dict[ServiceKey, Verdict]:
    """Serve the wishes and gaps of ``unsettled`` Services: wishes first, then sticky, then the rest; older first.

    ``giving_way`` is what ``adopt`` returns.
    """
    ledger = Ledger(snapshot, register, giving_way)
    drafts = []
    for one in sorted((register.facts[key] for key in unsettled), key=lambda one: age(one.service)):
        draft = _Draft(one)
        under_way = snapshot.pending.get(one.key)
        for item in _pending(under_way, ledger.pools) if under_way else ():
            if item.family in draft.families:
                draft.by_family[item.family] = item
        for item in giving_way.get(one.key, one.claim).held:
            draft.by_family[item.family] = item
        drafts.append(draft)
    for draft in drafts:
        _wish(draft, ledger)
    for draft in drafts:
        for family in draft.gaps():
            former = ledger.sticky(draft.one, family)
            if former:
                _give(draft, ledger, former)
    for draft in drafts:
        for family in draft.gaps():
            _accept(draft, ledger, family, ledger.any(draft.one, family))
        _all_or_nothing(draft, ledger)
    return {draft.one.key: _verdict(draft) for draft in drafts}


def _wish(draft: _Draft, ledger: Ledger) -> None:
    """Serve requested addresses and pools. What a Service has it keeps until the wish can be met."""
    wish = draft.one.wish
    if wish.address_refusal:
        draft.refused = dict.fromkeys(draft.families, wish.address_refusal)
        return
    for family in draft.families:
        current = draft.by_family.get(family)
        asked = wish.address(family)
        if asked and (current is None or current.address != asked):
            _accept(draft, ledger, family, ledger.request(draft.one, family))
        elif not asked and current and wish.pools and current.pool.name not in wish.pools:
            _accept(draft, ledger, family, ledger.any(draft.one, family))


def _accept(draft: _Draft, ledger: Ledger, family: int, found: Held | Judgement) -> None:
    if isinstance(found, Held):
        _give(draft, ledger, found)
    else:
        draft.refused[family] = found


def _give(draft: _Draft, ledger: Ledger, item: Held) -> None:
    """The old address, if any, stays taken for this pass: packets still come for it."""
    former = draft.by_family.get(item.family)
    if former:
        ledger.leave(draft.one.key, former)
    ledger.take(draft.one, item)
    draft.by_family[item.family] = item
    draft.fresh.append(item)


def _all_or_nothing(draft: _Draft, ledger: Ledger) -> None:
    """RequireDualStack gives both families or none; what was held before stays."""
    held_before = len(draft.by_family) > len(draft.fresh)
    if draft.one.service.ip_family_policy == "RequireDualStack" and draft.refused and not held_before:
        for item in draft.fresh:
            ledger.give_back(draft.one.key, item)
        draft.by_family.clear()


def _verdict(draft: _Draft) -> Verdict:
    held = tuple(draft.by_family[f] for f in draft.families if f in draft.by_family)
    family = next((f for f in draft.families if f in draft.refused), None)
    if family is None:
        return Verdict(held)
    refusal, wish = draft.refused[family], draft.one.wish
    is_preference = draft.one.service.ip_family_policy == "PreferDualStack" and family not in draft.by_family
    if held and is_preference and not wish.address_refusal and not wish.address(family):
        return Verdict(held, note=f"IPv{family}: {refusal.reason}: {refusal.detail}")
    if held:
        kept = ", ".join(h.address for h in held)
        refusal = Judgement(reason=refusal.reason, detail=f"{refusal.detail}; keeps {kept}")
    return Verdict(held, refusal)
