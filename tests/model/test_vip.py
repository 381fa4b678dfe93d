# SPDX-License-Identifier: Apache-2.0
from array import array
from dataclasses import replace

from lbagent.model.vip import RING_SLOTS, Ring
from lbagent.plan.desire import desire
from tests.builders import make_backend, make_key, make_service, make_snapshot, make_vip


def test_a_vip_prints_as_operators_write_it() -> None:
    assert str(make_vip("192.0.2.1:80/TCP")) == "192.0.2.1:80/TCP"
    assert str(make_vip("[2001:db8::1]:53/UDP")) == "[2001:db8::1]:53/UDP"


def test_a_vip_knows_its_family() -> None:
    assert (make_vip("192.0.2.1:80").family, make_vip("[2001:db8::1]:80").family) == (4, 6)


def test_the_number_of_slots_is_prime() -> None:
    assert all(RING_SLOTS % n for n in range(2, int(RING_SLOTS**0.5) + 1))


def test_what_the_kernel_does_not_know_makes_no_difference() -> None:
    (forward,) = desire(make_snapshot([make_service(status=["198.51.100.1"])])).forwards.values()
    assert replace(forward, service=make_key("other")) == forward
    assert make_backend(1, node="a") == make_backend(1, node="b")


def test_rings_compare_by_content_not_by_table() -> None:
    one = Ring(fingerprint="f", backends=(make_backend(1),), slots=array("H", [1]))
    assert one == Ring(fingerprint="f", backends=(make_backend(1),), slots=array("H", [0]))
    assert "slots" not in repr(one)
