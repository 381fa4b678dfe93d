# SPDX-License-Identifier: Apache-2.0
"""Targets in memory: a kernel of dictionaries, a speaker that obeys, a cluster that remembers.

tests/lab runs the same agent against the real ones; what a fake claims is held against them there.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lbagent.config import Bgp
from lbagent.errors import KubeUnavailable, LbagentError, TableFull, XdpError
from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement
from lbagent.model.route import PeerState, Route
from lbagent.model.service import Endpoint, Ingress, Node, Service, ServiceKey
from lbagent.model.vip import Forward, Ring, Vip


@dataclass(frozen=True, kw_only=True)
class FakeKernelState:
    forwards: Mapping[Vip, Forward] = field(default_factory=dict)
    rings: frozenset[str] = frozenset()
    unproven: Mapping[Vip, str] = field(default_factory=dict)
    attached: Mapping[str, str] = field(default_factory=dict)
    obstacles: Mapping[str, str] = field(default_factory=dict)
    repairs: int = 0


@dataclass(frozen=True, kw_only=True)
class FakeCount:
    packets: int = 0
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class FakeTally:
    verdicts: Mapping[str, FakeCount] = field(default_factory=dict)
    vips: Mapping[Vip, FakeCount] = field(default_factory=dict)
    backends: Mapping[str, FakeCount] = field(default_factory=dict)


class FakeKernel:
    """Holds Forwards in a dict. ``broken`` Vips fail their proof, ``fails`` makes every change raise."""

    def __init__(self, journal: list[str] | None = None) -> None:
        self.journal = journal if journal is not None else []
        self.forwards: dict[Vip, Forward] = {}
        self.rings: dict[str, Ring] = {}
        self.attached: dict[str, str] = {"eth0": "native"}
        self.broken: dict[Vip, str] = {}
        self.refuses: dict[Vip, str] = {}
        self.fails = False
        self.repairs = 0
        self.unresolved: set[str] = set()
        self.tracked: frozenset[str] = frozenset()

    @property
    def reachable(self) -> frozenset[str]:
        return self.tracked - self.unresolved

    def track(self, addresses: frozenset[str]) -> None:
        self.tracked = addresses

    def observed(self) -> FakeKernelState:
        return FakeKernelState(
            forwards=dict(self.forwards),
            rings=frozenset(self.rings),
            unproven={vip: why for vip, why in self.prove(list(self.forwards)).items() if why},
            attached=dict(self.attached),
            repairs=self.repairs,
        )

    def program(self, forwards: Sequence[Forward], rings: Sequence[Ring]) -> Mapping[Vip, LbagentError]:
        if self.fails:
            raise XdpError("the kernel said no")
        self.rings |= {ring.fingerprint: ring for ring in rings}
        for forward in forwards:
            if forward.vip not in self.refuses:
                assert forward.ring in self.rings, "a ring is programmed before the Vip that uses it"
                self.forwards[forward.vip] = forward
                self.journal.append(f"program {forward.vip}")
        return {f.vip: TableFull(self.refuses[f.vip]) for f in forwards if f.vip in self.refuses}

    def unprogram(self, vips: Sequence[Vip]) -> None:
        if self.fails:
            raise XdpError("the kernel said no")
        for vip in vips:
            self.forwards.pop(vip, None)
            self.journal.append(f"unprogram {vip}")

    def prove(self, vips: Sequence[Vip]) -> Mapping[Vip, str]:
        return {vip: self.broken.get(vip, "" if vip in self.forwards else "not programmed") for vip in vips}

    def trace(self, packet: bytes) -> Any:
        raise XdpError("a fake runs no packets")

    def backend_address(self, number: int) -> str:
        return ""

    def counters(self) -> FakeTally:
        return FakeTally(vips={vip: FakeCount(packets=1, bytes=64) for vip in self.forwards})

    async def run(self, changed: Callable[[], None]) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class FakeSpeakerState:
    connected: bool = True
    adopted: bool = True
    restarts: int = 0
    routes: frozenset[Route] = frozenset()
    attracting: Mapping[str, float] = field(default_factory=dict)
    peers: Mapping[str, PeerState] = field(default_factory=dict)


class FakeSpeaker:
    """Announces at once; a withdrawal is confirmed at the time ``confirm`` is called."""

    def __init__(self, journal: list[str] | None = None) -> None:
        self.journal = journal if journal is not None else []
        self.state = FakeSpeakerState()

    def want(self, routes: frozenset[Route]) -> None:
        gone = {route.address for route in self.state.routes} - {route.address for route in routes}
        self.journal += [f"withdraw {address}" for address in sorted(gone)]
        self.journal += [f"announce {route.address}" for route in sorted(routes - self.state.routes, key=str)]
        attracting = {a: u for a, u in self.state.attracting.items() if a not in {r.address for r in routes}}
        attracting |= dict.fromkeys(gone, float("inf"))
        self.state = replace(self.state, routes=routes, attracting=attracting)

    def reconfigure(self, bgp: Bgp) -> None:
        pass

    def confirm(self, now: float) -> None:
        self.state = replace(self.state, attracting=dict.fromkeys(self.state.attracting, now))

    def observed(self) -> FakeSpeakerState:
        return self.state

    async def run(self) -> None:
        await asyncio.Event().wait()


class FakeCluster:
    """Objects in dicts; a status write shows up at once. ``down`` makes writes fail."""

    def __init__(self) -> None:
        self.services: dict[ServiceKey, Service] = {}
        self.endpoints: dict[ServiceKey, tuple[Endpoint, ...]] = {}
        self.nodes: dict[str, Node] = {}
        self.namespace_labels: dict[str, dict[str, str]] = {}
        self.listed = True
        self.leads = True
        self.down = False
        self.age_s = 0.0
        self.lease_holder = "lb1_0"
        self.events: list[tuple[ServiceKey, Judgement]] = []
        self.writes = 0

    def holds_lease(self, now: float) -> bool:
        return self.leads

    async def assign(self, assignment: Assignment) -> None:
        await asyncio.sleep(0)
        if self.down:
            raise KubeUnavailable("connection refused")
        self.writes += 1
        service = self.services[assignment.service]
        ingress = tuple(Ingress(ip=address, ip_mode=assignment.ip_mode) for address in assignment.addresses)
        self.services[service.key] = replace(service, ingress=ingress)

    async def release(self, service: ServiceKey, addresses: tuple[str, ...]) -> None:
        if self.down:
            raise KubeUnavailable("connection refused")
        if service in self.services:
            self.services[service] = replace(self.services[service], ingress=())

    async def report(self, service: ServiceKey, judgement: Judgement) -> None:
        self.events.append((service, judgement))

    async def run(self, changed: Callable[[], None]) -> None:
        await asyncio.Event().wait()
