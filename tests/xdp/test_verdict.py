# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

from lbagent.xdp.verdict import BY_NUMBER, LAST_ANSWER, LAST_FORWARD, LAST_PASS, Verdict

HEADER = (Path(__file__).resolve().parents[2] / "ebpf/verdict.h").read_text(encoding="utf-8")


def enumerators() -> dict[str, str]:
    """Name -> what follows its ``=``, in the order of the header."""
    body = re.sub(r"/\*.*?\*/", "", HEADER.split("enum verdict {")[1].split("};")[0], flags=re.S)
    pairs = (entry.partition("=") for entry in body.replace("\n", " ").split(","))
    return {
        name.strip().removeprefix("LB_"): value.strip().removeprefix("LB_") for name, _, value in pairs if name.strip()
    }


def test_the_list_is_the_kernels() -> None:
    plain = [name for name, value in enumerators().items() if not value and name != "VERDICTS"]
    assert plain == [verdict.name for verdict in Verdict]
    assert [int(verdict) for verdict in Verdict] == list(range(len(Verdict)))


def test_the_borders_are_the_kernels() -> None:
    held = enumerators()
    assert held["LAST_PASS"] == LAST_PASS.name
    assert held["LAST_FORWARD"] == LAST_FORWARD.name
    assert held["LAST_ANSWER"] == LAST_ANSWER.name


def test_every_verdict_says_itself_in_words() -> None:
    assert len({verdict.sentence for verdict in Verdict}) == len(Verdict)
    assert all(verdict.sentence.startswith("dropped: ") == verdict.is_drop for verdict in Verdict)
    assert Verdict.NAT_FULL.word == "nat_full"


def test_what_goes_on_is_neither_a_pass_nor_a_drop() -> None:
    assert next(v for v in Verdict if v.is_forward) is Verdict.NAT_FORWARD
    assert not any(v.is_drop for v in Verdict if v.is_forward)
    assert BY_NUMBER[int(Verdict.TOO_BIG)] is Verdict.TOO_BIG
