# SPDX-License-Identifier: Apache-2.0
from dataclasses import FrozenInstanceError, replace

import pytest

from lbagent.model.service import Ingress, ServiceKey
from tests.builders import make_service


def test_a_key_prints_as_namespace_and_name_and_sorts_so() -> None:
    keys = [ServiceKey("b", "a"), ServiceKey("a", "z"), ServiceKey("a", "b")]
    assert [str(key) for key in sorted(keys)] == ["a/b", "a/z", "b/a"]


def test_the_status_addresses_leave_out_hostnames() -> None:
    service = replace(make_service(), ingress=(Ingress(ip="192.0.2.1"), Ingress(ip=""), Ingress(ip="2001:db8::1")))
    assert service.status_addresses == ("192.0.2.1", "2001:db8::1")


def test_nouns_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        make_service().type = "ClusterIP"  # type: ignore[misc]


def test_a_service_can_be_a_key_although_it_holds_mappings() -> None:
    assert hash(make_service(labels={"a": "b"})) == hash(make_service(labels={"c": "d"}))
