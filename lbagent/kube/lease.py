# SPDX-License-Identifier: Apache-2.0
"""May this host write addresses? Our Lease, never held by two.

``decide`` is pure; Lease performs what it says. All waiting is on the monotonic clock: the times in
the Lease object are for people. With ``duration_s`` = D, told to the others in the Lease itself:

  the holder     writes until 2/3 D after the moment *before* its last successful renewal was sent
  the others     take over D after they *first saw* the record they see now
  a new holder   waits another 2/3 D before it writes, unless the Lease stood there free

A write that was sent in time may still arrive late: the server may have been frozen, the bytes may
wait in a send queue. Both ends give it up within seconds (client.py); the wait of the new holder
covers that, and Cluster then lists all Services once more before anything is written. A missing
Lease is no sign of peace: somebody may have deleted it under a holder, who knows nothing of it yet
and may write for another 2/3 D. So its creator waits twice as long. Only a Lease without a holder,
as the manifest brings it and as an orderly stop leaves it, is free.
"""

import asyncio
import datetime
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from lbagent import log
from lbagent.config import LeaseConfig
from lbagent.errors import KubeError, KubeRejected
from lbagent.kube.client import Client, Json
from lbagent.kube.field import Field
from lbagent.kube.watch import Clocks

_log = log.get("kube")


def quiet_s(config: LeaseConfig) -> float:
    """2/3 D: how long a holder may write, and how long a new one keeps still."""
    return config.duration_s * 2 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The Lease as last read. ``since``: when this very version was first seen (monotonic)."""

    version: str
    holder: str
    duration_s: float
    transitions: int
    since: float


class Decision(StrEnum):
    """What to do about the Lease as it was last read."""

    CREATE = "create"
    TAKE = "take"
    RENEW = "renew"
    WAIT = "wait"


def decide(record: Record | None, *, me: str, now: float) -> Decision:
    """Ours: renew. Free, or silent for its whole duration: take. There is none: create."""
    if record is None:
        return Decision.CREATE
    if record.holder == me:
        return Decision.RENEW
    if not record.holder or now - record.since >= record.duration_s:
        return Decision.TAKE
    return Decision.WAIT


class Lease:
    """Ours or not. ``identity`` must be unique to this process: a successor on the same host is another.

    ``holds(now)`` is all that matters to others; ``settled_at`` is when the present tenure's
    waiting ends (infinity while there is none).
    """

    def __init__(self, config: LeaseConfig, *, client: Client, identity: str, clocks: Clocks) -> None:
        self.identity = identity
        self.settled_at = float("inf")
        self.holder = ""
        self._config = config
        self._client = client
        self._clocks = clocks
        self._deadline = float("-inf")
        self._record: Record | None = None
        self._is_known = False  # is _record what the server holds, as far as we can know?
        self._owed_s = 2 * quiet_s(config)  # how long somebody else's writes may still arrive
        self._complaint = ""
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{config.namespace}/leases"

    def holds(self, now: float) -> bool:
        """May a write be sent at ``now`` (monotonic)?"""
        return self.settled_at <= now < self._deadline

    def remaining_s(self, now: float) -> float:
        """How long a write sent at ``now`` may take."""
        return max(0.0, self._deadline - now)

    async def run(self, after_each: Callable[[], None]) -> None:
        """Try for ever; ``after_each`` is called after every attempt."""
        while True:
            pause_s = await self.attempt()
            after_each()
            await asyncio.sleep(pause_s)

    async def attempt(self) -> float:
        """Decide on what is known, act, say when to come again (seconds). Never raises KubeError."""
        pause_s = self._config.renew_s
        try:
            decision = decide(self._record, me=self.identity, now=self._clocks.monotonic())
            if not self._is_known or decision is not Decision.RENEW:
                await self._look()
                decision = decide(self._record, me=self.identity, now=self._clocks.monotonic())
            if decision is Decision.WAIT:
                self._lose()
            elif not await self._write(decision):
                pause_s /= 5
            self._complaint = ""
        except KubeError as error:
            self._is_known = False  # the fate of a write may be unknown
            pause_s /= 5
            if error.message != self._complaint:
                self._complaint = error.message
                _log.warning("lease attempt failed", lease=self._config.name, error=str(error))
        if self._clocks.monotonic() >= self._deadline:
            self._lose()
        return pause_s

    async def release(self) -> None:
        """Let the others take it at once. Best effort; only when no write of ours is under way or uncertain."""
        record = self._record
        if record is None or record.holder != self.identity or not self._is_known:
            return
        self._deadline, self.settled_at = float("-inf"), float("inf")
        body = self._body("", transitions=record.transitions, version=record.version)
        try:
            await self._client.send("PUT", f"{self._path}/{self._config.name}", body, timeout_s=2.0)
            _log.info("lease released", lease=self._config.name)
        except KubeError as error:
            _log.warning("lease not released", lease=self._config.name, error=str(error))

    # --- I/O ----------------------------------------------------------------------------------

    async def _look(self) -> None:
        try:
            body = await self._client.get(f"{self._path}/{self._config.name}")
        except KubeRejected as error:
            if error.status != 404:
                raise
            self._record = None
            self._owed_s = 2 * quiet_s(self._config)
        else:
            self._note(body)
        self._is_known = True

    def _note(self, body: Json) -> None:
        """Remember what was read; a version seen before keeps its age."""
        top = Field(body)
        spec = top.child("spec")
        version = top.child("metadata").text("resourceVersion")
        duration_s = float(spec.number("leaseDurationSeconds")) or self._config.duration_s
        is_same = self._record is not None and self._record.version == version
        self._record = Record(
            version=version,
            holder=spec.text("holderIdentity"),
            duration_s=duration_s,
            transitions=spec.number("leaseTransitions"),
            since=self._record.since if self._record is not None and is_same else self._clocks.monotonic(),
        )
        self.holder = self._record.holder
        if self.holder != self.identity:
            self._owed_s = quiet_s(self._config) if self.holder else 0.0

    async def _write(self, decision: Decision) -> bool:
        """Become or stay the holder. False on 409: somebody was faster; look again soon."""
        sent_at = self._clocks.monotonic()
        old = self._record
        transitions = 0 if old is None else old.transitions + (decision is Decision.TAKE)
        body = self._body(self.identity, transitions=transitions, version=old.version if old else "")
        method, path = ("POST", self._path) if old is None else ("PUT", f"{self._path}/{self._config.name}")
        try:
            answer = await self._client.send(method, path, body, timeout_s=self._config.duration_s / 4)
        except KubeRejected as error:
            if error.status != 409:
                raise
            self._is_known = False
            return False
        self._note(answer)
        self._deadline = sent_at + quiet_s(self._config)
        if self.settled_at == float("inf"):
            self.settled_at = sent_at + self._owed_s
            _log.info("lease acquired", lease=self._config.name, identity=self.identity, wait_s=round(self._owed_s, 1))
        elif sent_at >= self.settled_at:
            self._owed_s = 0.0
        return True

    def _lose(self) -> None:
        if self.settled_at != float("inf"):
            self.settled_at = float("inf")
            _log.warning("lease lost", lease=self._config.name, holder=self.holder)
        self._deadline = float("-inf")

    def _body(self, holder: str, *, transitions: int, version: str) -> Json:
        now = datetime.datetime.fromtimestamp(self._clocks.wall(), datetime.UTC)
        text = now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        meta: Json = {"name": self._config.name, "namespace": self._config.namespace}
        if version:
            meta["resourceVersion"] = version
        spec: Json = {
            "holderIdentity": holder,
            "leaseDurationSeconds": math.ceil(self._config.duration_s),
            "leaseTransitions": transitions,
            "renewTime": text,
        }
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
