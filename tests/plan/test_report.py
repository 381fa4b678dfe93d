# SPDX-License-Identifier: Apache-2.0
import pytest

from lbagent.kube import event, publish
from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import Condition, IpMode
from lbagent.plan.facts import establish
from lbagent.plan.report import CONDITION, FINALIZER, OF_THIS_HOST, is_reported, is_written, was_ours
from tests.builders import make_port, make_service, make_settings

A = "198.51.100.1"


def shown(reason: Reason, detail: str = "") -> Condition:
    """The condition as kube/publish writes it."""
    judgement = Judgement(reason=reason, detail=detail)
    return Condition(type=CONDITION, status="False", reason=reason.value, message=event.sentence(judgement))


def test_what_kube_writes_is_what_is_looked_for() -> None:
    assert CONDITION == publish.SATISFIED
    assert OF_THIS_HOST == event.OF_THIS_HOST
    assert FINALIZER == publish.CLEANUP_FINALIZER


@pytest.mark.parametrize(("ip_mode", "written"), [(IpMode.PROXY, True), (IpMode.VIP, False), (None, False)])
def test_a_status_says_the_ip_mode_too_and_unset_means_vip(ip_mode: IpMode | None, written: bool) -> None:
    service = make_service(status=[A], ip_mode=ip_mode)
    assert is_written(service, establish(service, {}, make_settings()).assignment) is written


def test_a_status_says_the_errors_of_ports_too() -> None:
    service = make_service(status=[A], ports=[make_port(), make_port(9, protocol="SCTP")])
    assert not is_written(service, establish(service, {}, make_settings()).assignment)


def test_a_reason_is_told_once() -> None:
    judgement = Judgement(reason=Reason.OUT_OF_IPS, detail="pool a")
    assert not is_reported(make_service(), judgement)
    assert is_reported(make_service(conditions=(shown(Reason.OUT_OF_IPS, "pool a"),)), judgement)


def test_another_reason_or_another_detail_is_told_anew() -> None:
    judgement = Judgement(reason=Reason.OUT_OF_IPS, detail="pool a")
    assert not is_reported(make_service(conditions=(shown(Reason.OUT_OF_IPS, "pool b"),)), judgement)
    assert not is_reported(make_service(conditions=(shown(Reason.NO_POOL, "pool a"),)), judgement)


def test_a_service_that_asks_no_more_loses_its_condition() -> None:
    judgement = Judgement(reason=Reason.NOT_LOAD_BALANCER)
    assert is_reported(make_service(), judgement)
    assert not is_reported(make_service(conditions=(shown(Reason.SATISFIED),)), judgement)


def test_the_condition_outlives_the_finalizer_which_it_shows_to_be_ours() -> None:
    service = make_service(conditions=(shown(Reason.SATISFIED),), finalizers=(FINALIZER,))
    assert was_ours(service)
    assert is_reported(service, Judgement(reason=Reason.NOT_LOAD_BALANCER))


def test_a_finalizer_without_our_condition_is_somebody_elses() -> None:
    assert not was_ours(make_service(finalizers=(FINALIZER,)))
    assert not was_ours(make_service(conditions=(shown(Reason.SATISFIED),)))


@pytest.mark.parametrize("reason", [Reason.NOT_OURS, Reason.PENDING_ASSIGNMENT, Reason.DELETING, Reason.HOST_DRAINING])
def test_what_is_nobodys_business_is_not_told(reason: Reason) -> None:
    assert is_reported(make_service(), Judgement(reason=reason))
