# SPDX-License-Identifier: Apache-2.0
"""Nodes learn of ipMode VIP a little later than we do."""

from dataclasses import replace

from lbagent.agent.news import NODES_FOLLOW_S, News
from lbagent.model.service import Ingress, IpMode, Service, ServiceKey

WEB = ServiceKey("default", "web")
NAT = Service(key=WEB, ingress=(Ingress(ip="192.0.2.1", ip_mode=IpMode.PROXY),))
DSR = replace(NAT, ingress=(Ingress(ip="192.0.2.1", ip_mode=IpMode.VIP),))


def mode(shown: dict[ServiceKey, Service]) -> IpMode | None:
    return shown[WEB].ingress[0].ip_mode


def test_what_stood_there_at_the_first_look_is_believed_at_once() -> None:
    news = News()
    assert news.services({WEB: DSR}, 0.0)[WEB] is DSR
    assert news.turns == 0.0


def test_a_status_that_turns_is_shown_when_the_nodes_had_time_to_follow() -> None:
    news = News()
    news.services({WEB: NAT}, 0.0)
    assert mode(news.services({WEB: DSR}, 1.0)) is IpMode.PROXY
    assert news.turns == 1.0 + NODES_FOLLOW_S
    assert mode(news.services({WEB: DSR}, 1.0 + NODES_FOLLOW_S - 0.1)) is IpMode.PROXY
    assert news.services({WEB: DSR}, 1.0 + NODES_FOLLOW_S)[WEB] is DSR
    assert news.turns == 0.0


def test_the_older_telling_stays_the_very_same_object() -> None:
    news = News()
    news.services({}, 0.0)
    first = news.services({WEB: DSR}, 1.0)[WEB]
    assert news.services({WEB: DSR}, 1.5)[WEB] is first


def test_turning_back_and_forth_begins_anew() -> None:
    news = News()
    news.services({WEB: NAT}, 0.0)
    news.services({WEB: DSR}, 1.0)
    news.services({WEB: NAT}, 2.0)
    assert mode(news.services({WEB: DSR}, 3.0)) is IpMode.PROXY
    assert news.turns == 3.0 + NODES_FOLLOW_S


def test_mode_nat_is_never_delayed() -> None:
    news = News()
    news.services({WEB: DSR}, 0.0)
    assert news.services({WEB: NAT}, 1.0)[WEB] is NAT
