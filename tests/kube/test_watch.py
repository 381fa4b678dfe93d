# SPDX-License-Identifier: Apache-2.0
"""One kind of object, kept equal to the cluster through everything an API server does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lbagent.backoff import Backoff
from lbagent.errors import KubeGone
from lbagent.kube import watch as module
from lbagent.kube.client import Client
from lbagent.kube.cluster import SERVICES
from lbagent.kube.watch import Watch
from lbagent.metrics import Metrics
from lbagent.model.service import Service, ServiceKey
from tests.fakes.apiserver import ApiServer
from tests.kube.conftest import TestClocks, eventually

WEB = ServiceKey("default", "web")


class Followed:
    """A Watch on Services with what it said."""

    def __init__(self, client: Client, clocks: TestClocks, metrics: Metrics, *, watch_timeout_s: float = 30) -> None:
        self.changes = 0
        self.differences: list[tuple[ServiceKey, bool]] = []
        self.metrics = metrics
        self.watch: Watch[Service] = Watch(
            SERVICES,
            client=client,
            clocks=clocks,
            metrics=metrics,
            watch_timeout_s=watch_timeout_s,
            difference=lambda key, value: self.differences.append((key, value is not None)),
        )

    def changed(self) -> None:
        self.changes += 1

    @property
    def names(self) -> set[str]:
        return {key.name for key in self.watch.objects}

    def restarts(self, cause: str) -> float:
        for line in self.metrics.render().decode().splitlines():
            if line.startswith("lbagent_watch_restarts_total") and f'cause="{cause}"' in line:
                return float(line.split()[-1])
        return 0.0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.watch.run(self.changed))
            try:
                await eventually(lambda: self.watch.listed)
                yield
            finally:
                task.cancel()


@pytest.fixture
def followed(client: Client, clocks: TestClocks, metrics: Metrics) -> Followed:
    return Followed(client, clocks, metrics)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures are repeated almost at once; how long to wait is test_backoff's affair."""
    monkeypatch.setattr(module, "Backoff", lambda **_: Backoff(first_s=0.01, cap_s=0.02))


def make(server: ApiServer, name: str = "web", **spec: Any) -> None:
    server.create("services", {"metadata": {"name": name}, "spec": {"ports": [{"port": 80}], **spec}})


def spoil(server: ApiServer, name: str = "web") -> None:
    """An object such as the API would never store."""
    kind = next(kind for kind in server.store.objects if kind.plural == "services")
    old = server.store.objects[kind]["default", name]
    spec = old["spec"] | {"ports": [{"port": "eighty", "protocol": "TCP"}]}
    server.store.record(kind, "MODIFIED", old | {"metadata": dict(old["metadata"]), "spec": spec})


async def test_what_is_there_is_listed_page_by_page(
    followed: Followed, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAGE", 2)
    for name in "abcde":
        make(server, name)
    assert followed.watch.listed is False
    async with followed.running():
        assert followed.names == set("abcde")
        assert followed.changes == 1
        lists = [path for method, path in server.requests if "limit=2" in path]
        assert len(lists) == 3


async def test_what_happens_later_is_followed(followed: Followed, server: ApiServer) -> None:
    async with followed.running():
        make(server)
        await eventually(lambda: WEB in followed.watch.objects)
        server.patch("services", ("default", "web"), {"metadata": {"labels": {"a": "b"}}})
        await eventually(lambda: followed.watch.objects[WEB].labels == {"a": "b"})
        server.delete("services", ("default", "web"))
        await eventually(lambda: WEB not in followed.watch.objects)
        assert followed.differences == [(WEB, True), (WEB, True), (WEB, False)]
        assert followed.changes == 4


async def test_a_change_that_no_planner_sees_wakes_nobody(followed: Followed, server: ApiServer) -> None:
    make(server)
    async with followed.running():
        before = followed.watch.objects[WEB].resource_version
        server.patch("services", ("default", "web"), {"metadata": {"managedFields": [{"manager": "other"}]}})
        server.patch("services", ("default", "web"), {"spec": {"internalTrafficPolicy": "Local"}})
        await eventually(lambda: followed.watch.objects[WEB].resource_version != before)
        assert followed.changes == 1


async def test_an_orderly_end_goes_on_from_where_it_was(client: Client, server: ApiServer, metrics: Metrics) -> None:
    followed = Followed(client, TestClocks(), metrics, watch_timeout_s=1)
    async with followed.running():
        await eventually(lambda: followed.restarts("expired") >= 1)
        make(server)
        await eventually(lambda: WEB in followed.watch.objects)
    assert sum("limit=500" in path for _, path in server.requests) == 1


async def test_a_dropped_connection_goes_on_from_where_it_was(followed: Followed, server: ApiServer) -> None:
    async with followed.running():
        await server.stop()
        make(server)
        await eventually(lambda: followed.restarts("error") >= 1)
        await server.start()
        await eventually(lambda: WEB in followed.watch.objects)
    assert sum("limit=500" in path for _, path in server.requests) == 1


async def test_what_is_known_is_served_while_the_server_is_away(followed: Followed, server: ApiServer) -> None:
    make(server)
    async with followed.running():
        await server.stop()
        await eventually(lambda: followed.restarts("error") >= 3)
        assert followed.names == {"web"}
        assert followed.watch.listed is True
        assert followed.changes == 1


async def test_an_expired_version_lists_again_and_finds_what_went_meanwhile(
    followed: Followed, server: ApiServer
) -> None:
    make(server, "gone")
    make(server, "stays")
    async with followed.running():
        await server.stop()
        server.delete("services", ("default", "gone"))
        make(server, "new")
        server.compact()
        await server.start()
        await eventually(lambda: followed.names == {"stays", "new"})
        assert followed.restarts("gone") == 1
        assert (ServiceKey("default", "gone"), False) in followed.differences
        assert followed.differences.count((ServiceKey("default", "stays"), True)) == 1


async def test_a_restored_etcd_is_noticed_by_versions_that_go_back(followed: Followed, server: ApiServer) -> None:
    make(server, "old")
    backup = server.backup()
    async with followed.running():
        make(server, "lost")
        await eventually(lambda: followed.names == {"old", "lost"})
        server.restore(backup)
        await eventually(lambda: followed.names == {"old"})
        assert followed.restarts("gone") == 1


async def test_after_a_long_absence_everything_is_listed_again(
    followed: Followed, server: ApiServer, clocks: TestClocks
) -> None:
    async with followed.running():
        await server.stop()
        for wait_s in (0.0, module.RESUME_S + 1):  # whole attempts, before and after
            clocks.ahead_s += wait_s
            failures = followed.restarts("error")
            await eventually(lambda: followed.restarts("error") > failures + 1)  # noqa: B023
        await server.start()
        await eventually(lambda: sum("limit=500" in path for _, path in server.requests) == 2)


async def test_a_silent_watch_is_begun_again(
    followed: Followed, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.5)
    async with followed.running():
        await asyncio.sleep(0)
        server.silent = True
        make(server)
        await eventually(lambda: followed.restarts("silent") >= 1)
        server.silent = False
        await eventually(lambda: WEB in followed.watch.objects)


async def test_bookmarks_are_asked_for_and_move_the_place_to_go_on_from(followed: Followed, server: ApiServer) -> None:
    async with followed.running():
        server.create("nodes", {"metadata": {"name": "n1"}})
        version = server.store.version
        heard_at = followed.watch.heard_at
        await eventually(lambda: followed.watch.heard_at > heard_at + 0.3)
        server.compact()
        server.drop_watches()
        await eventually(lambda: sum(f"resourceVersion={version}" in path for _, path in server.requests) == 1)
    watches = [path for _, path in server.requests if "watch=1" in path]
    assert all("allowWatchBookmarks=true" in path and "timeoutSeconds=30" in path for path in watches)


async def test_an_unreadable_object_is_named_and_costs_nobody_else_anything(
    followed: Followed, server: ApiServer
) -> None:
    make(server, "web")
    make(server, "good")
    spoil(server, "web")
    async with followed.running():
        assert followed.names == {"good"}
        assert followed.watch.problems == {WEB: "spec.ports[0].port is 'eighty', not a whole number"}
        make(server, "later")
        await eventually(lambda: followed.names == {"good", "later"})
        server.patch("services", ("default", "web"), {"spec": {"ports": [{"port": 80}]}})
        await eventually(lambda: followed.names == {"good", "later", "web"})
        assert followed.watch.problems == {}


async def test_an_object_that_becomes_unreadable_stays_what_it_was(followed: Followed, server: ApiServer) -> None:
    make(server)
    async with followed.running():
        known = followed.watch.objects[WEB]
        spoil(server)
        await eventually(lambda: followed.watch.problems)
        assert followed.watch.objects[WEB] is known
        followed.watch.list_again()
        listed_at = followed.watch.listed_at
        await eventually(lambda: followed.watch.listed_at > listed_at)
        assert followed.watch.objects[WEB] is known
        assert set(followed.watch.problems) == {WEB}
        server.delete("services", ("default", "web"))
        await eventually(lambda: not followed.watch.objects and not followed.watch.problems)


async def test_listing_again_leaves_the_watch_at_once_and_keeps_what_is_known(
    followed: Followed, server: ApiServer, clocks: TestClocks
) -> None:
    make(server)
    async with followed.running():
        known = followed.watch.objects[WEB]
        asked = clocks.monotonic()
        assert followed.watch.listed_at < asked
        followed.watch.list_again()
        followed.watch.list_again()
        assert followed.watch.listed is True
        await eventually(lambda: followed.watch.listed_at >= asked)
        assert followed.watch.objects[WEB] is known  # unchanged: the very same
        make(server, "b")
        await eventually(lambda: followed.names == {"web", "b"})


async def test_whoever_waits_for_a_newer_value_gets_it_and_none_when_it_goes(
    followed: Followed, server: ApiServer
) -> None:
    make(server)
    async with followed.running():
        old = followed.watch.objects[WEB]
        server.patch("services", ("default", "web"), {"metadata": {"labels": {"a": "b"}}})
        new = await followed.watch.newer(WEB, old)
        assert new is not None
        assert new.labels == {"a": "b"}
        server.delete("services", ("default", "web"))
        assert await followed.watch.newer(WEB, new) is None


async def test_an_unknown_event_is_passed_over(followed: Followed, server: ApiServer) -> None:
    async with followed.running():
        kind = next(kind for kind in server.store.objects if kind.plural == "services")
        make(server, "x")
        obj = server.store.objects[kind]["default", "x"]
        server.store.record(kind, "STRANGE", obj | {"metadata": dict(obj["metadata"])})
        make(server)
        await eventually(lambda: WEB in followed.watch.objects)


async def test_an_error_event_inside_a_200_is_an_error(followed: Followed, server: ApiServer) -> None:
    make(server)
    await followed.watch._list(followed.changed)
    make(server, "b")
    server.compact()
    with pytest.raises(KubeGone):
        await followed.watch.session(followed.changed)
