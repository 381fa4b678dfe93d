# SPDX-License-Identifier: Apache-2.0
from lbagent.model.route import PathPolicy, Route


def test_a_route_knows_its_family_and_its_address() -> None:
    four, six = Route(prefix="192.0.2.1/32"), Route(prefix="2001:db8::1/128")
    assert (four.family, four.address) == (4, "192.0.2.1")
    assert (six.family, six.address) == (6, "2001:db8::1")


def test_the_name_of_a_policy_makes_no_other_route() -> None:
    assert Route(prefix="a/32", policy=PathPolicy(name="x")) == Route(prefix="a/32", policy=PathPolicy(name="y"))
    assert Route(prefix="a/32", policy=PathPolicy(med=1)) != Route(prefix="a/32")


def test_a_softened_policy_is_never_more_attractive() -> None:
    policy = PathPolicy(communities=("65001:1",), local_preference=200, med=5, prepend=1, peers=("tor1",))
    soft = policy.softened(PathPolicy(communities=("graceful-shutdown",), local_preference=0, prepend=2))
    assert soft.communities == ("65001:1", "graceful-shutdown")
    assert (soft.local_preference, soft.med, soft.prepend, soft.peers) == (0, 5, 3, ("tor1",))
