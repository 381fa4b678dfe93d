# SPDX-License-Identifier: Apache-2.0
"""Snapshot -> Desired: all that should be, and one Judgement per Service.

Every host forwards and announces what the *status* of a Service holds; what the lease holder is
about to write changes nothing until it is read back. One Service that cannot be served never
stops the others.

A pure function. ``Memory`` only spares it the work whose inputs are still the very same objects;
with and without it the answer is equal (tests/plan/test_desire.py holds it to that).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement, Reason
from lbagent.model.route import Route
from lbagent.model.service import Endpoint, IpMode, Port, Service, ServiceKey
from lbagent.model.state import Desired, Settings, Snapshot
from lbagent.model.vip import Backend, Forward, Mode, Vip
from lbagent.plan import request as requests
from lbagent.plan.assign import (
    NOTHING_HELD,
    Held,
    Holding,
    Ledger,
    Verdict,
    adopt,
    allocate,
    assignment,
    claim,
    is_settled,
)
from lbagent.plan.eligible import Choice, Eligibility, Probes, Selection, usable
from lbagent.plan.pools import index
from lbagent.plan.request import NO_WISH, Request
from lbagent.plan.ring import Rings

FINALIZER = "service.kubernetes.io/load-balancer-cleanup"


@dataclass(frozen=True, slots=True)
class Facts:
    """What follows from a Service, its namespace's labels and the settings alone.

    ``foreign``: why it is not ours. ``refusal``: why it cannot be forwarded whatever its backends.
    ``assignment`` is what its status should say if the claim stands as it is.
    """

    service: Service
    labels: Mapping[str, str] | None
    foreign: Reason | None
    wish: Request = NO_WISH
    claim: Holding = NOTHING_HELD
    refusal: Judgement | None = None
    assignment: Assignment | None = None
    is_settled: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """What one Service needs of kernel and speaker. ``obstacle`` is its worst address's; None: all are served."""

    forwards: Mapping[Vip, Forward] = field(default_factory=dict)
    backends_by_ring: Mapping[str, tuple[Backend, ...]] = field(default_factory=dict)
    vips_by_route: Mapping[Route, frozenset[Vip]] = field(default_factory=dict)
    obstacle: Judgement | None = None


NOT_SERVED = Served()


class Memory:
    """Answers of an earlier pass, each with the inputs it was made from."""

    def __init__(self) -> None:
        self._settings: Settings | None = None
        self._eligibility = Eligibility({})
        self._facts: dict[ServiceKey, Facts] = {}
        self._served: dict[ServiceKey, tuple[Facts, tuple[Held, ...], object, object, object, Served]] = {}

    def facts(self, snapshot: Snapshot) -> dict[ServiceKey, Facts]:
        """The Facts of every Service, in the order of the Snapshot."""
        if self._settings != snapshot.settings:
            self._settings, self._facts, self._served = snapshot.settings, {}, {}
        known, labels_of = self._facts, snapshot.namespace_labels
        fresh: dict[ServiceKey, Facts] = {}
        for key, service in snapshot.services.items():
            labels = labels_of.get(key.namespace)
            facts = known.get(key)
            if facts is None or facts.service is not service or facts.labels is not labels:
                facts = establish(service, labels, snapshot.settings)
            fresh[key] = facts
        self._facts = fresh
        self._served = {key: entry for key, entry in self._served.items() if key in fresh}
        return fresh

    def choice(self, snapshot: Snapshot) -> Choice:
        """The Choice among the nodes; its answers are kept while the nodes stay as they are."""
        leaving = frozenset(name for name, until in snapshot.leaving.items() if until > snapshot.now)
        eligibility = Eligibility(snapshot.nodes, snapshot.unreachable, leaving, snapshot.settings.panic_keep)
        if self._eligibility != eligibility:
            self._eligibility = eligibility
        return Choice(self._eligibility, snapshot.health)

    def serve(self, facts: Facts, held: tuple[Held, ...], endpoints: tuple[Endpoint, ...], choice: Choice) -> Served:
        """``serve``, remembered."""
        key, probes = facts.service.key, _probes(facts.service, choice)
        entry = self._served.get(key)
        if (
            entry is not None
            and entry[0] is facts
            and entry[1] is held
            and entry[2] is endpoints
            and entry[3] is choice.eligibility
            and entry[4] == probes
        ):
            return entry[5]
        served = serve(facts.service, facts.wish, held, endpoints, choice)
        self._served[key] = (facts, held, endpoints, choice.eligibility, probes, served)
        return served


def _probes(service: Service, choice: Choice) -> tuple[Probes, ...]:
    if not choice.readings:
        return ()
    return tuple(choice.probes(service, protocol=p.protocol, node_port=p.node_port) for p in service.ports)


def establish(service: Service, labels: Mapping[str, str] | None, settings: Settings) -> Facts:
    """The Facts of one Service."""
    foreign = requests.foreign(service, settings)
    if foreign:
        return Facts(service, labels, foreign)
    wish = requests.read(service)
    holding = claim(service, index(settings.pools), labels or {})
    mode = _mode(wish, holding.held)
    modes = (mode,) if wish.mode or holding.held else tuple(pool.mode for pool in settings.pools) or (mode,)
    return Facts(
        service,
        labels,
        None,
        wish,
        holding,
        wish.refusal or requests.ports_refusal(service, modes, settings),
        assignment(service, holding.held, mode) if holding.held else None,
        is_settled(service, holding, wish),
    )


def desire(snapshot: Snapshot, memory: Memory | None = None) -> Desired:
    """All that should be. Nothing but Judgements while the first list is incomplete: see ``steps``."""
    memory = memory or Memory()
    facts_by_service = memory.facts(snapshot)
    ours = {key: facts for key, facts in facts_by_service.items() if facts.foreign is None}
    judgements = {
        key: Judgement(reason=facts.foreign or Reason.NOT_LISTED)
        for key, facts in facts_by_service.items()
        if facts.foreign or not snapshot.listed
    }
    if not snapshot.listed:
        return Desired(judgements=judgements)
    holdings = adopt({key: facts.service for key, facts in ours.items()}, {k: f.claim for k, f in ours.items()})
    verdicts = _allocate(snapshot, facts_by_service, ours, holdings)
    assignments: dict[ServiceKey, Assignment] = {}
    releases: dict[ServiceKey, tuple[str, ...]] = {}
    if snapshot.is_leader:
        assignments, releases = _status(ours, holdings, verdicts)
    forwards: dict[Vip, Forward] = {}
    rings: dict[str, tuple[Backend, ...]] = {}
    routes: dict[Route, frozenset[Vip]] = {}
    choice, endpoints = memory.choice(snapshot), snapshot.endpoints
    for key, facts in ours.items():
        held, served = holdings[key].held, NOT_SERVED
        if held and facts.refusal is None and not facts.service.deleting:
            served = memory.serve(facts, held, endpoints.get(key, ()), choice)
            forwards.update(served.forwards)
            rings.update(served.backends_by_ring)
            for route, vips in served.vips_by_route.items():
                routes[route] = routes[route] | vips if route in routes else vips
        judgements[key] = _judge(facts, holdings[key], verdicts.get(key), served)
    if snapshot.draining:
        routes = {}
    elif snapshot.softening:
        routes = {replace(r, policy=r.policy.softened(snapshot.softening)): vips for r, vips in routes.items()}
    _overlay(judgements, snapshot, forwards, routes)
    return Desired(
        assignments=assignments,
        releases=releases,
        forwards=forwards,
        rings=Rings(rings),
        routes=routes,
        judgements=judgements,
    )


def _allocate(
    snapshot: Snapshot,
    everybody: Mapping[ServiceKey, Facts],
    ours: Mapping[ServiceKey, Facts],
    holdings: Mapping[ServiceKey, Holding],
) -> dict[ServiceKey, Verdict]:
    """The allocator's answer for Services that lack something and could be forwarded if they had it."""
    unsettled = {
        key: facts.wish
        for key, facts in ours.items()
        if not (facts.is_settled and holdings[key] is facts.claim)
        and facts.refusal is None
        and not facts.service.deleting
    }
    if not unsettled:
        return {}
    others = {a: key for key, facts in everybody.items() if facts.foreign for a in facts.service.status_addresses}
    return allocate(snapshot, unsettled, Ledger(snapshot, index(snapshot.settings.pools), holdings, others), holdings)


def _status(
    ours: Mapping[ServiceKey, Facts],
    holdings: Mapping[ServiceKey, Holding],
    verdicts: Mapping[ServiceKey, Verdict],
) -> tuple[dict[ServiceKey, Assignment], dict[ServiceKey, tuple[str, ...]]]:
    """What the lease holder wants every status to say: (addresses, addresses to clear)."""
    assignments: dict[ServiceKey, Assignment] = {}
    releases: dict[ServiceKey, tuple[str, ...]] = {}
    for key, facts in ours.items():
        service = facts.service
        if service.deleting:
            if service.status_addresses or FINALIZER in service.finalizers:
                releases[key] = service.status_addresses
            continue
        verdict = verdicts.get(key)
        held = verdict.held if verdict else holdings[key].held
        if held is facts.claim.held and facts.assignment:
            assignments[key] = facts.assignment
        elif held:
            assignments[key] = assignment(service, held, _mode(facts.wish, held))
        elif service.status_addresses:
            releases[key] = service.status_addresses
    return assignments, releases


def _mode(wish: Request, held: tuple[Held, ...]) -> Mode:
    """One mode per Service: its own wish, else the default of the pool of its first address."""
    return wish.mode or (held[0].pool.mode if held else Mode.NAT)


def _judge(facts: Facts, holding: Holding, verdict: Verdict | None, served: Served) -> Judgement:
    if facts.service.deleting:
        return Judgement(reason=Reason.DELETING)
    if facts.refusal:
        return facts.refusal
    if verdict and verdict.refusal:
        return verdict.refusal
    if not holding.held:
        if holding.lost:
            return holding.lost[0][1]
        return Judgement(reason=Reason.PENDING_ASSIGNMENT, detail=_addresses(verdict.held if verdict else ()))
    if served.obstacle:
        return served.obstacle
    return Judgement(reason=Reason.SATISFIED, detail=verdict.note) if verdict and verdict.note else _SATISFIED


_SATISFIED = Judgement(reason=Reason.SATISFIED)


def _addresses(held: tuple[Held, ...]) -> str:
    return ", ".join(item.address for item in held)


def serve(
    service: Service, wish: Request, held: tuple[Held, ...], endpoints: tuple[Endpoint, ...], choice: Choice
) -> Served:
    """Forwards, rings and routes of one Service that holds addresses."""
    mode = _mode(wish, held)
    forwards: dict[Vip, Forward] = {}
    rings: dict[str, tuple[Backend, ...]] = {}
    routes: dict[Route, frozenset[Vip]] = {}
    obstacle: Judgement | None = None
    for item in held:
        waits = _waits_for_status(service, item.address, mode)
        if waits:
            obstacle = obstacle or Judgement(reason=Reason.PENDING_ASSIGNMENT, detail=waits)
            continue
        active = set()
        ends = usable(endpoints, family=item.family)
        for port in _ports(service, mode):
            selection = choice.select(
                service,
                ends,
                family=item.family,
                address_type=item.pool.node_address_type,
                protocol=port.protocol,
                node_port=port.node_port,
            )
            if selection.reason:
                obstacle = obstacle or _obstacle(item, port, selection, len(held) > 1)
            if not selection.backends:
                continue
            vip = Vip(address=item.address, protocol=port.protocol, port=port.port)
            forwards[vip] = Forward(
                vip=vip,
                service=service.key,
                mode=mode,
                ring=selection.fingerprint,
                node_port=port.node_port if mode is Mode.NAT else 0,
                source_ranges=wish.source_ranges,
                affinity_timeout_s=service.affinity_timeout_s,
            )
            rings[selection.fingerprint] = selection.backends
            if selection.reason is None:
                active.add(vip)
        if active:
            prefix = f"{item.address}/{32 if item.family == 4 else 128}"
            routes[Route(prefix=prefix, policy=item.pool.policy)] = frozenset(active)
    return Served(forwards, rings, routes, obstacle)


def _ports(service: Service, mode: Mode) -> Iterator[Port]:
    return (port for port in service.ports if not requests.port_error(port, mode))


def _waits_for_status(service: Service, address: str, mode: Mode) -> str:
    """In a DSR mode nodes take packets for the VIP only once the status says ipMode VIP; before, they would loop."""
    if mode is Mode.NAT:
        return ""
    written = next((i.ip_mode for i in service.ingress if i.ip == address), None)
    return "" if written in (None, IpMode.VIP) else f"{address}: ipMode VIP is not written yet"


def _obstacle(item: Held, port: Port, selection: Selection, several: bool) -> Judgement:
    assert selection.reason is not None
    about = [text for text in (f"IPv{item.family}" if several else "", selection.detail) if text]
    if selection.reason is Reason.NO_HEALTHY_BACKENDS:
        about.insert(0, f"port {port.port}/{port.protocol}")
    return Judgement(reason=selection.reason, detail=": ".join(about))


def _overlay(
    judgements: dict[ServiceKey, Judgement],
    snapshot: Snapshot,
    forwards: Mapping[Vip, Forward],
    routes: Mapping[Route, frozenset[Vip]],
) -> None:
    """What this host adds to the judgement on an otherwise satisfied Service."""
    needed = frozenset().union(*routes.values()) if snapshot.unproven else frozenset()
    for vip in sorted(snapshot.unproven):
        if vip in needed and vip in forwards:
            key = forwards[vip].service
            if judgements[key].reason is Reason.SATISFIED:
                detail = f"{vip}: {snapshot.unproven[vip]}"
                judgements[key] = Judgement(reason=Reason.NOT_FORWARDING, detail=detail)
    if snapshot.draining:
        for key, judgement in judgements.items():
            if judgement.reason is Reason.SATISFIED:
                judgements[key] = Judgement(reason=Reason.HOST_DRAINING)
