# SPDX-License-Identifier: Apache-2.0
import pytest

from lbagent.model.reason import Reason
from lbagent.model.vip import Mode
from lbagent.plan.facts import age, establish
from tests.builders import make_pool, make_port, make_selector, make_service, make_settings

V4, V6 = make_pool("v4", "198.51.100.0/24"), make_pool("v6", "2001:db8::/64")
SETTINGS = make_settings(V4, V6)


def test_a_claim_is_in_the_order_of_the_families_of_the_service() -> None:
    facts = establish(make_service(families=(6, 4), status=["198.51.100.1", "2001:db8::1"]), {}, SETTINGS)
    assert [(h.address, h.pool.name) for h in facts.claim.held] == [("2001:db8::1", "v6"), ("198.51.100.1", "v4")]


def test_a_second_address_of_a_family_and_one_of_another_family_are_surplus() -> None:
    facts = establish(make_service(status=["198.51.100.1", "198.51.100.2", "2001:db8::1"]), {}, SETTINGS)
    assert [h.address for h in facts.claim.held] == ["198.51.100.1"]
    assert facts.claim.surplus == ("198.51.100.2", "2001:db8::1")


@pytest.mark.parametrize(
    ("status", "reason"), [("203.0.113.1", Reason.OUTSIDE_POOLS), ("192.0.2.1", Reason.POOL_SELECTOR_MISMATCH)]
)
def test_an_address_that_may_not_be_kept_says_why(status: str, reason: Reason) -> None:
    fenced = make_pool("fenced", "192.0.2.0/24", namespaces=("other",))
    ((address, judgement),) = establish(make_service(status=[status]), {}, make_settings(V4, fenced)).claim.lost
    assert (address, judgement.reason) == (status, reason)


def test_a_namespaces_labels_decide_whether_a_pool_still_admits_it() -> None:
    pool = make_pool("red", "192.0.2.0/24", namespace_selectors=(make_selector(team="red"),))
    service = make_service(status=["192.0.2.1"])
    assert establish(service, {"team": "red"}, make_settings(pool)).claim.held
    assert not establish(service, {"team": "blue"}, make_settings(pool)).claim.held


def test_settled_is_who_has_all_it_wants() -> None:
    def is_settled(**fields: object) -> bool:
        return establish(make_service(status=["198.51.100.1"], **fields), {}, SETTINGS).is_settled

    assert is_settled()
    assert is_settled(annotations={"lbagent.io/load-balancer-ips": "198.51.100.1"})
    assert is_settled(annotations={"lbagent.io/address-pool": "v4"})
    assert not is_settled(families=(4, 6))
    assert not is_settled(annotations={"lbagent.io/load-balancer-ips": "198.51.100.2"})
    assert not is_settled(annotations={"lbagent.io/load-balancer-ips": "nonsense"})
    assert not is_settled(annotations={"lbagent.io/address-pool": "v6"})


def test_the_mode_of_an_address_is_that_of_its_pool_unless_the_service_chooses() -> None:
    settings = make_settings(make_pool("p", "198.51.100.0/24", mode=Mode.DSR_L2))
    assert establish(make_service(status=["198.51.100.1"]), {}, settings).assignment.ip_mode == "VIP"
    chosen = make_service(status=["198.51.100.1"], annotations={"lbagent.io/mode": "nat"})
    assert establish(chosen, {}, settings).assignment.ip_mode == "Proxy"


def test_without_an_address_a_service_is_refused_only_when_no_pool_could_serve_it() -> None:
    service = make_service(ports=[make_port(node_port=0)])
    dsr = make_pool("dsr", "192.0.2.0/24", mode=Mode.DSR_L2)
    assert establish(service, {}, make_settings(V4, dsr)).refusal is None
    assert establish(service, {}, make_settings(V4)).refusal.reason is Reason.NO_NODE_PORT


def test_age_is_by_creation_then_by_name() -> None:
    services = [make_service("b", created=1), make_service("a", created=2), make_service("a/z", created=1)]
    assert [str(s.key) for s in sorted(services, key=age)] == ["a/z", "default/b", "default/a"]
