# SPDX-License-Identifier: Apache-2.0
"""One LB host over fakes, with a clock of its own: what the tests of the agent drive."""

import asyncio
from pathlib import Path

from lbagent.agent.answers import Answers
from lbagent.agent.apply import Writer
from lbagent.agent.drain import Drain
from lbagent.agent.journal import Journal
from lbagent.agent.loop import Loop, Pass
from lbagent.agent.reload import compare
from lbagent.agent.world import Clocks, World
from lbagent.config import DrainConfig, parse, parse_range
from lbagent.metrics import Metrics
from lbagent.model.pool import Pool
from lbagent.model.service import Endpoint, Node, NodeAddress, Port, Protocol, Service, ServiceKey
from lbagent.model.state import Settings, Snapshot
from tests.config.example import GOOD
from tests.fakes.targets import FakeCluster, FakeKernel, FakeSpeaker

WEB = ServiceKey("default", "web")


def one_service() -> FakeCluster:
    """A cluster with one Service, one pod, one node."""
    cluster = FakeCluster()
    cluster.services[WEB] = Service(
        key=WEB, uid="u1", ports=(Port(name="http", protocol=Protocol.TCP, port=80, node_port=30080),)
    )
    cluster.endpoints[WEB] = (Endpoint(address="10.244.1.2", node="node1"),)
    cluster.nodes["node1"] = Node(name="node1", addresses=(NodeAddress("InternalIP", "10.0.2.1"),))
    return cluster


class Machine:
    """Kernel and speaker outlive ``start``, as they outlive the real process."""

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
        self.metrics = Metrics(version="1", process=False)
        self.done = Journal()
        self.writer = Writer(
            kernel=self.kernel,
            speaker=self.speaker,
            cluster=self.cluster,
            world=self.world,
            metrics=self.metrics,
            journal=self.done,
        )
        self.passes: list[Pass] = []
        self.loop = Loop(
            world=self.world,
            kernel=self.kernel,
            speaker=self.speaker,
            writer=self.writer,
            metrics=self.metrics,
            completed=self.passes.append,
            interfaces=frozenset({"eth0"}),
        )

    def answers(self, folder: Path) -> Answers:
        """What lbctl would reach."""
        return Answers(
            world=self.world,
            loop=self.loop,
            kernel=self.kernel,
            speaker=self.speaker,
            cluster=self.cluster,
            drain=Drain(folder / "drain.json", DrainConfig(), now=self.now),
            journal=self.done,
            settings=lambda: parse(GOOD),
            problems=lambda: {"loop": ""},
            phase_changed=lambda: None,
            reload=lambda only_look: compare(parse(GOOD), parse(GOOD + "cool_down_s: 5\n"), None),
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
