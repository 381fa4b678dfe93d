# SPDX-License-Identifier: Apache-2.0
"""The one mutable object: what the eyes have reported, and ``snapshot()`` of it.

Everything a decision rests on is gathered here and frozen once per pass. While the API has not
yet been listed, the stored Snapshot of an earlier life stands in for it (fail static).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lbagent.agent.news import News
from lbagent.agent.targets import Cluster, Kernel
from lbagent.model.pool import Assignment, Reservation
from lbagent.model.route import PathPolicy
from lbagent.model.service import Node, Service, ServiceKey
from lbagent.model.state import ProbeTarget, Pulse, Settings, Snapshot
from lbagent.model.vip import Vip
from lbagent.plan.eligible import is_excluded


@dataclass(slots=True, kw_only=True)
class Clocks:
    """Where time comes from; tests bring their own. ``monotonic`` and ``wall`` in seconds."""

    monotonic: Callable[[], float]
    wall: Callable[[], float]


class World:
    """Mutable state: settings, drain, proofs, writes under way, reservations, health."""

    def __init__(
        self,
        *,
        host: str,
        settings: Settings,
        cluster: Cluster,
        kernel: Kernel,
        clocks: Clocks,
        stored: Snapshot | None,
    ) -> None:
        self.host = host
        self.settings = settings
        self.clocks = clocks
        self.draining = False
        self.softening: PathPolicy | None = None
        self.health: Mapping[ProbeTarget, Pulse] = {}
        self.withdraw_after_s = math.inf
        self.confirmed = False  # the next pass may do what the guard would hold back
        self.unproven: Mapping[Vip, str] = {}
        self.pending: dict[ServiceKey, Assignment] = {}
        self._cluster = cluster
        self._kernel = kernel
        self._stored = stored
        self._reservations: dict[str, Reservation] = dict(stored.reservations) if stored else {}
        self._holder_by_address: dict[str, ServiceKey] = {}
        self._eligible: dict[str, Node] = {}
        self._news = News()
        self._leaving: dict[str, tuple[float, Node]] = {}

    @property
    def knows_cluster(self) -> bool:
        """Is there anything to decide on: a complete list, or the memory of one?"""
        return self._cluster.listed or self._stored is not None

    @property
    def from_memory(self) -> bool:
        """Do decisions rest on the stored Snapshot?"""
        return not self._cluster.listed and self._stored is not None

    @property
    def turns(self) -> float:
        """When the next Service may be forwarded in its DSR mode; 0 when none waits for that."""
        return self._news.turns

    def snapshot(self) -> Snapshot:
        """All we know now, frozen. Also tells the kernel which node addresses matter."""
        now, wall = self.clocks.monotonic(), self.clocks.wall()
        if self.from_memory and self._stored is not None:
            source = self._stored
            known = replace(source, now=now, wall=wall, is_leader=False, listed=True, settings=self.settings)
        else:
            self._stored = None
            known = Snapshot(
                now=now,
                wall=wall,
                listed=self._cluster.listed,
                is_leader=self._cluster.listed and self._cluster.holds_lease(now),
                settings=self.settings,
                services=self._news.services(self._cluster.services, now),
                endpoints=dict(self._cluster.endpoints),
                nodes=self._nodes(now),
                namespace_labels=dict(self._cluster.namespace_labels),
            )
            self._remember(known.services, wall)
        tracked = frozenset(
            address.address
            for node in known.nodes.values()
            for address in node.addresses
            if address.type.endswith("IP")  # not Hostname, not InternalDNS
        )
        self._kernel.track(tracked)
        return replace(
            known,
            host=self.host,
            draining=self.draining,
            stale=self._cluster.age_s > self.withdraw_after_s,
            softening=self.softening,
            health=dict(self.health),
            leaving={name: until for name, (until, _) in self._leaving.items()},
            unreachable=tracked - self._kernel.reachable,
            unproven=dict(self.unproven),
            pending=dict(self.pending),
            reservations=dict(self._reservations),
        )

    def _nodes(self, now: float) -> dict[str, Node]:
        """The cluster's nodes, and those that were eligible a moment ago: they drain before they are gone."""
        nodes = dict(self._cluster.nodes)
        eligible = {name: node for name, node in nodes.items() if not is_excluded(node)}
        for name, node in self._eligible.items():
            if name not in eligible and name not in self._leaving:
                self._leaving[name] = (now + self.settings.node_drain_s, replace(node, deleting=True))
        self._leaving = {
            name: (until, node) for name, (until, node) in self._leaving.items() if name not in eligible and now < until
        }
        self._eligible = eligible
        return {name: node for name, (_, node) in self._leaving.items()} | nodes

    def _remember(self, services: Mapping[ServiceKey, Service], wall: float) -> None:
        """Keep an address back for a while after its Service let go of it."""
        holder_by_address = {a: key for key, service in services.items() for a in service.status_addresses}
        for address, key in self._holder_by_address.items():
            if address not in holder_by_address:
                self._reservations[address] = Reservation(address=address, service=key, released=wall)
        self._holder_by_address = holder_by_address
        kept = self.settings.cool_down_s
        for address, reservation in list(self._reservations.items()):
            # A clock that was set back must not keep an address for ever.
            if address in holder_by_address or not 0 <= wall - reservation.released < kept:
                del self._reservations[address]
