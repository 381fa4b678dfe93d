# SPDX-License-Identifier: Apache-2.0
"""Snapshot -> Desired: all that should be, and one Judgement per Service.

Every host forwards and announces what the *status* of a Service holds; what the lease holder is
about to write changes nothing until it is read back. One Service that cannot be served never
stops the others.

A pure function. A ``Memory`` only spares it the work whose inputs are still the very same objects:
with and without one the answer is equal (tests/plan/test_desire.py holds it to that).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement, Reason
from lbagent.model.route import Route
from lbagent.model.service import Endpoint, Service, ServiceKey
from lbagent.model.state import Desired, Settings, Snapshot
from lbagent.model.vip import Backend, Forward, Vip
from lbagent.plan import request as requests
from lbagent.plan.assign import Verdict, adopt, allocate
from lbagent.plan.eligible import Choice, Eligibility, Probes, Selection, Usable, usable
from lbagent.plan.facts import Facts, Holding, assignment, establish, mode_of
from lbagent.plan.pools import index
from lbagent.plan.register import Register, may_be_given
from lbagent.plan.report import FINALIZER, is_reported, is_written, was_ours
from lbagent.plan.ring import Rings
from lbagent.plan.serve import NOT_SERVED, Served, serve

_SATISFIED = Judgement(reason=Reason.SATISFIED)


def desire(snapshot: Snapshot, memory: "Memory | None" = None) -> Desired:
    """All that should be. Nothing but Judgements while the first list is incomplete: see ``steps``."""
    if not snapshot.listed:
        return Desired(
            judgements={
                key: Judgement(reason=requests.foreign(service, snapshot.settings) or Reason.NOT_LISTED)
                for key, service in snapshot.services.items()
            }
        )
    memory = memory or Memory()
    memory.learn(snapshot)
    return memory.answer(snapshot)


class Memory:
    """The plan as of the last Snapshot, brought up to date by what differs in the next.

    ``learn`` finds the Services that a difference may concern and works out each of them anew;
    ``answer`` copies the result. The mutable state, all of it by Service or by address:

    - ``_register``: the Facts, and who claims which address;
    - ``_giving_way`` and ``_verdicts``: what adoption and allocation said last;
    - ``_served``, and from them ``_forwards``, ``_users`` of rings and ``_routes``;
    - ``_judgements``, ``_assignments``, ``_releases``, and which of them the status does not show yet.
    """

    def __init__(self) -> None:
        self._reset(Settings())

    def _reset(self, settings: Settings) -> None:
        self._settings = settings
        self._pools = index(settings.pools)
        self._labels: Mapping[str, Mapping[str, str]] = {}
        self._endpoints: Mapping[ServiceKey, tuple[Endpoint, ...]] = {}
        self._usable: dict[ServiceKey, dict[int, Usable]] = {}
        self._choice = Choice(Eligibility({}), {})
        self._register = Register()
        self._giving_way: dict[ServiceKey, Holding] = {}
        self._verdicts: dict[ServiceKey, Verdict] = {}
        self._served: dict[ServiceKey, Served] = {}
        self._forwards: dict[Vip, Forward] = {}
        self._users: Counter[str] = Counter()
        self._backends_by_ring: dict[str, tuple[Backend, ...]] = {}
        self._routes: dict[Route, frozenset[Vip]] = {}
        self._judgements: dict[ServiceKey, Judgement] = {}
        self._assignments: dict[ServiceKey, Assignment] = {}
        self._releases: dict[ServiceKey, tuple[str, ...]] = {}
        self._unwritten: set[ServiceKey] = set()
        self._unreported: set[ServiceKey] = set()

    def learn(self, snapshot: Snapshot) -> None:
        """Bring everything up to date."""
        if snapshot.settings != self._settings:
            self._reset(snapshot.settings)
        changed = self._learn_services(snapshot)
        if changed:
            changed |= self._settle_conflicts()
        changed |= self._allocate(snapshot)
        moved = self._learn_endpoints(snapshot) | self._learn_nodes(snapshot)
        self._work_out(changed, moved)

    def answer(self, snapshot: Snapshot) -> Desired:
        """The plan, with what only this host and this moment add."""
        routes = dict(self._routes)
        if snapshot.draining or snapshot.stale:
            routes = {}
        elif snapshot.softening:
            routes = {replace(r, policy=r.policy.softened(snapshot.softening)): vips for r, vips in routes.items()}
        judgements = dict(self._judgements)
        added = _of_this_host(judgements, snapshot, self._forwards, routes)
        judgements.update(added)
        unreported = self._unreported.difference(added)
        unreported.update(key for key, j in added.items() if not is_reported(self._facts[key].service, j))
        return Desired(
            assignments=dict(self._assignments) if snapshot.is_leader else {},
            releases=dict(self._releases) if snapshot.is_leader else {},
            forwards=dict(self._forwards),
            rings=Rings(dict(self._backends_by_ring)),
            routes=routes,
            judgements=judgements,
            unwritten=frozenset(self._unwritten) if snapshot.is_leader else frozenset(),
            unreported=frozenset(unreported),
        )

    @property
    def _facts(self) -> dict[ServiceKey, Facts]:
        return self._register.facts

    def facts(self, key: ServiceKey) -> Facts | None:
        """What follows from the Service alone."""
        return self._facts.get(key)

    def selections(self, key: ServiceKey) -> Mapping[Vip, Selection]:
        """Who was chosen for each Vip of a Service, and why."""
        return self._served.get(key, NOT_SERVED).selection_by_vip

    # --- what differs ---------------------------------------------------------------------------

    def _learn_services(self, snapshot: Snapshot) -> set[ServiceKey]:
        """Facts of Services that are new, changed or gone, or whose namespace got other labels."""
        facts, services = self._register.facts, snapshot.services
        changed = {
            key
            for key, service in services.items()
            if (known := facts.get(key)) is None or known.service is not service
        }
        if snapshot.namespace_labels != self._labels:
            changed |= {key for key in services if self._has_other_labels(key.namespace, snapshot)}
        self._labels = snapshot.namespace_labels
        for key in changed:
            self._strike_out(key)
            self._register.note(
                establish(services[key], self._labels.get(key.namespace, {}), self._settings, pools=self._pools)
            )
        if len(facts) != len(services):
            for key in facts.keys() - services.keys():
                self._strike_out(key)
                changed.add(key)
        return changed

    def _strike_out(self, key: ServiceKey) -> None:
        self._register.forget(key)
        self._usable.pop(key, None)

    def _has_other_labels(self, namespace: str, snapshot: Snapshot) -> bool:
        return self._labels.get(namespace, {}) != snapshot.namespace_labels.get(namespace, {})

    def _settle_conflicts(self) -> set[ServiceKey]:
        """Who must give way now, or need not any more."""
        before = self._giving_way
        self._giving_way = adopt(self._register)
        return {key for key in before.keys() | self._giving_way if before.get(key) != self._giving_way.get(key)}

    def _learn_endpoints(self, snapshot: Snapshot) -> set[ServiceKey]:
        before, self._endpoints = self._endpoints, snapshot.endpoints
        changed = {key for key, endpoints in self._endpoints.items() if before.get(key) is not endpoints}
        changed |= before.keys() - self._endpoints.keys()
        for key in changed:
            self._usable.pop(key, None)
        return changed

    def _learn_nodes(self, snapshot: Snapshot) -> set[ServiceKey]:
        """A change of nodes concerns every Service, one of probes those whose ports it is about."""
        leaving = frozenset(name for name, until in snapshot.leaving.items() if until > snapshot.now)
        eligibility = Eligibility(snapshot.nodes, snapshot.unreachable, leaving, snapshot.settings.panic_keep)
        before = self._choice
        if before.eligibility != eligibility:
            self._choice = Choice(eligibility, snapshot.health, proxy_port=snapshot.settings.proxy_port)
            return set(self._facts)
        self._choice = Choice(before.eligibility, snapshot.health, proxy_port=snapshot.settings.proxy_port)
        if self._choice.readings == before.readings:
            return set()
        return {
            key
            for key, facts in self._facts.items()
            if _probes(facts.service, before) != _probes(facts.service, self._choice)
        }

    def _allocate(self, snapshot: Snapshot) -> set[ServiceKey]:
        """Ask the allocator about all who lack something; time and other hosts may have changed its mind."""
        before, self._verdicts = self._verdicts, {}
        unsettled = self._register.unsettled | {key for key in self._giving_way if may_be_given(self._facts[key])}
        if unsettled:
            self._verdicts = allocate(snapshot, unsettled, self._register, self._giving_way)
        return {key for key in before.keys() | self._verdicts if before.get(key) != self._verdicts.get(key)}

    # --- what follows ---------------------------------------------------------------------------

    def _work_out(self, changed: set[ServiceKey], moved: set[ServiceKey]) -> None:
        """Everything about Services that changed anew, and the backends of those that ``moved``.

        First all that they had is taken out, then all that they have is put in: a Vip may pass from
        one Service to another.
        """
        touched: set[Route] = set()
        concerned = changed | moved
        for key in concerned:
            self._take_out(key, touched)
        for key in changed:
            self._assignments.pop(key, None)
            self._releases.pop(key, None)
            self._unwritten.discard(key)
        for key in concerned:
            facts = self._facts.get(key)
            if facts is None:
                self._judgements.pop(key, None)
                self._unreported.discard(key)
                continue
            self._put_in(facts, touched)
            if key in changed:
                self._write(facts)
        for route in touched:
            vips = [
                self._served[key].vips_by_route[route]
                for key in self._register.claimants.get(route.address, ())
                if key in self._served and route in self._served[key].vips_by_route
            ]
            if vips:
                self._routes[route] = frozenset().union(*vips)
            else:
                self._routes.pop(route, None)

    def _take_out(self, key: ServiceKey, touched: set[Route]) -> None:
        served = self._served.pop(key, NOT_SERVED)
        for vip in served.forwards:
            del self._forwards[vip]
        for fingerprint in served.backends_by_ring:
            self._users[fingerprint] -= 1
            if not self._users[fingerprint]:
                del self._users[fingerprint], self._backends_by_ring[fingerprint]
        touched.update(served.vips_by_route)

    def _put_in(self, facts: Facts, touched: set[Route]) -> None:
        key, served = facts.key, NOT_SERVED
        holding = self._giving_way.get(key, facts.claim)
        if holding.held and facts.refusal is None and not facts.service.deleting:
            served = serve(facts.service, facts.wish, holding.held, self._usable_by_family(facts), self._choice)
            self._served[key] = served
            self._forwards.update(served.forwards)
            for fingerprint, backends in served.backends_by_ring.items():
                self._users[fingerprint] += 1
                self._backends_by_ring[fingerprint] = backends
            touched.update(served.vips_by_route)
        judgement = _judge(facts, holding, self._verdicts.get(key), served)
        self._judgements[key] = judgement
        if is_reported(facts.service, judgement):
            self._unreported.discard(key)
        else:
            self._unreported.add(key)

    def _usable_by_family(self, facts: Facts) -> dict[int, Usable]:
        if facts.key not in self._usable:
            endpoints = self._endpoints.get(facts.key, ())
            self._usable[facts.key] = {f: usable(endpoints, family=f) for f in facts.service.ip_families}
        return self._usable[facts.key]

    def _write(self, facts: Facts) -> None:
        """What the lease holder wants the status to say."""
        service, key = facts.service, facts.key
        if facts.foreign:
            if facts.foreign is Reason.NOT_LOAD_BALANCER and was_ours(service):
                self._releases[key] = service.status_addresses
            return
        verdict = self._verdicts.get(key)
        held = verdict.held if verdict else self._giving_way.get(key, facts.claim).held
        if service.deleting:
            if service.status_addresses or FINALIZER in service.finalizers:
                self._releases[key] = service.status_addresses
        elif held:
            wanted = facts.assignment
            if wanted is None or held != facts.claim.held:
                wanted = assignment(service, held, mode_of(facts.wish, held))
            self._assignments[key] = wanted
            if not is_written(service, wanted):
                self._unwritten.add(key)
        elif service.status_addresses:
            self._releases[key] = service.status_addresses


def _probes(service: Service, choice: Choice) -> tuple[Probes, ...]:
    return tuple(choice.probes(service, protocol=p.protocol, node_port=p.node_port) for p in service.ports)


def _judge(facts: Facts, holding: Holding, verdict: Verdict | None, served: Served) -> Judgement:
    if facts.foreign:
        return Judgement(reason=facts.foreign)
    if facts.service.deleting:
        return Judgement(reason=Reason.DELETING)
    if facts.refusal:
        return facts.refusal
    if verdict and verdict.refusal:
        return verdict.refusal
    if not holding.held:
        if holding.lost:
            return holding.lost[0][1]
        detail = ", ".join(item.address for item in verdict.held) if verdict else ""
        return Judgement(reason=Reason.PENDING_ASSIGNMENT, detail=detail)
    if served.obstacle:
        return served.obstacle
    return Judgement(reason=Reason.SATISFIED, detail=verdict.note) if verdict and verdict.note else _SATISFIED


def _of_this_host(
    judgements: Mapping[ServiceKey, Judgement],
    snapshot: Snapshot,
    forwards: Mapping[Vip, Forward],
    routes: Mapping[Route, frozenset[Vip]],
) -> dict[ServiceKey, Judgement]:
    """What this host has to say about otherwise satisfied Services."""
    if snapshot.draining or snapshot.stale:
        reason = Judgement(reason=Reason.HOST_DRAINING if snapshot.draining else Reason.HOST_STALE)
        return {key: reason for key, judgement in judgements.items() if judgement.reason is Reason.SATISFIED}
    said: dict[ServiceKey, Judgement] = {}
    needed: frozenset[Vip] = frozenset().union(*routes.values()) if snapshot.unproven else frozenset()
    for vip in sorted(needed & snapshot.unproven.keys()):
        key = forwards[vip].service
        if judgements[key].reason is Reason.SATISFIED:
            said.setdefault(key, Judgement(reason=Reason.NOT_FORWARDING, detail=f"{vip}: {snapshot.unproven[vip]}"))
    return said
