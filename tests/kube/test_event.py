# SPDX-License-Identifier: Apache-2.0
"""Events: known words, one object per fact, counted."""

from typing import Any

import pytest

from lbagent.errors import KubeRejected
from lbagent.kube import event
from lbagent.kube.client import Client
from lbagent.kube.event import HUSH_S, KEPT_S, Teller
from lbagent.model.reason import Judgement, Reason
from tests.builders import make_service
from tests.fakes.apiserver import ApiServer
from tests.kube.conftest import TestClocks

KNOWN_WORDS = {
    # MetalLB
    "IPAllocated",
    "AllocationFailed",
    # the service controller
    "EnsuredLoadBalancer",
    "DeletingLoadBalancer",
    "DeletedLoadBalancer",
    "SyncLoadBalancerFailed",
    "UnAvailableLoadBalancer",
}
FAILED = ("Warning", "AllocationFailed")


@pytest.fixture
def teller(client: Client, clocks: TestClocks) -> Teller:
    return Teller(client, host="lb1", clocks=clocks)


def sent(server: ApiServer) -> list[dict[str, Any]]:
    return list(server.objects("events").values())


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_told_in_a_known_word_or_is_meant_to_be_silent(reason: Reason) -> None:
    word = event.word(reason)
    silent = {Reason.NOT_LOAD_BALANCER, Reason.NOT_OURS, Reason.NOT_LISTED, Reason.PENDING_ASSIGNMENT}
    if reason in silent:
        assert word is None
        return
    assert word is not None
    assert word[1] in KNOWN_WORDS
    assert word[0] == ("Normal" if reason in (Reason.SATISFIED, Reason.DELETING) else "Warning")


def test_a_sentence_has_what_it_is_about_and_what_to_do() -> None:
    text = event.sentence(Judgement(reason=Reason.OUT_OF_IPS, detail="pool default"))
    assert text == "no free address is left: pool default; enlarge the pool, or release a Service"
    assert event.sentence(Judgement(reason=Reason.SATISFIED)) == Reason.SATISFIED.sentence


async def test_an_event_names_the_service_the_host_and_the_time(teller: Teller, server: ApiServer) -> None:
    await teller.tell(make_service("web"), FAILED, "no address")
    (found,) = sent(server)
    assert found["involvedObject"]["uid"] == "uid-web"
    assert found["involvedObject"]["kind"] == "Service"
    assert (found["type"], found["reason"], found["message"], found["count"]) == (*FAILED, "no address", 1)
    assert found["source"] == {"component": "lbagent", "host": "lb1"}
    assert found["firstTimestamp"] == "2027-01-15T08:00:00Z"


async def test_saying_it_again_raises_the_count_but_not_at_once(
    teller: Teller, server: ApiServer, clocks: TestClocks
) -> None:
    service = make_service("web")
    for _ in range(3):
        await teller.tell(service, FAILED, "no address")
    assert [found["count"] for found in sent(server)] == [1]
    clocks.ahead_s += HUSH_S
    await teller.tell(service, FAILED, "no address")
    assert [found["count"] for found in sent(server)] == [4]


async def test_another_sentence_is_another_event(teller: Teller, server: ApiServer) -> None:
    service = make_service("web")
    await teller.tell(service, FAILED, "no address")
    await teller.tell(service, FAILED, "no pool")
    await teller.tell(make_service("api"), FAILED, "no pool")
    assert len(sent(server)) == 3


async def test_a_new_life_of_the_process_adds_to_the_event_of_the_old_one(
    teller: Teller, client: Client, server: ApiServer, clocks: TestClocks
) -> None:
    service = make_service("web")
    await teller.tell(service, FAILED, "no address")
    await Teller(client, host="lb1", clocks=clocks).tell(service, FAILED, "no address")
    assert len(sent(server)) == 1
    await Teller(client, host="lb2", clocks=clocks).tell(service, FAILED, "no address")
    assert len(sent(server)) == 2


async def test_an_event_that_the_server_has_forgotten_is_made_anew(
    teller: Teller, server: ApiServer, clocks: TestClocks
) -> None:
    service = make_service("web")
    await teller.tell(service, FAILED, "no address")
    server.objects("events").clear()
    clocks.ahead_s += KEPT_S
    await teller.tell(service, FAILED, "no address")
    assert [found["count"] for found in sent(server)] == [1]


async def test_an_event_deleted_early_is_made_anew(teller: Teller, server: ApiServer, clocks: TestClocks) -> None:
    service = make_service("web")
    await teller.tell(service, FAILED, "no address")
    server.objects("events").clear()
    clocks.ahead_s += HUSH_S
    await teller.tell(service, FAILED, "no address")
    assert len(sent(server)) == 1


async def test_a_refused_event_is_an_error(teller: Teller, server: ApiServer) -> None:
    server.forbidden.add(("create", "events"))
    with pytest.raises(KubeRejected):
        await teller.tell(make_service("web"), FAILED, "no address")
