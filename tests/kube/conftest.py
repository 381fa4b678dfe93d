# SPDX-License-Identifier: Apache-2.0
"""An API emulator per test, and what speaks to it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lbagent.kube.client import Client
from lbagent.metrics import Metrics
from tests.fakes.apiserver import ApiServer, write_kubeconfig

TOKEN = "secret"


@dataclass
class TestClocks:
    """Real time, which a test may push forward; wall time stands still."""

    __test__ = False
    ahead_s: float = 0.0
    wall: Callable[[], float] = field(default=lambda: 1_800_000_000.0)

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with ApiServer(tokens={TOKEN: "lbagent"}, bookmark_s=0.2) as running:
        yield running


@pytest.fixture
def clocks() -> TestClocks:
    return TestClocks()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="test", process=False)


@pytest.fixture
def kubeconfig(server: ApiServer, tmp_path: Path) -> Path:
    return write_kubeconfig(tmp_path / "kubeconfig", server.url, token=TOKEN)


@pytest.fixture
async def client(kubeconfig: Path, clocks: TestClocks) -> AsyncIterator[Client]:
    made = Client(kubeconfig, timeout_s=2.0, clock=clocks.monotonic)
    yield made
    await made.close()


async def eventually(look: Callable[[], object], *, limit_s: float = 10.0) -> None:
    """Poll until ``look`` says something true."""
    async with asyncio.timeout(limit_s):
        while not look():
            await asyncio.sleep(0.01)
