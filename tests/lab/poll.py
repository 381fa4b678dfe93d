# SPDX-License-Identifier: Apache-2.0
"""Waiting in the lab is always a poll with a limit; who waits in vain says for what."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.05


class LabError(Exception):
    """Something in the lab is not as it should be; the text is complete enough to act on."""


class Hopeless(LabError):
    """What is waited for cannot come any more."""


class Waited(LabError):
    """A wait came to its limit. ``seen`` is the last thing that was read."""

    def __init__(self, message: str, *, seen: object) -> None:
        super().__init__(message)
        self.seen = seen


def wait_for(
    what: str, look: Callable[[], T], *, until: Callable[[T], object] = bool, limit_s: float, logs: Iterable[Path] = ()
) -> T:
    """Look until ``until(seen)`` holds and return what was seen.

    ``look`` may raise OSError or LabError while things come up; the last one is told when the limit is reached.
    Hopeless ends the wait at once.
    """
    deadline = time.monotonic() + limit_s
    seen: object = None
    while True:
        try:
            value = look()
            if until(value):
                return value
            seen = value
        except Hopeless as error:
            raise Hopeless("\n".join([f"while waiting for {what}: {error}", *map(tail, logs)])) from error
        except (OSError, LabError) as error:
            seen = f"{type(error).__name__}: {error}"
        if time.monotonic() > deadline:
            text = f"waited {limit_s:g} s in vain for {what}; last seen: {str(seen)[:2000]}"
            raise Waited("\n".join([text, *map(tail, logs)]), seen=seen)
        time.sleep(POLL_S)


def tail(log: Path, *, lines: int = 12) -> str:
    """The end of a log, for the text of an error."""
    try:
        end = log.read_text(errors="replace").splitlines()[-lines:]
    except OSError as error:
        end = [str(error)]
    return "\n".join([f"--- {log}", *(f"    {line}" for line in end)])
