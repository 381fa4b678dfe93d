# SPDX-License-Identifier: Apache-2.0
"""Rise and fall: when do outcomes change what we believe of a target? Pure.

``rise`` outcomes in a row that are better than the state improve it, ``fall`` worse ones in a row
worsen it. The first outcome is believed at once. From best to worst: up, not_offered, closing, down.
"""

from dataclasses import dataclass, replace

from lbagent.model.state import Pulse
from lbagent.probe.check import Answer, Outcome

WINDOW = 20
"""Outcomes that are looked at for flapping: 10 s at the default interval."""

FLAPPING_FROM = 6
FLAPPING_UNTIL = 2
"""A target flaps from 6 changes within the window, until 2 are left (hysteresis)."""

_RANK = {Answer.UP: 3, Answer.NOT_OFFERED: 2, Answer.CLOSING: 1, Answer.DOWN: 0}
_MASK = (1 << WINDOW) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What we believe of one target since when, on the caller's clock.

    ``outcome``: the latest that agrees with what we believe. ``last``: the very latest.
    ``streak``: how many in a row were better (positive) or worse (negative); ``nearest``: the mildest
    of them. ``turns``: one bit for each of the last outcomes, set when it differs from the one before.
    """

    outcome: Outcome
    since: float
    last: Outcome
    streak: int = 0
    nearest: Outcome | None = None
    turns: int = 0
    flapping: bool = False

    @property
    def answer(self) -> Answer:
        """What we believe."""
        return self.outcome.answer

    def pulse(self) -> Pulse:
        """The same in the words of the model."""
        doubt = f"; but {self.last.detail or self.last.answer}, {abs(self.streak)} in a row" if self.streak else ""
        return Pulse(
            up=self.answer is Answer.UP,
            since=self.since,
            weight=self.outcome.weight,
            detail=(self.outcome.detail or self.answer) + doubt,
            closing=self.answer is Answer.CLOSING,
            offered=self.answer is not Answer.NOT_OFFERED,
            flapping=self.flapping,
        )


def judge(state: State | None, outcome: Outcome, *, now: float, rise: int, fall: int) -> State | None:
    """The state after ``outcome``. None: nothing is known yet.

    The state moves only as far as the whole streak agrees: up, after down, closing, down with fall=3,
    is closing. An attempt that this host could not make changes nothing.
    """
    if outcome.answer is Answer.UNTRIED:
        return state
    if state is None:
        return State(outcome=outcome, since=now, last=outcome)
    turns = ((state.turns << 1) | (outcome.answer is not state.last.answer)) & _MASK
    if not turns and not state.streak and outcome == state.outcome:
        return state  # the everyday case
    changes = turns.bit_count()
    flapping = changes > FLAPPING_UNTIL if state.flapping else changes >= FLAPPING_FROM
    better = _RANK[outcome.answer] - _RANK[state.answer]
    if not better:
        return State(outcome=outcome, since=state.since, last=outcome, turns=turns, flapping=flapping)
    streak, nearest = (1 if better > 0 else -1), outcome
    if state.nearest is not None and state.streak * streak > 0:
        streak += state.streak
        nearest = (min if better > 0 else max)(outcome, state.nearest, key=lambda o: _RANK[o.answer])
    if streak >= rise or -streak >= fall:
        return State(outcome=nearest, since=now, last=outcome, turns=turns, flapping=flapping)
    return replace(state, last=outcome, streak=streak, nearest=nearest, turns=turns, flapping=flapping)
