# SPDX-License-Identifier: Apache-2.0
"""May a node get new connections for a Service, keep those it has, or lose them? One table decides.

Four signs are fused: has this host a next hop to the node; what do the EndpointSlices say; does the
node port answer our own probe; does kube-proxy vouch for the node (``healthCheckNodePort`` for
policy Local, ``:10256/healthz`` for both). The first rule that matches decides, and is shown.

Sources: KEP-1669 (terminating endpoints), KEP-3836 (kube-proxy's health), and measurements: where
kube-proxy has died its health ports refuse while its rules go on forwarding; where only terminating
endpoints are left, healthCheckNodePort says 503 while connections are still served.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from lbagent.model.state import Pulse
from lbagent.model.vip import BackendState


class Sign(StrEnum):
    """What a probe says. ``silent``: not asked, not answered for yet, or not offered there."""

    UP = "up"
    CLOSING = "closing"
    DOWN = "down"
    SILENT = "silent"


class Slices(StrEnum):
    """What the EndpointSlices say: on the node for policy Local, anywhere for policy Cluster.

    ``closing``: nothing is ready, but something serves while it terminates.
    """

    READY = "ready"
    CLOSING = "closing"
    NONE = "none"


class Source(StrEnum):
    """Who decided."""

    NEXT_HOP = "next hop"
    SLICES = "EndpointSlices"
    NODE_PORT = "node port"
    KUBE_PROXY = "kube-proxy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Matches when every sign that it names agrees; None agrees with all. ``why`` is for operators."""

    state: BackendState
    source: Source
    why: str
    hop: bool | None = None
    slices: Slices | None = None
    node_port: Sign | None = None
    kube_proxy: Sign | None = None

    def matches(self, *, hop: bool, slices: Slices, node_port: Sign, kube_proxy: Sign) -> bool:
        """Does the rule speak about this case?"""
        return (
            self.hop in (None, hop)
            and self.slices in (None, slices)
            and self.node_port in (None, node_port)
            and self.kube_proxy in (None, kube_proxy)
        )


RULES: tuple[Rule, ...] = (
    # What is down loses its connections: the signs that nothing gets through.
    Rule(
        hop=False,
        state=BackendState.DOWN,
        source=Source.NEXT_HOP,
        why="this host has no next hop to the node",
    ),
    Rule(
        slices=Slices.NONE,
        state=BackendState.DOWN,
        source=Source.SLICES,
        why="no usable endpoint",
    ),
    Rule(
        node_port=Sign.DOWN,
        state=BackendState.DOWN,
        source=Source.NODE_PORT,
        why="the node port does not answer",
    ),
    Rule(
        node_port=Sign.SILENT,
        kube_proxy=Sign.DOWN,
        state=BackendState.DOWN,
        source=Source.KUBE_PROXY,
        why="kube-proxy does not answer, and the node port is not probed",
    ),
    # What drains keeps its connections and gets no new ones.
    Rule(
        slices=Slices.CLOSING,
        state=BackendState.DRAINING,
        source=Source.SLICES,
        why="only endpoints that terminate",
    ),
    Rule(
        kube_proxy=Sign.CLOSING,
        state=BackendState.DRAINING,
        source=Source.KUBE_PROXY,
        why="kube-proxy does not vouch for the node",
    ),
    Rule(
        kube_proxy=Sign.DOWN,
        state=BackendState.DRAINING,
        source=Source.KUBE_PROXY,
        why="kube-proxy does not answer, but the node port does",
    ),
    # Nothing speaks against it.
    Rule(
        node_port=Sign.UP,
        state=BackendState.ACTIVE,
        source=Source.NODE_PORT,
        why="the node port answers",
    ),
    Rule(
        kube_proxy=Sign.UP,
        state=BackendState.ACTIVE,
        source=Source.KUBE_PROXY,
        why="kube-proxy vouches for the node",
    ),
    Rule(
        state=BackendState.ACTIVE,
        source=Source.SLICES,
        why="usable endpoints, and no probe has an opinion",
    ),
)


@cache
def fuse(*, hop: bool, slices: Slices, node_port: Sign = Sign.SILENT, kube_proxy: Sign = Sign.SILENT) -> Rule:
    """The first rule that matches; the last one always does. ``node_port`` is never ``closing``."""
    return next(
        rule for rule in RULES if rule.matches(hop=hop, slices=slices, node_port=node_port, kube_proxy=kube_proxy)
    )


def sign(pulse: Pulse | None) -> Sign:
    """A Pulse as a sign. Without one, and where nobody offers the source, there is no opinion."""
    if pulse is None or not pulse.offered:
        return Sign.SILENT
    if pulse.up:
        return Sign.UP
    return Sign.CLOSING if pulse.closing else Sign.DOWN


_WORST_FIRST = (Sign.DOWN, Sign.CLOSING, Sign.UP)


def worst(signs: Iterable[Sign]) -> Sign:
    """Several signs of one source as one: healthCheckNodePort does not know the autoscaler's taint, 10256 does."""
    said = frozenset(signs)
    return next((sign for sign in _WORST_FIRST if sign in said), Sign.SILENT)


def disagreement(ready: int, pulse: Pulse | None) -> str:
    """In words, when the node counts other ready endpoints than the EndpointSlices; '' when all is well.

    Only a cross-check: weights come from the EndpointSlices, so that every LB host takes the same ones.
    """
    if pulse is None or not pulse.up or pulse.weight is None or pulse.weight == ready:
        return ""
    return f"the node reports {pulse.weight} ready endpoints, the EndpointSlices {ready}"


def reference() -> str:
    """docs/reference/health.md, made from the rules."""
    lines = [
        "# Health of a backend",
        "",
        "A node is a backend of a Service in one of three states: `active` gets new connections, `draining` keeps",
        "those it has, `down` loses them. Each node is looked at from the top; the first rule that matches decides,",
        "and `lbctl explain` shows its last two columns. `-` matches everything.",
        "",
        "- **next hop**: has this LB host a resolved next hop to the node?",
        "- **EndpointSlices**: on the node for `externalTrafficPolicy: Local`, anywhere for `Cluster`. `closing`:",
        "  nothing is ready, but something still serves while it terminates. For `Local` nodes count as `closing`",
        "  only while another node has ready endpoints; when none has, they serve on.",
        "- **node port**: our own TCP connect to it. UDP ports are not probed: `silent`.",
        "- **kube-proxy**: the worst of `:10256/healthz` and, for `Local`, `healthCheckNodePort`. `up` is HTTP 200;",
        "  `closing` any other answer, and a refused `healthCheckNodePort`; `down` is no answer in time; `silent`",
        "  is a refused 10256, or HTTP 404 there: nobody offers it. A kube-proxy that has died is therefore `silent`",
        "  for `Cluster` and `closing` for `Local`: its rules go on forwarding.",
        "",
        "Probes are dampened: `probe.fall` bad outcomes in a row take a sign down, `probe.rise` good ones bring it",
        "back, and the first one counts at once. A sign whose outcomes keep changing is shown as `flapping`. What this",
        "host could not try (no free port or descriptor, a firewall of its own, too busy to listen) counts for nothing",
        "and is logged.",
        "",
        "| next hop | EndpointSlices | node port | kube-proxy | state | decided by | why |",
        "|---|---|---|---|---|---|---|",
    ]
    for rule in RULES:
        hop = {None: "-", True: "yes", False: "no"}[rule.hop]
        signs = (rule.slices or "-", rule.node_port or "-", rule.kube_proxy or "-")
        lines.append(f"| {hop} | {' | '.join(signs)} | **{rule.state}** | {rule.source} | {rule.why} |")
    return "\n".join(lines) + "\n"
