# SPDX-License-Identifier: Apache-2.0
"""The pages: metrics are refreshed before they are read, health says why not."""

from aiohttp.test_utils import TestClient, TestServer

from lbagent.agent.http import Pages
from lbagent.metrics import Metrics


def pages(alive: dict[str, str], ready: dict[str, str], refreshed: list[int]) -> Pages:
    metrics = Metrics(version="1", process=False)
    return Pages(
        listen="127.0.0.1:0",
        metrics=metrics,
        refresh=lambda: refreshed.append(1),
        alive=lambda: alive,
        ready=lambda: ready,
    )


async def test_metrics_are_refreshed_and_rendered() -> None:
    refreshed: list[int] = []
    async with TestClient(TestServer(pages({}, {}, refreshed).application())) as client:
        reply = await client.get("/metrics")
        assert 'lbagent_build_info{version="1"} 1.0' in await reply.text()
    assert refreshed == [1]


async def test_health_is_200_when_every_check_is_fine() -> None:
    async with TestClient(TestServer(pages({"loop": ""}, {}, []).application())) as client:
        reply = await client.get("/healthz")
        assert reply.status == 200
        assert await reply.json() == {"ok": True, "checks": {"loop": "ok"}}


async def test_readiness_is_503_with_the_reason() -> None:
    ready = {"xdp": "not attached to eth0", "cluster": ""}
    async with TestClient(TestServer(pages({}, ready, []).application())) as client:
        reply = await client.get("/readyz")
        assert reply.status == 503
        assert await reply.json() == {"ok": False, "checks": {"xdp": "not attached to eth0", "cluster": "ok"}}
