# SPDX-License-Identifier: Apache-2.0
"""``lbagent plan``: what would happen to a cluster, from plain Kubernetes YAML, without touching anything.

The cluster is planned as the lease holder would, then once more as it will look when the statuses
are written, until nothing is left to write: that last plan is what is printed.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import yaml

from lbagent.agent import state
from lbagent.bgp import command
from lbagent.cli import document, table
from lbagent.config import DEFAULT_PATH, Bgp, Config, load
from lbagent.errors import ConfigError, LbagentError
from lbagent.kube import parse, publish
from lbagent.model.pool import Assignment, Reservation
from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import Ingress, Service, ServiceKey
from lbagent.model.state import Desired, ProbeTarget, Pulse, Snapshot
from lbagent.model.vip import Vip
from lbagent.plan import request
from lbagent.plan.desire import Memory, desire
from lbagent.plan.eligible import Selection
from lbagent.plan.facts import mode_of

NOW = 1_000.0
"""A plan without a clock: everything happens at one moment."""

PASSES = 5
SUFFIXES = (".yaml", ".yml", ".json")


class Unusable(LbagentError):
    """Input that cannot be planned with."""


# --- reading ----------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def documents(path: Path) -> Iterator[object]:
    """All documents of a file, of a folder's files in order, or of stdin (``-``). Raises Unusable."""
    if path.is_dir():
        for inner in sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
            yield from documents(inner)
        return
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise Unusable(f"{path}: cannot be read: {error}") from error
    try:
        if text.lstrip().startswith("{"):
            yield json.loads(text)
        else:
            yield from yaml.load_all(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise Unusable(
            f"{path}: neither YAML nor JSON: {error}", hint="give what kubectl get -o yaml prints"
        ) from error


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster to plan for, and what of it could not be read."""

    snapshot: Snapshot
    problems: Mapping[str, str]


def read(paths: Iterable[Path], settings: Config, *, host: str) -> Cluster:
    """Objects from files; a snapshot of ``lbctl snapshot`` is a cluster by itself. Raises Unusable."""
    found = [doc for path in paths for doc in documents(path)]
    for doc in found:
        if isinstance(doc, dict) and doc.get("format") == state.FORMAT:
            stored = state.parse(json.dumps(doc))
            return Cluster(replace(stored, settings=settings.settings(), listed=True, is_leader=True), {})
    objects = parse.objects(found)
    snapshot = Snapshot(
        now=NOW,
        wall=NOW,
        host=host,
        listed=True,
        is_leader=True,
        settings=settings.settings(),
        services=objects.services,
        endpoints=objects.endpoints,
        nodes=objects.nodes,
        namespace_labels=objects.namespace_labels,
    )
    return Cluster(snapshot, objects.problems)


def read_health(path: Path, snapshot: Snapshot) -> Snapshot:
    """Probe results laid over the cluster. Raises Unusable.

    ``{unreachable: [ADDRESS...], probes: [{address, kind: tcp|local|proxy, port, up, closing?}...]}``
    """
    try:
        (doc,) = documents(path)
        assert isinstance(doc, dict)
        probes = {
            ProbeTarget(str(p["address"]), str(p["kind"]), int(p.get("port", snapshot.settings.proxy_port))): Pulse(
                up=bool(p["up"]), closing=bool(p.get("closing", False)), since=NOW
            )
            for p in doc.get("probes", ())
        }
        unreachable = frozenset(str(address) for address in doc.get("unreachable", ()))
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
        hint = "{unreachable: [ADDRESS], probes: [{address: A, kind: tcp, port: 30080, up: false}]}"
        raise Unusable(f"{path}: not a health file: {error!r}", hint=hint) from error
    return replace(snapshot, health=probes, unreachable=unreachable)


def read_previous(path: Path, snapshot: Snapshot) -> Snapshot:
    """Statuses as an earlier plan would have written them, for Services whose status is empty. Raises Unusable."""
    try:
        (doc,) = documents(path)
        before = {s["service"]: [a["address"] for a in s["addresses"]] for s in doc["services"]}  # type: ignore[index]
    except (KeyError, TypeError, ValueError) as error:
        raise Unusable(f"{path}: not a plan: {error!r}", hint="give what lbagent plan -o json printed") from error
    services = {
        key: replace(service, ingress=tuple(Ingress(ip=address) for address in before[str(key)]))
        if not service.ingress and before.get(str(key))
        else service
        for key, service in snapshot.services.items()
    }
    return replace(snapshot, services=services)


# --- planning ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """The plan at first, and when all statuses are written."""

    before: Snapshot
    first: Desired
    after: Snapshot
    last: Desired


def outcome(snapshot: Snapshot) -> Outcome:
    """Plan and write until nothing is left to write."""
    first = last = desire(snapshot)
    after = snapshot
    for _ in range(PASSES):
        written = _written(after, last)
        if written.services == after.services:
            break
        after, last = written, desire(written)
    return Outcome(snapshot, first, after, last)


def _written(snapshot: Snapshot, desired: Desired) -> Snapshot:
    """The cluster once the lease holder has written; what is given back cools down."""
    services = dict(snapshot.services)
    for key, assignment in desired.assignments.items():
        services[key] = replace(services[key], ingress=_ingress(assignment))
    for key in desired.releases:
        services[key] = replace(services[key], ingress=())
    held = {address for service in services.values() for address in service.status_addresses}
    reservations = dict(snapshot.reservations)
    for key, service in snapshot.services.items():
        for address in service.status_addresses:
            if address not in held:
                reservations[address] = Reservation(address=address, service=key, released=snapshot.wall)
    return replace(snapshot, services=services, reservations=reservations)


def _ingress(assignment: Assignment) -> tuple[Ingress, ...]:
    return tuple(
        Ingress(ip=address, ip_mode=assignment.ip_mode, port_errors=assignment.port_errors)  # type: ignore[arg-type]
        for address in assignment.addresses
    )


# --- the document -----------------------------------------------------------------------------


def describe(found: Outcome, *, bgp: Bgp, host: str, problems: Mapping[str, str]) -> document.PlanDocument:
    """The plan in words and numbers."""
    ours = [
        key
        for key, j in sorted(found.last.judgements.items())
        if j.reason not in (Reason.NOT_LOAD_BALANCER, Reason.NOT_OURS)
    ]
    memory = Memory()
    memory.learn(found.after)
    return document.PlanDocument(
        host=host,
        services=tuple(_service(found, key, memory) for key in ours),
        rings=tuple(_rings(found.last)),
        routes=tuple(_routes(found.last, bgp)),
        renumbered=tuple(_renumbered(found)),
        problems=tuple(document.Problem(object=name, problem=text) for name, text in sorted(problems.items())),
    )


def _said(judgement: Judgement) -> dict[str, str]:
    reason = judgement.reason
    return {"reason": reason.value, "sentence": reason.sentence, "detail": judgement.detail, "hint": reason.hint}


def _service(found: Outcome, key: ServiceKey, memory: Memory) -> document.ServicePlan:
    before, after = found.before.services[key], found.after.services[key]
    judgement, told = found.last.judgements[key], found.first.judgements[key]
    is_news = told.reason not in (judgement.reason, Reason.PENDING_ASSIGNMENT, Reason.SATISFIED)
    assignment = found.last.assignments.get(key)
    facts = memory.facts(key)
    return document.ServicePlan(
        service=str(key),
        served=judgement.reason is Reason.SATISFIED,
        **_said(judgement),
        notice=document.Said(**_said(told)) if is_news else None,
        addresses=tuple(
            document.Address(
                address=address, family=6 if ":" in address else 4, pool=pool, held=address in before.status_addresses
            )
            for address, pool in zip(assignment.addresses, assignment.pools, strict=True)
        )
        if assignment
        else (),
        mode=mode_of(facts.wish, facts.claim.held).value if facts and assignment else "",
        ip_mode=assignment.ip_mode.value if assignment else "",
        ports=tuple(_ports(found.last, after, memory.selections(key))) if assignment else (),
        status_patch=_patch(before, found),
    )


def _ports(desired: Desired, service: Service, chosen: Mapping[Vip, Selection]) -> Iterator[document.PortPlan]:
    errors = {(port, str(protocol)): error for i in service.ingress[:1] for port, protocol, error in i.port_errors}
    for address in service.status_addresses:
        for port in service.ports:
            vip = Vip(address=address, protocol=port.protocol, port=port.port)
            forward, selection = desired.forwards.get(vip), chosen.get(vip, Selection())
            yield document.PortPlan(
                vip=str(vip),
                address=address,
                protocol=port.protocol.value,
                port=port.port,
                node_port=port.node_port,
                error=errors.get((port.port, port.protocol.value), ""),
                ring=forward.ring if forward else "",
                backends=tuple(
                    document.Target(
                        node=b.node,
                        address=b.address,
                        port=(forward.node_port if forward else 0) or port.port,
                        weight=b.weight,
                        state=b.state.value,
                        source=selection.finding_by_address[b.address].source,
                        why=selection.finding_by_address[b.address].why,
                    )
                    for b in selection.backends
                ),
                source_ranges=forward.source_ranges if forward else (),
                affinity_timeout_s=forward.affinity_timeout_s if forward else 0,
            )


def _patch(before: Service, found: Outcome) -> dict[str, Any] | None:
    """The write that leads to the last plan; objects from a file have no resourceVersion to insist on."""
    key = before.key
    patch = None
    if key in found.last.assignments:
        patch = publish.assigned(before, found.last.assignments[key], finalizer=True, wall=found.before.wall)
    elif key in found.first.releases:
        patch = publish.released(before, found.first.releases[key])
    if patch and not before.resource_version:
        del patch["metadata"]["resourceVersion"]
    return patch


def _rings(desired: Desired) -> Iterator[document.RingPlan]:
    users = Counter(forward.ring for forward in desired.forwards.values())
    for name in sorted(desired.rings):
        ring = desired.rings[name]
        slots = Counter(ring.slots)
        yield document.RingPlan(
            fingerprint=name,
            vips=users[name],
            backends=tuple(
                document.RingBackend(
                    node=b.node,
                    address=b.address,
                    weight=b.weight,
                    state=b.state.value,
                    share=round(slots[number] / len(ring.slots), 6),
                )
                for number, b in enumerate(ring.backends, start=1)
            ),
        )


def _routes(desired: Desired, bgp: Bgp) -> Iterator[document.RoutePlan]:
    paths_by_peer = {}
    for peer in bgp.peers:
        neighbor = command.Neighbor.of(bgp, peer)
        paths_by_peer[peer.name] = command.paths(desired.routes, neighbor)
    for route in sorted(desired.routes, key=lambda route: route.prefix):
        yield document.RoutePlan(
            prefix=route.prefix,
            policy=route.policy.name,
            needs=tuple(sorted(map(str, desired.routes[route]))),
            paths=tuple(
                document.Path(
                    peer=name,
                    next_hop=paths[route.prefix].next_hop,
                    as_path=paths[route.prefix].as_path,
                    communities=paths[route.prefix].communities,
                    local_preference=paths[route.prefix].local_preference,
                    med=paths[route.prefix].med,
                )
                for name, paths in paths_by_peer.items()
                if route.prefix in paths
            ),
        )


def _renumbered(found: Outcome) -> Iterator[document.Renumbered]:
    for key, service in sorted(found.before.services.items()):
        if request.foreign(service, found.before.settings) or service.deleting:
            continue
        after = found.after.services[key].status_addresses
        lost = [address for address in service.status_addresses if address not in after]
        if lost:
            judgement = found.first.judgements[key]
            yield document.Renumbered(
                service=str(key), before=service.status_addresses, after=after, why=str(judgement)
            )


# --- the screen -------------------------------------------------------------------------------


def screen(plan: document.PlanDocument) -> str:
    """Tables for people."""
    parts = [
        table.rows(
            [
                {
                    "service": s.service,
                    "addresses": [a.address if a.held else f"{a.address} (new)" for a in s.addresses],
                    "pool": sorted({a.pool for a in s.addresses}),
                    "mode": s.mode,
                    "ip_mode": s.ip_mode,
                    "reason": s.reason,
                    "detail": s.detail,
                }
                for s in plan.services
            ]
        ),
        table.rows(
            [
                {
                    "vip": p.vip,
                    "service": s.service,
                    "node_port": p.node_port,
                    "ring": p.ring,
                    "backends": [f"{b.node}={b.address}:{b.port}*{b.weight}/{b.state}" for b in p.backends],
                    "error": p.error,
                }
                for s in plan.services
                for p in s.ports
            ]
        ),
        table.rows(
            [
                {
                    "route": r.prefix,
                    "policy": r.policy,
                    "peer": p.peer,
                    "next_hop": p.next_hop,
                    "as_path": list(p.as_path),
                    "communities": list(p.communities),
                    "local_preference": p.local_preference,
                    "med": p.med,
                }
                for r in plan.routes
                for p in r.paths
            ]
        ),
    ]
    if plan.renumbered:
        parts.append(table.rows([r.model_dump(mode="json") for r in plan.renumbered]))
    parts += [f"{p.object}: {p.problem}" for p in plan.problems]
    hints = sorted({f"{s.reason}: {s.hint}" for s in plan.services if s.hint})
    return "\n\n".join(parts + (["\n".join(hints)] if hints else []))


@click.command("plan")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=DEFAULT_PATH,
    show_default=True,
    help="Configuration file.",
)
@click.option(
    "--objects",
    "object_paths",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="Kubernetes YAML or JSON: a file, a folder, - for stdin, or the output of lbctl snapshot. May be repeated.",
)
@click.argument("more", type=click.Path(path_type=Path), nargs=-1)
@click.option("--node-name", default="", help="The LB host to plan for; default: host.name of the configuration.")
@click.option("--health", "health_path", type=click.Path(path_type=Path), help="Probe results to assume.")
@click.option("--previous", "previous_path", type=click.Path(path_type=Path), help="An earlier plan, as JSON.")
@click.option("-o", "--output", "form", type=click.Choice(table.FORMATS), default="table", show_default=True)
def plan(
    config_path: Path,
    object_paths: tuple[Path, ...],
    more: tuple[Path, ...],
    node_name: str,
    health_path: Path | None,
    previous_path: Path | None,
    form: str,
) -> None:
    """What would happen to a cluster, from its objects in files; nothing is touched.

    Exit code 0: every Service of ours is served; 3: some is not; 1: the input cannot be used.
    """
    try:
        settings = load(config_path)
        host = node_name or settings.host.name
        cluster = read((*object_paths, *more), settings, host=host)
        snapshot = cluster.snapshot
        if health_path:
            snapshot = read_health(health_path, snapshot)
        if previous_path:
            snapshot = read_previous(previous_path, snapshot)
        found = describe(outcome(snapshot), bgp=settings.bgp, host=host, problems=cluster.problems)
    except ConfigError as error:
        for line in error.problems:
            click.echo(line, err=True)
        sys.exit(1)
    except LbagentError as error:
        click.echo(f"lbagent: {error}", err=True)
        sys.exit(1)
    click.echo(screen(found) if form == "table" else table.machine(found.model_dump(mode="json"), form))
    is_served = all(service.served or service.reason == Reason.DELETING for service in found.services)
    sys.exit(0 if is_served and not found.problems else 3)
