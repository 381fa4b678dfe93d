# SPDX-License-Identifier: Apache-2.0
"""Patches as functions of what is there and what should be; and sending them."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from lbagent.errors import KubeRejected, KubeUnavailable
from lbagent.kube import publish as module
from lbagent.kube.client import Client
from lbagent.kube.cluster import SERVICES
from lbagent.kube.publish import CLEANUP_FINALIZER, PORTS_ERROR, SATISFIED, Publisher, assigned, judged, released
from lbagent.kube.watch import Watch
from lbagent.metrics import Metrics
from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import Condition, Ingress, IpMode, Service, ServiceKey
from tests.builders import make_key, make_port, make_service
from tests.fakes.apiserver import ApiServer
from tests.kube.conftest import TestClocks, eventually

WALL = 1_800_000_000.0
WHEN = "2027-01-15T08:00:00Z"
WEB = make_key("web")


def make_assignment(
    *addresses: str, mode: IpMode = IpMode.PROXY, errors: tuple[tuple[int, str, str], ...] = ()
) -> Assignment:
    return Assignment(service=WEB, addresses=addresses, pools=("p",) * len(addresses), ip_mode=mode, port_errors=errors)


# --- assigned -----------------------------------------------------------------------------------


def test_the_first_address_comes_with_the_finalizer_on_the_version_it_was_decided_on() -> None:
    service = make_service("web", resource_version="7", finalizers=("other",))
    assert assigned(service, make_assignment("192.0.2.1"), finalizer=True, wall=WALL) == {
        "metadata": {"resourceVersion": "7", "finalizers": [CLEANUP_FINALIZER]},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1", "ipMode": "Proxy"}]}},
    }


def test_without_finalizers_only_the_status_is_written() -> None:
    patch = assigned(make_service("web"), make_assignment("192.0.2.1"), finalizer=False, wall=WALL)
    assert patch is not None
    assert "finalizers" not in patch["metadata"]


def test_nothing_is_written_when_it_stands_there_already() -> None:
    service = make_service("web", status=("192.0.2.1", "2001:db8::1"), finalizers=(CLEANUP_FINALIZER,))
    assignment = make_assignment("192.0.2.1", "2001:db8::1")
    assert assigned(service, assignment, finalizer=True, wall=WALL) is None


def test_an_unset_ip_mode_is_the_same_as_vip() -> None:
    service = make_service("web", status=("192.0.2.1",), ip_mode=None, finalizers=(CLEANUP_FINALIZER,))
    assert assigned(service, make_assignment("192.0.2.1", mode=IpMode.VIP), finalizer=True, wall=WALL) is None
    patch = assigned(service, make_assignment("192.0.2.1", mode=IpMode.PROXY), finalizer=True, wall=WALL)
    assert patch is not None
    assert patch["status"]["loadBalancer"]["ingress"] == [{"ip": "192.0.2.1", "ipMode": "Proxy"}]


@pytest.mark.parametrize("addresses", [("192.0.2.2",), ("192.0.2.1", "2001:db8::1"), ("2001:db8::1", "192.0.2.1"), ()])
def test_other_addresses_or_another_order_is_written(addresses: tuple[str, ...]) -> None:
    service = make_service("web", status=("192.0.2.1",), finalizers=(CLEANUP_FINALIZER,))
    patch = assigned(service, make_assignment(*addresses), finalizer=True, wall=WALL)
    assert patch is not None
    assert [entry["ip"] for entry in patch["status"]["loadBalancer"]["ingress"]] == list(addresses)


def test_a_port_that_cannot_be_served_is_told_on_every_address_and_as_the_apis_condition() -> None:
    service = make_service("web", ports=[make_port(80), make_port(5000, protocol="SCTP")])
    assignment = make_assignment("192.0.2.1", errors=((5000, "SCTP", "lbagent.io/NotSupported"),))
    patch = assigned(service, assignment, finalizer=False, wall=WALL)
    assert patch is not None
    assert patch["status"]["loadBalancer"]["ingress"][0]["ports"] == [
        {"port": 80, "protocol": "TCP"},
        {"port": 5000, "protocol": "SCTP", "error": "lbagent.io/NotSupported"},
    ]
    (condition,) = patch["status"]["conditions"]
    assert (condition["type"], condition["status"], condition["lastTransitionTime"]) == (PORTS_ERROR, "True", WHEN)
    assert condition["reason"] == "LoadBalancerMixedProtocolNotSupported"
    assert "5000/SCTP" in condition["message"]


def test_port_errors_that_are_gone_take_our_condition_with_them_but_nobody_elses() -> None:
    ours = Condition(type=PORTS_ERROR, status="True", reason="LoadBalancerMixedProtocolNotSupported")
    service = make_service("web", status=("192.0.2.1",), conditions=(ours,))
    patch = assigned(service, make_assignment("192.0.2.1"), finalizer=False, wall=WALL)
    assert patch is not None
    assert patch["status"] == {"conditions": [{"type": PORTS_ERROR, "$patch": "delete"}]}
    theirs = replace(service, conditions=(replace(ours, reason="SomebodyElse"),))
    assert assigned(theirs, make_assignment("192.0.2.1"), finalizer=False, wall=WALL) is None


# --- released -----------------------------------------------------------------------------------


def test_the_last_address_goes_together_with_the_finalizer() -> None:
    service = make_service("web", status=("192.0.2.1",), finalizers=("x", CLEANUP_FINALIZER), resource_version="7")
    assert released(service, ("192.0.2.1",)) == {
        "metadata": {"resourceVersion": "7", "$deleteFromPrimitiveList/finalizers": [CLEANUP_FINALIZER]},
        "status": {"loadBalancer": {"ingress": None}},
    }


def test_one_address_of_two_goes_alone() -> None:
    service = make_service("web", status=("192.0.2.1", "2001:db8::1"), finalizers=(CLEANUP_FINALIZER,))
    patch = released(service, ("2001:db8::1",))
    assert patch is not None
    assert patch["status"]["loadBalancer"]["ingress"] == [{"ip": "192.0.2.1", "ipMode": "Proxy"}]
    assert "$deleteFromPrimitiveList/finalizers" not in patch["metadata"]


def test_an_entry_that_is_not_ours_stays() -> None:
    service = replace(make_service("web"), ingress=(Ingress(ip="198.51.100.9"), Ingress(ip="192.0.2.1")))
    patch = released(service, ("192.0.2.1",))
    assert patch is not None
    assert patch["status"]["loadBalancer"]["ingress"] == [{"ip": "198.51.100.9"}]


def test_a_status_cleared_by_a_change_of_type_still_gives_the_finalizer_back() -> None:
    service = make_service("web", type="ClusterIP", finalizers=(CLEANUP_FINALIZER,))
    patch = released(service, ())
    assert patch is not None
    assert "status" not in patch


def test_there_is_nothing_to_release_twice() -> None:
    assert released(make_service("web"), ("192.0.2.1",)) is None


# --- judged -------------------------------------------------------------------------------------


def test_the_reason_stands_in_a_condition() -> None:
    patch = judged(make_service("web"), Judgement(reason=Reason.OUT_OF_IPS, detail="pool a"), wall=WALL)
    assert patch is not None
    (condition,) = patch["status"]["conditions"]
    assert condition["type"] == SATISFIED
    assert condition["status"] == "False"
    assert condition["reason"] == "out_of_ips"
    assert "pool a" in condition["message"]
    assert condition["lastTransitionTime"] == WHEN


def test_the_transition_time_moves_only_with_the_status() -> None:
    old = Condition(type=SATISFIED, status="False", reason="no_pool", message="m")
    service = make_service("web", conditions=(old,))
    patch = judged(service, Judgement(reason=Reason.OUT_OF_IPS), wall=WALL)
    assert patch is not None
    assert "lastTransitionTime" not in patch["status"]["conditions"][0]
    patch = judged(service, Judgement(reason=Reason.SATISFIED), wall=WALL)
    assert patch is not None
    assert patch["status"]["conditions"][0]["lastTransitionTime"] == WHEN


def test_the_same_judgement_is_not_written_again() -> None:
    judgement = Judgement(reason=Reason.SATISFIED)
    patch = judged(make_service("web"), judgement, wall=WALL)
    assert patch is not None
    written = {key: value for key, value in patch["status"]["conditions"][0].items() if key != "lastTransitionTime"}
    assert judged(make_service("web", conditions=(Condition(**written),)), judgement, wall=WALL) is None


def test_a_service_of_another_type_loses_our_condition_and_a_foreign_one_is_never_touched() -> None:
    old = Condition(type=SATISFIED, status="True", reason="satisfied", message="m")
    service = make_service("web", conditions=(old,))
    assert judged(service, Judgement(reason=Reason.NOT_LOAD_BALANCER), wall=WALL) == {
        "status": {"conditions": [{"type": SATISFIED, "$patch": "delete"}]}
    }
    assert judged(make_service("web"), Judgement(reason=Reason.NOT_LOAD_BALANCER), wall=WALL) is None
    for reason in (Reason.NOT_OURS, Reason.PENDING_ASSIGNMENT, Reason.NOT_LISTED):
        assert judged(service, Judgement(reason=reason), wall=WALL) is None


# --- sending ------------------------------------------------------------------------------------


class Desk:
    """A Publisher over a running watch, and the allowance a test gives it."""

    def __init__(self, client: Client, clocks: TestClocks, metrics: Metrics) -> None:
        self.allowance_s = 10.0
        self.services: Watch[Service] = Watch(
            SERVICES, client=client, clocks=clocks, metrics=metrics, watch_timeout_s=30
        )
        self.publisher = Publisher(
            client,
            services=self.services,
            host="lb1",
            finalizer=True,
            clocks=clocks,
            allowance_s=lambda _: self.allowance_s,
        )


@pytest.fixture
async def desk(client: Client, clocks: TestClocks, metrics: Metrics, server: ApiServer) -> AsyncIterator[Desk]:
    server.create("services", {"metadata": {"name": "web"}, "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}})
    made = Desk(client, clocks, metrics)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(made.services.run(lambda: None))
        await eventually(lambda: WEB in made.services.objects and server.store.listeners)
        yield made
        task.cancel()


def stored(server: ApiServer) -> list[str]:
    entries = server.objects("services")["default", "web"]["status"]["loadBalancer"].get("ingress", [])
    return [entry["ip"] for entry in entries]


def words(server: ApiServer) -> list[str]:
    return [found["reason"] for found in server.objects("events").values()]


def writes(server: ApiServer) -> int:
    return sum(method == "PATCH" and "/status" in path for method, path in server.requests)


async def test_an_assignment_is_written_once_and_told(desk: Desk, server: ApiServer) -> None:
    await desk.publisher.assign(make_assignment("192.0.2.1"))
    assert stored(server) == ["192.0.2.1"]
    assert words(server) == ["IPAllocated"]
    await desk.publisher.assign(make_assignment("192.0.2.1"))
    assert writes(server) == 1


async def test_an_assignment_is_done_when_the_watch_has_told_of_it(desk: Desk, server: ApiServer) -> None:
    server.silent = True
    async with asyncio.TaskGroup() as group:
        task = group.create_task(desk.publisher.assign(make_assignment("192.0.2.1")))
        await eventually(lambda: stored(server) == ["192.0.2.1"])
        await asyncio.sleep(0.1)
        assert not task.done()
        server.silent = False
        server.patch("services", ("default", "web"), {"metadata": {"labels": {"a": "b"}}})
    assert desk.services.objects[WEB].status_addresses == ("192.0.2.1",)


async def test_who_loses_the_lease_waits_for_no_watch(
    desk: Desk, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NEWER_S", 0.05)
    server.silent = True
    async with asyncio.TaskGroup() as group:
        group.create_task(desk.publisher.assign(make_assignment("192.0.2.1")))
        await eventually(lambda: stored(server) == ["192.0.2.1"])
        desk.allowance_s = 0.0


async def test_without_the_lease_nothing_is_sent(desk: Desk, server: ApiServer) -> None:
    desk.allowance_s = 0.0
    with pytest.raises(KubeUnavailable, match="lease"):
        await desk.publisher.assign(make_assignment("192.0.2.1"))
    assert writes(server) == 0


async def test_a_write_may_not_take_longer_than_the_lease_lasts(desk: Desk, server: ApiServer) -> None:
    desk.allowance_s = 0.3
    server.answering.clear()
    before = desk.publisher.uncertain_at
    async with asyncio.timeout(1.5):
        with pytest.raises(KubeUnavailable):
            await desk.publisher.assign(make_assignment("192.0.2.1"))
    assert desk.publisher.uncertain_at > before
    server.answering.set()


async def test_after_a_conflict_the_service_is_read_again_and_written(desk: Desk, server: ApiServer) -> None:
    server.silent = True  # the watch does not tell yet
    server.patch("services", ("default", "web"), {"metadata": {"labels": {"a": "b"}}})
    async with asyncio.TaskGroup() as group:
        group.create_task(desk.publisher.assign(make_assignment("192.0.2.1")))
        await eventually(lambda: writes(server) == 1)
        server.silent = False
        server.patch("services", ("default", "web"), {"metadata": {"labels": {"c": "d"}}})
    assert stored(server) == ["192.0.2.1"]


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {"type": "ClusterIP"}},
        {"metadata": {"annotations": {"lbagent.io/address-pool": "other"}}},
        {"spec": {"ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}]}},
    ],
)
async def test_after_a_conflict_about_what_was_asked_the_planner_must_decide(
    desk: Desk, server: ApiServer, change: dict[str, object]
) -> None:
    server.silent = True
    server.patch("services", ("default", "web"), {"metadata": {"labels": {"a": "b"}}})

    async def change_once_refused() -> None:
        await eventually(lambda: writes(server) == 1)
        server.silent = False
        server.patch("services", ("default", "web"), change)

    async with asyncio.TaskGroup() as group:
        group.create_task(change_once_refused())
        with pytest.raises(KubeRejected, match="changed meanwhile"):
            await desk.publisher.assign(make_assignment("192.0.2.1"))
    assert stored(server) == []


async def test_a_conflict_that_the_watch_does_not_explain_is_given_up(
    desk: Desk, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NEWER_S", 0.1)
    server.silent = True
    server.patch("services", ("default", "web"), {"metadata": {"labels": {"a": "b"}}})
    with pytest.raises(KubeUnavailable, match="not told"):
        await desk.publisher.assign(make_assignment("192.0.2.1"))


async def test_a_release_takes_the_service_out_of_our_hands(desk: Desk, server: ApiServer) -> None:
    await desk.publisher.assign(make_assignment("192.0.2.1"))
    server.delete("services", ("default", "web"))
    await eventually(lambda: desk.services.objects[WEB].deleting)
    await desk.publisher.release(WEB, ("192.0.2.1",))
    assert ("default", "web") not in server.objects("services")
    await eventually(lambda: WEB not in desk.services.objects)
    await desk.publisher.release(WEB, ("192.0.2.1",))
    assert words(server) == ["IPAllocated", "DeletedLoadBalancer"]


async def test_an_assignment_to_a_service_that_is_gone_is_refused(desk: Desk) -> None:
    with pytest.raises(KubeRejected, match="gone"):
        await desk.publisher.assign(replace(make_assignment("192.0.2.1"), service=ServiceKey("default", "none")))


async def test_an_event_that_cannot_be_sent_does_not_undo_what_was_written(desk: Desk, server: ApiServer) -> None:
    server.forbidden.add(("create", "events"))
    await desk.publisher.assign(make_assignment("192.0.2.1"))
    assert stored(server) == ["192.0.2.1"]


async def test_the_holder_reports_by_condition_and_event(desk: Desk, server: ApiServer) -> None:
    await desk.publisher.report(WEB, Judgement(reason=Reason.OUT_OF_IPS))
    (condition,) = server.objects("services")["default", "web"]["status"]["conditions"]
    assert condition["reason"] == "out_of_ips"
    assert words(server) == ["AllocationFailed"]


async def test_who_does_not_hold_the_lease_reports_only_about_itself(desk: Desk, server: ApiServer) -> None:
    desk.allowance_s = 0.0
    for reason in Reason:
        await desk.publisher.report(WEB, Judgement(reason=reason))
    assert "conditions" not in server.objects("services")["default", "web"]["status"]
    told = {found["message"].split(";")[0] for found in server.objects("events").values()}
    assert told == {
        reason.sentence for reason in (Reason.MODE_UNAVAILABLE, Reason.NO_HEALTHY_BACKENDS, Reason.NOT_FORWARDING)
    }


async def test_a_report_on_a_service_that_is_gone_is_nothing(desk: Desk, server: ApiServer) -> None:
    server.silent = True
    server.delete("services", ("default", "web"))
    await desk.publisher.report(WEB, Judgement(reason=Reason.OUT_OF_IPS))
    await desk.publisher.report(ServiceKey("default", "none"), Judgement(reason=Reason.OUT_OF_IPS))
    assert words(server) == []
