# SPDX-License-Identifier: Apache-2.0
"""How a host leaves: first less attractive (RFC 8326), then withdrawn; and how it comes back.

``in`` -> ``softening`` -> ``out``. The phase is kept on disk, so a restart or a reboot does not
bring a drained host back. Softening ends when the host has become quiet or after ``wait_s``.
Forwarding goes on in every phase: whatever still arrives is served.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lbagent.config import DrainConfig
from lbagent.errors import ControlError
from lbagent.model.route import PathPolicy

QUIET_S = 3.0
"""So long without a packet towards a backend counts as quiet: routers have moved the traffic."""


class Phase(StrEnum):
    """Where a host stands."""

    IN = "in"
    SOFTENING = "softening"
    OUT = "out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Packets forwarded so far, and when that number last moved (monotonic seconds)."""

    packets: int
    moved: float


class Drain:
    """The phase of this host. ``now``: monotonic seconds."""

    def __init__(self, path: Path, settings: DrainConfig, *, now: float) -> None:
        self.settings = settings
        self._path = path
        self._since = now
        self._traffic: Traffic | None = None
        self.phase = _read(path)

    @property
    def policy(self) -> PathPolicy:
        """What is laid over every route while softening."""
        return PathPolicy(
            name="drain",
            communities=self.settings.communities,
            local_preference=self.settings.local_preference,
            med=self.settings.med,
            prepend=self.settings.prepend,
        )

    def begin(self, now: float) -> None:
        """Start to leave; nothing when already on the way. Raises ControlError when it cannot be kept."""
        if self.phase is Phase.IN:
            self._enter(Phase.SOFTENING, now)

    def end(self, now: float) -> None:
        """Come back at once. Raises ControlError when it cannot be kept."""
        if self.phase is not Phase.IN:
            self._enter(Phase.IN, now)

    def advance(self, *, now: float, packets: int) -> bool:
        """Take note of the traffic; is the next phase entered?"""
        if self._traffic is None or packets != self._traffic.packets:
            self._traffic = Traffic(packets=packets, moved=now)
        if self.phase is not Phase.SOFTENING:
            return False
        is_quiet = now - max(self._traffic.moved, self._since) >= QUIET_S
        if is_quiet or now - self._since >= self.settings.wait_s:
            self._enter(Phase.OUT, now)
            return True
        return False

    def progress(self, now: float) -> dict[str, str | float]:
        """For ``lbctl drain --wait`` and ``lbctl status``."""
        return {"phase": self.phase.value, "for_s": round(now - self._since, 1)}

    def _enter(self, phase: Phase, now: float) -> None:
        aside = self._path.with_suffix(".new")
        try:
            aside.write_text(json.dumps({"phase": phase.value}), encoding="ascii")
            aside.replace(self._path)
        except OSError as error:
            raise ControlError(f"cannot keep the phase in {self._path}: {error}", hint="see paths.state") from error
        self.phase = phase
        self._since = now


def _read(path: Path) -> Phase:
    """The kept phase. A host that was on its way out when it died is out."""
    try:
        kept = Phase(json.loads(path.read_text(encoding="ascii"))["phase"])
    except (OSError, ValueError, KeyError, TypeError):
        return Phase.IN
    return Phase.IN if kept is Phase.IN else Phase.OUT
