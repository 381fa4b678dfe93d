# SPDX-License-Identifier: Apache-2.0
"""What lbctl may ask, one method per verb. Everything comes from the last Pass or from a target.

Verbs that change something only set what the loop will act on; ``apply`` stays the only writer.
"""

import ipaddress
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from lbagent import __version__
from lbagent.agent import state, views
from lbagent.agent.control import Arguments, Verb
from lbagent.agent.drain import Drain
from lbagent.agent.journal import Journal
from lbagent.agent.loop import Loop, Pass
from lbagent.agent.reload import Change
from lbagent.agent.targets import Cluster, Count, Kernel, Speaker
from lbagent.agent.world import World
from lbagent.config import Config
from lbagent.errors import ControlError
from lbagent.model import service
from lbagent.model.vip import Vip
from lbagent.xdp import frame, testrun

FRAME_BYTES = 2048


class ReadAgain(Protocol):
    """Reads the configuration file; takes it over unless it is only to be looked at. Raises ConfigError."""

    def __call__(self, *, only_look: bool) -> Change: ...


class Answers:
    """``settings`` gives the configuration in force, ``problems`` what is wrong now by check."""

    def __init__(
        self,
        *,
        world: World,
        loop: Loop,
        kernel: Kernel,
        speaker: Speaker,
        cluster: Cluster,
        drain: Drain,
        journal: Journal,
        settings: Callable[[], Config],
        problems: Callable[[], Mapping[str, str]],
        phase_changed: Callable[[], None],
        reload: ReadAgain,
    ) -> None:
        self._world = world
        self._loop = loop
        self._kernel = kernel
        self._speaker = speaker
        self._cluster = cluster
        self._drain = drain
        self._journal = journal
        self._settings = settings
        self._problems = problems
        self._phase_changed = phase_changed
        self._reload_now = reload

    def verbs(self) -> dict[str, Verb]:
        """By name, as lbctl says them."""
        tables = {
            "show services": views.services,
            "show vips": views.vips,
            "show backends": views.backends,
            "show rings": views.rings,
            "show routes": views.routes,
            "show pools": views.pools,
            "diff": views.diff,
        }
        looks = {
            "show peers": self._peers,
            "show drops": self._drops,
            "show config": self._config,
            "show events": self._events,
            "counters": self._counters,
            "status": self._status,
            "explain": self._explain,
            "trace": self._trace,
            "snapshot": self._snapshot,
        }
        changes = {"drain": self._leave, "undrain": self._come_back, "reload": self._reload, "confirm": self._confirm}
        return (
            {name: Verb(answer=partial(self._table, view)) for name, view in tables.items()}
            | {name: Verb(answer=answer) for name, answer in looks.items()}
            | {name: Verb(answer=answer, changes=True) for name, answer in changes.items()}
        )

    @property
    def _now(self) -> float:
        return self._world.clocks.monotonic()

    def _last(self) -> Pass:
        if self._loop.last is None:
            raise ControlError("no pass has been completed yet", hint="is the API server reachable? see the log")
        return self._loop.last

    # --- looking ---------------------------------------------------------------------------------

    async def _table(self, view: Callable[[Pass], Any], _arguments: Arguments) -> Any:
        return view(self._last())

    async def _peers(self, _arguments: Arguments) -> Any:
        return views.peers(self._speaker.observed().peers, self._now)

    async def _drops(self, _arguments: Arguments) -> Any:
        verdicts = self._kernel.counters().verdicts
        return [
            {"verdict": verdict.word, "packets": count.packets, "bytes": count.bytes, "meaning": verdict.sentence}
            for verdict, count in verdicts.items()
            if verdict.is_drop and count.packets
        ]

    async def _config(self, _arguments: Arguments) -> Any:
        # Keys of sessions are named by file, never held: there is no secret to leave out.
        return self._settings().model_dump(mode="json")

    async def _events(self, _arguments: Arguments) -> Any:
        return self._journal.rows(self._world.clocks.wall())

    async def _counters(self, _arguments: Arguments) -> Any:
        tally = self._kernel.counters()
        return {
            "at_s": self._now,
            "verdicts": {verdict.word: _numbers(count) for verdict, count in tally.verdicts.items()},
            "vips": {str(vip): _numbers(count) for vip, count in tally.vips.items()},
            "backends": {address: _numbers(count) for address, count in tally.backends.items()},
        }

    async def _explain(self, arguments: Arguments) -> Any:
        last = self._last()
        key = views.find(last, str(arguments.get("name", "")))
        row = views.explain(last, key)
        row["sentences"] = [
            {"about": s.about, "text": s.text, "is_obstacle": s.is_obstacle} for s in self._loop.explain(key)
        ]
        row["changes"] = [
            change for change in self._journal.rows(last.snapshot.wall) if change["about"] in row["about"]
        ]
        return row

    async def _snapshot(self, _arguments: Arguments) -> Any:
        return {"format": state.FORMAT, "snapshot": state.plain(self._last().snapshot)}

    async def _status(self, _arguments: Arguments) -> Any:
        last, now = self._loop.last, self._now
        kernel, speaker = self._kernel.observed(), self._speaker.observed()
        problems = {name: why for name, why in self._problems().items() if why}
        return {
            "host": self._settings().host.name,
            "version": __version__,
            "ok": not problems,
            "problems": problems,
            "lease": _lease(self._cluster, now),
            "api_age_s": round(self._cluster.age_s, 1),
            "from_memory": self._world.from_memory,
            "drain": self._drain.progress(now),
            "xdp": {name: str(mode) for name, mode in kernel.attached.items()},
            "peers": views.peers(speaker.peers, now),
            "services": views.counts(last) if last else {},
            "vips": {
                "wanted": len(last.desired.forwards) if last else 0,
                "programmed": len(kernel.forwards),
                "proven": len(last.observed.proven) if last else 0,
            },
            "routes": {"wanted": len(last.desired.routes) if last else 0, "announced": len(speaker.routes)},
            "pass": views.last_pass(last, now) if last else {},
        }

    async def _trace(self, arguments: Arguments) -> Any:
        packet = _packet(arguments)
        trial = self._kernel.trace(packet)
        backend = self._kernel.backend_address(trial.backend_id)
        row: dict[str, Any] = {
            "before": frame.text(packet),
            "verdict": trial.verdict.word,
            "meaning": trial.verdict.sentence,
            "action": trial.action,
            "backend": backend,
            "after": frame.text(trial.packet) if trial.action in ("tx", "redirect") else "",
        }
        if self._loop.last is not None:
            row |= views.around(self._loop.last, frame.layers(packet), backend)
        return row

    # --- changing --------------------------------------------------------------------------------

    async def _leave(self, _arguments: Arguments) -> Any:
        self._drain.begin(self._now)
        self._phase_changed()
        return self._drain.progress(self._now)

    async def _come_back(self, _arguments: Arguments) -> Any:
        self._drain.end(self._now)
        self._phase_changed()
        return self._drain.progress(self._now)

    async def _confirm(self, _arguments: Arguments) -> Any:
        held = views.held(self._last())
        self._world.confirmed = True
        self._loop.wake()
        return held

    async def _reload(self, arguments: Arguments) -> Any:
        only_look = bool(arguments.get("check"))
        return {"taken_over": not only_look, "changes": self._reload_now(only_look=only_look).words()}


def _lease(cluster: Cluster, now: float) -> str:
    if cluster.holds_lease(now):
        return "held by this host"
    holder = cluster.lease_holder.rpartition("_")[0] or cluster.lease_holder  # host name and a mark of its process
    return f"held by {holder}" if holder else "held by nobody"


def _numbers(count: Count) -> dict[str, int]:
    return {"packets": count.packets, "bytes": count.bytes}


def _packet(arguments: Arguments) -> bytes:
    """The frame to trace: given in hex, or made from addresses. Raises ControlError."""
    if text := arguments.get("packet"):
        try:
            packet = bytes.fromhex(str(text))
        except ValueError as error:
            raise ControlError(f"the packet is not hex: {error}") from error
        if not 14 <= len(packet) <= FRAME_BYTES:
            raise ControlError(f"a frame has 14 to {FRAME_BYTES} bytes, this one {len(packet)}")
        return packet
    try:
        vip = Vip(
            address=str(ipaddress.ip_address(str(arguments["destination"]))),
            protocol=service.Protocol(str(arguments["protocol"]).upper()),
            port=_port(arguments["destination_port"]),
        )
        source = ipaddress.ip_address(str(arguments["source"]))
        source_port = _port(arguments["source_port"])
    except (KeyError, ValueError, TypeError) as error:
        raise ControlError(f"cannot make a packet of this: {error}", hint="SRC[:PORT] DST:PORT/PROTO") from error
    if source.version != vip.family:
        raise ControlError("source and destination are of different families")
    if vip.protocol is service.Protocol.SCTP:
        raise ControlError("SCTP is not forwarded", hint="TCP or UDP")
    return testrun.packet_to(vip, source=str(source), source_port=source_port)


def _port(value: Any) -> int:
    port = int(value)
    if not 0 < port <= 65535:
        raise ValueError(f"{port} is not a port")
    return port
