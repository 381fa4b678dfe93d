# SPDX-License-Identifier: Apache-2.0
"""Speaker, relay and ExaBGP against a real FRR: what the router holds is what was wanted."""

import signal

import pytest

from lbagent.model.route import PathPolicy, Route
from tests.bgp.rig import Rig, is_synced, received, speaking, until
from tests.lab.frr import Frr

pytestmark = pytest.mark.netns

POLICY = PathPolicy(name="std", communities=("65001:100", "65001:1:2", "no-export"), med=50, prepend=1)


def routes(*last: int, policy: PathPolicy = POLICY) -> frozenset[Route]:
    return frozenset(Route(prefix=f"192.0.2.{n}/32", policy=policy) for n in last)


def prefixes(*last: int) -> list[str]:
    return sorted(f"192.0.2.{n}/32" for n in last)


async def test_a_route_is_in_the_routers_table_while_it_is_wanted(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(routes(1, 2, 3))
        await until("announced", lambda: sorted(frr.bgp_routes()), prefixes(1, 2, 3), log=rig.log)
        await until("in the kernel", lambda: frr.kernel_next_hops("192.0.2.1"), frozenset({"10.0.1.1"}))
        await until("synced", is_synced(speaker))
        speaker.want(routes(2))
        await until("withdrawn", lambda: sorted(frr.bgp_routes()), prefixes(2))
        await until("synced", is_synced(speaker))
        state = speaker.observed()
        assert state.attracting["192.0.2.2"] == float("inf")
        assert state.attracting["192.0.2.1"] < float("inf")
        assert state.peers["tor"].sent == state.peers["tor"].acknowledged == 1


async def test_every_attribute_arrives_as_the_operator_named_it(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(routes(1))
        await until("announced", lambda: len(frr.bgp_paths("192.0.2.1/32")), 1, log=rig.log)
        (path,) = frr.bgp_paths("192.0.2.1/32")
        assert path["community"]["list"] == ["65001:100", "noExport"]
        assert path["largeCommunity"]["list"] == ["65001:1:2"]
        assert path["metric"] == 50
        assert path["aspath"]["string"] == "65001 65001"


async def test_an_agent_that_is_killed_and_restarted_sends_no_bgp_message(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(routes(1, 2, 3))
        await until("announced", lambda: sorted(frr.bgp_routes()), prefixes(1, 2, 3), log=rig.log)
        await until("synced", is_synced(speaker))
    before = received(frr)
    async with speaking(rig) as speaker:
        await until("adopted", lambda: speaker.observed().adopted)
        assert speaker.observed().routes == routes(1, 2, 3)
        speaker.want(routes(1, 2, 3))
        await until("synced", is_synced(speaker))
    assert sorted(frr.bgp_routes()) == prefixes(1, 2, 3)
    assert received(frr) == before


async def test_a_restarted_agent_sends_only_the_difference(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(routes(1, 2, 3))
        await until("synced", is_synced(speaker), log=rig.log)
    before = received(frr)
    async with speaking(rig) as speaker:
        speaker.want(routes(1, 2, 4))
        await until("synced", is_synced(speaker))
    await until("difference", lambda: sorted(frr.bgp_routes()), prefixes(1, 2, 4))
    assert received(frr)["updatesRecv"] == before["updatesRecv"] + 2


async def test_a_restarted_exabgp_gets_everything_again(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(routes(1, 2, 3))
        await until("synced", is_synced(speaker), log=rig.log)
        rig.stop_exabgp(signal.SIGKILL)
        await until("lost", lambda: sorted(frr.bgp_routes()), [])
        rig.start_exabgp()
        await until("replayed", lambda: sorted(frr.bgp_routes()), prefixes(1, 2, 3), log=rig.log)
        await until("synced", is_synced(speaker))
        assert speaker.observed().restarts == 1


async def test_a_restarted_router_gets_everything_again(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(routes(1, 2, 3))
        await until("synced", is_synced(speaker), log=rig.log)
        frr.stop()
        await until("down", lambda: speaker.observed().peers["tor"].session, "down")
        speaker.want(routes(1, 4))
        await until("let go", lambda: speaker.observed().attracting["192.0.2.2"] < float("inf"))
        frr.start()
        await until("back", lambda: sorted(frr.bgp_routes()), prefixes(1, 4), log=rig.log)
        await until("synced", is_synced(speaker))
        assert speaker.observed().peers["tor"].flaps == 1
