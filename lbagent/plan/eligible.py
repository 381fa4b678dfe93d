# SPDX-License-Identifier: Apache-2.0
"""Which nodes serve a Service port, with which weight, in which state.

Sources: cloud-provider's service controller (exclude label, deletion, autoscaler taint), KEP-1669
(terminating endpoints), KEP-3458 (NotReady alone removes nobody). What probes say is weighed
against what the API says in ``plan.health``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lbagent.model.reason import Reason
from lbagent.model.service import Endpoint, Node, Protocol, Service, TrafficPolicy
from lbagent.model.state import ProbeTarget, Pulse
from lbagent.model.vip import Backend, BackendState
from lbagent.plan.health import Sign, Slices, fuse, sign, worst
from lbagent.plan.ring import fingerprint

EXCLUDE_LABEL = "node.kubernetes.io/exclude-from-external-load-balancers"
DRAIN_TAINT = "ToBeDeletedByClusterAutoscaler"
SELECTIONS_KEPT = 20_000
PROBE, NO_PROBE = "lbagent.io/probe", "none"
_FALSE_WORDS = frozenset({"0", "f", "F", "false", "FALSE", "False"})  # Go's strconv.ParseBool


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An eligible node at the address it is reached at. ``leaving`` says why it drains, '' when it does not."""

    address: str
    node: str
    has_hop: bool = True
    leaving: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Why a backend is in its state: what decided, and in words."""

    source: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The backends of one Vip. ``reason`` None: at least one is active."""

    backends: tuple[Backend, ...] = ()
    fingerprint: str = ""
    reason: Reason | None = None
    detail: str = ""
    finding_by_address: Mapping[str, Finding] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Readings:
    """What one kind of probe says on one port: addresses by sign; silence is not noted."""

    down: frozenset[str] = frozenset()
    closing: frozenset[str] = frozenset()
    up: frozenset[str] = frozenset()

    def sign(self, address: str) -> Sign:
        """What it says of one node."""
        if address in self.down:
            return Sign.DOWN
        if address in self.closing:
            return Sign.CLOSING
        return Sign.UP if address in self.up else Sign.SILENT


NO_READINGS = Readings()

Probes = tuple[Readings, ...]
"""Our own probe of the node port, then kube-proxy's answers."""


def is_excluded(node: Node) -> bool:
    """Is the node out? A label value that parses as false keeps it (the service controller's rule).

    MetalLB excludes on the label's mere presence.
    """
    if node.deleting:
        return True
    value = node.labels.get(EXCLUDE_LABEL)
    return value is not None and value not in _FALSE_WORDS


def node_address(node: Node, *, family: int, address_type: str) -> str:
    """The first address of that type and family, '' when it has none (kube-proxy's primary address)."""
    for address in node.addresses:
        if address.type == address_type and (":" in address.address) == (family == 6):
            return address.address
    return ""


def candidates(
    nodes: Mapping[str, Node],
    unreachable: frozenset[str],
    leaving: frozenset[str] = frozenset(),
    *,
    family: int,
    address_type: str,
) -> tuple[Candidate, ...]:
    """Eligible nodes sorted by address. Of nodes that claim one address the first by name counts.

    ``leaving``: nodes that were eligible a moment ago; they drain before they are gone.
    """
    found: dict[str, Candidate] = {}
    for name in sorted(nodes):
        node = nodes[name]
        if is_excluded(node) and name not in leaving:
            continue
        address = node_address(node, family=family, address_type=address_type)
        if not address or address in found:
            continue
        found[address] = Candidate(
            address=address, node=name, has_hop=address not in unreachable, leaving=_why_leaving(node)
        )
    return tuple(found[address] for address in sorted(found))


def _why_leaving(node: Node) -> str:
    if node.deleting:
        return "the node is being deleted"
    if is_excluded(node):
        return f"label {EXCLUDE_LABEL}"
    return f"taint {DRAIN_TAINT}" if DRAIN_TAINT in node.taints else ""


def readings_by_probe(health: Mapping[ProbeTarget, Pulse]) -> dict[tuple[str, int], Readings]:
    """Probe results by (kind, port), so that a Service looks at its own ports only."""
    sets: dict[tuple[str, int], dict[Sign, set[str]]] = {}
    for target, pulse in health.items():
        said = sign(pulse)
        if said is not Sign.SILENT:
            sets.setdefault((target.kind, target.port), {}).setdefault(said, set()).add(target.address)
    return {
        probe: Readings(*(frozenset(found.get(said, ())) for said in (Sign.DOWN, Sign.CLOSING, Sign.UP)))
        for probe, found in sets.items()
    }


def weight(ready: int) -> int:
    """Weight of a node with so many ready endpoints: the number itself up to 15, then rounded.

    Four significant bits (16, 18, 20 ... 30, 32, 36 ...): at most 1/17 away from the truth. A plan
    has no memory, so it cannot wait before it follows a count; but it can refuse to follow small
    changes of large counts. A rollout that moves a node of 40 pods by one pod at a time then
    rebuilds a ring every fourth pod at most. Exact below 16, where one pod is a share worth following.
    """
    step = 1 << max(0, ready.bit_length() - 4)
    return (ready + step // 2) // step * step


@dataclass(frozen=True, slots=True)
class Usable:
    """Endpoints of one family as the policy sees them.

    ``ready_by_node`` counts what takes new connections; ``closing`` are nodes that have only
    endpoints which still serve while they terminate. Endpoints without a node count for ``anywhere``.
    ``is_fallback``: nothing is ready, so those that terminate take new connections.
    """

    anywhere: bool
    ready_by_node: Mapping[str, int]
    closing: frozenset[str] = frozenset()
    is_fallback: bool = False


def usable(endpoints: Iterable[Endpoint], *, family: int) -> Usable:
    """KEP-1669: ready endpoints; only where there is none, those that serve while terminating.

    For Local that fallback is taken for the Service as a whole: a node with nothing but terminating
    endpoints drains as long as another node has ready ones; when no node has, such nodes serve on,
    because kube-proxy still forwards there and refusing would help nobody.
    An address that stands in several slices counts once, in its best condition.
    """
    best: dict[str, tuple[int, str]] = {}
    top = 0
    for endpoint in endpoints:
        if endpoint.family != family:
            continue
        rank = 2 if endpoint.ready else 1 if endpoint.serving and endpoint.terminating else 0
        if not rank:
            continue
        top = max(top, rank)
        if endpoint.address not in best or (rank, endpoint.node) > best[endpoint.address]:
            best[endpoint.address] = (rank, endpoint.node)
    count_by_node: dict[str, int] = {}
    for rank, node in best.values():
        if rank == top and node:
            count_by_node[node] = count_by_node.get(node, 0) + 1
    closing = frozenset(node for rank, node in best.values() if rank < top and node and node not in count_by_node)
    return Usable(bool(best), count_by_node, closing, is_fallback=top == 1)


@dataclass(frozen=True, slots=True)
class Eligibility:
    """What the choice rests on besides probes (these are compared), and the answers given so far."""

    nodes: Mapping[str, Node]
    unreachable: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()
    panic_keep: bool = False
    candidates_by_kind: dict[tuple[int, str], tuple[Candidate, ...]] = field(default_factory=dict, compare=False)
    selections: dict[tuple[object, ...], Selection] = field(default_factory=dict, compare=False)

    def candidates(self, *, family: int, address_type: str) -> tuple[Candidate, ...]:
        """Eligible nodes of a family."""
        key = (family, address_type)
        if key not in self.candidates_by_kind:
            self.candidates_by_kind[key] = candidates(
                self.nodes, self.unreachable, self.leaving, family=family, address_type=address_type
            )
        return self.candidates_by_kind[key]


class Choice:
    """Chooses backends. Thousands of Services ask the same question, so they get the very same Selection."""

    def __init__(
        self, eligibility: Eligibility, health: Mapping[ProbeTarget, Pulse], *, proxy_port: int = 10256
    ) -> None:
        self.eligibility = eligibility
        self._proxy_port = proxy_port
        self.readings = readings_by_probe(health)

    def probes(self, service: Service, *, protocol: Protocol, node_port: int) -> Probes:
        """What bears on one port of a Service; empty when nothing is probed."""
        if not self.readings or service.annotations.get(PROBE) == NO_PROBE:
            return ()
        found = [
            self.readings.get(("tcp", node_port), NO_READINGS) if protocol is Protocol.TCP else NO_READINGS,
            self.readings.get(("proxy", self._proxy_port), NO_READINGS),
        ]
        if service.external_traffic_policy is TrafficPolicy.LOCAL and service.health_check_node_port:
            found.append(self.readings.get(("local", service.health_check_node_port), NO_READINGS))
        return tuple(found)

    def select(
        self,
        service: Service,
        usable_endpoints: Usable,
        *,
        family: int,
        address_type: str,
        protocol: Protocol,
        node_port: int,
    ) -> Selection:
        """The backends of one Vip of ``service``."""
        probes = self.probes(service, protocol=protocol, node_port=node_port)
        shares: tuple[tuple[str, int], ...] | None = None
        closing: frozenset[str] = frozenset()
        if service.external_traffic_policy is TrafficPolicy.LOCAL:
            shares = tuple(sorted(usable_endpoints.ready_by_node.items()))
            closing = usable_endpoints.closing
            if usable_endpoints.is_fallback:
                probes = probes[:2]  # healthCheckNodePort counts ready endpoints only: its 503 says nothing new
        key = (family, address_type, usable_endpoints.anywhere, shares, closing, probes)
        selections = self.eligibility.selections
        if key not in selections:
            if len(selections) >= SELECTIONS_KEPT:
                selections.clear()
            eligible = self.eligibility.candidates(family=family, address_type=address_type)
            if not usable_endpoints.anywhere:
                selections[key] = Selection(reason=Reason.NO_ENDPOINTS)
            elif shares is None:
                everybody = [Chosen(candidate, 1, Slices.READY) for candidate in eligible]
                selections[key] = judge(everybody, probes, panic_keep=self.eligibility.panic_keep)
            else:
                local = choose_local(eligible, dict(shares), closing)
                selections[key] = judge(local, probes, panic_keep=self.eligibility.panic_keep)
        return selections[key]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A candidate that the policy admits, with its weight and what the EndpointSlices say of it."""

    candidate: Candidate
    weight: int
    slices: Slices


def choose_local(
    eligible: Iterable[Candidate], ready_by_node: Mapping[str, int], closing: frozenset[str]
) -> list[Chosen]:
    """Policy Local: nodes with ready endpoints by their number; those with closing ones only drain."""
    chosen = []
    for candidate in eligible:
        if candidate.node in ready_by_node:
            chosen.append(Chosen(candidate, weight(ready_by_node[candidate.node]), Slices.READY))
        elif candidate.node in closing:
            chosen.append(Chosen(candidate, 1, Slices.CLOSING))
    return chosen


def judge(chosen: list[Chosen], probes: Probes, *, panic_keep: bool) -> Selection:
    """The state of every chosen node, and whether anybody is left for new connections.

    Panic: when probes leave nobody active whom the API would have active, the API may be believed
    instead, for a probe that is wrong is likelier than a whole cluster that is.
    """
    if not chosen:
        return Selection(reason=Reason.NO_NODES)
    detail = ""
    judged = [_judge_one(c, probes) for c in chosen]
    if panic_keep and probes and not _any_active(judged):
        believed = [_judge_one(c, ()) for c in chosen]
        if _any_active(believed):
            judged, detail = believed, "probes leave no backend; the API is believed instead (panic)"
    backends = tuple(
        Backend(address=c.candidate.address, node=c.candidate.node, weight=c.weight, state=state)
        for c, (state, _) in zip(chosen, judged, strict=True)
    )
    reason = None if _any_active(judged) else Reason.NO_HEALTHY_BACKENDS
    return Selection(
        backends=backends,
        fingerprint=fingerprint(backends),
        reason=reason,
        detail="; ".join(sorted({finding.why for _, finding in judged})) if reason else detail,
        finding_by_address={c.candidate.address: finding for c, (_, finding) in zip(chosen, judged, strict=True)},
    )


def _judge_one(chosen: Chosen, probes: Probes) -> tuple[BackendState, Finding]:
    candidate = chosen.candidate
    own, *proxy = (readings.sign(candidate.address) for readings in probes or (NO_READINGS,))
    rule = fuse(hop=candidate.has_hop, slices=chosen.slices, node_port=own, kube_proxy=worst(proxy))
    if rule.state is BackendState.ACTIVE and candidate.leaving:
        return BackendState.DRAINING, Finding(source="node", why=candidate.leaving)
    return rule.state, Finding(source=rule.source, why=rule.why)


def _any_active(judged: Iterable[tuple[BackendState, Finding]]) -> bool:
    return any(state is BackendState.ACTIVE for state, _ in judged)
