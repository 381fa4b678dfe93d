# SPDX-License-Identifier: Apache-2.0
"""What the VIP itself answers: a port that it does not serve, and a ping."""

import pytest

from tests.lab.lab import Lab

pytestmark = pytest.mark.netns

ASK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3).close()
    print("connected")
except ConnectionRefusedError:
    print("refused")
except TimeoutError:
    print("silence")
"""


def test_a_port_that_is_not_served_is_refused_at_once(tier: Lab, service_name: str) -> None:
    tier.deploy(service_name)
    address = tier.address_of(service_name)
    tier.wait_routes(address, tuple(tier.hosts))
    assert tier.client.run("python3", "-c", ASK, address, "81").strip() == "refused"


def test_a_vip_answers_a_ping(tier: Lab, service_name: str) -> None:
    tier.deploy(service_name)
    address = tier.address_of(service_name)
    tier.wait_routes(address, tuple(tier.hosts))
    said = tier.client.run("ping", "-c", "3", "-i", "0.2", "-W", "2", address)
    assert "3 received" in said
