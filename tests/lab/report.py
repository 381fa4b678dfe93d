# SPDX-License-Identifier: Apache-2.0
"""What the demo prints and writes: stages with their time, and the facts that were read back."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tests.lab.poll import LabError

WIDTH = 100


@dataclass
class Stage:
    """One step. ``say`` prints, ``note`` goes to the JSON file, ``require`` ends the stage when it does not hold."""

    number: int
    title: str
    out: TextIO
    facts: dict[str, Any] = field(default_factory=dict)
    ok: bool = False
    ms: float = 0.0
    error: str = ""

    def say(self, *lines: str) -> None:
        for line in lines:
            for part in line.expandtabs(4).splitlines() or [""]:
                print(f"      {part}".rstrip(), file=self.out, flush=True)

    def show(self, word: str, value: object) -> None:
        """An aligned line: what it is, what was read."""
        first, *rest = str(value).splitlines() or [""]
        self.say(f"{word:<17} {first}", *(f"{'':<17} {line}" for line in rest))

    def note(self, **facts: Any) -> None:
        self.facts.update(facts)

    def require(self, holds: object, otherwise: str) -> None:
        if not holds:
            raise LabError(otherwise)


class Report:
    """Stages in order; the file is written whatever happens."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self.out = out
        self.stages: list[Stage] = []
        self.begun = time.monotonic()
        self.facts: dict[str, Any] = {}

    @property
    def ok(self) -> bool:
        return bool(self.stages) and all(stage.ok for stage in self.stages)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def line(self, text: str = "") -> None:
        print(text, file=self.out, flush=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Prints the title at once and the time at the end. Every failure is told here and raised on."""
        stage = Stage(number=len(self.stages) + 1, title=title, out=self.out)
        self.stages.append(stage)
        self.line(f"{stage.number:>3}  {title}")
        begun = time.monotonic()
        try:
            yield stage
            stage.ok = True
        except BaseException as error:
            stage.error = str(error) or type(error).__name__
            raise
        finally:
            stage.ms = (time.monotonic() - begun) * 1000
            verdict = "ok" if stage.ok else "FAILED"
            self.line(f"      {'':-<{WIDTH - 26}} {verdict} {stage.ms / 1000:>6.2f} s")
            if stage.error:
                stage.say(*stage.error.splitlines())
            self.line()

    def write(self, path: Path) -> None:
        """``demo.json``: see the keys below. ``requests`` sums what the stages noted as ``requests``."""
        ledgers = [stage.facts["requests"] for stage in self.stages if "requests" in stage.facts]
        content = {
            "ok": self.ok,
            "seconds": round(self.seconds, 2),
            **self.facts,
            "requests": {key: sum(ledger[key] for ledger in ledgers) for key in ("sent", "failed")},
            "routes_seen": [
                {"stage": stage.title, **route} for stage in self.stages for route in stage.facts.get("routes", ())
            ],
            "stages": [
                {
                    "stage": stage.title,
                    "ok": stage.ok,
                    "ms": round(stage.ms, 1),
                    **({"error": stage.error} if stage.error else {}),
                    **stage.facts,
                }
                for stage in self.stages
            ],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
