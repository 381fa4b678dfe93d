# SPDX-License-Identifier: Apache-2.0
"""The agent's door to Kubernetes: what the cluster holds, and what we may write into it.

Four watches (Services, EndpointSlices, Nodes, Namespaces), one Lease, one Publisher. Readers get
the live dictionaries; their values are frozen.
"""

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lbagent import log
from lbagent.config import Kubernetes
from lbagent.kube import parse
from lbagent.kube.client import Client
from lbagent.kube.lease import Lease, quiet_s
from lbagent.kube.publish import Publisher
from lbagent.kube.watch import Changed, Clocks, Difference, Kind, Watch, spoken
from lbagent.metrics import Metrics
from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement
from lbagent.model.service import Endpoint, Node, Service, ServiceKey

_log = log.get("kube")

Value = TypeVar("Value")

DEFAULT_KUBECONFIG = Path("/etc/lbagent/kubeconfig")


def _differs(old: Service, new: Service) -> bool:
    return replace(old, resource_version="") != replace(new, resource_version="")


SERVICES = Kind(name="services", path="/api/v1/services", read=parse.service, matters=_differs)
SLICES = Kind(name="endpointslices", path="/apis/discovery.k8s.io/v1/endpointslices", read=parse.endpoint_slice)
NODES = Kind(name="nodes", path="/api/v1/nodes", read=parse.node)
NAMESPACES = Kind(name="namespaces", path="/api/v1/namespaces", read=parse.namespace_labels)


class _ByService:
    """EndpointSlices -> endpoints of each Service, kept current slice by slice."""

    def __init__(self) -> None:
        self.endpoints: dict[ServiceKey, tuple[Endpoint, ...]] = {}
        self._slices: dict[ServiceKey, dict[ServiceKey, parse.Slice]] = {}
        self._owner_by_slice: dict[ServiceKey, ServiceKey] = {}

    def __call__(self, name: ServiceKey, part: parse.Slice | None) -> None:
        """A slice is new, changed or (None) gone. Its label, and so its Service, may have changed."""
        owner = part.service if part else None
        before = self._owner_by_slice.pop(name, None)
        if before is not None and before != owner:
            del self._slices[before][name]
            self._merge(before)
        if part is not None and owner is not None:
            self._owner_by_slice[name] = owner
            self._slices.setdefault(owner, {})[name] = part
            self._merge(owner)

    def _merge(self, owner: ServiceKey) -> None:
        parts = self._slices[owner]
        if parts:
            self.endpoints[owner] = parse.merge_slices(parts[name] for name in sorted(parts))
        else:
            del self._slices[owner]
            self.endpoints.pop(owner, None)


class Cluster:
    """One cluster, seen by one process on ``host``."""

    def __init__(self, settings: Kubernetes, *, host: str, clocks: Clocks, metrics: Metrics) -> None:
        self._clocks = clocks
        self._metrics = metrics
        self._quiet_s = quiet_s(settings.lease)
        self._client = Client(
            settings.kubeconfig or DEFAULT_KUBECONFIG, timeout_s=settings.request_timeout_s, clock=clocks.monotonic
        )
        self._by_service = _ByService()
        self._watch_timeout_s = settings.watch_timeout_s
        self._services = self._watch(SERVICES)
        self._slices = self._watch(SLICES, difference=self._by_service)
        self._nodes = self._watch(NODES)
        self._namespaces = self._watch(NAMESPACES)
        self._watches: tuple[Watch[Any], ...] = (self._services, self._slices, self._nodes, self._namespaces)
        self._lease = Lease(
            settings.lease, client=self._client, identity=f"{host}_{uuid.uuid4().hex[:8]}", clocks=clocks
        )
        self._publisher = Publisher(
            self._client,
            services=self._services,
            host=host,
            finalizer=settings.finalizer,
            clocks=clocks,
            allowance_s=self._allowance_s,
        )
        self._listing_for = float("-inf")  # the tenure for which Services were listed once more
        self._held = False

    # --- what is known ------------------------------------------------------------------------

    @property
    def services(self) -> Mapping[ServiceKey, Service]:
        """Every Service of the cluster, of whatever type and class."""
        return self._services.objects

    @property
    def endpoints(self) -> Mapping[ServiceKey, tuple[Endpoint, ...]]:
        """Endpoints by Service, over all its slices."""
        return self._by_service.endpoints

    @property
    def nodes(self) -> Mapping[str, Node]:
        """Nodes by name."""
        return {key.name: node for key, node in self._nodes.objects.items()}

    @property
    def namespace_labels(self) -> Mapping[str, Mapping[str, str]]:
        """Labels by Namespace."""
        return {key.name: labels for key, labels in self._namespaces.objects.items()}

    @property
    def listed(self) -> bool:
        """Has everything been listed completely, once?"""
        return all(watch.listed for watch in self._watches)

    @property
    def age_s(self) -> float:
        """Since the API server last spoke on the quietest watch; up to a minute is usual (bookmarks)."""
        return max(0.0, self._clocks.monotonic() - min(watch.heard_at for watch in self._watches))

    @property
    def problems(self) -> Mapping[str, str]:
        """Objects that cannot be read, as ``services default/web``, each with the field that is wrong."""
        return {
            f"{watch.kind.name} {spoken(key)}": why for watch in self._watches for key, why in watch.problems.items()
        }

    @property
    def lease_holder(self) -> str:
        """Identity of the holder as last read: host name and a mark of its process."""
        return self._lease.holder

    def holds_lease(self, now: float) -> bool:
        """May this host write addresses at ``now`` (monotonic)?

        A new holder must first have listed all Services, after its waiting time: what the holder
        before it wrote last is then known.
        """
        return self._lease.holds(now) and self._services.listed_at >= self._lease.settled_at

    # --- what is written ----------------------------------------------------------------------

    async def assign(self, assignment: Assignment) -> None:
        """Write the addresses into the Service's status, with our finalizer. Raises KubeError."""
        await self._publisher.assign(assignment)

    async def release(self, service: ServiceKey, addresses: tuple[str, ...]) -> None:
        """Take them off; with the last one goes our finalizer. Raises KubeError."""
        await self._publisher.release(service, addresses)

    async def report(self, service: ServiceKey, judgement: Judgement) -> None:
        """Condition and Event, deduplicated. Raises KubeError."""
        await self._publisher.report(service, judgement)

    # --- life ---------------------------------------------------------------------------------

    async def run(self, changed: Changed) -> None:
        """Watch and renew the lease until cancelled; then give the lease back."""
        try:
            async with asyncio.TaskGroup() as group:
                for watch in self._watches:
                    group.create_task(watch.run(changed), name=f"watch {watch.kind.name}")
                group.create_task(self._lease.run(lambda: self._after_attempt(changed)), name="lease")
        finally:
            await self._close()

    def _after_attempt(self, changed: Changed) -> None:
        """Begin a tenure with a list; tell when it has begun or ended."""
        now = self._clocks.monotonic()
        begins = self._lease.settled_at
        if begins <= now and self._services.listed_at < begins != self._listing_for:
            self._listing_for = begins
            self._services.list_again()
        held = self.holds_lease(now)
        self._metrics.leader(is_leader=held)
        if held != self._held:
            self._held = held
            changed()

    async def _close(self) -> None:
        # A write that may still arrive late forbids the next holder to start at once.
        if self._clocks.monotonic() - self._publisher.uncertain_at > self._quiet_s:
            await self._lease.release()
        await self._client.close()

    def _allowance_s(self, now: float) -> float:
        return self._lease.remaining_s(now) if self.holds_lease(now) else 0.0

    def _watch(self, kind: Kind[Value], *, difference: Difference[Value] | None = None) -> Watch[Value]:
        return Watch(
            kind,
            client=self._client,
            clocks=self._clocks,
            metrics=self._metrics,
            watch_timeout_s=self._watch_timeout_s,
            difference=difference,
        )
