# SPDX-License-Identifier: Apache-2.0
from lbagent.model.state import Desired, Observed, ProbeTarget, Settings, Snapshot


def test_nothing_is_known_by_default_and_nothing_is_led() -> None:
    snapshot = Snapshot(now=0.0)
    assert not snapshot.listed
    assert not snapshot.is_leader
    assert not snapshot.services


def test_by_default_only_the_mode_that_needs_nothing_is_offered() -> None:
    assert Settings().modes == {"nat"}


def test_empty_plans_and_observations_compare_equal() -> None:
    assert Desired() == Desired()
    assert Observed() == Observed()


def test_probe_targets_are_keys_in_a_fixed_order() -> None:
    targets = {ProbeTarget("10.0.0.2", "tcp", 1), ProbeTarget("10.0.0.1", "tcp", 2), ProbeTarget("10.0.0.1", "tcp", 2)}
    assert [t.address for t in sorted(targets)] == ["10.0.0.1", "10.0.0.2"]
