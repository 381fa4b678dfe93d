# SPDX-License-Identifier: Apache-2.0
"""The agent's door: everything listed, endpoints gathered, a tenure that begins with a list."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lbagent.config import Kubernetes, LeaseConfig
from lbagent.kube import parse
from lbagent.kube.client import Client
from lbagent.kube.cluster import Cluster
from lbagent.metrics import Metrics
from lbagent.model.pool import Assignment
from lbagent.model.service import ServiceKey
from tests.fakes.apiserver import ApiServer
from tests.kube.conftest import TestClocks, eventually

WEB = ServiceKey("default", "web")
D = 1.2
LEASE = LeaseConfig(duration_s=D, renew_s=0.1)


def make_cluster(kubeconfig: Path, clocks: TestClocks, *, host: str = "lb1", **settings: Any) -> Cluster:
    return Cluster(
        Kubernetes(kubeconfig=kubeconfig, lease=LEASE, **settings),
        host=host,
        clocks=clocks,
        metrics=Metrics(version="test", process=False),
    )


@contextlib.asynccontextmanager
async def running(cluster: Cluster) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(cluster.run(lambda: None))
        try:
            yield
        finally:
            task.cancel()


@pytest.fixture
def cluster(kubeconfig: Path, clocks: TestClocks) -> Cluster:
    return make_cluster(kubeconfig, clocks)


def make_slice(server: ApiServer, name: str, *addresses: str, service: str = "web") -> None:
    body = {
        "metadata": {"name": name, "labels": {parse.SERVICE_OF_SLICE_LABEL: service}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "nodeName": "n1"} for address in addresses],
    }
    if ("default", name) in server.objects("endpointslices"):
        body["metadata"]["namespace"] = "default"  # type: ignore[index]
        server.replace("endpointslices", body)
    else:
        server.create("endpointslices", body, namespace="default")


def addresses(cluster: Cluster, service: str = "web") -> list[str]:
    return [endpoint.address for endpoint in cluster.endpoints.get(ServiceKey("default", service), ())]


async def test_all_four_kinds_are_there_once_it_is_listed(cluster: Cluster, server: ApiServer) -> None:
    server.create("services", {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}})
    server.create("nodes", {"metadata": {"name": "n1"}})
    make_slice(server, "web-1", "10.0.0.1")
    assert not cluster.listed
    async with running(cluster):
        await eventually(lambda: cluster.listed)
        assert set(cluster.services) == {WEB}
        assert set(cluster.nodes) == {"n1"}
        assert addresses(cluster) == ["10.0.0.1"]
        assert cluster.namespace_labels["default"] == {"kubernetes.io/metadata.name": "default"}
        assert cluster.age_s < 1


@pytest.mark.parametrize("kind", ["services", "endpointslices", "nodes", "namespaces"])
async def test_it_is_not_listed_while_one_kind_is_missing(cluster: Cluster, server: ApiServer, kind: str) -> None:
    server.forbidden.add(("list", kind))
    async with running(cluster):
        await asyncio.sleep(0.2)
        assert not cluster.listed
        server.forbidden.clear()
        await eventually(lambda: cluster.listed)


async def test_endpoints_of_a_service_come_from_all_its_slices_in_their_order(
    cluster: Cluster, server: ApiServer
) -> None:
    make_slice(server, "web-b", "10.0.0.2")
    async with running(cluster):
        await eventually(lambda: addresses(cluster) == ["10.0.0.2"])
        make_slice(server, "web-a", "10.0.0.1", "10.0.0.3")
        await eventually(lambda: addresses(cluster) == ["10.0.0.1", "10.0.0.3", "10.0.0.2"])
        make_slice(server, "web-a")
        await eventually(lambda: addresses(cluster) == ["10.0.0.2"])
        server.delete("endpointslices", ("default", "web-b"))
        await eventually(lambda: addresses(cluster) == [])
        server.delete("endpointslices", ("default", "web-a"))
        await eventually(lambda: WEB not in cluster.endpoints)


async def test_a_slice_that_changes_its_owner_moves_its_endpoints(cluster: Cluster, server: ApiServer) -> None:
    make_slice(server, "x", "10.0.0.1", service="web")
    async with running(cluster):
        await eventually(lambda: addresses(cluster) == ["10.0.0.1"])
        make_slice(server, "x", "10.0.0.1", service="api")
        await eventually(lambda: addresses(cluster, "api") == ["10.0.0.1"])
        assert WEB not in cluster.endpoints


async def test_unreadable_objects_are_named_by_kind(cluster: Cluster, server: ApiServer) -> None:
    server.create("nodes", {"metadata": {"name": "n1"}, "spec": {"taints": [{"key": 5}]}})
    async with running(cluster):
        await eventually(lambda: cluster.listed)
        assert cluster.problems == {"nodes n1": "spec.taints[0].key is 5, not text"}


async def test_age_grows_while_the_server_is_away_and_what_is_known_stays(
    cluster: Cluster, server: ApiServer, clocks: TestClocks
) -> None:
    server.create("nodes", {"metadata": {"name": "n1"}})
    async with running(cluster):
        await eventually(lambda: cluster.listed)
        await server.stop()
        clocks.ahead_s += 500
        assert cluster.age_s >= 500
        assert set(cluster.nodes) == {"n1"}
        assert cluster.listed


# --- the lease ----------------------------------------------------------------------------------


async def test_one_of_two_holds_the_lease_and_the_other_follows_when_it_stops(
    kubeconfig: Path, clocks: TestClocks
) -> None:
    clusters = [make_cluster(kubeconfig, clocks, host=name) for name in ("one", "two")]

    def holders() -> list[Cluster]:
        return [cluster for cluster in clusters if cluster.holds_lease(clocks.monotonic())]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cluster.run(lambda: None)) for cluster in clusters]
        await eventually(holders)
        (first,) = holders()
        tasks.pop(clusters.index(first)).cancel()
        await eventually(lambda: holders() and holders() != [first], limit_s=D / 2)  # given back, not run out
        (second,) = holders()
        assert second.lease_holder.startswith("one_" if second is clusters[0] else "two_")
        tasks[0].cancel()


async def test_a_tenure_begins_with_a_list_of_all_services(
    cluster: Cluster, server: ApiServer, clocks: TestClocks
) -> None:
    server.forbidden.add(("update", "leases"))
    async with running(cluster):
        await eventually(lambda: cluster.listed)
        lists = sum(path.startswith("/api/v1/services?limit=500") for _, path in server.requests)
        server.forbidden.add(("list", "services"))
        server.forbidden.discard(("update", "leases"))
        await eventually(lambda: cluster._lease.holds(clocks.monotonic()))
        await asyncio.sleep(0.3)
        assert not cluster.holds_lease(clocks.monotonic())
        server.forbidden.clear()
        await eventually(lambda: cluster.holds_lease(clocks.monotonic()))
        again = sum(path.startswith("/api/v1/services?limit=500") for _, path in server.requests)
        assert again > lists


async def test_a_lease_gone_from_under_the_holder_stops_its_writes(
    cluster: Cluster, server: ApiServer, clocks: TestClocks
) -> None:
    server.create("services", {"metadata": {"name": "web"}, "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}})
    async with running(cluster):
        await eventually(lambda: cluster.holds_lease(clocks.monotonic()))
        server.forbidden |= {("update", "leases"), ("get", "leases")}
        await eventually(lambda: not cluster.holds_lease(clocks.monotonic()), limit_s=D)
        with pytest.raises(Exception, match="does not hold the lease"):
            await cluster.assign(Assignment(service=WEB, addresses=("192.0.2.1",), pools=("p",)))
    assert server.objects("services")["default", "web"]["status"] == {"loadBalancer": {}}


async def test_the_lease_is_not_given_back_while_a_write_may_still_arrive(
    cluster: Cluster, server: ApiServer, clocks: TestClocks
) -> None:
    server.create("services", {"metadata": {"name": "web"}, "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}})
    async with running(cluster):
        await eventually(lambda: cluster.holds_lease(clocks.monotonic()) and WEB in cluster.services)
        server.answering.clear()
        with pytest.raises(Exception, match="no answer"):
            await cluster.assign(Assignment(service=WEB, addresses=("192.0.2.1",), pools=("p",)))
        server.answering.set()
        await eventually(lambda: cluster._lease.holds(clocks.monotonic()))
    holder = server.objects("leases")["lbagent", "lbagent"]["spec"]["holderIdentity"]
    assert holder.startswith("lb1_")


async def test_a_change_of_the_lease_wakes_the_agent(kubeconfig: Path, clocks: TestClocks, server: ApiServer) -> None:
    cluster = make_cluster(kubeconfig, clocks)
    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    async with asyncio.TaskGroup() as group:
        task = group.create_task(cluster.run(changed))
        await eventually(lambda: cluster.holds_lease(clocks.monotonic()))
        await eventually(lambda: changes >= 5)  # four lists, and the lease
        before = changes
        server.forbidden |= {("update", "leases"), ("get", "leases")}
        await eventually(lambda: changes > before, limit_s=2 * D)
        task.cancel()


async def test_without_a_kubeconfig_in_the_configuration_the_usual_place_is_read(clocks: TestClocks) -> None:
    cluster = Cluster(Kubernetes(), host="lb1", clocks=clocks, metrics=Metrics(version="test", process=False))
    client: Client = cluster._client
    assert str(client._kubeconfig) == "/etc/lbagent/kubeconfig"
