# SPDX-License-Identifier: Apache-2.0
"""The whole daemon over fakes: it becomes ready, answers, keeps its memory, and stops without a change."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lbagent import config
from lbagent.agent import run as daemon
from lbagent.agent import state
from lbagent.agent.drain import Phase
from lbagent.agent.world import Clocks
from lbagent.errors import ControlError
from lbagent.metrics import Metrics
from lbagent.model.state import Snapshot
from lbagent.notify import Notifier
from lbagent.probe.schedule import Prober
from tests.agent.machine import one_service
from tests.config.example import GOOD
from tests.fakes.targets import FakeCluster, FakeKernel, FakeSpeaker


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Host:
    """An Agent with everything it talks to, in a folder of its own."""

    def __init__(self, folder: Path, cluster: FakeCluster) -> None:
        self.folder = folder
        self.path = folder / "lbagent.yaml"
        self.http_port = free_port()
        self.path.write_text(
            GOOD
            + f"paths: {{run: {folder}, state: {folder}}}\nhttp: {{listen: '127.0.0.1:{self.http_port}'}}\n"
            + "probe: {enabled: false}\n"
        )
        self.journal: list[str] = []
        self.kernel = FakeKernel(self.journal)
        self.speaker = FakeSpeaker(self.journal)
        self.cluster = cluster
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.told.bind(str(folder / "notify"))

    def agent(self) -> daemon.Agent:
        settings = config.load(self.path)
        metrics = Metrics(version="1", process=False)
        return daemon.Agent(
            path=self.path,
            settings=settings,
            kernel=self.kernel,
            speaker=self.speaker,
            cluster=self.cluster,
            prober=Prober(
                settings.probe, clock=time.monotonic, source=lambda: 0.5, changed=lambda: None, probed=metrics.probed
            ),
            metrics=metrics,
            notifier=Notifier(str(self.folder / "notify")),
            clocks=Clocks(monotonic=time.monotonic, wall=time.time),
        )

    def notices(self) -> list[str]:
        found = []
        while True:
            try:
                found += self.told.recv(4096).decode().splitlines()
            except BlockingIOError:
                return found

    async def ask(self, verb: str, **arguments: Any) -> Any:
        reader, writer = await asyncio.open_unix_connection(self.folder / "lbagent.sock")
        writer.write(json.dumps({"verb": verb, "args": arguments}).encode() + b"\n")
        reply = json.loads(await reader.readline())
        writer.close()
        await writer.wait_closed()
        return reply


@pytest.fixture
def host(tmp_path: Path) -> Any:
    made = Host(tmp_path, one_service())
    yield made
    made.told.close()


@asynccontextmanager
async def running(host: Host) -> AsyncIterator[daemon.Agent]:
    agent = host.agent()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(agent.run())
        async with asyncio.timeout(10):
            while not host.speaker.state.routes:
                assert not task.done()
                await asyncio.sleep(0.01)
                agent.wake()
        yield agent
        os.kill(os.getpid(), signal.SIGTERM)


async def test_it_becomes_ready_answers_and_stops_without_a_change(host: Host) -> None:
    async with running(host):
        status = (await host.ask("status"))["result"]
        assert status["ok"]
        assert status["vips"] == {"wanted": 1, "programmed": 1, "proven": 1}
        before = list(host.journal)
    assert host.journal == before
    notices = host.notices()
    assert "READY=1" in notices
    assert "WATCHDOG=1" in notices
    assert "STOPPING=1" in notices


async def test_a_degraded_host_says_why(host: Host) -> None:
    async with running(host) as agent:
        host.kernel.attached.clear()
        agent.wake()
        reply = (await host.ask("status"))["result"]
        assert reply["problems"] == {"xdp": "not attached to eth0"}


async def test_a_broken_configuration_is_refused_and_the_last_good_one_stays(host: Host) -> None:
    async with running(host):
        good = host.path.read_text()
        host.path.write_text(good.replace("peer_as: 65101", "peer_as: x"))
        reply = await host.ask("reload")
        assert not reply["ok"]
        assert "bgp.peers[0].peer_as" in reply["error"]
        host.path.write_text(good + "cool_down_s: 7\n")
        assert (await host.ask("reload", check=True))["result"]["changes"] == ["cool_down_s: taken over"]
        assert (await host.ask("show config"))["result"]["cool_down_s"] == 60
        assert (await host.ask("reload"))["ok"]
        assert (await host.ask("show config"))["result"]["cool_down_s"] == 7


async def test_a_drained_host_softens_withdraws_and_comes_back(host: Host) -> None:
    async with running(host) as agent:
        (route,) = host.speaker.state.routes
        assert "graceful-shutdown" not in route.policy.communities
        assert (await host.ask("drain"))["result"]["phase"] == "softening"
        await until(lambda: any("graceful-shutdown" in r.policy.communities for r in host.speaker.state.routes))
        agent._drain._enter(Phase.OUT, time.monotonic())  # a quiet host would get there after seconds
        agent._phase_changed()
        await until(lambda: not host.speaker.state.routes)
        assert len(host.kernel.forwards) == 1  # whatever still arrives is served
        await host.ask("undrain")
        await until(lambda: bool(host.speaker.state.routes))


async def test_the_last_snapshot_is_kept_for_a_start_without_the_api(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "SAVE_EVERY_S", 0.01)
    async with running(host):
        kept = host.folder / "snapshot.json"
        await until(lambda: kept.exists() and '"ip":"203.0.113.' in kept.read_text())
        held = host.cluster.services
    host.cluster.services, host.cluster.listed, host.cluster.leads = {}, False, False
    host.kernel.forwards.clear()
    host.speaker.want(frozenset())
    async with running(host):
        assert (await host.ask("status"))["result"]["from_memory"]
        (vip,) = host.kernel.forwards
        assert [vip.address] == [a for s in held.values() for a in s.status_addresses]


async def test_a_snapshot_that_cannot_be_kept_is_a_problem_and_said_once(
    host: Host, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[Path] = []
    save = state.save

    def full(path: Path, snapshot: Snapshot) -> None:
        tries.append(path)
        raise ControlError("the disk is full")

    monkeypatch.setattr(daemon, "SAVE_EVERY_S", 0.01)
    monkeypatch.setattr(state, "save", full)
    async with running(host) as agent:
        await until(lambda: len(tries) > 3)
        assert (await host.ask("status"))["result"]["problems"] == {"memory": "the disk is full"}
        assert "".join(capsys.readouterr()).count("snapshot not saved") == 1
        monkeypatch.setattr(state, "save", save)
        await until(lambda: not agent._unsaved)
        assert (host.folder / "snapshot.json").exists()
        assert (await host.ask("status"))["result"]["ok"]


async def until(claim: Any) -> None:
    async with asyncio.timeout(10):
        while not claim():
            await asyncio.sleep(0.01)
