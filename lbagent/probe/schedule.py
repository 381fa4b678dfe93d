# SPDX-License-Identifier: Apache-2.0
"""Who is probed when. One coroutine and one epoll for all targets; no task, future or timer per probe.

Each target has its own phase, drawn when it comes, so that probes are spread over the interval and
LB hosts are out of step. However many Services need a target, it is probed once.
"""

import asyncio
import heapq
import itertools
import math
import select
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from lbagent import config, log
from lbagent.errors import ProbeError
from lbagent.model.state import ProbeTarget, Pulse
from lbagent.probe.check import Answer, Attempt, Outcome, Question, question
from lbagent.probe.judge import State, judge

_log = log.get("probe")

BATCH_S = 0.005
"""Probes that fall due within it begin together: at most 200 wake-ups a second to begin them."""

MAX_RATE = 4000.0
"""Probes per second. With more targets than that allows, rounds take longer than the interval: a huge
list of targets slows probing evenly and never starves the agent."""

LATE_S = 0.1
"""A turn that comes later than planned by this much takes no attempt for expired: this host was too
busy, and what it missed is not held against the nodes. It is counted as ``untried``, and said."""

_READY = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET


class Probed(Protocol):
    """Called after every attempt; ``outcome`` is the value of its Answer."""

    def __call__(self, kind: str, *, outcome: str, took_s: float) -> None: ...


class _Course:
    """A target's life here. ``is_slow``: its last attempt ran into the timeout."""

    __slots__ = ("due", "is_slow", "question", "state")

    def __init__(self, question: Question, *, due: float) -> None:
        self.question = question
        self.due = due
        self.is_slow = False
        self.state: State | None = None


class Prober:
    """Keeps the pulse of a set of targets.

    ``clock`` gives monotonic seconds, ``source`` numbers in [0, 1). ``changed`` is called when what is
    believed of a target changes, or its weight, or whether it flaps; ``probed`` after every attempt.

    An eighth of the places under way (``concurrency``) is kept from slow targets: one that answers is
    probed in time, however many others hang. Those that begin to hang may be in the way for one timeout.
    To probe targets in time even when all of them hang takes targets * timeout_s / interval_s places.
    """

    def __init__(
        self,
        settings: config.Probe,
        *,
        clock: Callable[[], float],
        source: Callable[[], float],
        changed: Callable[[], None],
        probed: Probed,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._source = source
        self._changed = changed
        self._probed = probed
        self._wanted: frozenset[ProbeTarget] = frozenset()
        self._course_by_target: dict[ProbeTarget, _Course] = {}
        self._pulse_by_target: dict[ProbeTarget, Pulse] = {}
        self._untried: set[ProbeTarget] = set()
        # When: a heap by due time (the number keeps courses from being compared), and the slow ones that
        # are due and wait for a place. A course that is no longer wanted stays there until its turn comes.
        self._due: list[tuple[float, int, _Course]] = []
        self._slow_due: deque[_Course] = deque()
        self._number = itertools.count()
        self._begin_at = -math.inf
        self._planned = math.inf  # the next turn, when no news come before
        # Under way: by descriptor, those at slow targets, and all in the order of their deadlines.
        self._attempt_by_fd: dict[int, Attempt] = {}
        self._slow_fds: set[int] = set()
        self._deadlines: deque[Attempt] = deque()
        self._poller = select.epoll()
        self._ready_fds: list[int] = []
        self._wake = asyncio.Event()

    @property
    def pulses(self) -> Mapping[ProbeTarget, Pulse]:
        """By target, as soon as it has been probed once. A live view."""
        return MappingProxyType(self._pulse_by_target)

    @property
    def period_s(self) -> float:
        """Seconds between two probes of one target: the interval, or longer with too many targets."""
        return max(self._settings.interval_s, len(self._course_by_target) / MAX_RATE)

    @property
    def under_way(self) -> int:
        """Attempts that have begun and not ended."""
        return len(self._attempt_by_fd)

    def configure(self, settings: config.Probe) -> None:
        """Take over other settings; attempts under way keep theirs."""
        self._settings = settings
        self._set_targets()

    def want(self, targets: frozenset[ProbeTarget]) -> None:
        """Probe exactly these targets. One that cannot be probed at all gets a Pulse without an opinion."""
        if targets != self._wanted:
            self._wanted = targets
            self._set_targets()

    def _set_targets(self) -> None:
        targets = self._wanted if self._settings.enabled else frozenset()
        for target in self._course_by_target.keys() - targets:
            del self._course_by_target[target]
        for target in self._pulse_by_target.keys() - targets:
            del self._pulse_by_target[target]
        self._untried &= targets
        now = self._clock()
        fresh = []
        for target in sorted(targets - self._course_by_target.keys() - self._pulse_by_target.keys()):
            try:
                fresh.append(_Course(question(target), due=now))
            except ProbeError as error:
                _log.warning("target not probed", target=_name(target), error=str(error))
                self._pulse_by_target[target] = Pulse(up=False, since=now, offered=False, detail=error.message)
            else:
                self._course_by_target[target] = fresh[-1]
        period_s = self.period_s
        if fresh and period_s > self._settings.interval_s:
            _log.warning("probing slowed down", targets=len(self._course_by_target), period_s=round(period_s, 1))
        for course in fresh:
            course.due = now + self._source() * period_s
            self._push(course)
        self._wake.set()

    async def run(self) -> None:
        """Probe for ever. Leaves no socket behind when it is cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._poller.fileno(), self._hear)
        try:
            while True:
                self._wake.clear()
                delay_s = self.turn()
                timer = None if delay_s is None else loop.call_later(delay_s, self._wake.set)
                await self._wake.wait()
                if timer:
                    timer.cancel()
        finally:
            loop.remove_reader(self._poller.fileno())
            self.close()

    def close(self) -> None:
        """Give up what is under way. The Prober is of no use afterwards."""
        for attempt in self._attempt_by_fd.values():
            attempt.close()
        self._poller.close()

    def turn(self) -> float | None:
        """All that is to be done at this moment; seconds until the next turn, None when only news can cause one."""
        now = self._clock()
        self._listen()  # answers that came while the agent was busy count before the clock does
        self._advance(now)
        self._expire(now, is_late=now - self._planned > LATE_S)
        if now >= self._begin_at:
            self._begin(now)
        self._planned = self._plan()
        return max(0.0, self._planned - now) if self._planned < math.inf else None

    def _plan(self) -> float:
        """When the next turn is due."""
        times = [math.inf]
        if self._deadlines:
            times.append(self._deadlines[0].deadline)
        if self._slow_due and self._may_begin(slow=True):
            times.append(self._begin_at)
        if self._due and self._may_begin(slow=False):
            times.append(max(self._begin_at, self._due[0][0]))
        return min(times)

    # -- the parts of a turn

    def _hear(self) -> None:
        self._listen()
        self._wake.set()

    def _listen(self) -> None:
        """Take over which sockets are ready. Edge-triggered: each readiness is told once."""
        self._ready_fds += [fd for fd, _ in self._poller.poll(0)]

    def _advance(self, now: float) -> None:
        ready, self._ready_fds = self._ready_fds, []
        for fd in ready:
            attempt = self._attempt_by_fd.get(fd)
            outcome = attempt.advance() if attempt else None
            if attempt and outcome:
                self._end(attempt, outcome, now)

    def _expire(self, now: float, *, is_late: bool) -> None:
        while self._deadlines and (self._deadlines[0].is_over or self._deadlines[0].deadline <= now):
            attempt = self._deadlines.popleft()
            if not attempt.is_over:
                self._end(attempt, attempt.excuse() if is_late else attempt.expire(), now, slow=True)

    def _begin(self, now: float) -> None:
        self._begin_at = now + BATCH_S
        while self._slow_due and self._may_begin(slow=True):
            self._begin_one(self._slow_due.popleft(), now)
        while self._due and self._due[0][0] <= now and self._may_begin(slow=False):
            course = heapq.heappop(self._due)[2]
            if course.is_slow and not self._may_begin(slow=True):
                self._slow_due.append(course)
            else:
                self._begin_one(course, now)

    def _may_begin(self, *, slow: bool) -> bool:
        places = self._settings.concurrency
        if slow and len(self._slow_fds) >= max(1, min(places - 1, places * 7 // 8)):
            return False
        return len(self._attempt_by_fd) < places

    # -- one probe

    def _begin_one(self, course: _Course, now: float) -> None:
        if self._course_by_target.get(course.question.target) is not course:
            return  # no longer wanted
        period_s = self.period_s
        course.due += period_s * (1 + max(0.0, now - course.due) // period_s)  # late or not, the phase stays
        self._push(course)
        attempt = Attempt(course.question, began=now, deadline=now + self._settings.timeout_s)
        outcome = attempt.begin()
        if outcome:
            self._end(attempt, outcome, now)
            return
        try:
            # Our descriptors are close-on-exec and nothing here forks without exec: to close one takes it out.
            self._poller.register(attempt.fd, _READY)
        except OSError as error:
            self._end(attempt, attempt.fail(error.errno or 0), now)
            return
        self._attempt_by_fd[attempt.fd] = attempt
        self._deadlines.append(attempt)
        if course.is_slow:
            self._slow_fds.add(attempt.fd)

    def _push(self, course: _Course) -> None:
        heapq.heappush(self._due, (course.due, next(self._number), course))

    def _end(self, attempt: Attempt, outcome: Outcome, now: float, *, slow: bool = False) -> None:
        self._attempt_by_fd.pop(attempt.fd, None)
        self._slow_fds.discard(attempt.fd)
        target = attempt.question.target
        self._probed(target.kind, outcome=outcome.answer.value, took_s=now - attempt.began)
        course = self._course_by_target.get(target)
        if course is None:
            return  # no longer wanted
        self._note_untried(target, outcome)
        course.is_slow = slow
        before = course.state
        course.state = judge(before, outcome, now=now, rise=self._settings.rise, fall=self._settings.fall)
        if course.state is not None and course.state is not before:
            self._publish(target, before, course.state)

    def _publish(self, target: ProbeTarget, before: State | None, state: State) -> None:
        pulse = state.pulse()
        said = self._pulse_by_target.get(target)
        self._pulse_by_target[target] = pulse
        if before is None or before.answer is not state.answer:
            tell = (
                _log.warning if state.answer in (Answer.CLOSING, Answer.DOWN) else _log.info if before else _log.debug
            )
            tell("pulse changed", target=_name(target), answer=state.answer.value, why=pulse.detail)
        if before is not None and before.flapping is not state.flapping:
            tell = _log.warning if state.flapping else _log.info
            tell("pulse flaps" if state.flapping else "pulse is steady again", target=_name(target))
        if said is None or _believed(said) != _believed(pulse):
            self._changed()

    def _note_untried(self, target: ProbeTarget, outcome: Outcome) -> None:
        """One line when this host becomes unable to probe anything it should, one when it can again."""
        if outcome.answer is Answer.UNTRIED:
            if not self._untried:
                _log.error("probing hindered", target=_name(target), why=outcome.detail)
            self._untried.add(target)
        elif target in self._untried:
            self._untried.discard(target)
            if not self._untried:
                _log.info("probing hindered no more")


def _believed(pulse: Pulse) -> tuple[object, ...]:
    """What others act on; ``detail`` is for people."""
    return pulse.up, pulse.closing, pulse.offered, pulse.weight, pulse.flapping


def _name(target: ProbeTarget) -> str:
    host = f"[{target.address}]" if ":" in target.address else target.address
    return f"{target.kind} {host}:{target.port}"
