# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest

from lbagent.model.reason import Reason
from lbagent.model.service import IpMode
from lbagent.model.vip import Mode
from lbagent.plan.request import foreign, ip_mode, parse_address, port_error, ports_refusal, read
from tests.builders import make_port, make_service, make_settings


def asking(**annotations: str):
    """A dual-stack Service with annotations; ``_`` in a keyword stands for ``-``."""
    return read(make_service(families=(4, 6), annotations=annotations))


@pytest.mark.parametrize(
    "name", ["lbagent.io/load-balancer-ips", "metallb.io/loadBalancerIPs", "metallb.universe.tf/loadBalancerIPs"]
)
def test_addresses_are_asked_for_under_our_name_and_both_of_metallbs(name: str) -> None:
    wish = asking(**{name: "192.0.2.1, 2001:DB8::1"})
    assert (wish.address(4), wish.address(6)) == ("192.0.2.1", "2001:db8::1")


@pytest.mark.parametrize("prefix", ["lbagent.io", "metallb.io", "metallb.universe.tf"])
def test_pool_and_sharing_key_are_asked_for_under_every_prefix(prefix: str) -> None:
    wish = asking(**{f"{prefix}/address-pool": "red, blue", f"{prefix}/allow-shared-ip": "key"})
    assert (wish.pools, wish.sharing_key) == (("red", "blue"), "key")


def test_our_annotation_wins_over_metallbs() -> None:
    wish = asking(**{"metallb.io/address-pool": "theirs", "lbagent.io/address-pool": "ours"})
    assert wish.pools == ("ours",)


def test_the_deprecated_field_asks_for_one_address() -> None:
    assert read(make_service(load_balancer_ip="192.0.2.1")).address(4) == "192.0.2.1"


def test_field_and_annotation_together_are_refused() -> None:
    service = make_service(load_balancer_ip="192.0.2.1", annotations={"lbagent.io/load-balancer-ips": "192.0.2.1"})
    refusal = read(service).address_refusal
    assert refusal
    assert refusal.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize(
    "text", ["nonsense", "192.0.2.1,192.0.2.2", "192.0.2.0/24", "192.0.2.01", "fe80::1%eth0", "2001:db8::1,2001:db8::2"]
)
def test_addresses_that_cannot_be_understood_are_refused(text: str) -> None:
    refusal = asking(**{"lbagent.io/load-balancer-ips": text}).address_refusal
    assert refusal
    assert refusal.reason is Reason.BAD_REQUEST


def test_an_address_of_a_family_the_service_has_not_is_refused() -> None:
    wish = read(make_service(annotations={"lbagent.io/load-balancer-ips": "2001:db8::1"}))
    assert wish.address_refusal


def test_ipv4_written_as_ipv6_counts_as_ipv4() -> None:
    assert parse_address("::ffff:192.0.2.1") == parse_address("192.0.2.1")


# --- ours or not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "class_less", "reason"),
    [
        (None, True, None),
        ("", True, None),
        (None, False, Reason.NOT_OURS),
        ("lbagent.io/lbagent", False, None),
        ("lbagent.io/lbagent", True, None),
        ("metallb.io/x", True, Reason.NOT_OURS),
    ],
)
def test_the_class_decides_whose_a_service_is(wanted: str | None, class_less: bool, reason: Reason | None) -> None:
    assert foreign(make_service(load_balancer_class=wanted), make_settings(class_less=class_less)) is reason


def test_another_type_of_service_is_not_ours() -> None:
    assert foreign(make_service(type="ClusterIP"), make_settings()) is Reason.NOT_LOAD_BALANCER


# --- mode and ports -------------------------------------------------------------------------------


def test_the_mode_is_chosen_by_annotation() -> None:
    assert asking(**{"lbagent.io/mode": "dsr-l2"}).mode is Mode.DSR_L2
    assert asking().mode is None


def test_an_unknown_mode_is_refused_with_those_there_are() -> None:
    refusal = asking(**{"lbagent.io/mode": "magic"}).refusal
    assert refusal
    assert refusal.reason is Reason.MODE_UNAVAILABLE
    assert "dsr-ipip" in refusal.detail


def test_a_mode_this_host_cannot_give_is_refused() -> None:
    refusal = ports_refusal(make_service(), [Mode.DSR_L2], make_settings(modes=frozenset({Mode.NAT})))
    assert refusal
    assert refusal.reason is Reason.MODE_UNAVAILABLE


def test_the_ip_mode_is_the_truth() -> None:
    assert [ip_mode(mode) for mode in (Mode.NAT, Mode.DSR_L2, Mode.DSR_IPIP)] == [IpMode.PROXY, IpMode.VIP, IpMode.VIP]


def test_a_port_without_node_port_is_an_error_in_nat_mode_only() -> None:
    port = make_port(node_port=0)
    assert port_error(port, Mode.NAT) == "lbagent.io/NoNodePort"
    assert port_error(port, Mode.DSR_L2) == ""


def test_sctp_is_reported_per_port() -> None:
    assert port_error(make_port(protocol="SCTP"), Mode.NAT) == "lbagent.io/ProtocolNotSupported"


@pytest.mark.parametrize(
    ("ports", "reason"),
    [
        ([make_port(), make_port(9, protocol="SCTP")], None),
        ([make_port(9, protocol="SCTP")], Reason.NO_SUPPORTED_PORT),
        ([make_port(node_port=0)], Reason.NO_NODE_PORT),
        ([make_port(), make_port(443, node_port=0)], None),
    ],
)
def test_a_service_is_refused_only_when_no_port_is_left(ports: list, reason: Reason | None) -> None:
    refusal = ports_refusal(make_service(ports=ports), [Mode.NAT], make_settings())
    assert (refusal.reason if refusal else None) is reason


def test_a_service_is_refused_only_when_no_mode_can_forward_it() -> None:
    service = make_service(ports=[make_port(node_port=0)])
    assert ports_refusal(service, [Mode.NAT, Mode.DSR_L2], make_settings()) is None


# --- source ranges --------------------------------------------------------------------------------


def ranges(*field: str, annotation: str = "") -> tuple[str, ...]:
    name = "service.beta.kubernetes.io/load-balancer-source-ranges"
    wish = read(make_service(source_ranges=field, annotations={name: annotation} if annotation else {}))
    assert wish.refusal is None
    return wish.source_ranges


def test_source_ranges_are_trimmed_sorted_and_made_canonical() -> None:
    assert ranges(" 198.51.100.7/24", "192.0.2.0/24 ", "2001:DB8::/32", "192.0.2.0/24") == (
        "192.0.2.0/24",
        "198.51.100.0/24",
        "2001:db8::/32",
    )


def test_the_field_wins_over_the_annotation() -> None:
    assert ranges("192.0.2.0/24", annotation="198.51.100.0/24") == ("192.0.2.0/24",)
    assert ranges(annotation="198.51.100.0/24, 192.0.2.0/24") == ("192.0.2.0/24", "198.51.100.0/24")


def test_no_source_ranges_allow_everybody() -> None:
    assert ranges() == ()
    assert ranges(" ") == ()


@pytest.mark.parametrize("text", ["192.0.2.1", "192.0.2.0/33", "nonsense/8", "192.0.2.0/24;198.51.100.0/24"])
def test_a_malformed_source_range_refuses_the_service(text: str) -> None:
    refusal = read(replace(make_service(), source_ranges=("192.0.2.0/24", text))).refusal
    assert refusal
    assert refusal.reason is Reason.BAD_SOURCE_RANGES
    assert text in refusal.detail
