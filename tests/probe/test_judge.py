# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbagent.probe.check import Answer, Outcome
from lbagent.probe.judge import FLAPPING_FROM, WINDOW, State, judge

UP, NOT_OFFERED, CLOSING, DOWN, UNTRIED = Answer.UP, Answer.NOT_OFFERED, Answer.CLOSING, Answer.DOWN, Answer.UNTRIED
BY_LETTER = {"u": UP, "o": NOT_OFFERED, "c": CLOSING, "d": DOWN, "?": UNTRIED}
BAD_TO_GOOD = [DOWN, CLOSING, NOT_OFFERED, UP]


def outcomes(letters: str) -> list[Outcome]:
    return [Outcome(answer=BY_LETTER[letter]) for letter in letters if letter != " "]


def judged(seen: Iterable[Outcome], *, rise: int = 2, fall: int = 3) -> list[State]:
    """The state after each outcome, one second apart, from the first that says something."""
    states: list[State] = []
    state = None
    for now, outcome in enumerate(seen):
        state = judge(state, outcome, now=float(now), rise=rise, fall=fall)
        if state is not None:
            states.append(state)
    return states


@pytest.mark.parametrize(
    ("seen", "believed"),
    [
        ("u", "u"),
        ("d", "d"),
        ("c", "c"),
        ("o", "o"),
        # fall 3, rise 2
        ("u dd d", "u uu d"),
        ("u dd u ddd", "u uu u uud"),
        ("d u u", "d d u"),
        ("d u d uu", "d d d du"),
        # as far as the whole streak agrees, and no farther
        ("u dcd", "u uuc"),
        ("u dcd ddd", "u uuc ccd"),
        ("u ooo", "u uuo"),
        ("u dod", "u uuo"),
        ("d cu uu", "d dc cu"),
        ("d co cc", "d dc cc"),
        # between those that are not up
        ("c ddd", "c ccd"),
        ("d cc", "d dc"),
        ("o ddd", "o ood"),
        ("o uu", "o ou"),
        # better and worse do not add up
        ("c udu dd d", "c ccc cc d"),
        # what this host could not try changes nothing
        ("u d?d d", "u uuu d"),
        ("u ????", "u uuuu"),
        ("d u?u", "d ddu"),
    ],
)
def test_rise_two_fall_three(seen: str, believed: str) -> None:
    assert [s.answer for s in judged(outcomes(seen))] == [BY_LETTER[x] for x in believed.replace(" ", "")]


def test_a_target_that_could_never_be_tried_has_no_state() -> None:
    assert judged(outcomes("???")) == []


def test_the_first_outcome_is_believed_from_its_own_time() -> None:
    assert judged(outcomes("?d"))[0].since == 1.0


def test_since_is_the_time_of_the_outcome_that_decided() -> None:
    states = judged(outcomes("u d d d d d"))
    assert [s.since for s in states] == [0, 0, 0, 3, 3, 3]


def test_a_steady_target_costs_no_new_state() -> None:
    first, second, third = judged(outcomes("uuu"))
    assert first is second is third


@pytest.mark.parametrize(("rise", "fall"), [(1, 1), (1, 3), (4, 2)])
def test_rise_and_fall_are_counted_exactly(rise: int, fall: int) -> None:
    states = judged(outcomes("u" + "d" * fall + "u" * rise), rise=rise, fall=fall)
    assert [s.answer for s in states] == [UP] * fall + [DOWN] * rise + [UP]


@given(
    answers=st.lists(st.sampled_from(BAD_TO_GOOD), min_size=1, max_size=60),
    rise=st.integers(1, 4),
    fall=st.integers(1, 4),
)
def test_a_state_moves_only_when_the_last_rise_or_fall_outcomes_all_agree(
    answers: list[Answer], rise: int, fall: int
) -> None:
    rank = BAD_TO_GOOD.index
    states = judged([Outcome(answer=a) for a in answers], rise=rise, fall=fall)
    for number, (before, after) in enumerate(pairwise(states), start=1):
        if after.answer is before.answer:
            continue
        better = rank(after.answer) > rank(before.answer)
        streak = answers[number + 1 - (rise if better else fall) : number + 1]
        assert len(streak) == (rise if better else fall)
        if better:
            assert min(map(rank, streak)) == rank(after.answer)
        else:
            assert max(map(rank, streak)) == rank(after.answer)


@given(
    before=st.lists(st.sampled_from([*BAD_TO_GOOD, UNTRIED]), max_size=30),
    last=st.sampled_from(BAD_TO_GOOD),
    rise=st.integers(1, 4),
    fall=st.integers(1, 4),
)
def test_whatever_came_before_an_unchanging_target_is_believed_in_the_end(
    before: list[Answer], last: Answer, rise: int, fall: int
) -> None:
    seen = [Outcome(answer=a) for a in before] + [Outcome(answer=last)] * (2 * max(rise, fall) + WINDOW)
    end = judged(seen, rise=rise, fall=fall)[-1]
    assert end.answer is last
    assert not end.flapping
    assert not end.streak


def test_a_probe_that_alternates_is_held_still_and_shown_as_flapping() -> None:
    states = judged(outcomes("u" + "du" * 10))
    assert {s.answer for s in states} == {UP}
    assert [s.flapping for s in states].index(True) == FLAPPING_FROM
    assert states[-1].pulse().flapping


def test_a_target_that_is_steady_again_stops_flapping_within_the_window() -> None:
    states = judged(outcomes("u" + "du" * 10 + "u" * WINDOW))
    assert states[20].flapping
    assert not states[-1].flapping


def test_one_fall_and_one_rise_are_not_flapping() -> None:
    assert not any(s.flapping for s in judged(outcomes("uuuu dddd uuuu dddd uuuu")))


def test_the_weight_is_that_of_the_outcome_we_believe() -> None:
    up = Outcome(answer=UP, weight=7, detail="HTTP 200")
    silent = Outcome(answer=DOWN, detail="no answer within 0.4 s")
    states = judged([up, silent, silent, silent])
    assert [s.pulse().weight for s in states] == [7, 7, 7, None]
    assert states[2].pulse().detail == "HTTP 200; but no answer within 0.4 s, 2 in a row"
    assert states[3].pulse().detail == "no answer within 0.4 s"


def test_a_new_weight_is_shown_at_once() -> None:
    states = judged([Outcome(answer=UP, weight=1), Outcome(answer=UP, weight=2)])
    assert states[1].pulse().weight == 2
    assert states[1].since == 0


@pytest.mark.parametrize(
    ("answer", "up", "closing", "offered"),
    [
        (UP, True, False, True),
        (NOT_OFFERED, False, False, False),
        (CLOSING, False, True, True),
        (DOWN, False, False, True),
    ],
)
def test_each_answer_in_the_words_of_the_model(answer: Answer, up: bool, closing: bool, offered: bool) -> None:
    pulse = judged([Outcome(answer=answer, detail="seen")])[0].pulse()
    assert (pulse.up, pulse.closing, pulse.offered, pulse.detail) == (up, closing, offered, "seen")
