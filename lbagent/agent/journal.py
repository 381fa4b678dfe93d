# SPDX-License-Identifier: Apache-2.0
"""The last changes, for ``lbctl show events`` and ``lbctl explain``: one row per Step performed.

Bounded; lives with the process. The journal of systemd has the rest.
"""

from collections import deque
from typing import Any

from lbagent.model.step import Announce, Assign, Program, Release, Report, Step, Unprogram, Withdraw

KEPT = 1000


class Journal:
    """``note`` what was done and how it ended, ``rows`` of it, newest first."""

    def __init__(self) -> None:
        self._rows: deque[tuple[float, str, str, str]] = deque(maxlen=KEPT)

    def note(self, step: Step, *, at: float, outcome: str) -> None:
        """``at``: seconds since the epoch."""
        for about, detail in _about(step):
            self._rows.append((at, type(step).__name__.lower(), about, f"{outcome} {detail}".strip()))

    def rows(self, wall: float) -> list[dict[str, Any]]:
        """``age_s`` counts from ``wall``."""
        return [
            {"age_s": round(max(0.0, wall - at), 1), "step": step, "about": about, "outcome": outcome}
            for at, step, about, outcome in reversed(self._rows)
        ]


def _about(step: Step) -> list[tuple[str, str]]:
    match step:
        case Program():
            return [(str(forward.vip), f"ring {forward.ring}") for forward in step.forwards]
        case Unprogram():
            return [(str(vip), "") for vip in step.vips]
        case Announce() | Withdraw():
            return [(step.route.prefix, "")]
        case Assign():
            return [(str(step.assignment.service), ",".join(step.assignment.addresses))]
        case Release():
            return [(str(step.service), ",".join(step.addresses))]
        case Report():
            return [(str(step.service), step.judgement.reason.value)]
