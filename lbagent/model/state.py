# SPDX-License-Identifier: Apache-2.0
"""Snapshot (all we know), Desired (all that should be), Observed (what the targets hold)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lbagent.model.pool import Assignment, Pool, Reservation
from lbagent.model.reason import Judgement
from lbagent.model.route import PathPolicy, PeerState, Route
from lbagent.model.service import Endpoint, Node, Service, ServiceKey
from lbagent.model.vip import Forward, Mode, Ring, Vip


@dataclass(frozen=True, slots=True, order=True)
class ProbeTarget:
    """What is probed: ``kind`` is ``tcp``, ``local`` (healthCheckNodePort) or ``proxy`` (10256)."""

    address: str
    kind: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """Dampened outcome of a probe. ``weight`` as the node reports it, None when it does not.

    ``closing``: not up, but the node answered, and said that it wants no new connections (HTTP 503).
    ``offered`` False: nobody offers this source there, so it has no opinion: neither up nor down.
    ``flapping``: the outcomes keep changing, and dampening holds the state still.
    """

    up: bool
    since: float
    weight: int | None = None
    detail: str = ""
    closing: bool = False
    offered: bool = True
    flapping: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the planner needs of the configuration.

    ``namespace_quota``: addresses a namespace may hold, ``*`` for every namespace not named.
    ``panic_keep``: when probes say that every backend of a Vip is down, believe the API instead.
    The guard holds back withdrawals above the share, but never the first ``at_least``.
    """

    pools: tuple[Pool, ...] = ()
    load_balancer_class: str = "lbagent.io/lbagent"
    class_less: bool = True
    modes: frozenset[Mode] = frozenset({Mode.NAT})
    cool_down_s: float = 60.0
    settle_s: float = 0.5
    guard_withdraw_share: float = 1.0
    guard_withdraw_at_least: int = 10
    panic_keep: bool = False
    proxy_port: int = 10256
    node_port_probes: int = 2000
    node_drain_s: float = 30.0
    namespace_quota: Mapping[str, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All we know at ``now`` (monotonic seconds); ``wall`` is seconds since the epoch.

    ``listed``: Services, EndpointSlices and Nodes were each listed completely at least once.
    """

    now: float
    wall: float = 0.0
    host: str = ""
    listed: bool = False
    is_leader: bool = False
    draining: bool = False  # this host announces nothing
    stale: bool = False  # the cluster's facts are too old to go on announcing (kubernetes.stale_action)
    softening: PathPolicy | None = None  # this host is about to leave: laid over every route
    settings: Settings = field(default_factory=Settings)
    services: Mapping[ServiceKey, Service] = field(default_factory=dict)
    endpoints: Mapping[ServiceKey, tuple[Endpoint, ...]] = field(default_factory=dict)
    nodes: Mapping[str, Node] = field(default_factory=dict)
    namespace_labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    health: Mapping[ProbeTarget, Pulse] = field(default_factory=dict)
    leaving: Mapping[str, float] = field(default_factory=dict)  # excluded or deleted nodes that drain until then
    unreachable: frozenset[str] = frozenset()  # node addresses without a resolved next hop here
    unproven: Mapping[Vip, str] = field(default_factory=dict)  # what the last proof found wrong
    pending: Mapping[ServiceKey, Assignment] = field(default_factory=dict)  # status writes under way: taken, not held
    reservations: Mapping[str, Reservation] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """All that should be, and one Judgement per Service.

    ``assignments`` and ``releases`` are empty unless the Snapshot's host is the leader.
    ``routes`` maps a Route to the Vips that must be proven before it is announced.
    ``unwritten``: those of the assignments that a status does not say yet; ``unreported``: Services
    whose Judgement the cluster does not show yet.
    """

    assignments: Mapping[ServiceKey, Assignment] = field(default_factory=dict)
    releases: Mapping[ServiceKey, tuple[str, ...]] = field(default_factory=dict)
    forwards: Mapping[Vip, Forward] = field(default_factory=dict)
    rings: Mapping[str, Ring] = field(default_factory=dict)
    routes: Mapping[Route, frozenset[Vip]] = field(default_factory=dict)
    judgements: Mapping[ServiceKey, Judgement] = field(default_factory=dict)
    unwritten: frozenset[ServiceKey] = frozenset()
    unreported: frozenset[ServiceKey] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the targets really hold, read back.

    ``proven``: Vips whose synthetic packet reached an active backend through the attached program.
    ``routes``: what the speaker has been told to announce. ``attracting``: address -> the time
    (clock of Snapshot.now) until which packets may still arrive for it after its withdrawal;
    ``math.inf`` while a peer may still hold the route.
    ``rings``: fingerprints the kernel holds.
    """

    forwards: Mapping[Vip, Forward] = field(default_factory=dict)
    rings: frozenset[str] = frozenset()
    proven: frozenset[Vip] = frozenset()
    routes: frozenset[Route] = frozenset()
    attracting: Mapping[str, float] = field(default_factory=dict)
    peers: Mapping[str, PeerState] = field(default_factory=dict)
