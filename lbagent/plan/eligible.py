# SPDX-License-Identifier: Apache-2.0
"""Which nodes serve a Service port, with which weight, in which state.

Sources: cloud-provider's service controller (exclude label, deletion, autoscaler taint), KEP-1669
(terminating endpoints), KEP-3458 (NotReady alone removes nobody), KEP-3836 (kube-proxy health).

Health is the fusion of what the API says, what kube-proxy on the node says, what our own probe of
the node port says, and whether this host has a next hop at all; the worst one decides.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lbagent.model.reason import Reason
from lbagent.model.service import Endpoint, Node, Protocol, Service, TrafficPolicy
from lbagent.model.state import ProbeTarget, Pulse
from lbagent.model.vip import Backend, BackendState
from lbagent.plan.ring import fingerprint

EXCLUDE_LABEL = "node.kubernetes.io/exclude-from-external-load-balancers"
DRAIN_TAINT = "ToBeDeletedByClusterAutoscaler"
PROXY_PORT = 10256
SELECTIONS_KEPT = 20_000
_FALSE_WORDS = frozenset({"0", "f", "F", "false", "FALSE", "False"})  # Go's strconv.ParseBool


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An eligible node at the address it is reached at. ``why`` says what made it less than active."""

    address: str
    node: str
    state: BackendState = BackendState.ACTIVE
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The backends of one Vip. ``reason`` None: at least one is active."""

    backends: tuple[Backend, ...] = ()
    fingerprint: str = ""
    reason: Reason | None = None
    detail: str = ""
    why_by_address: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Readings:
    """What one kind of probe says on one port: addresses found down, and those that are closing."""

    down: frozenset[str] = frozenset()
    closing: frozenset[str] = frozenset()
    up: frozenset[str] = frozenset()


NO_READINGS = Readings()


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
    nodes: Mapping[str, Node], unreachable: frozenset[str], *, family: int, address_type: str
) -> tuple[Candidate, ...]:
    """Eligible nodes sorted by address. Of nodes that claim one address the first by name counts."""
    found: dict[str, Candidate] = {}
    for name in sorted(nodes):
        node = nodes[name]
        if is_excluded(node):
            continue
        address = node_address(node, family=family, address_type=address_type)
        if not address or address in found:
            continue
        if address in unreachable:
            state, why = BackendState.DOWN, "no next hop from this host"
        elif DRAIN_TAINT in node.taints:
            state, why = BackendState.DRAINING, f"taint {DRAIN_TAINT}"
        else:
            state, why = BackendState.ACTIVE, ""
        found[address] = Candidate(address=address, node=name, state=state, why=why)
    return tuple(found[address] for address in sorted(found))


def readings_by_probe(health: Mapping[ProbeTarget, Pulse]) -> dict[tuple[str, int], Readings]:
    """Probe results by (kind, port), so that a Service looks at its own ports only."""
    sets: dict[tuple[str, int], tuple[set[str], set[str], set[str]]] = {}
    for target, pulse in health.items():
        down, closing, up = sets.setdefault((target.kind, target.port), (set(), set(), set()))
        (up if pulse.up else closing if pulse.closing else down).add(target.address)
    return {probe: Readings(*map(frozenset, found)) for probe, found in sets.items()}


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
    """

    anywhere: bool
    ready_by_node: Mapping[str, int]
    closing: frozenset[str]


def usable(endpoints: Iterable[Endpoint], *, family: int) -> Usable:
    """KEP-1669: ready endpoints; only where there is none, those that serve while terminating.

    For Local that fallback is taken for the Service as a whole: a node with nothing but terminating
    endpoints drains as long as another node has ready ones; when no node has, such nodes serve on,
    because kube-proxy still forwards there and refusing would help nobody.
    An address that stands in several slices counts once, in its best condition.
    """
    best: dict[str, tuple[int, str]] = {}
    for endpoint in endpoints:
        if endpoint.family != family:
            continue
        rank = 2 if endpoint.ready else 1 if endpoint.serving and endpoint.terminating else 0
        if rank and (rank, endpoint.node) > best.get(endpoint.address, (0, "")):
            best[endpoint.address] = (rank, endpoint.node)
    top = max((rank for rank, _ in best.values()), default=0)
    count_by_node: dict[str, int] = {}
    for rank, node in best.values():
        if rank == top and node:
            count_by_node[node] = count_by_node.get(node, 0) + 1
    closing = frozenset(node for _, node in best.values() if node and node not in count_by_node)
    return Usable(bool(best), count_by_node, closing)


@dataclass(frozen=True, slots=True)
class Eligibility:
    """What the choice rests on besides probes (these are compared), and the answers given so far."""

    nodes: Mapping[str, Node]
    unreachable: frozenset[str] = frozenset()
    panic_keep: bool = False
    candidates_by_kind: dict[tuple[int, str], tuple[Candidate, ...]] = field(default_factory=dict, compare=False)
    selections: dict[tuple[object, ...], Selection] = field(default_factory=dict, compare=False)

    def candidates(self, *, family: int, address_type: str) -> tuple[Candidate, ...]:
        """Eligible nodes of a family."""
        key = (family, address_type)
        if key not in self.candidates_by_kind:
            self.candidates_by_kind[key] = candidates(
                self.nodes, self.unreachable, family=family, address_type=address_type
            )
        return self.candidates_by_kind[key]


class Choice:
    """Chooses backends. Thousands of Services ask the same question, so they get the very same Selection."""

    def __init__(self, eligibility: Eligibility, health: Mapping[ProbeTarget, Pulse]) -> None:
        self.eligibility = eligibility
        self.readings = readings_by_probe(health)

    def probes(self, service: Service, *, protocol: Protocol, node_port: int) -> tuple[Readings, Readings]:
        """(our own probe of the node port, kube-proxy's opinion) on one port of a Service."""
        if not self.readings:
            return NO_READINGS, NO_READINGS
        own = self.readings.get(("tcp", node_port), NO_READINGS) if protocol is Protocol.TCP else NO_READINGS
        proxy = self.readings.get(("proxy", PROXY_PORT), NO_READINGS)
        if service.external_traffic_policy is TrafficPolicy.LOCAL and service.health_check_node_port:
            local = self.readings.get(("local", service.health_check_node_port), NO_READINGS)
            down = proxy.down | local.down
            closing = (proxy.closing | local.closing) - down
            proxy = Readings(down, closing, (proxy.up | local.up) - down - closing)
        return own, proxy

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
        own, proxy = self.probes(service, protocol=protocol, node_port=node_port)
        shares: tuple[tuple[str, int], ...] | None = None
        closing: frozenset[str] = frozenset()
        if service.external_traffic_policy is TrafficPolicy.LOCAL:
            shares = tuple(sorted(usable_endpoints.ready_by_node.items()))
            closing = usable_endpoints.closing
        key = (family, address_type, usable_endpoints.anywhere, shares, closing, own, proxy)
        selections = self.eligibility.selections
        if key not in selections:
            if len(selections) >= SELECTIONS_KEPT:
                selections.clear()
            selections[key] = self._select(
                self.eligibility.candidates(family=family, address_type=address_type),
                usable_endpoints.anywhere,
                shares=None if shares is None else dict(shares),
                closing=closing,
                own=own,
                proxy=proxy,
            )
        return selections[key]

    def _select(
        self,
        eligible: tuple[Candidate, ...],
        anywhere: bool,
        *,
        shares: Mapping[str, int] | None,
        closing: frozenset[str],
        own: Readings,
        proxy: Readings,
    ) -> Selection:
        if not anywhere:
            return Selection(reason=Reason.NO_ENDPOINTS, why_by_address={})
        chosen: list[tuple[Candidate, int]] = []
        for candidate in eligible:
            if shares is None:
                chosen.append((candidate, 1))
            elif candidate.node in shares:
                chosen.append((candidate, weight(shares[candidate.node])))
            elif candidate.node in closing:
                chosen.append((_worse(candidate, BackendState.DRAINING, "only terminating endpoints"), 1))
        if not chosen:
            detail = "" if shares is None else f"no eligible node among those with endpoints: {_some(shares)}"
            return Selection(reason=Reason.NO_NODES, detail=detail, why_by_address={})
        judged = [(_fuse(candidate, own, proxy), share) for candidate, share in chosen]
        detail = ""
        if self.eligibility.panic_keep and not _any_active(judged) and _any_active(chosen):
            judged, detail = chosen, "every probe says down; the API is believed instead (panic)"
        backends = tuple(Backend(address=c.address, node=c.node, weight=w, state=c.state) for c, w in judged)
        reason = None if _any_active(judged) else Reason.NO_HEALTHY_BACKENDS
        if reason:
            detail = "; ".join(sorted({c.why for c, _ in judged if c.why}))
        return Selection(
            backends=backends,
            fingerprint=fingerprint(backends),
            reason=reason,
            detail=detail,
            why_by_address={c.address: c.why for c, _ in judged if c.why},
        )


def _fuse(candidate: Candidate, own: Readings, proxy: Readings) -> Candidate:
    """Our own probe moves flows at once; kube-proxy alone only stops new ones while the port answers."""
    address = candidate.address
    if address in own.down:
        return _worse(candidate, BackendState.DOWN, "node port does not answer")
    if address in proxy.closing:
        return _worse(candidate, BackendState.DRAINING, "kube-proxy wants no new connections")
    if address in proxy.down:
        if address in own.up:
            return _worse(candidate, BackendState.DRAINING, "kube-proxy does not answer")
        return _worse(candidate, BackendState.DOWN, "kube-proxy does not answer")
    return candidate


_RANK = {BackendState.ACTIVE: 0, BackendState.DRAINING: 1, BackendState.DOWN: 2}


def _worse(candidate: Candidate, state: BackendState, why: str) -> Candidate:
    if _RANK[state] <= _RANK[candidate.state]:
        return candidate
    return Candidate(address=candidate.address, node=candidate.node, state=state, why=why)


def _any_active(chosen: list[tuple[Candidate, int]]) -> bool:
    return any(candidate.state is BackendState.ACTIVE for candidate, _ in chosen)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
