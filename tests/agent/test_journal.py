# SPDX-License-Identifier: Apache-2.0
"""The last changes, newest first, bounded."""

from lbagent.agent.journal import KEPT, Journal
from lbagent.model.route import Route
from lbagent.model.step import Announce, Withdraw


def test_rows_are_newest_first_with_their_age() -> None:
    journal = Journal()
    journal.note(Announce(route=Route(prefix="192.0.2.1/32"), needs=frozenset()), at=10.0, outcome="done")
    journal.note(Withdraw(route=Route(prefix="192.0.2.1/32")), at=12.0, outcome="failed")
    assert journal.rows(15.0) == [
        {"age_s": 3.0, "step": "withdraw", "about": "192.0.2.1/32", "outcome": "failed"},
        {"age_s": 5.0, "step": "announce", "about": "192.0.2.1/32", "outcome": "done"},
    ]


def test_old_rows_make_room() -> None:
    journal = Journal()
    for number in range(KEPT + 5):
        journal.note(Withdraw(route=Route(prefix=f"{number}/32")), at=float(number), outcome="done")
    rows = journal.rows(0.0)
    assert len(rows) == KEPT
    assert rows[-1]["about"] == "5/32"
