# SPDX-License-Identifier: Apache-2.0
"""One fault under load: what is promised, what is done, and the judgement.

A Scenario is data. ``run`` judges it by the client's own ledger of requests and by the BGP messages that the ToR
counted; nothing that the agent says of itself makes a promise kept.
"""

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from tests.lab import stages
from tests.lab.held import Held
from tests.lab.lab import Lab
from tests.lab.lbhost import LbHost
from tests.lab.poll import LabError, wait_for
from tests.lab.topology import NodeAddresses
from tests.lab.tor import Session
from tests.lab.traffic import Ledger, Load

HTTP = 80
RATE = 50.0  # requests per second
LIMIT_S = 400.0

UNDER_WAY = 3
"""Requests that may be under way at one moment: an answer takes some milliseconds, every 20 ms one begins."""
FALL_S = 3.0
"""docs/reference/health.md: three probes 0.5 s apart, 0.4 s for each to time out; here with room for a busy machine."""
READY_S = 20.0
"""A start of the agent on a busy machine with two cores."""
LEASE_S = 6.0 + 2.0 + 4.0
"""The lab's lease.duration_s, one lease.renew_s, and the time to write and read a status."""
PASS_S = 35.0
"""Without an event a pass, and a look at what the maps hold, comes every 30 s."""


@dataclass(frozen=True, kw_only=True)
class Expect:
    """What a promise allows.

    ``failed``: requests at most, None: not bounded in number; with 0 no open connection may break either.
    ``lost_for_s``: no request sent later than this after the fault may fail. ``messages``: BGP messages from LB
    hosts at most (keepalives apart), None: the fault is one of BGP. ``within_s``: repaired, seconds after the
    fault, or after its cause has gone where a fault lasts for a given time.
    """

    failed: int | None = 0
    lost_for_s: float = 0.0
    messages: int | None = 0
    within_s: float


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """``inject`` does it and returns when it is repaired; it raises LabError when that does not come.

    ``kube``: only with that form of the Kubernetes API; the embedded one forgets everything when it is killed.
    """

    name: str
    promise: str
    inject: "Callable[[Scene], None]"
    expect: Expect
    in_ci: bool = False
    kube: str = ""


@dataclass(kw_only=True)
class Scene:
    """What an ``inject`` works with: the lab under load, and where it notes what it did and saw."""

    lab: Lab
    address: str
    load: Load
    is_short: bool
    undo: ExitStack
    injected_s: float = 0.0
    repair_s: float | None = None
    said: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    messages: int | None = None
    _before: dict[tuple[str, int], Session] = field(default_factory=dict)

    @property
    def host(self) -> LbHost:
        """The LB host that suffers."""
        return self.lab.hosts["lb1"]

    @property
    def other(self) -> LbHost:
        return self.lab.hosts["lb2"]

    @property
    def empty_node(self) -> NodeAddresses:
        """A backend like the others, without a pod of the Service."""
        return self.lab.topology.nodes[-1]

    def another_service(self) -> str:
        """With one pod; it goes with the scene. No two have one name: an earlier one may still be leaving."""
        name = f"late-{next(_numbers)}"
        self.undo.callback(self.lab.undeploy, name)
        self.lab.deploy(name, pods=1)
        return name

    def rounds(self, full: int, *, short: int) -> int:
        """How often, or how long."""
        return short if self.is_short else full

    def say(self, text: str) -> None:
        """What happened, for the ledger."""
        self.said.append(text)

    def require(self, holds: object, otherwise: str) -> None:
        """A part of the promise; one that is broken does not end the scenario."""
        if not holds:
            self.broken.append(otherwise)

    def start(self) -> None:
        """From here on messages count."""
        self._before = sessions(self.lab)
        self.inject_now()

    def inject_now(self) -> None:
        """The fault is in, or its cause is gone: time to repair and lost requests count from here."""
        self.injected_s = time.monotonic()

    def repaired(self) -> None:
        self.repair_s = time.monotonic() - self.injected_s

    def stop_counting(self) -> None:
        """What is sent from here on is meant to be."""
        if self.messages is None:
            now = sessions(self.lab)
            self.messages = sum(messages(now[key]) - messages(self._before[key]) for key in now)

    def carried(self, host: LbHost, *, since_s: float) -> int:
        """Answered requests, sent since then, that went by this LB host."""
        return self.lab.tap.carriers(self.load.ledger.between(since_s))[host.name]

    def wait(self, what: str, look: Callable[[], object], *, limit_s: float) -> None:
        wait_for(what, look, limit_s=limit_s, logs=self.lab.logs)


_numbers = itertools.count(1)


def sessions(lab: Lab) -> dict[tuple[str, int], Session]:
    """As the ToR counts them, by LB host and family."""
    return {
        (host.name, family): lab.tor.session(host.lb, family=family) for host in lab.hosts.values() for family in (4, 6)
    }


def messages(session: Session) -> int:
    """Messages of an LB host that are no keepalives."""
    return session.updates_received + session.opens_received + session.notifications_received


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the ledger."""

    scenario: Scenario
    requests: Ledger
    messages: int
    route_changes: int
    lost_for_s: float
    repair_s: float | None
    said: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def kept(self) -> bool:
        return not self.broken

    def told(self) -> str:
        """For a person at a terminal, and for a test that fails."""
        repair = "never" if self.repair_s is None else f"{self.repair_s:.1f} s"
        lines = [
            f"{'kept  ' if self.kept else 'BROKEN'} {self.scenario.name}: {len(self.requests.failures)} of "
            f"{self.requests.sent} requests failed ({self.requests.retransmits} segments sent again), "
            f"{self.messages} BGP messages, {self.route_changes} route changes, repaired in {repair}",
            *(f"       {text}" for text in self.said),
            *(f"       BROKEN: {line}" for text in self.broken for line in text.splitlines()),
        ]
        return "\n".join(lines)


def settle(lab: Lab) -> None:
    """Every host runs, is ready and has its sessions; the tap is empty."""
    for host in lab.hosts.values():
        if not host.namespace.exists:
            host.power_on()
        if host.speaker is None or not host.speaker.alive:
            host.start_speaker()
        if host.agent is None or not host.agent.alive:
            host.start_agent()
    for host in lab.hosts.values():
        host.wait_ready()
        for family in (4, 6):
            stages.wait_session(lab, host.name, family)
    lab.tap.clear()


def run(lab: Lab, scenario: Scenario, address: str, *, is_short: bool = False) -> Entry:
    """One scenario against a Service that both hosts serve, and that has no pod on the last node."""
    settle(lab)
    lab.wait_routes(address, tuple(lab.hosts), limit_s=60)
    undone = ""
    with ExitStack() as undo:
        with (
            lab.tor.watching_routes(address) as changes,
            Held(lab.client, address, HTTP) as held,
            Load(lab.client, address, HTTP, rate=RATE, limit_s=LIMIT_S) as load,
        ):
            scene = Scene(lab=lab, address=address, load=load, is_short=is_short, undo=undo)
            time.sleep(1.0)
            scene.start()
            try:
                scenario.inject(scene)
            except (LabError, OSError) as error:
                scene.broken.append(str(error))
            time.sleep(1.0)
            scene.stop_counting()
            survivors = held.survivors()
        scene.say(f"{survivors} of {held.count} open connections outlived it")
        scene.require(survivors == held.count or scenario.expect.failed != 0, "an open connection broke")
        try:
            undo.close()
        except (LabError, OSError) as error:
            undone = f"not undone: {error}"
    return judge(scenario, scene, load.ledger, route_changes=len(changes), problems=[undone] if undone else [])


def judge(scenario: Scenario, scene: Scene, requests: Ledger, *, route_changes: int, problems: list[str]) -> Entry:
    """Compare what happened with what the promise allows."""
    expect = scenario.expect
    failures, sent = requests.failures, scene.messages or 0
    lost_for_s = max((one.sent_s - scene.injected_s for one in failures), default=0.0)
    broken = [*scene.broken, *problems]
    if expect.failed is not None and len(failures) > expect.failed:
        broken.append(f"{len(failures)} requests failed, {expect.failed} may: {requests.by_error}")
    if failures and lost_for_s > expect.lost_for_s:
        broken.append(f"a request failed that was sent {lost_for_s:.1f} s after the fault; {expect.lost_for_s:g} s may")
    if expect.messages is not None and sent > expect.messages:
        broken.append(f"{sent} BGP messages, {expect.messages} may")
    if expect.messages == 0 and route_changes:
        broken.append(f"the ToR changed its route {route_changes} times")
    if scene.repair_s is not None and scene.repair_s > expect.within_s:
        broken.append(f"repaired after {scene.repair_s:.1f} s, promised {expect.within_s:g} s")
    if scene.repair_s is None and not broken:
        broken.append("not repaired")
    return Entry(
        scenario=scenario,
        requests=requests,
        messages=sent,
        route_changes=route_changes,
        lost_for_s=lost_for_s,
        repair_s=scene.repair_s,
        said=tuple(scene.said),
        broken=tuple(broken),
    )
