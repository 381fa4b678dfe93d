# SPDX-License-Identifier: Apache-2.0
"""Events: what `kubectl describe service` shows of a Judgement.

The words are those that people grep for already: MetalLB's for addresses, the service controller's
for the rest. One Event object per Service, host, word and sentence, under a name made from these:
saying the same again raises its count, also after a restart, and also while a Service flaps.
"""

import hashlib
from dataclasses import dataclass, replace

from lbagent.errors import KubeRejected
from lbagent.kube.client import MERGE_PATCH, Client, Json, rfc3339
from lbagent.kube.watch import Clocks
from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import Service

HUSH_S = 30.0
"""The same Event is sent at most this often; what happens in between is only counted."""
KEPT_S = 3600.0
"""How long we remember what was said. The API server forgets Events after an hour, too."""

NORMAL, WARNING = "Normal", "Warning"

ALLOCATED = (NORMAL, "IPAllocated")
RELEASED = (NORMAL, "DeletedLoadBalancer")
_ALLOCATION_FAILED = (WARNING, "AllocationFailed")
_SYNC_FAILED = (WARNING, "SyncLoadBalancerFailed")
_UNAVAILABLE = (WARNING, "UnAvailableLoadBalancer")

_WORD_BY_REASON: dict[Reason, tuple[str, str] | None] = {
    Reason.SATISFIED: (NORMAL, "EnsuredLoadBalancer"),
    Reason.DELETING: (NORMAL, "DeletingLoadBalancer"),
    Reason.NOT_LOAD_BALANCER: None,  # nobody asked us
    Reason.NOT_OURS: None,
    Reason.NOT_LISTED: None,  # passes by itself
    Reason.PENDING_ASSIGNMENT: None,
    Reason.BAD_SOURCE_RANGES: _SYNC_FAILED,
    Reason.NO_SUPPORTED_PORT: _SYNC_FAILED,
    Reason.NO_NODE_PORT: _SYNC_FAILED,
    Reason.MODE_UNAVAILABLE: _SYNC_FAILED,
    Reason.NOT_FORWARDING: _SYNC_FAILED,
    Reason.NO_ENDPOINTS: _UNAVAILABLE,
    Reason.NO_NODES: _UNAVAILABLE,
    Reason.NO_HEALTHY_BACKENDS: _UNAVAILABLE,
}

OF_THIS_HOST = frozenset({Reason.MODE_UNAVAILABLE, Reason.NO_HEALTHY_BACKENDS, Reason.NOT_FORWARDING})
"""Every host speaks for itself about these; about all others only the lease holder speaks."""


def word(reason: Reason) -> tuple[str, str] | None:
    """Type and reason of the Event, None when it is not worth one. What is not listed is about addresses."""
    return _WORD_BY_REASON.get(reason, _ALLOCATION_FAILED)


def sentence(judgement: Judgement) -> str:
    """The message of an Event or a condition."""
    text = judgement.reason.sentence
    if judgement.detail:
        text += f": {judgement.detail}"
    return f"{text}; {judgement.reason.hint}" if judgement.reason.hint else text


@dataclass(frozen=True, slots=True)
class _Told:
    """``count`` so far, of which the API server knows since ``sent_at`` (monotonic)."""

    count: int
    sent_at: float


class Teller:
    """Sends Events in the name of ``host``. Raises KubeError."""

    def __init__(self, client: Client, *, host: str, clocks: Clocks) -> None:
        self._client = client
        self._host = host
        self._clocks = clocks
        self._told_by_name: dict[str, _Told] = {}

    async def tell(self, service: Service, kind: tuple[str, str], message: str) -> None:
        """Say it, or count it when it was said a moment ago."""
        now = self._clocks.monotonic()
        name = _name(service, self._host, kind, message)
        told = self._told_by_name.get(name)
        if told is not None and now - told.sent_at < HUSH_S:
            self._told_by_name[name] = replace(told, count=told.count + 1)
            return
        count = 1 if told is None else told.count + 1
        folder = f"/api/v1/namespaces/{service.key.namespace}/events"
        if told is None or not await self._repeat(f"{folder}/{name}", count=count):
            count = 1
            try:
                await self._client.send("POST", folder, self._body(service, name, kind, message))
            except KubeRejected as error:
                if error.status != 409:
                    raise
                await self._repeat(f"{folder}/{name}", count=None)  # said in an earlier life of this process
        self._told_by_name[name] = _Told(count, now)
        for old in [n for n, t in self._told_by_name.items() if now - t.sent_at >= KEPT_S]:
            del self._told_by_name[old]

    async def _repeat(self, path: str, *, count: int | None) -> bool:
        """Tell that it was said again; False when the server has forgotten the Event (after --event-ttl)."""
        patch: Json = {"lastTimestamp": rfc3339(self._clocks.wall())}
        if count is not None:
            patch["count"] = count
        try:
            await self._client.send("PATCH", path, patch, content_type=MERGE_PATCH)
        except KubeRejected as error:
            if error.status != 404:
                raise
            return False
        return True

    def _body(self, service: Service, name: str, kind: tuple[str, str], message: str) -> Json:
        now = rfc3339(self._clocks.wall())
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": service.key.namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Service",
                "namespace": service.key.namespace,
                "name": service.key.name,
                "uid": service.uid,
            },
            "type": kind[0],
            "reason": kind[1],
            "message": message[:1024],  # the limit of the API
            "source": {"component": "lbagent", "host": self._host},
            "reportingComponent": "lbagent",
            "reportingInstance": self._host,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }


def _name(service: Service, host: str, kind: tuple[str, str], message: str) -> str:
    digest = hashlib.sha256("\0".join((service.uid, host, *kind, message)).encode()).hexdigest()
    return f"{service.key.name}.{digest[:16]}"
