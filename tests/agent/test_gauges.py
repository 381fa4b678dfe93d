# SPDX-License-Identifier: Apache-2.0
"""The gauges say what the last pass and the targets say."""

from lbagent.agent import gauges
from tests.agent.machine import Machine, one_service


async def test_a_scrape_shows_decisions_and_counters() -> None:
    machine = Machine(one_service())
    await machine.settle()
    gauges.refresh(
        machine.metrics,
        last=machine.loop.last,
        kernel=machine.kernel,
        speaker=machine.speaker,
        cluster=machine.cluster,
        now=machine.now,
    )
    text = machine.metrics.render().decode()
    (vip,) = machine.kernel.forwards
    assert 'lbagent_services{reason="satisfied"} 1.0' in text
    assert f'lbagent_vip_packets_total{{vip="{vip}"}} 1.0' in text
    assert 'lbagent_backend_up{backend="10.0.2.1",service="default/web"} 1.0' in text
    assert 'lbagent_pool_addresses{pool="p"} 16.0' in text
    assert "lbagent_leader 1.0" in text


def test_a_scrape_before_the_first_pass_is_no_crash() -> None:
    machine = Machine(one_service())
    gauges.refresh(
        machine.metrics,
        last=None,
        kernel=machine.kernel,
        speaker=machine.speaker,
        cluster=machine.cluster,
        now=machine.now,
    )
    assert b"lbagent_speaker_connected 1.0" in machine.metrics.render()
