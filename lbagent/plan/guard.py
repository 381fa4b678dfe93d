# SPDX-License-Identifier: Apache-2.0
"""The blast-radius guard: one pass may not take away too much at once.

What it is against is a mistake in what we are told (a list that came back empty, probes that all
fail at once, a bad manifest applied everywhere), so it counts what the *world* wants gone: routes
that are no longer desired, and Services whose last backend goes. It does not hold back a host that
drains, facts declared stale, or a Vip that provably does not work: others serve better then.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lbagent.model.state import Desired, Observed, Snapshot
from lbagent.model.step import Program, Step, Unprogram, Withdraw
from lbagent.model.vip import BackendState, Forward


@dataclass(frozen=True, slots=True)
class Guarded:
    """Steps to perform, steps held back, and why, in words ('' when nothing is held)."""

    steps: tuple[Step, ...]
    held: tuple[Step, ...] = ()
    why: str = ""


def guard(
    todo: Iterable[Step], observed: Observed, desired: Desired, snapshot: Snapshot, *, confirmed: bool = False
) -> Guarded:
    """Hold back what takes too much away. ``confirmed``: an operator, or a new configuration, means it.

    Held are the withdrawals and whatever would empty those same addresses in the kernel; all other
    Steps go on. Nothing is remembered: the next pass counts again, so what comes back to its senses
    is released by itself.
    """
    steps = tuple(todo)
    if confirmed or snapshot.draining or snapshot.stale:
        return Guarded(steps)
    wanted = {route.prefix for route in desired.routes}
    gone = {s.route.address for s in steps if isinstance(s, Withdraw) and s.route.prefix not in wanted}
    settings, total = snapshot.settings, len({route.address for route in observed.routes})
    allowed = max(settings.guard_withdraw_at_least, int(settings.guard_withdraw_share * total))
    if len(gone) <= allowed:
        return Guarded(steps)
    kept, held = [], []
    for step in steps:
        stays, goes = _parted(step, gone, desired)
        kept += [stays] if stays else []
        held += [goes] if goes else []
    why = f"one pass would withdraw {len(gone)} of {total} addresses; {allowed} are allowed"
    return Guarded(tuple(kept), tuple(held), why)


def _parted(step: Step, gone: set[str], desired: Desired) -> tuple[Step | None, Step | None]:
    """The harmless and the harmful part of a Step."""
    match step:
        case Withdraw():
            return (None, step) if step.route.address in gone else (step, None)
        case Program():
            emptied = [f for f in step.forwards if f.vip.address in gone and _is_empty(f, desired)]
            return _split(step, emptied)
        case Unprogram():
            harmful = tuple(vip for vip in step.vips if vip.address in gone)
            harmless = tuple(vip for vip in step.vips if vip.address not in gone)
            return (replace(step, vips=harmless) if harmless else None), (
                replace(step, vips=harmful) if harmful else None
            )
        case _:
            return step, None


def _split(step: Program, emptied: list[Forward]) -> tuple[Step | None, Step | None]:
    def part(forwards: list[Forward]) -> Program | None:
        names = {forward.ring for forward in forwards}
        rings = tuple(ring for ring in step.rings if ring.fingerprint in names)
        return Program(forwards=tuple(forwards), rings=rings) if forwards else None

    return part([f for f in step.forwards if f not in emptied]), part(emptied)


def _is_empty(forward: Forward, desired: Desired) -> bool:
    """Is nobody left for new connections?"""
    return not any(backend.state is BackendState.ACTIVE for backend in desired.rings[forward.ring].backends)
