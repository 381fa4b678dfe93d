# SPDX-License-Identifier: Apache-2.0
"""What a new configuration would change, before anything is changed. Pure.

Pools, policies, timings and peers are taken over at run time; what the process was built around
needs a restart, which costs no packet and no BGP message. Addresses are never taken from Services
by a reload unless the file says ``allow_renumber: true``.
"""

from dataclasses import dataclass, replace

from lbagent.config import Config
from lbagent.errors import ConfigError
from lbagent.model.state import Snapshot
from lbagent.plan.desire import desire

NEEDS_RESTART = ("host", "kubernetes", "xdp", "http", "paths", "log")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """From the configuration in force to another one. ``renumbered``: Service -> addresses it would lose."""

    config: Config
    sections: tuple[str, ...]
    needs_restart: tuple[str, ...]
    renumbered: dict[str, tuple[str, ...]]
    withdrawn: tuple[str, ...]
    announced: tuple[str, ...]

    def words(self) -> list[str]:
        """One line per consequence; empty when nothing differs."""
        lines = [f"{name}: taken over" for name in self.sections if name not in self.needs_restart]
        lines += [f"{name}: needs systemctl restart lbagent" for name in self.needs_restart]
        if "bgp" in self.sections:
            lines.append("bgp: sessions change with systemctl reload lbagent-bgp")
        lines += [f"{service} loses {', '.join(lost)}" for service, lost in sorted(self.renumbered.items())]
        lines += [f"withdraw {prefix}" for prefix in self.withdrawn]
        lines += [f"announce {prefix}" for prefix in self.announced]
        return lines


def compare(current: Config, fresh: Config, snapshot: Snapshot | None) -> Change:
    """What ``fresh`` would change; with a Snapshot also what that means for Services."""
    sections = tuple(name for name in type(current).model_fields if getattr(fresh, name) != getattr(current, name))
    renumbered: dict[str, tuple[str, ...]] = {}
    withdrawn: tuple[str, ...] = ()
    announced: tuple[str, ...] = ()
    if snapshot is not None and sections:
        now = desire(replace(snapshot, settings=current.settings(), is_leader=True))
        then = desire(replace(snapshot, settings=fresh.settings(), is_leader=True))
        for key, service in snapshot.services.items():
            if key not in now.assignments:
                continue  # it keeps nothing under the configuration in force either
            kept = then.assignments[key].addresses if key in then.assignments else ()
            if lost := tuple(a for a in service.status_addresses if a not in kept):
                renumbered[str(key)] = lost
        before, after = {r.prefix for r in now.routes}, {r.prefix for r in then.routes}
        withdrawn, announced = tuple(sorted(before - after)), tuple(sorted(after - before))
    return Change(
        config=fresh,
        sections=sections,
        needs_restart=tuple(name for name in sections if name in NEEDS_RESTART),
        renumbered=renumbered,
        withdrawn=withdrawn,
        announced=announced,
    )


def permit(change: Change) -> None:
    """Raises ConfigError when Services would lose addresses and the file does not allow it."""
    if change.renumbered and not change.config.allow_renumber:
        losers = tuple(f"{service} loses {', '.join(lost)}" for service, lost in sorted(change.renumbered.items()))
        raise ConfigError(
            f"the new configuration would take addresses from {len(losers)} Services: {'; '.join(losers[:3])}",
            hint="set allow_renumber: true to accept that",
            problems=losers,
        )
