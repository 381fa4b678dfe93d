# SPDX-License-Identifier: Apache-2.0
"""The plan of one Service as sentences, from its class to its routes; what stands in the way is marked.

Nothing is decided here. The sentences say what ``desire`` and ``steps`` decided, in their order.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lbagent.model.reason import Reason
from lbagent.model.service import Service, ServiceKey, TrafficPolicy
from lbagent.model.state import Desired, Observed, ProbeTarget, Snapshot
from lbagent.model.vip import BackendState, Vip
from lbagent.plan.desire import Memory
from lbagent.plan.eligible import Selection, is_excluded, node_address, usable
from lbagent.plan.facts import Facts, mode_of
from lbagent.plan.health import disagreement
from lbagent.plan.request import port_error

SHOWN = 8
"""Names in a list before it says how many more there are."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """``about`` is class, request, address, mode, port, endpoints, nodes, backends, kernel or route."""

    about: str
    text: str
    is_obstacle: bool = False

    def __str__(self) -> str:
        return f"{'!' if self.is_obstacle else ' '} {self.about:<9}  {self.text}"


def explain(
    key: ServiceKey, snapshot: Snapshot, desired: Desired, observed: Observed, *, memory: Memory
) -> tuple[Sentence, ...]:
    """Why the Service is where it is. ``memory`` is the one that ``desired`` was made with."""
    facts = memory.facts(key)
    if facts is None:
        return (Sentence("class", f"Service {key} is not known", is_obstacle=True),)
    service = facts.service
    if facts.foreign:
        return (Sentence("class", f"{facts.foreign.sentence}: {_class(service)}", is_obstacle=True),)
    return (
        Sentence("class", _class(service)),
        *_request(facts),
        *_addresses(facts, snapshot, desired),
        *_mode(facts, snapshot),
        *_endpoints(service, snapshot),
        *_nodes(facts, snapshot),
        *_backends(facts, snapshot, memory.selections(key)),
        *_kernel(key, snapshot, desired, observed),
        *_routes(service, snapshot, desired, observed),
    )


def _class(service: Service) -> str:
    if service.type != "LoadBalancer":
        return f"type {service.type}"
    return f"class {service.load_balancer_class}" if service.load_balancer_class else "no class"


def _request(facts: Facts) -> Iterator[Sentence]:
    wish = facts.wish
    if wish.address_refusal:
        yield Sentence("request", str(wish.address_refusal), is_obstacle=True)
    for family, address in wish.address_by_family:
        yield Sentence("request", f"asks for {address} (IPv{family})")
    if wish.pools:
        yield Sentence("request", f"asks for pool {', '.join(wish.pools)}")
    if wish.sharing_key:
        yield Sentence("request", f"may share with Services of key {wish.sharing_key}")


def _addresses(facts: Facts, snapshot: Snapshot, desired: Desired) -> Iterator[Sentence]:
    key = facts.key
    for item in facts.claim.held:
        yield Sentence("address", f"holds {item.address} of pool {item.pool.name}")
    for address, said in facts.claim.lost:
        yield Sentence("address", f"may not keep {address}: {said}", is_obstacle=True)
    for address in facts.claim.surplus:
        yield Sentence("address", f"gives back {address}, which it has no use for")
    if key in desired.unwritten:
        wanted = ", ".join(desired.assignments[key].addresses)
        yield Sentence("address", f"{wanted} is about to be written into the status", is_obstacle=not facts.claim.held)
    judgement = desired.judgements[key]
    if judgement.reason is Reason.PENDING_ASSIGNMENT and not snapshot.is_leader:
        yield Sentence("address", "this host does not hold the lease, so another one writes the address")
    elif not facts.claim.held and key not in desired.unwritten:
        yield Sentence("address", str(judgement), is_obstacle=True)


def _mode(facts: Facts, snapshot: Snapshot) -> Iterator[Sentence]:
    mode = mode_of(facts.wish, facts.claim.held)
    source = "by annotation" if facts.wish.mode else "by the pool"
    yield Sentence("mode", f"{mode}, {source}", is_obstacle=mode not in snapshot.settings.modes)
    if facts.refusal:
        yield Sentence("mode", str(facts.refusal), is_obstacle=True)
    for port in facts.service.ports:
        error = port_error(port, mode)
        if error:
            yield Sentence("port", f"{port.port}/{port.protocol} is not forwarded: {error}", is_obstacle=True)
    if facts.wish.source_ranges:
        yield Sentence("port", f"only clients of {_some(facts.wish.source_ranges)} are admitted")


def _endpoints(service: Service, snapshot: Snapshot) -> Iterator[Sentence]:
    for family in service.ip_families:
        found = usable(snapshot.endpoints.get(service.key, ()), family=family)
        kind = "terminating but serving" if found.is_fallback else "ready"
        text = f"IPv{family}: {sum(found.ready_by_node.values())} {kind} on {len(found.ready_by_node)} nodes"
        if found.closing:
            text += f"; only terminating ones on {_some(found.closing)}"
        yield Sentence("endpoints", text, is_obstacle=not found.anywhere)


def _nodes(facts: Facts, snapshot: Snapshot) -> Iterator[Sentence]:
    """Nodes that are out, with why; for policy Local only those that hold endpoints."""
    service = facts.service
    is_local = service.external_traffic_policy is TrafficPolicy.LOCAL
    homes = {end.node for end in snapshot.endpoints.get(service.key, ()) if end.node}
    kind = facts.claim.held[0].pool.node_address_type if facts.claim.held else "InternalIP"
    for name in sorted(snapshot.nodes if not is_local else homes):
        node = snapshot.nodes.get(name)
        if node is None:
            yield Sentence("nodes", f"{name} holds endpoints but is not known", is_obstacle=True)
        elif is_excluded(node):
            yield Sentence("nodes", f"{name} is out: {'being deleted' if node.deleting else 'its exclude label'}")
        else:
            for family in service.ip_families:
                if not node_address(node, family=family, address_type=kind):
                    yield Sentence("nodes", f"{name} has no {kind} of IPv{family}")


def _backends(facts: Facts, snapshot: Snapshot, chosen: Mapping[Vip, Selection]) -> Iterator[Sentence]:
    for vip in sorted(chosen):
        selection = chosen[vip]
        counts = {state: sum(b.state is state for b in selection.backends) for state in BackendState}
        text = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"
        if selection.reason:
            text += f"; {selection.reason.value}"
        elif selection.detail:
            text += f"; {selection.detail}"
        yield Sentence("backends", f"{vip}: {text}", is_obstacle=selection.reason is not None)
        for backend in selection.backends:
            finding = selection.finding_by_address[backend.address]
            if backend.state is not BackendState.ACTIVE:
                said = f"{backend.node} ({backend.address}) is {backend.state}: {finding.why}, says {finding.source}"
                yield Sentence("backends", f"{vip}: {said}")
    yield from _disagreements(facts.service, snapshot)


def _disagreements(service: Service, snapshot: Snapshot) -> Iterator[Sentence]:
    """Where a node counts other endpoints than the EndpointSlices."""
    if service.external_traffic_policy is not TrafficPolicy.LOCAL or not service.health_check_node_port:
        return
    for family in service.ip_families:
        counts = usable(snapshot.endpoints.get(service.key, ()), family=family).ready_by_node
        for name in sorted(counts.keys() & snapshot.nodes.keys()):
            address = node_address(snapshot.nodes[name], family=family, address_type="InternalIP")
            pulse = snapshot.health.get(ProbeTarget(address, "local", service.health_check_node_port))
            said = disagreement(counts[name], pulse)
            if said:
                yield Sentence("backends", f"{name}: {said}")


def _kernel(key: ServiceKey, snapshot: Snapshot, desired: Desired, observed: Observed) -> Iterator[Sentence]:
    for vip in sorted(vip for vip, forward in desired.forwards.items() if forward.service == key):
        if vip in snapshot.unproven:
            yield Sentence("kernel", f"{vip} does not work here: {snapshot.unproven[vip]}", is_obstacle=True)
        elif observed.forwards.get(vip) != desired.forwards[vip]:
            yield Sentence("kernel", f"{vip} is not programmed as it should be yet", is_obstacle=True)
        elif vip in observed.proven:
            yield Sentence("kernel", f"{vip} is programmed, and a test packet reached a backend")
        else:
            yield Sentence("kernel", f"{vip} is programmed, but no test packet has been tried")


def _routes(service: Service, snapshot: Snapshot, desired: Desired, observed: Observed) -> Iterator[Sentence]:
    wanted = {route.address: route for route in desired.routes}
    announced = {route.address: route for route in observed.routes}
    for address in service.status_addresses:
        route = wanted.get(address)
        if route is None:
            why = "this host is being drained" if snapshot.draining else "nothing behind it takes new connections"
            yield Sentence("route", f"{address} is not to be announced: {why}", is_obstacle=True)
        elif announced.get(address) == route:
            yield Sentence("route", f"{route.prefix} is announced with policy {route.policy.name}")
        else:
            missing = _some(str(vip) for vip in desired.routes[route] if vip not in observed.proven)
            wait = f"waits for {missing}" if missing else "is about to be announced"
            yield Sentence("route", f"{route.prefix} {wait}", is_obstacle=True)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {more} more" if more > 0 else "")
