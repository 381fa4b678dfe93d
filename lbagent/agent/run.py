# SPDX-License-Identifier: Apache-2.0
"""Wiring: the rooms, the loop, the sockets, the signals, in one TaskGroup.

SIGTERM and SIGINT end the process and leave kernel, routes and sessions as they are. SIGHUP reads
the configuration again; a broken one is refused and the last good one stays.
"""

import asyncio
import gc
import math
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lbagent import __version__, config, log
from lbagent.agent import gauges, reload, state
from lbagent.agent.answers import Answers
from lbagent.agent.apply import Writer
from lbagent.agent.control import Control, refuse_second
from lbagent.agent.drain import Drain, Phase
from lbagent.agent.http import Pages
from lbagent.agent.journal import Journal
from lbagent.agent.loop import PERIOD_S, Loop, Pass
from lbagent.agent.targets import Cluster, Kernel, Speaker
from lbagent.agent.world import Clocks, World
from lbagent.errors import ConfigError, ControlError
from lbagent.metrics import Metrics
from lbagent.notify import Notifier
from lbagent.plan.watchlist import watchlist
from lbagent.probe.schedule import Prober

_log = log.get("agent")

SAVE_EVERY_S = 5.0
SOCKET = "lbagent.sock"
SNAPSHOT_FILE = "snapshot.json"
DRAIN_FILE = "drain.json"
DRAIN_LOOK_S = 0.5
TARGETS_S = 0.2
"""A new target waits at most this long for its first probe; until then it counts as well."""


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
        prober: Prober,
        metrics: Metrics,
        notifier: Notifier,
        clocks: Clocks,
    ) -> None:
        self._path = path
        self._config = settings
        self._kernel = kernel
        self._speaker = speaker
        self._cluster = cluster
        self._prober = prober
        self._metrics = metrics
        self._notifier = notifier
        self._clocks = clocks
        self._is_ready = False
        self._saved: object = None
        self._unsaved = ""
        self._world = World(
            host=settings.host.name,
            settings=settings.settings(),
            cluster=cluster,
            kernel=kernel,
            clocks=clocks,
            stored=_stored(settings.paths.state / SNAPSHOT_FILE),
        )
        self._world.health = prober.pulses
        self._world.withdraw_after_s = _withdraw_after_s(settings.kubernetes)
        self._drain = Drain(settings.paths.state / DRAIN_FILE, settings.bgp.drain, now=clocks.monotonic())
        self._take_phase()
        self._journal = Journal()
        self._writer = Writer(
            kernel=kernel,
            speaker=speaker,
            cluster=cluster,
            world=self._world,
            metrics=metrics,
            journal=self._journal,
        )
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
        control = Control(path=self._config.paths.run / SOCKET, verbs=self._answers().verbs())
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
                    "prober": self._prober.run(),
                    "targets": self._choose_targets_for_ever(),
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

    def _answers(self) -> Answers:
        return Answers(
            world=self._world,
            loop=self._loop,
            kernel=self._kernel,
            speaker=self._speaker,
            cluster=self._cluster,
            drain=self._drain,
            journal=self._journal,
            settings=lambda: self._config,
            problems=self._problems,
            phase_changed=self._phase_changed,
            reload=self._read_again,
        )

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
                self._phase_changed()

    def _phase_changed(self) -> None:
        self._take_phase()
        _log.info("drain changed", phase=self._drain.phase.value)
        self.wake()

    # --- after each pass ------------------------------------------------------------------------

    def _completed(self, last: Pass) -> None:
        self._notifier.watchdog()
        if not self._is_ready and not any(self._ready().values()):
            self._is_ready = True
            gc.freeze()  # what was listed stays: collections need not walk 10,000 Services again and again
            self._notifier.ready(f"{len(last.desired.forwards)} VIPs")
            _log.info("agent ready", vips=len(last.desired.forwards), routes=len(last.desired.routes))

    async def _choose_targets_for_ever(self) -> None:
        number = 0
        while True:
            last = self._loop.last
            if last is not None and last.number != number:
                number = last.number
                self._prober.want(watchlist(last.snapshot))
            await asyncio.sleep(TARGETS_S)

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
                if str(error) != self._unsaved:  # tried again every few seconds, said once
                    _log.error("snapshot not saved", error=str(error))
                self._unsaved = str(error)
            else:
                self._saved, self._unsaved = worth_keeping, ""

    def _refresh(self) -> None:
        gauges.refresh(
            self._metrics,
            last=self._loop.last,
            kernel=self._kernel,
            speaker=self._speaker,
            cluster=self._cluster,
            now=self._clocks.monotonic(),
        )

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

    def _problems(self) -> Mapping[str, str]:
        guard = self._loop.last.held_why if self._loop.last else ""
        return {**self._alive(), **self._ready(), "guard": guard, "memory": self._unsaved}

    # --- configuration ---------------------------------------------------------------------------

    def _hangup(self) -> None:
        try:
            self._read_again(only_look=False)
        except ConfigError as error:
            _log.error("configuration refused, the last good one stays", problems="; ".join(error.problems))

    def _read_again(self, *, only_look: bool) -> reload.Change:
        """Take over what may change at run time. Raises ConfigError; then the last good one stays."""
        self._notifier.reloading()
        try:
            fresh = config.load(self._path)
            change = reload.compare(self._config, fresh, self._loop.last.snapshot if self._loop.last else None)
            if only_look:
                return change
            reload.permit(change)
        except ConfigError:
            self._metrics.reloaded(outcome="failed")
            raise
        finally:
            self._notifier.ready()
        self._config = fresh.model_copy(update={name: getattr(self._config, name) for name in change.needs_restart})
        self._world.settings = self._config.settings()
        self._world.confirmed = bool(change.sections)
        self._drain.settings = self._config.bgp.drain
        self._prober.configure(self._config.probe)
        if "bgp" in change.sections:
            self._speaker.reconfigure(self._config.bgp)
        self._metrics.reloaded(outcome="done")
        _log.info("configuration read", changed=",".join(change.sections) or "nothing")
        self.wake()
        return change


def _withdraw_after_s(settings: config.Kubernetes) -> float:
    """Age of the API's last word after which this host withdraws; never, unless the file says so."""
    withdraws = settings.stale_after_s > 0 and settings.stale_action is config.StaleAction.WITHDRAW
    return settings.stale_after_s if withdraws else math.inf


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
    await refuse_second(settings.paths.run / SOCKET)
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
        prober = Prober(
            settings.probe,
            clock=clocks.monotonic,
            source=random.random,
            changed=changed,
            probed=metrics.probed,
        )
        agent = Agent(
            path=path,
            settings=settings,
            kernel=kernel,
            speaker=speaker,
            cluster=cluster,
            prober=prober,
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
