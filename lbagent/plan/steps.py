# SPDX-License-Identifier: Apache-2.0
"""(Observed, Desired) -> ordered Steps.

The order is the invariant. Withdraw what should not be announced, program what should be
forwarded, announce what is forwarded, and forget only what attracts no packets any more. After
every prefix, no route lacks a programmed Vip; planned again from any prefix, the end is the same.

Nothing here waits. Whatever must wait (a proof, a peer's confirmation, the settling time) is
simply not yielded until the world says that it has come true.
"""

from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter

from lbagent.model.reason import Reason
from lbagent.model.service import Service, ServiceKey
from lbagent.model.state import Desired, Observed, Snapshot
from lbagent.model.step import Announce, Assign, Program, Release, Report, Step, Unprogram, Withdraw
from lbagent.model.vip import Forward, Vip
from lbagent.plan.facts import age
from lbagent.plan.report import OF_THIS_HOST

RINGS_PER_STEP = 16
"""A Program carries at most this many rings (131 kB and up to 80 ms each), so that none lasts long."""

_by_prefix = attrgetter("prefix")


def steps(observed: Observed, desired: Desired, snapshot: Snapshot) -> Iterator[Step]:
    """The changes that lead from what is to what should be, as far as they may be made now.

    Before the first complete list there are none (fail static).
    """
    if not snapshot.listed:
        return
    if snapshot.is_leader:
        yield from _status_steps(observed, desired, snapshot)
    yield from _reports(observed, desired, snapshot)
    changed = _changed(observed, desired)
    needs_by_prefix = {route.prefix: needs for route, needs in desired.routes.items()}
    withdrawn = [
        route
        for route in observed.routes
        if (needs := needs_by_prefix.get(route.prefix)) is None or _is_refuted(needs, changed, snapshot)
    ]
    for route in sorted(withdrawn, key=_by_prefix):
        yield Withdraw(route=route)
    yield from _program(changed - _still_serving(changed, observed, desired, snapshot), desired)
    for route in sorted(desired.routes.keys() - observed.routes.difference(withdrawn), key=_by_prefix):
        needs = desired.routes[route]
        if all(vip in changed or _is_proven(vip, observed, snapshot) for vip in needs):
            yield Announce(route=route, needs=needs)
    idle = _idle(observed, desired, snapshot)
    if idle:
        yield Unprogram(vips=idle)


def _changed(observed: Observed, desired: Desired) -> set[Vip]:
    """Vips that the kernel does not hold as they should be, or whose ring it lacks."""
    held = observed.forwards
    lacking = {fingerprint for fingerprint in desired.rings if fingerprint not in observed.rings}
    return {
        vip
        for vip, forward in desired.forwards.items()
        if ((found := held.get(vip)) is not forward and found != forward) or forward.ring in lacking
    }


def _still_serving(changed: set[Vip], observed: Observed, desired: Desired, snapshot: Snapshot) -> set[Vip]:
    """Vips that nobody is left to serve, while packets for them may still arrive.

    They keep the backends that they have until their address attracts no more: some of those may
    serve on, and a ring without anybody certainly does not.
    """
    if not changed:
        return changed
    has_backends: frozenset[Vip] = frozenset().union(*desired.routes.values())
    wanted = {route.address for route in desired.routes}
    attracts = _attracting(observed, snapshot)
    emptied = ((changed - has_backends) & observed.forwards.keys()) - {v for v in changed if v.address in wanted}
    return {vip for vip in emptied if attracts(vip.address)}


def _attracting(observed: Observed, snapshot: Snapshot) -> Callable[[str], bool]:
    """May packets for an address still arrive?"""
    announced = {route.address for route in observed.routes}
    latest = snapshot.now - snapshot.settings.settle_s
    return lambda address: address in announced or observed.attracting.get(address, 0.0) > latest


def _is_proven(vip: Vip, observed: Observed, snapshot: Snapshot) -> bool:
    return vip in observed.proven and vip in observed.forwards and vip not in snapshot.unproven


def _is_refuted(needs: Iterable[Vip], changed: set[Vip], snapshot: Snapshot) -> bool:
    """Is a Vip known not to work? Unknown is not refuted: a restarted agent has proven nothing yet."""
    return bool(snapshot.unproven) and any(vip in snapshot.unproven and vip not in changed for vip in needs)


def _program(changed: set[Vip], desired: Desired) -> Iterator[Program]:
    """Vips grouped by ring, so that a ring is carried once."""
    forwards_by_ring: dict[str, list[Forward]] = {}
    for vip in sorted(changed, key=attrgetter("address", "protocol", "port")):
        forward = desired.forwards[vip]
        forwards_by_ring.setdefault(forward.ring, []).append(forward)
    names = sorted(forwards_by_ring)
    for start in range(0, len(names), RINGS_PER_STEP):
        batch = names[start : start + RINGS_PER_STEP]
        yield Program(
            forwards=tuple(forward for name in batch for forward in forwards_by_ring[name]),
            rings=tuple(desired.rings[name] for name in batch),
        )


def _idle(observed: Observed, desired: Desired, snapshot: Snapshot) -> tuple[Vip, ...]:
    """Vips that the kernel may forget.

    While the address stays announced for other Vips, as soon as those are proven: it would attract
    packets for ever.
    """
    surplus = observed.forwards.keys() - desired.forwards.keys()
    if not surplus:
        return ()
    addresses = {vip.address for vip in surplus}
    kept = {
        route.address
        for route, needs in desired.routes.items()
        if route.address in addresses and all(_is_proven(vip, observed, snapshot) for vip in needs)
    }
    attracts = _attracting(observed, snapshot)
    return tuple(sorted(vip for vip in surplus if vip.address in kept or not attracts(vip.address)))


# --- the cluster ----------------------------------------------------------------------------------


def _status_steps(observed: Observed, desired: Desired, snapshot: Snapshot) -> Iterator[Step]:
    """Status writes, younger Services first: who must give way does so before the one it gives way to changes.

    So an interrupted pass leaves a conflict that is judged again as it was before.
    """
    services, pending = snapshot.services, snapshot.pending
    changing = [services[key] for key in desired.unwritten if pending.get(key) != desired.assignments[key]]
    changing += [services[key] for key in desired.releases]
    for service in sorted(changing, key=age, reverse=True):
        if service.key in desired.assignments:
            yield Assign(assignment=desired.assignments[service.key])
        elif not service.deleting or not _is_served(service, observed, desired):
            yield Release(service=service.key, addresses=desired.releases[service.key])


def _is_served(service: Service, observed: Observed, desired: Desired) -> bool:
    """Does this host still attract or forward packets for a Service that is being deleted?

    What is desired at its addresses is another Service's.
    """
    announced = {route.address for route in observed.routes} - {route.address for route in desired.routes}
    vips = {
        Vip(address=address, protocol=port.protocol, port=port.port)
        for address in service.status_addresses
        for port in service.ports
    }
    return not announced.isdisjoint(service.status_addresses) or any(
        vip in observed.forwards and vip not in desired.forwards for vip in vips
    )


def _reports(observed: Observed, desired: Desired, snapshot: Snapshot) -> Iterator[Report]:
    if not desired.unreported:
        return
    announced = {route.address for route in observed.routes}
    for key in sorted(desired.unreported):
        judgement = desired.judgements[key]
        if not snapshot.is_leader and judgement.reason not in OF_THIS_HOST:
            continue
        if judgement.reason is Reason.SATISFIED and not _is_announced(key, announced, snapshot):
            continue  # not before it is true
        yield Report(service=key, judgement=judgement)


def _is_announced(key: ServiceKey, announced: set[str], snapshot: Snapshot) -> bool:
    return announced.issuperset(snapshot.services[key].status_addresses)
