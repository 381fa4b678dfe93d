# SPDX-License-Identifier: Apache-2.0
"""Wake, settle, snapshot, plan, apply, report.

An event only sets a flag. The loop waits a few milliseconds for company, then makes one pass.
Without an event it passes every ``PERIOD_S`` and compares with what the targets really hold.
The endless part has no branch worth testing; ``one_pass`` is finite.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lbagent import log
from lbagent.agent.apply import Writer
from lbagent.agent.targets import Kernel, KernelState, Speaker, SpeakerState
from lbagent.agent.world import World
from lbagent.metrics import Metrics
from lbagent.model.service import ServiceKey
from lbagent.model.state import Desired, Observed, Snapshot
from lbagent.model.step import Announce, Program, Step, Unprogram, Withdraw
from lbagent.model.vip import Forward, Vip
from lbagent.plan.desire import Memory, desire
from lbagent.plan.explain import Sentence, explain
from lbagent.plan.guard import Guarded, guard
from lbagent.plan.steps import steps

_log = log.get("agent")

PERIOD_S = 30.0
COMPANY_S = 0.005
_STAGES = {"programmed": (Program, Unprogram), "announced": (Announce, Withdraw)}
LEARN_S = 2.0
"""At start, how long the first pass waits for next hops and for ExaBGP's routes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One completed pass; ``kernel`` and ``observed`` are as the Steps left them."""

    number: int
    snapshot: Snapshot
    desired: Desired
    observed: Observed
    steps: tuple[Step, ...]
    kernel: KernelState
    held: tuple[Step, ...] = ()
    held_why: str = ""
    took_s: float = 0.0


class Loop:
    """``wake()`` from anywhere; ``run()`` in the TaskGroup; ``last`` is the last completed Pass."""

    def __init__(
        self,
        *,
        world: World,
        kernel: Kernel,
        speaker: Speaker,
        writer: Writer,
        metrics: Metrics,
        completed: Callable[[Pass], None],
        interfaces: frozenset[str],
    ) -> None:
        self.last: Pass | None = None
        self._world = world
        self._kernel = kernel
        self._speaker = speaker
        self._writer = writer
        self._metrics = metrics
        self._completed = completed
        self._interfaces = interfaces
        self._memory = Memory()
        self._woken = asyncio.Event()
        self._event_at: float | None = None
        self._held: Mapping[Vip, Forward] = {}
        self._repairs = 0
        self._due_s = 0.0
        self._number = 0

    def wake(self) -> None:
        """Something has changed."""
        if self._event_at is None:
            self._event_at = self._world.clocks.monotonic()
        self._woken.set()

    def explain(self, service: ServiceKey) -> tuple[Sentence, ...]:
        """The last pass's decision about one Service, in sentences; none before the first pass."""
        last = self.last
        return explain(service, last.snapshot, last.desired, last.observed, memory=self._memory) if last else ()

    async def run(self) -> None:
        """Pass after pass, for ever."""
        await self._wait_until_known()
        while True:
            self.one_pass(complete=not await self._woken_within(self._due_s))

    async def _woken_within(self, limit_s: float) -> bool:
        """Wait for an event, then a little for its company; False when only time has passed."""
        try:
            async with asyncio.timeout(limit_s):
                await self._woken.wait()
        except TimeoutError:
            return False
        await asyncio.sleep(COMPANY_S)
        self._woken.clear()
        return True

    async def _wait_until_known(self) -> None:
        """Until it is known what should be, nothing is changed (fail static).

        Next hops and announced routes were there before a restart: give them a moment to be learned.
        """
        while not self._world.knows_cluster:
            await self._woken.wait()
            self._woken.clear()
        deadline = self._world.clocks.monotonic() + LEARN_S
        while (left_s := deadline - self._world.clocks.monotonic()) > 0:
            if self._speaker.observed().adopted and not self._world.snapshot().unreachable:
                return
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, 0.05)):
                    await self._woken.wait()

    def one_pass(self, *, complete: bool = False) -> Pass:
        """Snapshot, plan, apply. ``complete``: prove every Vip again, not only the new ones."""
        started = self._world.clocks.monotonic()
        if complete:
            self._kernel.prove(list(self._kernel.observed().forwards))
        kernel = self._kernel.observed()
        self._world.unproven = self._unproven(kernel)
        snapshot = self._world.snapshot()
        desired = desire(snapshot, self._memory)
        observed = observe(kernel, self._speaker.observed(), snapshot.unproven)
        guarded = guard(
            steps(observed, desired, snapshot), observed, desired, snapshot, confirmed=self._world.confirmed
        )
        self._world.confirmed = False
        self._tell(guarded)
        todo = guarded.steps
        self._writer.perform(todo, proven=observed.proven)
        self._writer.forget(snapshot.services, desired.forwards)
        self._measure(kernel, todo)
        if any(_vips(step) for step in todo):
            kernel = self._kernel.observed()
            self._world.unproven = self._unproven(kernel)
        took_s = self._world.clocks.monotonic() - started
        self._number += 1
        self.last = Pass(
            number=self._number,
            snapshot=snapshot,
            desired=desired,
            observed=observe(kernel, self._speaker.observed(), self._world.unproven),
            steps=todo,
            held=guarded.held,
            held_why=guarded.why,
            kernel=kernel,
            took_s=took_s,
        )
        self._due_s = self._next_due(snapshot)
        if any(isinstance(step, Unprogram) for step in todo):
            self._woken.set()  # a deleted Service waits for that, to be let go
        self._metrics.passed(took_s=took_s, at=snapshot.wall)
        self._completed(self.last)
        return self.last

    def _unproven(self, kernel: KernelState) -> Mapping[Vip, str]:
        return {**self._writer.refused, **unproven(kernel, self._interfaces)}

    def _tell(self, guarded: Guarded) -> None:
        """The guard's alarm, once per cause."""
        self._metrics.guard(blocked=bool(guarded.held))
        if guarded.why and (self.last is None or self.last.held_why != guarded.why):
            _log.error("changes held back", why=guarded.why, hint="lbctl diff; lbctl confirm if it is meant")

    def _next_due(self, snapshot: Snapshot) -> float:
        """Seconds until time alone changes something that this pass could not.

        An address stops attracting, a node has drained, a target is tried again, nodes know a status.
        """
        settle_s = snapshot.settings.settle_s
        times = [until + settle_s for until in self._speaker.observed().attracting.values()]
        times += [*snapshot.leaving.values(), self._writer.resumes, self._world.turns]
        waits = [at - snapshot.now for at in times if snapshot.now < at < math.inf]
        return max(COMPANY_S, min([PERIOD_S, *waits]))

    def _measure(self, kernel: KernelState, todo: Sequence[Step]) -> None:
        """How long it took from the event to the change, and what had changed without us."""
        for stage, kinds in _STAGES.items():
            if self._event_at is not None and any(isinstance(step, kinds) for step in todo):
                self._metrics.converged(stage, took_s=self._world.clocks.monotonic() - self._event_at)
        self._event_at = None
        for vip in [vip for vip, forward in self._held.items() if kernel.forwards.get(vip) != forward]:
            self._metrics.drifted("kernel")
            _log.warning("kernel entry differs from what was programmed", vip=str(vip))
        for _ in range(kernel.repairs - self._repairs):
            self._metrics.drifted("kernel")
        self._repairs = kernel.repairs
        touched = {vip for step in todo for vip in _vips(step)}
        self._held = {vip: forward for vip, forward in kernel.forwards.items() if vip not in touched}


def _vips(step: Step) -> Iterable[Vip]:
    match step:
        case Program():
            return [forward.vip for forward in step.forwards]
        case Unprogram():
            return step.vips
        case _:
            return ()


def unproven(kernel: KernelState, interfaces: frozenset[str]) -> Mapping[Vip, str]:
    """What is wrong with each Vip; with all of them, while an interface lacks the program."""
    missing = sorted(interfaces - kernel.attached.keys())
    if not missing:
        return kernel.unproven
    said = "; ".join(f"{name}: {kernel.obstacles.get(name, 'the program is not attached')}" for name in missing)
    return dict.fromkeys(kernel.forwards, said)


def observe(kernel: KernelState, speaker: SpeakerState, unproven: Mapping[Vip, str]) -> Observed:
    """What the targets hold."""
    return Observed(
        forwards=kernel.forwards,
        rings=kernel.rings,
        proven=frozenset(vip for vip in kernel.forwards if vip not in unproven),
        routes=speaker.routes,
        attracting=speaker.attracting,
        peers=speaker.peers,
    )
