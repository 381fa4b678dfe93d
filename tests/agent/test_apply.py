# SPDX-License-Identifier: Apache-2.0
"""The writer: order, guards, and what happens when a target says no."""

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from lbagent.agent.apply import Writer
from lbagent.agent.journal import Journal
from lbagent.agent.world import Clocks, World
from lbagent.metrics import Metrics
from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement, Reason
from lbagent.model.route import Route
from lbagent.model.service import Port, Protocol, Service, ServiceKey
from lbagent.model.state import Settings
from lbagent.model.step import Announce, Assign, Program, Report, Step, Unprogram, Withdraw
from lbagent.model.vip import RING_SLOTS, Backend, Forward, Mode, Ring, Vip
from tests.fakes.targets import FakeCluster, FakeKernel, FakeSpeaker

WEB = ServiceKey("default", "web")
VIP = Vip(address="192.0.2.1", protocol=Protocol.TCP, port=80)
OTHER = Vip(address="192.0.2.2", protocol=Protocol.TCP, port=80)
RING = Ring(fingerprint="00000000000000aa", backends=(Backend(address="10.0.2.1"),), slots=array("H", [1] * RING_SLOTS))
ROUTE = Route(prefix="192.0.2.1/32")


def forward(vip: Vip) -> Forward:
    return Forward(vip=vip, service=WEB, mode=Mode.NAT, ring=RING.fingerprint, node_port=30080)


def program(*vips: Vip) -> Program:
    return Program(forwards=tuple(forward(v) for v in vips), rings=(RING,))


class Bench:
    """A writer with fakes around it and a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.journal: list[str] = []
        self.kernel = FakeKernel(self.journal)
        self.speaker = FakeSpeaker(self.journal)
        self.cluster = FakeCluster()
        self.world = World(
            host="lb1",
            settings=Settings(),
            cluster=self.cluster,
            kernel=self.kernel,
            clocks=Clocks(monotonic=lambda: self.now, wall=lambda: self.now),
            stored=None,
        )
        self.writer = Writer(
            kernel=self.kernel,
            speaker=self.speaker,
            cluster=self.cluster,
            world=self.world,
            metrics=Metrics(version="1", process=False),
            journal=Journal(),
        )

    def perform(self, steps: list[Step]) -> None:
        held = self.kernel.observed()
        self.writer.perform(steps, proven=frozenset(vip for vip in held.forwards if vip not in held.unproven))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_steps_are_carried_out_in_their_order(bench: Bench) -> None:
    bench.perform([program(VIP), Announce(route=ROUTE, needs=frozenset({VIP}))])
    bench.perform([Withdraw(route=ROUTE), Unprogram(vips=(VIP,))])
    assert bench.journal == [
        "program 192.0.2.1:80/TCP",
        "announce 192.0.2.1",
        "withdraw 192.0.2.1",
        "unprogram 192.0.2.1:80/TCP",
    ]


def test_a_vip_whose_proof_fails_is_not_announced(bench: Bench) -> None:
    bench.kernel.broken[VIP] = "no backend"
    bench.perform([program(VIP, OTHER), Announce(route=ROUTE, needs=frozenset({VIP}))])
    assert bench.speaker.state.routes == frozenset()


def test_a_refused_vip_does_not_stop_the_others(bench: Bench) -> None:
    bench.kernel.refuses[VIP] = "table full"
    bench.perform(
        [
            program(VIP, OTHER),
            Announce(route=ROUTE, needs=frozenset({VIP})),
            Announce(route=Route(prefix="192.0.2.2/32"), needs=frozenset({OTHER})),
        ]
    )
    assert {r.prefix for r in bench.speaker.state.routes} == {"192.0.2.2/32"}


def test_a_failing_kernel_is_left_alone_for_a_while_and_nothing_is_announced(bench: Bench) -> None:
    bench.kernel.fails = True
    bench.perform([program(VIP), Announce(route=ROUTE, needs=frozenset({VIP}))])
    assert bench.journal == []
    bench.kernel.fails = False
    bench.now += 60
    bench.perform([program(VIP), Announce(route=ROUTE, needs=frozenset({VIP}))])
    assert bench.journal == ["program 192.0.2.1:80/TCP", "announce 192.0.2.1"]


def test_a_vip_that_is_still_announced_is_never_unprogrammed(bench: Bench) -> None:
    bench.perform([program(VIP), Announce(route=ROUTE, needs=frozenset({VIP}))])
    bench.perform([Unprogram(vips=(VIP,))])
    assert VIP in bench.kernel.forwards


def test_nothing_is_unprogrammed_while_the_speaker_has_not_told_its_routes(bench: Bench) -> None:
    bench.perform([program(VIP)])
    bench.speaker.state = replace(bench.speaker.state, adopted=False)
    bench.perform([Unprogram(vips=(VIP,))])
    assert VIP in bench.kernel.forwards


def test_changed_attributes_replace_the_route_of_a_prefix(bench: Bench) -> None:
    better = Route(prefix="192.0.2.1/32", next_hop="10.0.1.9")
    bench.perform([program(VIP), Announce(route=ROUTE, needs=frozenset({VIP}))])
    bench.perform([Announce(route=better, needs=frozenset({VIP}))])
    assert bench.speaker.state.routes == {better}


@asynccontextmanager
async def writing(bench: Bench) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(bench.writer.run())
        yield
        task.cancel()


def assign(*addresses: str) -> Assign:
    return Assign(assignment=Assignment(service=WEB, addresses=addresses, pools=("p",)))


async def test_an_address_under_way_is_pending_until_it_is_written(bench: Bench) -> None:
    bench.cluster.services[WEB] = Service(key=WEB, ports=(Port(name="", protocol=Protocol.TCP, port=80),))
    async with writing(bench):
        bench.perform([assign("192.0.2.1")])
        assert bench.world.snapshot().pending[WEB].addresses == ("192.0.2.1",)
        while bench.world.pending:
            await asyncio.sleep(0)
    assert bench.cluster.services[WEB].status_addresses == ("192.0.2.1",)


async def test_a_failed_write_is_no_longer_pending_so_that_the_next_pass_plans_again(bench: Bench) -> None:
    bench.cluster.services[WEB] = Service(key=WEB)
    bench.cluster.down = True
    async with writing(bench):
        bench.perform([assign("192.0.2.1")])
        while bench.world.pending:
            await asyncio.sleep(0)
    assert bench.cluster.writes == 0


async def test_the_same_report_is_sent_once(bench: Bench) -> None:
    report = Report(service=WEB, judgement=Judgement(reason=Reason.OUT_OF_IPS))
    async with writing(bench):
        for _ in range(3):
            bench.perform([report])
            for _ in range(10):
                await asyncio.sleep(0)
    assert bench.cluster.events == [(WEB, Judgement(reason=Reason.OUT_OF_IPS))]
