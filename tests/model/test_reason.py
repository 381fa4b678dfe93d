# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from lbagent.model.reason import Judgement, Reason

WELL = {Reason.SATISFIED, Reason.NOT_LOAD_BALANCER, Reason.DELETING}


@pytest.mark.parametrize("reason", list(Reason))
def test_a_reason_is_a_machine_word_a_sentence_and_what_to_do_next(reason: Reason) -> None:
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", reason.value)
    assert reason.value == reason.name.lower() or reason is Reason.ALREADY_ALLOCATED_INCOMPATIBLE
    assert reason.sentence
    assert not reason.sentence.endswith(".")
    assert bool(reason.hint) is (reason not in WELL)


def test_no_two_reasons_say_the_same() -> None:
    assert len({reason.sentence for reason in Reason}) == len(Reason)


def test_a_reason_is_found_by_its_word() -> None:
    assert Reason("out_of_ips") is Reason.OUT_OF_IPS


def test_a_judgement_prints_word_sentence_and_detail() -> None:
    assert str(Judgement(reason=Reason.OUT_OF_IPS)) == "out_of_ips: no free address is left"
    assert str(Judgement(reason=Reason.OUT_OF_IPS, detail="pool a")) == "out_of_ips: no free address is left (pool a)"
