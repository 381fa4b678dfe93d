# SPDX-License-Identifier: Apache-2.0
"""What the planner makes of the sections."""

from lbagent import config
from lbagent.model.pool import AddressRange
from tests.config.example import GOOD, changed


def test_a_small_file_is_enough() -> None:
    settings = config.parse(GOOD).settings()
    (pool,) = settings.pools
    assert pool.ranges[0] == AddressRange(4, 0xCB007100, 0xCB00710F)
    assert pool.ranges[1].last - pool.ranges[1].first == 8
    assert pool.policy.communities == ("65001:100",)


def test_policies_on_one_pool_are_united() -> None:
    settings = config.parse(changed("policies: [std]", "policies: [std, far]")).settings()
    policy = settings.pools[0].policy
    assert policy.communities == ("65001:100", "no-export")
    assert policy.prepend == 2
    assert policy.peers == ()  # std goes to everybody
