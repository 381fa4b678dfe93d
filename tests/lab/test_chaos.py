# SPDX-License-Identifier: Apache-2.0
"""The faults that matter most, in their short form. ``make chaos`` has all of them, at length."""

from collections.abc import Iterator

import pytest

from tests.lab.lab import Lab, random_prefix
from tests.lab.scenarios import SCENARIOS
from tests.lab.scene import Scenario, run, settle


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[Lab, str]]:
    """A tier of its own, for what is done to it, and the address of its one Service."""
    with Lab.up(prefix=random_prefix()) as lab:
        for host in lab.hosts.values():
            host.power_on()
        settle(lab)
        lab.deploy("web", pods=len(lab.topology.nodes) - 1)
        yield lab, lab.address_of("web")


@pytest.mark.netns
@pytest.mark.timeout(120)
@pytest.mark.parametrize("scenario", [one for one in SCENARIOS if one.in_ci], ids=lambda one: one.name)
def test_a_promise_is_kept_when(stage: tuple[Lab, str], scenario: Scenario) -> None:
    lab, address = stage
    entry = run(lab, scenario, address, is_short=True)
    assert entry.kept, entry.told()


def test_every_fault_has_a_name_of_its_own() -> None:
    assert len({one.name for one in SCENARIOS}) == len(SCENARIOS)
