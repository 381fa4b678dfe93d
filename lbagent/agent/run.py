# SPDX-License-Identifier: Apache-2.0
"""Wiring: the rooms, the loop, the sockets, the signals, in one TaskGroup.

SIGTERM and SIGINT end the process and leave kernel, routes and sessions as they are. SIGHUP reads
the configuration again; a broken one is refused and the last good one stays.
"""

import asyncio
import signal
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lbagent import __version__, config, log
from lbagent.agent import state, views
from lbagent.agent.apply import Writer
from lbagent.agent.control import Arguments, Control, Verb
from lbagent.agent.drain import Drain, Phase
from lbagent.agent.http import Pages
from lbagent.agent.loop import PERIOD_S, Loop, Pass
from lbagent.agent.targets import Cluster, Count, Kernel, Speaker
from lbagent.agent.world import Clocks, World
from lbagent.errors import ConfigError, ControlError
from lbagent.metrics import Metrics, Traffic
from lbagent.model.route import SessionState
from lbagent.notify import Notifier

_log = log.get("agent")

SAVE_EVERY_S = 5.0
SNAPSHOT_FILE = "snapshot.json"
DRAIN_FILE = "drain.json"
DRAIN_LOOK_S = 0.5


class Agent:
    """One LB host's daemon around three targets that are already open."""

    def __init__(
        self,
        *,
        path: Path,
        settings: config.Config,
        kernel: Kernel,
        speaker: Speaker,
        cluster: Cluster,
        metrics: Metrics,
        notifier: Notifier,
        clocks: Clocks,
    ) -> None:
        self._path = path
        self._config = settings
        self._kernel = kernel
        self._speaker = speaker
        self._cluster = cluster
        self._metrics = metrics
        self._notifier = notifier
        self._clocks = clocks
        self._is_ready = False
        self._saved: object = None
        self._world = World(
            host=settings.host.name,
            settings=settings.settings(),
            cluster=cluster,
            kernel=kernel,
            clocks=clocks,
            stored=_stored(settings.paths.state / SNAPSHOT_FILE),
        )
        self._drain = Drain(settings.paths.state / DRAIN_FILE, settings.bgp.drain, now=clocks.monotonic())
        self._take_phase()
        self._writer = Writer(kernel=kernel, speaker=speaker, cluster=cluster, world=self._world, metrics=metrics)
        self._loop = Loop(
            world=self._world,
            kernel=kernel,
            speaker=speaker,
            writer=self._writer,
            metrics=metrics,
            completed=self._completed,
            interfaces=frozenset(settings.xdp.interfaces),
        )

    def wake(self) -> None:
        """Ask for a pass; what the targets call when something has changed."""
        self._loop.wake()

    async def run(self) -> None:
        """Until SIGTERM. Whatever ends it, nothing that is forwarded or announced changes."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._hangup)
        control = Control(path=self._config.paths.run / "lbagent.sock", verbs=self._verbs())
        pages = Pages(
            listen=self._config.http.listen,
            metrics=self._metrics,
            refresh=self._refresh,
            alive=self._alive,
            ready=self._ready,
        )
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(task, name=name)
                for name, task in {
                    "control": control.run(),
                    "http": pages.run(),
                    "kernel": self._kernel.run(self.wake),
                    "speaker": self._speaker.run(),
                    "cluster": self._cluster.run(self.wake),
                    "writer": self._writer.run(),
                    "loop": self._loop.run(),
                    "memory": self._save_for_ever(),
                    "drain": self._drain_for_ever(),
                }.items()
            ]
            await stop.wait()
            self._notifier.stopping()
            _log.info("agent stopping", forwarding="stays", routes="stay")
            for task in tasks:
                task.cancel()

    # --- leaving and coming back -----------------------------------------------------------------

    def _take_phase(self) -> None:
        """Let the plan know how far this host has left."""
        self._world.draining = self._drain.phase is Phase.OUT
        self._world.softening = self._drain.policy if self._drain.phase is Phase.SOFTENING else None

    async def _drain_for_ever(self) -> None:
        while True:
            await asyncio.sleep(DRAIN_LOOK_S)
            if self._drain.phase is not Phase.SOFTENING:
                continue
            packets = sum(count.packets for count in self._kernel.counters().backends.values())
            if self._drain.advance(now=self._clocks.monotonic(), packets=packets):
                _log.info("host drained", routes="withdrawn", forwarding="stays")
                self._take_phase()
                self.wake()

    async def _leave(self, _arguments: Arguments) -> Any:
        self._drain.begin(self._clocks.monotonic())
        return self._phase_changed()

    async def _come_back(self, _arguments: Arguments) -> Any:
        self._drain.end(self._clocks.monotonic())
        return self._phase_changed()

    def _phase_changed(self) -> Any:
        self._take_phase()
        self.wake()
        _log.info("drain changed", phase=self._drain.phase.value)
        return self._drain.progress(self._clocks.monotonic())

    # --- after each pass ------------------------------------------------------------------------

    def _completed(self, last: Pass) -> None:
        self._notifier.watchdog()
        if not self._is_ready and not any(self._ready().values()):
            self._is_ready = True
            self._notifier.ready(f"{len(last.desired.forwards)} VIPs")
            _log.info("agent ready", vips=len(last.desired.forwards), routes=len(last.desired.routes))

    async def _save_for_ever(self) -> None:
        path = self._config.paths.state / SNAPSHOT_FILE
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            last = self._loop.last
            if last is None or self._world.from_memory:
                continue
            worth_keeping = (
                last.snapshot.services,
                last.snapshot.endpoints,
                last.snapshot.nodes,
                last.snapshot.reservations,
            )
            if worth_keeping == self._saved:
                continue
            try:
                await asyncio.to_thread(state.save, path, last.snapshot)
            except ControlError as error:
                _log.error("snapshot not saved", error=str(error))
            else:
                self._saved = worth_keeping

    def _refresh(self) -> None:
        """Bring the gauges up to date before a scrape."""
        last = self._loop.last
        speaker = self._speaker.observed()
        self._metrics.speaker(connected=speaker.connected, restarts=0)
        self._metrics.state_age(self._cluster.age_s)
        self._metrics.leader(is_leader=self._cluster.holds_lease(self._clocks.monotonic()))
        peers = speaker.peers.values()
        self._metrics.peers(
            up={p.name: p.session is SessionState.UP for p in peers},
            flaps={p.name: p.flaps for p in peers},
            announced={p.name: p.sent for p in peers},
        )
        if last is None:
            return
        self._metrics.services(views.counts(last))
        tally = self._kernel.counters()
        self._metrics.verdicts({verdict.word: _traffic(count) for verdict, count in tally.verdicts.items()})
        self._metrics.vips({str(vip): _traffic(count) for vip, count in tally.vips.items()})
        self._metrics.backends({address: _traffic(count) for address, count in tally.backends.items()})
        self._metrics.attached(last.attached)
        self._metrics.programmed(vips=len(last.kernel.forwards), proven=len(last.observed.proven))
        pools = views.pools(last)
        self._metrics.pools(
            assigned={p["pool"]: p["assigned"] for p in pools}, capacity={p["pool"]: p["addresses"] for p in pools}
        )
        fingerprint = 0
        for ring in last.desired.rings:
            fingerprint ^= int(ring, 16)
        self._metrics.rings(fingerprint)

    # --- health ----------------------------------------------------------------------------------

    def _alive(self) -> Mapping[str, str]:
        last = self._loop.last
        if last is None:
            return {"loop": ""}
        age_s = self._clocks.monotonic() - last.snapshot.now
        return {"loop": "" if age_s < 2 * PERIOD_S else f"no pass for {age_s:.0f} s"}

    def _ready(self) -> Mapping[str, str]:
        missing = frozenset(self._config.xdp.interfaces) - self._kernel.observed().attached.keys()
        known = "" if self._cluster.listed else "from memory" if self._world.from_memory else "not listed yet"
        return {
            "xdp": "not attached to " + ", ".join(sorted(missing)) if missing else "",
            "cluster": "" if self._world.knows_cluster else known,
            "speaker": "" if self._speaker.observed().connected else "ExaBGP's relay does not answer",
        }

    # --- verbs -----------------------------------------------------------------------------------

    def _verbs(self) -> dict[str, Verb]:
        tables = {
            "services": views.services,
            "vips": views.vips,
            "backends": views.backends,
            "rings": views.rings,
            "routes": views.routes,
            "pools": views.pools,
        }
        verbs = {f"show {noun}": Verb(answer=partial(self._show, view)) for noun, view in tables.items()}
        verbs["show peers"] = Verb(answer=self._show_peers)
        verbs["status"] = Verb(answer=self._status)
        verbs["explain"] = Verb(answer=self._explain)
        verbs["diff"] = Verb(answer=partial(self._show, views.diff))
        verbs["snapshot"] = Verb(answer=self._snapshot)
        verbs["drain"] = Verb(answer=self._leave, changes=True)
        verbs["undrain"] = Verb(answer=self._come_back, changes=True)
        verbs["reload"] = Verb(answer=self._reload, changes=True)
        return verbs

    def _last(self) -> Pass:
        if self._loop.last is None:
            raise ControlError("no pass has been completed yet", hint="is the API server reachable? see the log")
        return self._loop.last

    async def _show(self, view: Any, _arguments: Arguments) -> Any:
        return view(self._last())

    async def _show_peers(self, _arguments: Arguments) -> Any:
        return views.peers(self._speaker.observed().peers, self._clocks.monotonic())

    async def _explain(self, arguments: Arguments) -> Any:
        return views.explain(self._last(), str(arguments.get("name", "")))

    async def _snapshot(self, _arguments: Arguments) -> Any:
        return {"format": state.FORMAT, "snapshot": state.plain(self._last().snapshot)}

    async def _status(self, _arguments: Arguments) -> Any:
        last = self._loop.last
        now = self._clocks.monotonic()
        kernel = self._kernel.observed()
        speaker = self._speaker.observed()
        checks = {**self._alive(), **self._ready()}
        return {
            "host": self._config.host.name,
            "version": __version__,
            "ok": not any(checks.values()),
            "problems": {name: why for name, why in checks.items() if why},
            "lease": "held by this host" if self._cluster.holds_lease(now) else "held by another host, or by nobody",
            "api_age_s": round(self._cluster.age_s, 1),
            "from_memory": self._world.from_memory,
            "drain": self._drain.progress(now),
            "xdp": dict(kernel.attached),
            "peers": views.peers(speaker.peers, now),
            "services": views.counts(last) if last else {},
            "vips": {
                "wanted": len(last.desired.forwards) if last else 0,
                "programmed": len(kernel.forwards),
                "proven": len(last.observed.proven) if last else 0,
            },
            "routes": {
                "wanted": len(last.desired.routes) if last else 0,
                "announced": len(speaker.routes),
            },
            "pass": {
                "number": last.number,
                "age_s": round(now - last.snapshot.now, 1),
                "took_ms": round(last.took_s * 1e3, 1),
            }
            if last
            else {},
        }

    # --- configuration ---------------------------------------------------------------------------

    def _hangup(self) -> None:
        try:
            self._read_again()
        except ConfigError as error:
            _log.error("configuration refused, the last good one stays", problems="; ".join(error.problems))

    async def _reload(self, _arguments: Arguments) -> Any:
        return {"needs_restart": self._read_again()}

    def _read_again(self) -> list[str]:
        """Take over what may change at run time; names the sections that need a restart. Raises ConfigError."""
        self._notifier.reloading()
        try:
            fresh = config.load(self._path)
        except ConfigError:
            self._metrics.reloaded(outcome="failed")
            self._notifier.ready()
            raise
        fixed = [name for name in _FIXED_SECTIONS if getattr(fresh, name) != getattr(self._config, name)]
        self._config = fresh.model_copy(update={name: getattr(self._config, name) for name in fixed})
        self._world.settings = self._config.settings()
        self._metrics.reloaded(outcome="done")
        self._notifier.ready()
        _log.info("configuration read", needs_restart=",".join(fixed) or "nothing")
        self.wake()
        return fixed


_FIXED_SECTIONS = ("host", "kubernetes", "bgp", "xdp", "http", "paths", "log")


def _traffic(count: Count) -> Traffic:
    return Traffic(packets=count.packets, bytes=count.bytes)


def _stored(path: Path) -> Any:
    try:
        return state.load(path)
    except ControlError as error:
        _log.warning("last snapshot not readable", error=str(error))
        return None


async def run(path: Path, settings: config.Config) -> None:
    """Open the three targets and run the agent until SIGTERM. Raises LbagentError when one cannot be opened."""
    from lbagent.bgp.speaker import Speaker as BgpSpeaker  # the rooms are heavy: only the daemon loads them
    from lbagent.kube.cluster import Cluster as KubeCluster
    from lbagent.xdp.forwarder import Forwarder

    log.configure(level=settings.log.level, form=log.Form(settings.log.format))
    for folder in (settings.paths.run, settings.paths.state):
        _make(folder)
    clocks = Clocks(monotonic=time.monotonic, wall=time.time)  # noqa: TID251 - the one place where clocks come from
    metrics = Metrics(version=__version__)
    agent: Agent | None = None

    def changed() -> None:
        if agent is not None:
            agent.wake()

    kernel = Forwarder(
        settings.xdp,
        settings.paths,
        clock=clocks.monotonic,
        routers=frozenset(peer.address for peer in settings.bgp.peers),
    )
    await kernel.open()
    try:
        speaker = BgpSpeaker(settings.bgp, settings.paths, clock=clocks.monotonic, changed=changed)
        cluster = KubeCluster(settings.kubernetes, host=settings.host.name, clocks=clocks, metrics=metrics)
        agent = Agent(
            path=path,
            settings=settings,
            kernel=kernel,
            speaker=speaker,
            cluster=cluster,
            metrics=metrics,
            notifier=Notifier.from_environment(),
            clocks=clocks,
        )
        await agent.run()
    finally:
        kernel.close()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise ControlError(f"cannot make {folder}: {error}", hint="see paths in the configuration") from error
