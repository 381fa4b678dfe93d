# SPDX-License-Identifier: Apache-2.0
"""lbagent's Kubernetes room against an API that misbehaves, embedded and real alike.

Two hosts are two Clusters in one process, each with its own connections; a paused process is one
whose tasks are not run (``Paused``).
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lbagent.config import Kubernetes, LeaseConfig
from lbagent.errors import KubeError
from lbagent.kube.cluster import Cluster
from lbagent.kube.publish import CLEANUP_FINALIZER
from lbagent.metrics import Metrics
from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import ServiceKey
from tests.k8s.conftest import EVENTS, LEASES, SERVICES, Api

D = 3.0


class Clocks:
    """The real ones."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


@pytest.fixture
async def free_lease(api: Api) -> str:
    """A Lease of this test's own, free as the manifest brings it."""
    name = f"l-{uuid.uuid4().hex[:8]}"
    answer = await api.call("POST", LEASES.format(api.namespace), {"metadata": {"name": name}, "spec": {}})
    assert answer.code == 201, answer
    return name


Make = Callable[..., Cluster]


@pytest.fixture
def make(api: Api, free_lease: str, tmp_path: Path) -> Make:
    def made(host: str = "lb1", *, token: str = "admin", request_timeout_s: float = 2.0) -> Cluster:
        settings = Kubernetes(
            kubeconfig=api.kubeconfig(tmp_path / f"{host}.json", token=token),
            lease=LeaseConfig(namespace=api.namespace, name=free_lease, duration_s=D, renew_s=0.3),
            request_timeout_s=request_timeout_s,
        )
        return Cluster(settings, host=host, clocks=Clocks(), metrics=Metrics(version="test", process=False))

    return made


@contextlib.asynccontextmanager
async def running(*clusters: Cluster) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cluster.run(lambda: None)) for cluster in clusters]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def eventually(look: Callable[[], object], *, limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not look():
            await asyncio.sleep(0.02)


def holds(cluster: Cluster) -> bool:
    return cluster.holds_lease(time.monotonic())


def key(api: Api, name: str = "web") -> ServiceKey:
    return ServiceKey(api.namespace, name)


def assignment(api: Api, name: str = "web", *addresses: str) -> Assignment:
    addresses = addresses or ("192.0.2.1",)
    return Assignment(service=key(api, name), addresses=addresses, pools=("p",) * len(addresses))


# --- the whole of a Service's life --------------------------------------------------------------


async def test_a_service_is_given_its_address_told_of_it_and_let_go(api: Api, make: Make) -> None:
    cluster = make()
    async with running(cluster):
        await api.make_service()
        await eventually(lambda: key(api) in cluster.services and holds(cluster))
        await cluster.assign(assignment(api, "web", "192.0.2.1"))
        await cluster.report(key(api), Judgement(reason=Reason.SATISFIED))
        await eventually(lambda: cluster.services[key(api)].status_addresses == ("192.0.2.1",))
        service = await api.service()
        assert service["status"]["loadBalancer"]["ingress"] == [{"ip": "192.0.2.1", "ipMode": "Proxy"}]
        assert service["metadata"]["finalizers"] == [CLEANUP_FINALIZER]
        assert [c["reason"] for c in service["status"]["conditions"]] == ["satisfied"]
        events = (await api.call("GET", EVENTS.format(api.namespace))).body["items"]
        assert {event["reason"] for event in events} == {"IPAllocated", "EnsuredLoadBalancer"}
        await api.call("DELETE", f"{SERVICES.format(api.namespace)}/web")
        await eventually(lambda: cluster.services[key(api)].deleting)
        await cluster.release(key(api), ("192.0.2.1",))
        await eventually(lambda: key(api) not in cluster.services)


async def test_another_type_is_followed_and_the_condition_goes(api: Api, make: Make) -> None:
    cluster = make()
    async with running(cluster):
        await api.make_service()
        await eventually(lambda: key(api) in cluster.services and holds(cluster))
        await cluster.assign(assignment(api))
        await cluster.report(key(api), Judgement(reason=Reason.SATISFIED))
        await api.patch({"spec": {"type": "ClusterIP"}})
        await eventually(lambda: cluster.services[key(api)].type == "ClusterIP")
        assert cluster.services[key(api)].status_addresses == ()
        await cluster.release(key(api), ())
        await cluster.report(key(api), Judgement(reason=Reason.NOT_LOAD_BALANCER))
        service = await api.service()
        assert "finalizers" not in service["metadata"] or not service["metadata"]["finalizers"]
        assert not service["status"].get("conditions")


async def test_a_write_decided_on_an_old_version_is_made_anew(api: Api, make: Make) -> None:
    cluster = make()
    async with running(cluster):
        await api.make_service()
        await eventually(lambda: key(api) in cluster.services and holds(cluster))
        await asyncio.gather(
            *(api.patch({"metadata": {"labels": {"n": str(n)}}}) for n in range(3)), cluster.assign(assignment(api))
        )
        assert (await api.service())["status"]["loadBalancer"]["ingress"][0]["ip"] == "192.0.2.1"


async def test_a_port_error_reaches_the_status(api: Api, make: Make) -> None:
    cluster = make()
    async with running(cluster):
        ports = [{"name": "a", "port": 80}, {"name": "s", "port": 5000, "protocol": "SCTP"}]
        await api.make_service(ports=ports)
        await eventually(lambda: key(api) in cluster.services and holds(cluster))
        errors = ((5000, "SCTP", "lbagent.io/ProtocolNotSupported"),)
        wanted = Assignment(service=key(api), addresses=("192.0.2.1",), pools=("p",), port_errors=errors)
        await cluster.assign(wanted)
        service = await api.service()
        assert service["status"]["loadBalancer"]["ingress"][0]["ports"][1]["error"] == errors[0][2]
        assert [c["type"] for c in service["status"]["conditions"]] == ["LoadBalancerPortsError"]
        await eventually(lambda: cluster.services[key(api)].ingress)
        version = cluster.services[key(api)].resource_version
        await cluster.assign(wanted)
        assert (await api.service())["metadata"]["resourceVersion"] == version


# --- the API server -----------------------------------------------------------------------------


async def test_a_restart_of_the_api_server_loses_nothing(api: Api, make: Make) -> None:
    """Watches from before are Expired; what came and went meanwhile is found by listing."""
    cluster = make()
    async with running(cluster):
        await api.make_service("stays")
        await api.make_service("goes")
        await eventually(lambda: key(api, "goes") in cluster.services and holds(cluster))
        await asyncio.to_thread(lambda: None)
        await api.restart()
        await api.call("DELETE", f"{SERVICES.format(api.namespace)}/goes")
        await api.make_service("comes")
        await eventually(
            lambda: (
                {key(api, "stays"), key(api, "comes")} <= set(cluster.services)
                and key(api, "goes") not in cluster.services
            )
        )
        await eventually(lambda: holds(cluster))
        await cluster.assign(assignment(api, "comes"))


async def test_a_hanging_api_server_ends_the_right_to_write_and_nothing_else(api: Api, make: Make) -> None:
    cluster = make()
    async with running(cluster):
        await api.make_service()
        await eventually(lambda: key(api) in cluster.services and holds(cluster))
        api.hang()
        try:
            await eventually(lambda: not holds(cluster), limit_s=D)
            with pytest.raises(KubeError):
                await cluster.assign(assignment(api))
            assert key(api) in cluster.services
            assert cluster.listed
        finally:
            api.recover()
        await eventually(lambda: holds(cluster))
        await cluster.assign(assignment(api))


async def test_a_write_under_way_when_the_server_hangs_is_given_up_in_time(api: Api, make: Make) -> None:
    cluster = make(request_timeout_s=10.0)
    async with running(cluster):
        await api.make_service()
        await eventually(lambda: key(api) in cluster.services and holds(cluster))
        began = time.monotonic()
        api.hang()
        try:
            with pytest.raises(KubeError):
                await cluster.assign(assignment(api))
            assert not holds(cluster) or time.monotonic() - began < D
        finally:
            api.recover()


# --- two hosts ----------------------------------------------------------------------------------


async def test_one_of_two_writes_and_the_other_takes_over(api: Api, make: Make) -> None:
    one, two = make("one"), make("two")
    async with running(two):
        async with running(one):
            await eventually(lambda: holds(one) or holds(two))
            for _ in range(40):
                assert not (holds(one) and holds(two))
                await asyncio.sleep(0.02)
        await eventually(lambda: holds(two))


async def test_two_hosts_and_a_hanging_server_never_both_hold(api: Api, make: Make) -> None:
    one, two = make("one"), make("two")
    seen: set[str] = set()
    async with running(one, two):
        await eventually(lambda: holds(one) or holds(two))
        for hang in range(2):
            api.hang()
            until = time.monotonic() + D * (0.5 + 1.2 * hang)
            try:
                while time.monotonic() < until:
                    assert not (holds(one) and holds(two))
                    await asyncio.sleep(0.01)
            finally:
                api.recover()
            until = time.monotonic() + 2.5 * D
            while time.monotonic() < until:
                assert not (holds(one) and holds(two))
                seen |= {name for name, cluster in (("one", one), ("two", two)) if holds(cluster)}
                await asyncio.sleep(0.01)
    assert seen


async def test_a_missing_lease_is_made(api: Api, make: Make, free_lease: str) -> None:
    await api.call("DELETE", f"{LEASES.format(api.namespace)}/{free_lease}")
    cluster = make()
    async with running(cluster):
        await eventually(lambda: holds(cluster))
    lease = (await api.call("GET", f"{LEASES.format(api.namespace)}/{free_lease}")).body
    assert not lease["spec"].get("holderIdentity")  # given back at the end
