# SPDX-License-Identifier: Apache-2.0
"""Who holds which address (every host), and who gets which (lease holder).

Adopt first: what a status holds is kept whenever it is still legal, older Services before younger
ones, so that nothing moves because an agent restarted. Only then are wishes and gaps served, again
older first, wishes before anything automatic. Rules are MetalLB's where it has one; where we go
further (families from different pools, cool-down, quota) docs/reference/services.md says so.

All hosts come to the same answer from the same Snapshot; only the lease holder acts on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lbagent.model.pool import Assignment, Pool, Reservation
from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import Service, ServiceKey, TrafficPolicy
from lbagent.model.state import Settings, Snapshot
from lbagent.model.vip import Mode
from lbagent.plan import request as requests
from lbagent.plan.pools import Cursor, PoolIndex, admits, has_family
from lbagent.plan.request import Request, address_text, parse_address


@dataclass(frozen=True, slots=True)
class Held:
    """An address of a Service, in its pool. ``value`` is the address as an integer."""

    address: str
    family: int
    value: int
    pool: Pool


@dataclass(frozen=True, slots=True)
class Holding:
    """What a Service may keep of its status, at most one address a family, in the order of its families.

    ``lost``: (address, Judgement) for those it may not keep; ``surplus`` are given back in peace.
    """

    held: tuple[Held, ...] = ()
    lost: tuple[tuple[str, Judgement], ...] = ()
    surplus: tuple[str, ...] = ()

    def of(self, family: int) -> Held | None:
        """The address held in a family."""
        return next((h for h in self.held if h.family == family), None)


NOTHING_HELD = Holding()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the allocator says of one Service: its addresses, and what could not be given.

    ``refusal`` is the Reason when the Service lacks something it needs, ``note`` when it lacks
    something it only prefers.
    """

    held: tuple[Held, ...]
    refusal: Judgement | None = None
    note: str = ""


def claim(service: Service, pools: PoolIndex, namespace_labels: Mapping[str, str]) -> Holding:
    """What a Service may keep as far as it alone is concerned."""
    held: dict[int, Held] = {}
    lost: list[tuple[str, Judgement]] = []
    surplus: list[str] = []
    for text in service.status_addresses:
        parsed = parse_address(text)
        if parsed is None:
            lost.append((text, Judgement(reason=Reason.OUTSIDE_POOLS, detail=text)))
            continue
        family, value = parsed
        pool = pools.find(family, value)
        if family not in service.ip_families or family in held:
            surplus.append(text)
        elif pool is None:
            lost.append((text, Judgement(reason=Reason.OUTSIDE_POOLS, detail=text)))
        elif not admits(pool, service, namespace_labels):
            detail = f"{text} is of pool {pool.name}"
            lost.append((text, Judgement(reason=Reason.POOL_SELECTOR_MISMATCH, detail=detail)))
        else:
            held[family] = Held(text, family, value, pool)
    return Holding(tuple(held[f] for f in service.ip_families if f in held), tuple(lost), tuple(surplus))


def age(service: Service) -> tuple[float, ServiceKey]:
    """Order in which Services are served: older first, equal ages by name."""
    return service.created, service.key


def may_share(one: Service, other: Service) -> str:
    """Why two Services may not have one address, '' when they may. Both must consent by one key.

    MetalLB's rule: no port of both, and either all traffic policies are Cluster, or all are Local
    and choose the same pods.
    """
    key, other_key = requests.read(one).sharing_key, requests.read(other).sharing_key
    if not key or not other_key:
        return "no consent: both need a sharing key"
    if key != other_key:
        return f"the sharing keys differ: {key} and {other_key}"
    ports = {(port.protocol, port.port) for port in one.ports}
    both = sorted(f"{p.port}/{p.protocol}" for p in other.ports if (p.protocol, p.port) in ports)
    if both:
        return f"both use {', '.join(both)}"
    if one.external_traffic_policy is not other.external_traffic_policy:
        return "the traffic policies differ"
    if one.external_traffic_policy is TrafficPolicy.LOCAL and dict(one.selector) != dict(other.selector):
        return "policy Local with different selectors"
    return ""


def _refused_by(one: Service, holders: Sequence[Service]) -> Judgement | None:
    """The Reason why ``one`` may not join the holders of an address."""
    for holder in holders:
        why = may_share(one, holder)
        if why:
            consent = not why.startswith("no consent")
            reason = Reason.ALREADY_ALLOCATED_INCOMPATIBLE if consent else Reason.ALREADY_ALLOCATED
            return Judgement(reason=reason, detail=f"{holder.key} holds it; {why}")
    return None


def adopt(services: Mapping[ServiceKey, Service], claims: Mapping[ServiceKey, Holding]) -> dict[ServiceKey, Holding]:
    """Claims with conflicts settled: of Services that may not share an address, the older keeps it."""
    claimants: dict[str, list[ServiceKey]] = {}
    first: dict[str, ServiceKey] = {}
    for key, holding in claims.items():
        for item in holding.held:
            other = first.setdefault(item.address, key)
            if other is not key:
                claimants.setdefault(item.address, [other]).append(key)
    result = dict(claims)
    for address in sorted(claimants):
        kept: list[Service] = []
        for service in sorted((services[key] for key in claimants[address]), key=age):
            refusal = _refused_by(service, kept)
            if refusal is None:
                kept.append(service)
            else:
                result[service.key] = _without(result[service.key], address, refusal)
    return result


def _without(holding: Holding, address: str, refusal: Judgement) -> Holding:
    said = Judgement(reason=refusal.reason, detail=f"{address}: {refusal.detail}")
    return Holding(
        tuple(h for h in holding.held if h.address != address), (*holding.lost, (address, said)), holding.surplus
    )


def is_settled(service: Service, holding: Holding, wish: Request) -> bool:
    """Has the Service all it wants? Then the allocator need not look at it."""
    if wish.address_refusal or len(holding.held) != len(service.ip_families):
        return False
    asked = all(wish.address(h.family) in ("", h.address) for h in holding.held)
    return asked and (not wish.pools or all(h.pool.name in wish.pools for h in holding.held))


class Ledger:
    """Who has what while addresses are given out; lives for one pass."""

    def __init__(
        self,
        snapshot: Snapshot,
        pools: PoolIndex,
        holdings: Mapping[ServiceKey, Holding],
        others: Mapping[str, ServiceKey],
    ) -> None:
        self.pools = pools
        self._settings: Settings = snapshot.settings
        self._services = snapshot.services
        self._labels = snapshot.namespace_labels
        self._holders: dict[str, list[ServiceKey]] = {}
        self._taken: dict[int, set[int]] = {4: set(), 6: set()}
        self._cooling: dict[int, dict[int, ServiceKey]] = {4: {}, 6: {}}
        self._sticky: dict[ServiceKey, list[tuple[int, int]]] = {}
        self._addresses_by_namespace: dict[str, set[str]] = {}
        self._by_sharing_key: dict[str, list[Held]] = {}
        self._cursors: dict[tuple[str, int], Cursor] = {}
        self._blocked = {family: _Union(self._taken[family], self._cooling[family]) for family in (4, 6)}
        for address, key in others.items():
            parsed = parse_address(address)
            if parsed:
                self._holders.setdefault(address, []).append(key)
                self._taken[parsed[0]].add(parsed[1])
        for key, holding in holdings.items():
            for item in holding.held:
                self.take(key, item)
            for address in (*holding.surplus, *(address for address, _ in holding.lost)):
                self._cool(address, key)  # still written in the status: nobody's yet
        self._expect(snapshot.pending)
        self._reserve(snapshot.reservations, snapshot.wall)

    def _expect(self, pending: Mapping[ServiceKey, Assignment]) -> None:
        for key, assignment in pending.items():
            for item in _pending(assignment, self.pools):
                if key in self._services and key not in self._holders.get(item.address, ()):
                    self.take(key, item)

    def _reserve(self, reservations: Mapping[str, Reservation], wall: float) -> None:
        for reservation in reservations.values():
            parsed = parse_address(reservation.address)
            if parsed is None or reservation.address in self._holders:
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

    def take(self, key: ServiceKey, item: Held) -> None:
        """Note that a Service has an address."""
        self._holders.setdefault(item.address, []).append(key)
        self._taken[item.family].add(item.value)
        self._addresses_by_namespace.setdefault(key.namespace, set()).add(item.address)
        sharing_key = requests.read(self._services[key]).sharing_key
        if sharing_key and not self._services[key].deleting:
            self._by_sharing_key.setdefault(sharing_key, []).append(item)

    def leave(self, key: ServiceKey, item: Held) -> None:
        """Note that a Service moves away from an address: nobody joins it there any more."""
        if self._holders[item.address] == [key]:
            self._cooling[item.family].setdefault(item.value, key)
            for items in self._by_sharing_key.values():
                if item in items:
                    items.remove(item)

    def give_back(self, key: ServiceKey, item: Held) -> None:
        """Undo a ``take``."""
        holders = self._holders[item.address]
        holders.remove(key)
        if not holders:
            del self._holders[item.address]
            self._taken[item.family].discard(item.value)
        namespace = key.namespace
        if not any(holder.namespace == namespace for holder in holders):
            self._addresses_by_namespace[namespace].discard(item.address)
        for items in self._by_sharing_key.values():
            if item in items and not holders:
                items.remove(item)

    def request(self, service: Service, wish: Request, family: int) -> Held | Judgement:
        """The very address a Service asks for, or why not."""
        address = wish.address(family)
        parsed = parse_address(address)
        assert parsed is not None  # read() has seen to it
        value = parsed[1]
        pool = self.pools.find(family, value)
        if pool is None:
            return Judgement(reason=Reason.OUTSIDE_POOLS, detail=address)
        if wish.pools and pool.name not in wish.pools:
            detail = f"{address} is of pool {pool.name}, but pool {', '.join(wish.pools)} is asked for too"
            return Judgement(reason=Reason.BAD_REQUEST, detail=detail)
        if not admits(pool, service, self._labels.get(service.key.namespace, {})):
            return Judgement(reason=Reason.POOL_SELECTOR_MISMATCH, detail=f"{address} is of pool {pool.name}")
        if pool.disabled:
            return Judgement(reason=Reason.NO_POOL, detail=f"pool {pool.name} is disabled")
        refusal = requests.ports_refusal(service, (wish.mode or pool.mode,), self._settings)
        if refusal:
            return refusal
        return self._try(service, Held(address, family, value, pool))

    def sticky(self, service: Service, wish: Request, family: int) -> Held | None:
        """The address a Service of this name had before, when it may have it again."""
        for found, value in self._sticky.get(service.key, ()):
            pool = self.pools.find(found, value)
            if found != family or pool not in self._candidates(service, wish, family):
                continue
            assert pool is not None
            item = self._try(service, Held(address_text(family, value), family, value, pool))
            if isinstance(item, Held):
                return item
        return None

    def any(self, service: Service, wish: Request, family: int) -> Held | Judgement:
        """An address of the first pool that will do: one it may share by its key, else a free one."""
        candidates = self._candidates(service, wish, family)
        if not candidates:
            return self._why_no_pool(service, wish, family)
        shared = self._by_sharing_key.get(wish.sharing_key, ()) if wish.sharing_key else ()
        for item in sorted(shared, key=lambda item: item.value):
            if item.family == family and item.pool in candidates and self._judge(service, item) is None:
                return item
        for pool in candidates:
            cursor = self._cursors.setdefault((pool.name, family), Cursor(pool, family))
            value = cursor.peek(self._blocked[family])
            if value is not None:
                item = Held(address_text(family, value), family, value, pool)
                return self._quota(service, item) or item
        cooling = sum(1 for v in self._cooling[family] if self.pools.find(family, v) in candidates)
        detail = f"pool {', '.join(p.name for p in candidates)}, IPv{family}"
        return Judgement(reason=Reason.OUT_OF_IPS, detail=f"{detail}; {cooling} cooling down" if cooling else detail)

    def _try(self, service: Service, item: Held) -> Held | Judgement:
        return self._judge(service, item) or item

    def _judge(self, service: Service, item: Held) -> Judgement | None:
        """Why a Service may not have this address now."""
        holders = sorted(key for key in self._holders.get(item.address, ()) if key != service.key)
        refusal = _refused_by(service, [self._services[key] for key in holders])
        if refusal:
            return Judgement(reason=refusal.reason, detail=f"{item.address}: {refusal.detail}")
        leaving = [key for key in holders if self._services[key].deleting]
        if leaving and len(leaving) == len(holders):
            return Judgement(
                reason=Reason.COOLING_DOWN, detail=f"{item.address}, of {leaving[0]}, which is being deleted"
            )
        cooling = self._cooling[item.family].get(item.value)
        if cooling is not None and cooling != service.key and not holders:
            return Judgement(reason=Reason.COOLING_DOWN, detail=f"{item.address}, lately of {cooling}")
        return self._quota(service, item)

    def _quota(self, service: Service, item: Held) -> Judgement | None:
        quotas, namespace = self._settings.namespace_quota, service.key.namespace
        quota = quotas.get(namespace, quotas.get("*"))
        has = self._addresses_by_namespace.get(namespace, set())
        if quota is None or item.address in has or len(has) < quota:
            return None
        return Judgement(reason=Reason.QUOTA_EXCEEDED, detail=f"namespace {namespace} holds {len(has)} of {quota}")

    def _candidates(self, service: Service, wish: Request, family: int) -> list[Pool]:
        labels = self._labels.get(service.key.namespace, {})
        return [
            pool
            for pool in self.pools.pools
            if has_family(pool, family)
            and not pool.disabled
            and (pool.name in wish.pools if wish.pools else pool.auto_assign)
            and admits(pool, service, labels)
            and not requests.ports_refusal(service, (wish.mode or pool.mode,), self._settings)
        ]

    def _why_no_pool(self, service: Service, wish: Request, family: int) -> Judgement:
        unknown = [name for name in wish.pools if name not in self.pools.by_name]
        if unknown:
            return Judgement(reason=Reason.UNKNOWN_POOL, detail=", ".join(unknown))
        asked = [pool for pool in self.pools.pools if pool.name in wish.pools or not wish.pools]
        with_family = [pool for pool in asked if has_family(pool, family)]
        names = ", ".join(pool.name for pool in with_family)
        if not with_family:
            of = f"pool {', '.join(wish.pools)}" if wish.pools else "no pool"
            detail = f"{of} has no IPv{family} addresses" if wish.pools else f"no pool has IPv{family} addresses"
            return Judgement(reason=Reason.NO_POOL, detail=detail)
        labels = self._labels.get(service.key.namespace, {})
        if not any(admits(pool, service, labels) for pool in with_family):
            return Judgement(reason=Reason.POOL_SELECTOR_MISMATCH, detail=f"IPv{family}: pool {names}")
        for pool in with_family:
            refusal = requests.ports_refusal(service, (wish.mode or pool.mode,), self._settings)
            if refusal:
                return refusal
        if all(pool.disabled for pool in with_family):
            return Judgement(reason=Reason.NO_POOL, detail=f"pool {names} is disabled")
        return Judgement(reason=Reason.NO_POOL, detail=f"pool {names} is given on request only (auto_assign: false)")


@dataclass(frozen=True, slots=True)
class _Union:
    """Membership in either of two collections."""

    one: set[int]
    other: Mapping[int, object]

    def __contains__(self, value: object) -> bool:
        return value in self.one or value in self.other


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

    service: Service
    wish: Request
    by_family: dict[int, Held] = field(default_factory=dict)
    refused: dict[int, Judgement] = field(default_factory=dict)
    fresh: list[Held] = field(default_factory=list)


def allocate(
    snapshot: Snapshot,
    unsettled: Mapping[ServiceKey, Request],
    ledger: Ledger,
    holdings: Mapping[ServiceKey, Holding],
) -> dict[ServiceKey, Verdict]:
    """Serve the wishes and gaps of ``unsettled`` Services: wishes first, then sticky, then the rest; older first."""
    drafts = []
    for service in sorted((snapshot.services[key] for key in unsettled), key=age):
        draft = _Draft(service, unsettled[service.key])
        under_way = snapshot.pending.get(service.key)
        for item in _pending(under_way, ledger.pools) if under_way else ():
            if item.family in service.ip_families:
                draft.by_family[item.family] = item
        for item in holdings[service.key].held:
            draft.by_family[item.family] = item
        drafts.append(draft)
    for draft in drafts:
        _wish(draft, ledger)
    for draft in drafts:
        for family in _gaps(draft):
            former = ledger.sticky(draft.service, draft.wish, family)
            if former:
                _give(draft, ledger, former)
    for draft in drafts:
        for family in _gaps(draft):
            found = ledger.any(draft.service, draft.wish, family)
            _accept(draft, ledger, family, found)
        _all_or_nothing(draft, ledger)
    return {draft.service.key: _verdict(draft) for draft in drafts}


def _wish(draft: _Draft, ledger: Ledger) -> None:
    """Serve requested addresses and pools. What a Service has it keeps until the wish can be met."""
    service, wish = draft.service, draft.wish
    if wish.address_refusal:
        draft.refused = dict.fromkeys(service.ip_families, wish.address_refusal)
        return
    for family in service.ip_families:
        current = draft.by_family.get(family)
        asked = wish.address(family)
        if asked and (current is None or current.address != asked):
            _accept(draft, ledger, family, ledger.request(service, wish, family))
        elif not asked and current and wish.pools and current.pool.name not in wish.pools:
            _accept(draft, ledger, family, ledger.any(service, wish, family))


def _gaps(draft: _Draft) -> list[int]:
    return [f for f in draft.service.ip_families if f not in draft.by_family and f not in draft.refused]


def _accept(draft: _Draft, ledger: Ledger, family: int, found: Held | Judgement) -> None:
    if isinstance(found, Held):
        _give(draft, ledger, found)
    else:
        draft.refused[family] = found


def _give(draft: _Draft, ledger: Ledger, item: Held) -> None:
    """The old address, if any, stays taken for this pass: packets still come for it."""
    former = draft.by_family.get(item.family)
    if former:
        ledger.leave(draft.service.key, former)
    ledger.take(draft.service.key, item)
    draft.by_family[item.family] = item
    draft.fresh.append(item)


def _all_or_nothing(draft: _Draft, ledger: Ledger) -> None:
    """RequireDualStack gives both families or none; what was held before stays."""
    held_before = len(draft.by_family) > len(draft.fresh)
    if draft.service.ip_family_policy == "RequireDualStack" and draft.refused and not held_before:
        for item in draft.fresh:
            ledger.give_back(draft.service.key, item)
        draft.by_family.clear()


def _verdict(draft: _Draft) -> Verdict:
    held = tuple(draft.by_family[f] for f in draft.service.ip_families if f in draft.by_family)
    refusal = next((draft.refused[f] for f in draft.service.ip_families if f in draft.refused), None)
    if refusal is None:
        return Verdict(held)
    if held and draft.service.ip_family_policy == "PreferDualStack" and not draft.wish.address_refusal:
        family = next(f for f in draft.service.ip_families if f in draft.refused)
        if family not in draft.by_family and not draft.wish.address(family):
            return Verdict(held, note=f"IPv{family}: {refusal.reason}: {refusal.detail}")
    if held:
        kept = ", ".join(h.address for h in held)
        refusal = Judgement(reason=refusal.reason, detail=f"{refusal.detail}; keeps {kept}")
    return Verdict(held, refusal)


def assignment(service: Service, held: tuple[Held, ...], mode: Mode) -> Assignment:
    """The status a Service shall have."""
    errors = ((p.port, p.protocol.value, requests.port_error(p, mode)) for p in service.ports)
    return Assignment(
        service=service.key,
        addresses=tuple(h.address for h in held),
        pools=tuple(h.pool.name for h in held),
        ip_mode=requests.ip_mode(mode),
        port_errors=tuple(error for error in errors if error[2]),
    )
