# SPDX-License-Identifier: Apache-2.0
"""Labs for tests. Building one takes half a second, starting LB hosts some seconds: they are shared."""

import zlib
from collections.abc import Iterator

import pytest

from tests.lab import stages
from tests.lab.lab import Lab, random_prefix
from tests.lab.poll import wait_for


@pytest.fixture(scope="session")
def bare_lab() -> Iterator[Lab]:
    """Everything but LB hosts: client, ToR, API, nodes."""
    with Lab.up(prefix=random_prefix()) as lab:
        yield lab


@pytest.fixture(scope="session")
def tier_of_the_session() -> Iterator[Lab]:
    with Lab.up(prefix=random_prefix()) as lab:
        for host in lab.hosts.values():
            host.power_on()
        yield lab


@pytest.fixture
def tier(tier_of_the_session: Lab) -> Lab:
    """Two LB hosts, both ready and with sessions to the ToR, whatever the test before has done to them."""
    lab = tier_of_the_session
    for host in lab.hosts.values():
        if not host.namespace.exists:
            host.power_on()
        elif host.agent is None or not host.agent.alive:
            host.start_agent()
        host.wait_ready()
        for family in (4, 6):
            stages.wait_session(lab, host.name, family)
    lab.tap.clear()
    return lab


@pytest.fixture
def service_name(tier: Lab, request: pytest.FixtureRequest) -> Iterator[str]:
    """A Service name of this test alone; the Service is gone from ToR and kernels afterwards."""
    name = f"s{zlib.crc32(request.node.name.encode()):08x}"
    yield name
    tier.undeploy(name)
    for host in tier.hosts.values():
        wait_for(f"{host.name} to be empty", host.vips, until=lambda rows: not rows, limit_s=20, logs=host.logs)
