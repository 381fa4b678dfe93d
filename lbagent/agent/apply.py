# SPDX-License-Identifier: Apache-2.0
"""The only writer: performs Steps on the kernel, the speaker and the cluster.

Kernel and speaker are changed at once, in the order of the Steps. Writes to the cluster may take
seconds, so they are queued per Service and sent beside the loop; until one has returned, its
addresses stand in ``World.pending``, so that nobody else is given them. A target that fails is
left alone for a while (full jitter) and the others go on; the next pass plans again.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import assert_never

from lbagent import log
from lbagent.agent.journal import Journal
from lbagent.agent.targets import Cluster, Kernel, Speaker
from lbagent.agent.world import World
from lbagent.backoff import Backoff
from lbagent.errors import KubeRejected, LbagentError
from lbagent.metrics import Metrics
from lbagent.model.route import Route
from lbagent.model.service import ServiceKey
from lbagent.model.step import Announce, Assign, Program, Release, Report, Step, Unprogram, Withdraw
from lbagent.model.vip import Vip

_log = log.get("agent")

ClusterStep = Assign | Release | Report
CONCURRENT_WRITES = 16
"""Status writes under way at the same time; the API server's priority and fairness dislikes more."""


class Writer:
    """Performs Steps. ``refused``: Vips that the kernel has no room for or otherwise declined, and why."""

    def __init__(
        self, *, kernel: Kernel, speaker: Speaker, cluster: Cluster, world: World, metrics: Metrics, journal: Journal
    ) -> None:
        self._kernel = kernel
        self._speaker = speaker
        self._cluster = cluster
        self._world = world
        self._metrics = metrics
        self._journal = journal
        self._backoff_by_target = {name: Backoff(first_s=0.2, cap_s=10) for name in ("kernel", "speaker")}
        self._resume_by_target = dict.fromkeys(self._backoff_by_target, 0.0)
        self.refused: dict[Vip, str] = {}
        self._queue: dict[tuple[ServiceKey, type], ClusterStep] = {}
        self._queued = asyncio.Event()
        self._done: dict[tuple[ServiceKey, type], ClusterStep] = {}

    # --- kernel and speaker -------------------------------------------------------------------

    def perform(self, steps: Iterable[Step], *, proven: frozenset[Vip]) -> None:
        """Carry the Steps out in their order; a Step whose target is failing is left for a later pass.

        ``proven``: Vips that provably forward before the first Step.
        """
        forwarding = set(proven)
        for kind, run in groupby(steps, key=_target):
            batch = list(run)
            if kind == "cluster":
                for step in batch:
                    self._enqueue(step)
                continue
            if self._world.clocks.monotonic() < self._resume_by_target[kind]:
                self._count(batch, "held")
                continue
            try:
                self._perform_kernel(batch, forwarding) if kind == "kernel" else self._perform_bgp(batch, forwarding)
            except LbagentError as error:
                wait_s = self._backoff_by_target[kind].failed()
                self._resume_by_target[kind] = self._world.clocks.monotonic() + wait_s
                self._metrics.refused(kind)
                self._count(batch, "failed")
                _log.error("target refused", target=kind, error=str(error), retry_s=round(wait_s, 2))
            else:
                self._backoff_by_target[kind].succeeded()

    @property
    def resumes(self) -> float:
        """When the first target that is left alone is tried again; 0 when all are well."""
        now = self._world.clocks.monotonic()
        return min((at for at in self._resume_by_target.values() if at > now), default=0.0)

    def _perform_kernel(self, steps: Sequence[Step], forwarding: set[Vip]) -> None:
        for step in steps:
            match step:
                case Program():
                    forwarding |= self._program(step)
                case Unprogram():
                    self._unprogram(step)
                case _:
                    raise AssertionError(step)

    def _program(self, step: Program) -> set[Vip]:
        """The Vips of the step that forward, proven by a packet each."""
        refused = self._kernel.program(step.forwards, step.rings)
        for vip, error in refused.items():
            if self.refused.get(vip) != str(error):
                _log.error("vip refused by the kernel", vip=str(vip), error=str(error))
            self.refused[vip] = str(error)
        served = [f for f in step.forwards if f.vip not in refused]
        self._note(replace(step, forwards=tuple(served)), "done", count=len(served))
        self._metrics.stepped("Program", outcome="failed", count=len(refused))
        for forward in served:
            self.refused.pop(forward.vip, None)
        outcomes = self._kernel.prove([f.vip for f in served])
        for forward in served:
            facts = {"vip": str(forward.vip), "service": str(forward.service), "ring": forward.ring}
            if why := outcomes[forward.vip]:
                _log.warning("vip programmed but not proven", **facts, why=why)
            else:
                _log.info("vip programmed", **facts)
        return {vip for vip, why in outcomes.items() if not why}

    def _unprogram(self, step: Unprogram) -> None:
        speaker = self._speaker.observed()
        if not speaker.adopted:  # somebody may still send us packets
            self._metrics.stepped("Unprogram", outcome="held", count=len(step.vips))
            return
        exposed = {route.address for route in speaker.routes}
        vips = [vip for vip in step.vips if vip.address not in exposed]
        self._kernel.unprogram(vips)
        for vip in vips:
            _log.info("vip unprogrammed", vip=str(vip))
        self._note(replace(step, vips=tuple(vips)), "done", count=len(vips))

    def _perform_bgp(self, steps: Sequence[Step], forwarding: set[Vip]) -> None:
        wanted = set(self._speaker.observed().routes)
        for step in steps:
            match step:
                case Announce():
                    if not step.needs <= forwarding:  # the plan hoped that Program would succeed
                        self._metrics.stepped("Announce", outcome="held")
                        continue
                    wanted -= {route for route in wanted if route.prefix == step.route.prefix}
                    wanted.add(step.route)
                    _log.info("route announced", prefix=step.route.prefix)
                    self._note(step, "done")
                case Withdraw():
                    wanted.discard(step.route)
                    _log.info("route withdrawn", prefix=step.route.prefix)
                    self._note(step, "done")
                case _:
                    raise AssertionError(step)
        self._want(frozenset(wanted))

    def _want(self, routes: frozenset[Route]) -> None:
        if routes != self._speaker.observed().routes:
            self._speaker.want(routes)

    def _note(self, step: Step, outcome: str, *, count: int = 1) -> None:
        self._metrics.stepped(type(step).__name__, outcome=outcome, count=count)
        self._journal.note(step, at=self._world.clocks.wall(), outcome=outcome)

    def _count(self, steps: Sequence[Step], outcome: str) -> None:
        for step in steps:
            self._metrics.stepped(type(step).__name__, outcome=outcome)

    # --- cluster ------------------------------------------------------------------------------

    def _enqueue(self, step: Step) -> None:
        match step:
            case Assign():
                key = (step.assignment.service, Assign)
                self._world.pending[step.assignment.service] = step.assignment
            case Release() | Report():
                key = (step.service, type(step))  # type: ignore[assignment]
            case _:
                raise AssertionError(step)
        if self._done.get(key) == step and isinstance(step, Report):
            return  # said already
        self._queue[key] = step
        self._queued.set()

    async def run(self) -> None:
        """Send queued cluster writes for ever."""
        slots = asyncio.Semaphore(CONCURRENT_WRITES)
        async with asyncio.TaskGroup() as group:
            while True:
                await self._queued.wait()
                self._queued.clear()
                while self._queue:
                    await slots.acquire()
                    key, step = next(iter(self._queue.items()))
                    del self._queue[key]
                    group.create_task(self._write(key, step, slots))

    async def _write(self, key: tuple[ServiceKey, type], step: ClusterStep, slots: asyncio.Semaphore) -> None:
        kind = "event" if isinstance(step, Report) else "status"
        try:
            match step:
                case Assign():
                    await self._cluster.assign(step.assignment)
                    _log.info("address assigned", service=str(key[0]), addresses=",".join(step.assignment.addresses))
                case Release():
                    await self._release(step)
                    _log.info("address released", service=str(key[0]), addresses=",".join(step.addresses))
                case Report():
                    await self._cluster.report(step.service, step.judgement)
                case _:
                    assert_never(step)
        except LbagentError as error:
            self._metrics.published(kind, outcome="failed")
            self._note(step, "failed")
            self._done.pop(key, None)
            _log.warning("cluster write failed", service=str(key[0]), step=type(step).__name__, error=str(error))
        else:
            self._metrics.published(kind, outcome="done")
            self._note(step, "done")
            self._done[key] = step
        finally:
            slots.release()
            if isinstance(step, Assign) and self._world.pending.get(key[0]) == step.assignment:
                del self._world.pending[key[0]]

    async def _release(self, step: Release) -> None:
        try:
            await self._cluster.release(step.service, step.addresses)
        except KubeRejected as error:
            if error.status != 404:  # gone is released
                raise

    def forget(self, services: Mapping[ServiceKey, object], vips: Mapping[Vip, object]) -> None:
        """Drop what was said of Services and Vips that are gone."""
        self.refused = {vip: why for vip, why in self.refused.items() if vip in vips}
        for key in [key for key in self._done if key[0] not in services]:
            del self._done[key]


def _target(step: Step) -> str:
    match step:
        case Program() | Unprogram():
            return "kernel"
        case Announce() | Withdraw():
            return "speaker"
        case Assign() | Release() | Report():
            return "cluster"
        case _:
            assert_never(step)
