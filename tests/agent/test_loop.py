# SPDX-License-Identifier: Apache-2.0
"""One pass after another over fakes: the whole life of a Service, and of a host."""

import asyncio
from dataclasses import replace

import pytest

from lbagent.agent.apply import Writer
from lbagent.agent.journal import Journal
from lbagent.agent.loop import Loop, Pass
from lbagent.agent.world import Clocks, World
from lbagent.config import parse_range
from lbagent.metrics import Metrics
from lbagent.model.pool import Pool
from lbagent.model.reason import Reason
from lbagent.model.service import Endpoint, Node, NodeAddress, Port, Protocol, Service, ServiceKey
from lbagent.model.state import Settings, Snapshot
from tests.fakes.targets import FakeCluster, FakeKernel, FakeSpeaker

WEB = ServiceKey("default", "web")


class Machine:
    """One LB host over fakes, with a clock of its own."""

    def __init__(self, cluster: FakeCluster, stored: Snapshot | None = None) -> None:
        self.now = 1000.0
        self.journal: list[str] = []
        self.kernel = FakeKernel(self.journal)
        self.speaker = FakeSpeaker(self.journal)
        self.cluster = cluster
        self.start(stored)

    def start(self, stored: Snapshot | None = None) -> None:
        """A new process on the same kernel and the same ExaBGP."""
        self.world = World(
            host="lb1",
            settings=Settings(pools=(Pool(name="p", ranges=(parse_range("192.0.2.0/28"),)),), settle_s=0.5),
            cluster=self.cluster,
            kernel=self.kernel,
            clocks=Clocks(monotonic=lambda: self.now, wall=lambda: self.now),
            stored=stored,
        )
        metrics = Metrics(version="1", process=False)
        self.writer = Writer(
            kernel=self.kernel,
            speaker=self.speaker,
            cluster=self.cluster,
            world=self.world,
            metrics=metrics,
            journal=Journal(),
        )
        self.passes: list[Pass] = []
        self.loop = Loop(
            world=self.world,
            kernel=self.kernel,
            speaker=self.speaker,
            writer=self.writer,
            metrics=metrics,
            completed=self.passes.append,
            interfaces=frozenset({"eth0"}),
        )

    async def settle(self) -> Pass:
        """Passes with cluster writes in between, until nothing is left to do."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.writer.run())
            for _ in range(10):
                last = self.loop.one_pass()
                for _ in range(20):
                    await asyncio.sleep(0)
            task.cancel()
        return last


@pytest.fixture
def cluster() -> FakeCluster:
    cluster = FakeCluster()
    cluster.services[WEB] = Service(
        key=WEB, uid="u1", ports=(Port(name="http", protocol=Protocol.TCP, port=80, node_port=30080),)
    )
    cluster.endpoints[WEB] = (Endpoint(address="10.244.1.2", node="node1"),)
    cluster.nodes["node1"] = Node(name="node1", addresses=(NodeAddress("InternalIP", "10.0.2.1"),))
    return cluster


async def test_a_service_gets_its_address_is_programmed_and_then_announced(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    last = await machine.settle()
    (address,) = cluster.services[WEB].status_addresses
    assert machine.journal == [f"program {address}:80/TCP", f"announce {address}"]
    assert last.desired.judgements[WEB].reason is Reason.SATISFIED
    assert cluster.writes == 1


async def test_a_settled_host_does_nothing_more(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    before = list(machine.journal)
    await machine.settle()
    assert machine.journal == before
    assert cluster.writes == 1


async def test_a_deleted_service_is_withdrawn_confirmed_settled_and_only_then_unprogrammed(
    cluster: FakeCluster,
) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (address,) = cluster.services[WEB].status_addresses
    machine.journal.clear()
    del cluster.services[WEB]
    await machine.settle()
    assert machine.journal == [f"withdraw {address}"]
    machine.speaker.confirm(machine.now)
    machine.now += 0.4
    await machine.settle()
    assert machine.journal == [f"withdraw {address}"]
    machine.now += 0.2
    await machine.settle()
    assert machine.journal == [f"withdraw {address}", f"unprogram {address}:80/TCP"]


async def test_a_restarted_agent_changes_nothing(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    machine.journal.clear()
    machine.start()
    await machine.settle()
    assert machine.journal == []


async def test_a_host_that_boots_without_the_api_serves_what_it_remembers(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    last = await machine.settle()
    silent = FakeCluster()
    silent.listed = silent.leads = False
    reborn = Machine(silent, stored=last.snapshot)
    await reborn.settle()
    (address,) = cluster.services[WEB].status_addresses
    assert reborn.journal == [f"program {address}:80/TCP", f"announce {address}"]
    assert reborn.world.from_memory


async def test_nothing_is_planned_from_a_cluster_that_was_never_listed(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    machine.journal.clear()
    cluster.listed = False
    cluster.services.clear()
    machine.start()
    await machine.settle()
    assert machine.journal == []


async def test_a_detached_program_withdraws_the_routes_and_attaching_brings_them_back(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (address,) = cluster.services[WEB].status_addresses
    machine.journal.clear()
    machine.kernel.attached.clear()
    last = await machine.settle()
    assert machine.journal == [f"withdraw {address}"]
    assert last.desired.judgements[WEB].reason is Reason.NOT_FORWARDING
    machine.kernel.attached["eth0"] = "native"
    machine.loop.one_pass(complete=True)
    await machine.settle()
    assert machine.journal == [f"withdraw {address}", f"announce {address}"]


async def test_a_proof_that_fails_later_withdraws_the_route(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (vip,) = machine.kernel.forwards
    machine.kernel.broken[vip] = "the packet was dropped"
    machine.loop.one_pass(complete=True)
    assert machine.speaker.state.routes == frozenset()


async def test_a_map_entry_lost_by_hand_is_programmed_again_without_a_flap(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (vip,) = machine.kernel.forwards
    machine.journal.clear()
    machine.kernel.forwards.clear()
    await machine.settle()
    assert machine.journal == [f"program {vip}"]


async def test_a_node_without_next_hop_serves_nobody(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    machine.kernel.unresolved.add("10.0.2.1")
    last = await machine.settle()
    assert last.desired.judgements[WEB].reason is Reason.NO_HEALTHY_BACKENDS
    assert machine.speaker.state.routes == frozenset()


async def test_a_host_that_does_not_hold_the_lease_writes_nothing(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    cluster.leads = False
    last = await machine.settle()
    assert cluster.writes == 0
    assert last.desired.judgements[WEB].reason is Reason.PENDING_ASSIGNMENT


async def test_two_services_never_get_one_address_while_writes_are_under_way(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    machine.loop.one_pass()  # the write is queued, not yet sent
    older = ServiceKey("default", "aaa")
    cluster.services[older] = replace(cluster.services[WEB], key=older, uid="u0", created=-5.0)
    cluster.endpoints[older] = cluster.endpoints[WEB]
    await machine.settle()
    addresses = [a for s in cluster.services.values() for a in s.status_addresses]
    assert len(addresses) == len(set(addresses)) == 2


async def test_a_released_address_rests_before_it_is_given_again(cluster: FakeCluster) -> None:
    machine = Machine(cluster)
    await machine.settle()
    (address,) = cluster.services[WEB].status_addresses
    del cluster.services[WEB]
    await machine.settle()
    assert machine.world.snapshot().reservations[address].service == WEB
    machine.now += 61
    assert machine.world.snapshot().reservations == {}
