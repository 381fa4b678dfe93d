# SPDX-License-Identifier: Apache-2.0
"""What we write about a Service: addresses and finalizer, condition, Events.

The patches are pure functions of the Service as read and of what it should say; None means that it
says so already. Publisher sends them. Addresses go out with the resourceVersion they were decided
on, and only while the lease is ours. After a conflict the Service is read again, from the watch,
and the patch is made anew, unless what was asked of us has changed: then the planner must decide.

A strategic patch is used because it merges conditions by type: nobody else's are touched.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace

from lbagent import log
from lbagent.errors import KubeError, KubeRejected, KubeUnavailable
from lbagent.kube import event
from lbagent.kube.client import STRATEGIC_PATCH, Client, Json, rfc3339
from lbagent.kube.parse import resource_version_of
from lbagent.kube.watch import Clocks, Watch
from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import Condition, Ingress, IpMode, Protocol, Service, ServiceKey

_log = log.get("kube")

CLEANUP_FINALIZER = "service.kubernetes.io/load-balancer-cleanup"
"""The service controller's own word: whoever serves type LoadBalancer keeps the Service until all is gone."""

SATISFIED = "lbagent.io/Satisfied"
PORTS_ERROR = "LoadBalancerPortsError"
PORTS_ERROR_REASON = "LoadBalancerMixedProtocolNotSupported"  # the API's constant for it

TRIES = 3
NEWER_S = 2.0
"""How long a conflict waits for the watch to tell what changed."""


# --- patches ----------------------------------------------------------------------------------


def assigned(service: Service, assignment: Assignment, *, finalizer: bool, wall: float) -> Json | None:
    """The patch that gives the Service its addresses; the finalizer comes with the first one."""
    wished = tuple(
        Ingress(ip=ip, ip_mode=assignment.ip_mode, port_errors=_ordered(assignment.port_errors))
        for ip in assignment.addresses
    )
    metadata: Json = {}
    if finalizer and CLEANUP_FINALIZER not in service.finalizers:
        metadata["finalizers"] = [CLEANUP_FINALIZER]
    status: Json = {}
    if wished != tuple(_as_shown(entry) for entry in service.ingress):
        status["loadBalancer"] = {"ingress": [_entry(entry, service) for entry in wished]}
    conditions = _ports_condition(service, assignment, wall=wall)
    if conditions:
        status["conditions"] = conditions
    return _patch(service, metadata, status)


def released(service: Service, addresses: Iterable[str]) -> Json | None:
    """The patch that takes these addresses away, and with the last one our finalizer and port errors."""
    gone = frozenset(addresses)
    kept = [entry for entry in service.ingress if entry.ip not in gone]
    metadata: Json = {}
    status: Json = {}
    if len(kept) != len(service.ingress):
        status["loadBalancer"] = {"ingress": [_entry(entry, service) for entry in kept] or None}
    if not kept:
        if CLEANUP_FINALIZER in service.finalizers:
            metadata["$deleteFromPrimitiveList/finalizers"] = [CLEANUP_FINALIZER]
        if _ours(service):
            status["conditions"] = [_without(PORTS_ERROR)]
    return _patch(service, metadata, status)


def judged(service: Service, judgement: Judgement, *, wall: float) -> Json | None:
    """The patch that shows the Reason as a condition, or takes it off a Service that asks no more."""
    old = next((c for c in service.conditions if c.type == SATISFIED), None)
    if judgement.reason is Reason.NOT_LOAD_BALANCER:
        return {"status": {"conditions": [_without(SATISFIED)]}} if old else None
    if event.word(judgement.reason) is None:
        return None
    new = Condition(
        type=SATISFIED,
        status=str(judgement.reason is Reason.SATISFIED),
        reason=judgement.reason.value,
        message=event.sentence(judgement),
    )
    return None if new == old else {"status": {"conditions": [_condition(new, old, wall=wall)]}}


def _patch(service: Service, metadata: Json, status: Json) -> Json | None:
    if not metadata and not status:
        return None
    patch: Json = {"metadata": {"resourceVersion": service.resource_version} | metadata}
    return patch | {"status": status} if status else patch


def _as_shown(entry: Ingress) -> Ingress:
    """As we would have written it: an unset ipMode means VIP."""
    return Ingress(ip=entry.ip, ip_mode=entry.ip_mode or IpMode.VIP, port_errors=_ordered(entry.port_errors))


def _ordered(errors: Iterable[tuple[int, str, str]]) -> tuple[tuple[int, Protocol, str], ...]:
    return tuple(sorted((port, Protocol(protocol), error) for port, protocol, error in errors))


def _entry(entry: Ingress, service: Service) -> Json:
    """JSON of one ingress. Once one port has an error, all ports are listed (API reference)."""
    value: Json = {"ip": entry.ip} | ({"ipMode": str(entry.ip_mode)} if entry.ip_mode else {})
    if entry.port_errors:
        error_by_port = {(port, protocol): error for port, protocol, error in entry.port_errors}
        value["ports"] = [
            {"port": port.port, "protocol": str(port.protocol)}
            | ({"error": error_by_port[key]} if (key := (port.port, port.protocol)) in error_by_port else {})
            for port in service.ports
        ]
    return value


def _ours(service: Service) -> Condition | None:
    """The ports condition, when it is of our making."""
    found = (c for c in service.conditions if c.type == PORTS_ERROR and c.reason == PORTS_ERROR_REASON)
    return next(found, None)


def _ports_condition(service: Service, assignment: Assignment, *, wall: float) -> list[Json]:
    old = _ours(service)
    if not assignment.port_errors:
        return [_without(PORTS_ERROR)] if old else []
    ports = ", ".join(f"{port}/{protocol}" for port, protocol, _ in sorted(assignment.port_errors))
    new = Condition(
        type=PORTS_ERROR, status="True", reason=PORTS_ERROR_REASON, message=f"lbagent forwards TCP and UDP, not {ports}"
    )
    return [] if new == old else [_condition(new, old, wall=wall)]


def _condition(new: Condition, old: Condition | None, *, wall: float) -> Json:
    value: Json = {"type": new.type, "status": new.status, "reason": new.reason, "message": new.message[:32768]}
    if old is None or old.status != new.status:
        value["lastTransitionTime"] = rfc3339(wall)
    return value


def _without(type_: str) -> Json:
    return {"type": type_, "$patch": "delete"}


# --- sending ----------------------------------------------------------------------------------


class Publisher:
    """Sends what the patches say. ``allowance_s(now)``: for how long a write sent now may take, 0 = not ours.

    ``uncertain_at``: monotonic time of the last write whose fate is unknown (-inf: none). Raises KubeError.
    """

    def __init__(
        self,
        client: Client,
        *,
        services: Watch[Service],
        host: str,
        finalizer: bool,
        clocks: Clocks,
        allowance_s: Callable[[float], float],
    ) -> None:
        self.uncertain_at = float("-inf")
        self._client = client
        self._services = services
        self._finalizer = finalizer
        self._clocks = clocks
        self._allowance_s = allowance_s
        self._teller = event.Teller(client, host=host, clocks=clocks)

    async def assign(self, assignment: Assignment) -> None:
        """Write the addresses into the status; nothing is sent when they stand there already.

        Returns when the watch has told of them: who plans next must not give them to somebody else.
        """

        def patch(service: Service) -> Json | None:
            return assigned(service, assignment, finalizer=self._finalizer, wall=self._clocks.wall())

        if written := await self._write(assignment.service, patch):
            await self._mention(written, event.ALLOCATED, f"Assigned IP {', '.join(assignment.addresses)}")

    async def release(self, key: ServiceKey, addresses: tuple[str, ...]) -> None:
        """Take the addresses, and with the last one the finalizer, off the Service. It may be gone already."""
        if key not in self._services.objects:
            return
        if written := await self._write(key, lambda service: released(service, addresses)):
            await self._mention(written, event.RELEASED, f"Released IP {', '.join(addresses) or '(none)'}")

    async def report(self, key: ServiceKey, judgement: Judgement) -> None:
        """Condition (by the lease holder) and Event (by the holder, or about this very host)."""
        service = self._services.objects.get(key)
        if service is None:
            return
        now = self._clocks.monotonic()
        leads = self._allowance_s(now) > 0
        patch = judged(service, judgement, wall=self._clocks.wall())
        if leads and patch is not None:
            try:
                await self._client.send("PATCH", _path(key), patch, content_type=STRATEGIC_PATCH)
            except KubeRejected as error:
                if error.status == 404:  # gone meanwhile
                    return
                raise
        word = event.word(judgement.reason)
        if word is not None and (leads or judgement.reason in event.OF_THIS_HOST):
            await self._teller.tell(service, word, event.sentence(judgement))

    async def _mention(self, service: Service, kind: tuple[str, str], message: str) -> None:
        """An Event about what is done; that it cannot be told must not undo it."""
        try:
            await self._teller.tell(service, kind, message)
        except KubeError as error:
            _log.warning("event not sent", service=str(service.key), word=kind[1], error=str(error))

    async def _write(self, key: ServiceKey, patch: Callable[[Service], Json | None]) -> Service | None:
        """Send the patch of the Service as known; the Service when something was sent."""
        service = self._services.objects.get(key)
        for _ in range(TRIES):
            if service is None:
                raise KubeRejected(f"Service {key} is gone", status=404)
            body = patch(service)
            if body is None:
                return None
            allowed_s = self._allowance_s(self._clocks.monotonic())
            if allowed_s <= 0:
                raise KubeUnavailable(f"Service {key} not written: this host does not hold the lease")
            try:
                answer = await self._client.send(
                    "PATCH", _path(key), body, content_type=STRATEGIC_PATCH, timeout_s=allowed_s
                )
            except KubeUnavailable:
                self.uncertain_at = self._clocks.monotonic()
                raise
            except KubeRejected as error:
                if error.status != 409:
                    raise
                service = await self._read_again(key, service)
            else:
                await self._until_told(key, resource_version_of(answer))
                return service
        raise KubeRejected(f"Service {key} changes faster than it can be written", status=409)

    async def _until_told(self, key: ServiceKey, version: str) -> None:
        """Wait for the watch to reach what was written; for nothing once the lease is not ours any more."""
        while self._allowance_s(self._clocks.monotonic()) > 0:
            service = self._services.objects.get(key)
            if service is None or _reached(service.resource_version, version):
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NEWER_S):
                    await self._services.newer(key, service)

    async def _read_again(self, key: ServiceKey, old: Service) -> Service | None:
        """The Service as it is now; refuses when what was asked of us has changed."""
        try:
            async with asyncio.timeout(NEWER_S):
                new = await self._services.newer(key, old)
        except TimeoutError as error:
            raise KubeUnavailable(f"Service {key} changed, and the watch has not told how yet") from error
        if new is not None and _wish(new) != _wish(old):
            raise KubeRejected(f"Service {key} changed meanwhile", hint="the next pass decides again", status=409)
        return new


def _reached(version: str, wanted: str) -> bool:
    """ResourceVersions are numbers that grow (KEP-5504, stable in 1.35; true before); if not, equality must do."""
    return int(version) >= int(wanted) if version.isdigit() and wanted.isdigit() else version == wanted


def _wish(service: Service) -> Service:
    """The Service without what no decision about its addresses rests on."""
    return replace(service, resource_version="", conditions=(), labels={})


def _path(key: ServiceKey) -> str:
    return f"/api/v1/namespaces/{key.namespace}/services/{key.name}/status"
