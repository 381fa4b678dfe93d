# SPDX-License-Identifier: Apache-2.0
"""The way to a node: decided from facts alone, and followed live in a namespace."""

import asyncio
import contextlib
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from lbagent.xdp.nexthop import (
    DEFAULT4,
    DEFAULT6,
    NUD_REACHABLE,
    Facts,
    Link,
    Neighbour,
    NextHop,
    NextHops,
    Way,
)
from tests.lab.netns import Namespace, Port, cable

NODE = "10.0.0.7"
MAC, OTHER_MAC, OWN_MAC = b"\2\0\0\0\0\7", b"\2\0\0\0\0\x08", b"\2\0\0\0\0\1"
STALE, INCOMPLETE, FAILED = 0x04, 0x01, 0x20


def link(ifindex: int, name: str, **changes: object) -> Link:
    values = {"mac": OWN_MAC, "mtu": 1500, "is_up": True} | changes
    return Link(ifindex=ifindex, name=name, **values)  # type: ignore[arg-type]


@pytest.fixture
def facts() -> Facts:
    """eth0 (2) and eth1 (3) carry the program; NODE is on the segment of eth0 and known there."""
    return Facts(
        interfaces=frozenset({"eth0", "eth1"}),
        link_by_index={2: link(2, "eth0"), 3: link(3, "eth1")},
        neighbour_by_key={(2, NODE): Neighbour(NUD_REACHABLE, MAC)},
        ways_by_address={NODE: (Way(2),)},
    )


def test_a_node_on_the_segment_is_reached_by_its_own_mac(facts: Facts):
    assert facts.resolve(NODE) == NextHop(ifindex=2, destination_mac=MAC, source_mac=OWN_MAC, mtu=1500)


def test_a_node_behind_a_gateway_is_reached_by_the_gateways_mac(facts: Facts):
    facts.ways_by_address["10.9.0.1"] = (Way(2, NODE),)
    assert facts.resolve("10.9.0.1") == facts.resolve(NODE)


def test_an_ipv4_node_may_have_an_ipv6_gateway(facts: Facts):
    facts.ways_by_address[NODE] = (Way(2, "fe80::1"),)
    facts.neighbour_by_key[2, "fe80::1"] = Neighbour(STALE, OTHER_MAC)
    hop = facts.resolve(NODE)
    assert isinstance(hop, NextHop)
    assert hop.destination_mac == OTHER_MAC


@pytest.mark.parametrize("state", [STALE, 0x08, 0x10, 0x40, 0x80])
def test_every_state_with_a_mac_will_do(facts: Facts, state: int):
    facts.neighbour_by_key[2, NODE] = Neighbour(state, MAC)
    assert isinstance(facts.resolve(NODE), NextHop)


@pytest.mark.parametrize(
    "neighbour", [None, Neighbour(INCOMPLETE, b""), Neighbour(FAILED, MAC), Neighbour(NUD_REACHABLE, b"")]
)
def test_a_silent_neighbour_is_named(facts: Facts, neighbour: Neighbour | None):
    facts.neighbour_by_key.clear()
    if neighbour is not None:
        facts.neighbour_by_key[2, NODE] = neighbour
    assert facts.resolve(NODE) == f"{NODE} does not answer on eth0"


def test_no_route_is_said(facts: Facts):
    assert facts.resolve("10.99.0.1") == "no route"


def test_a_link_that_is_down_is_no_way(facts: Facts):
    facts.link_by_index[2] = link(2, "eth0", is_up=False)
    assert facts.resolve(NODE) == "link eth0 is down"


def test_a_vanished_link_is_no_way(facts: Facts):
    del facts.link_by_index[2]
    assert facts.resolve(NODE) == "interface 2 is gone"


def test_an_interface_without_the_program_is_no_way(facts: Facts):
    facts.link_by_index[2] = link(2, "mgmt0")
    assert facts.resolve(NODE) == "its route leaves by mgmt0, which is not among xdp.interfaces"


def test_of_equal_ways_the_dead_one_is_left_out(facts: Facts):
    facts.ways_by_address[NODE] = (Way(2), Way(3))
    facts.neighbour_by_key[3, NODE] = Neighbour(NUD_REACHABLE, OTHER_MAC)
    for dead, alive in ((2, 3), (3, 2)):
        facts.link_by_index[dead] = link(dead, "eth0", is_up=False)
        hop = facts.resolve(NODE)
        assert isinstance(hop, NextHop)
        assert hop.ifindex == alive
        facts.link_by_index[dead] = link(dead, f"eth{dead - 2}")


def test_many_nodes_spread_over_equal_ways_and_only_the_victims_move(facts: Facts):
    nodes = [f"10.9.0.{n}" for n in range(100)]
    for node in nodes:
        facts.ways_by_address[node] = (Way(2, "10.0.0.2"), Way(3, "10.0.1.2"))
    facts.neighbour_by_key[2, "10.0.0.2"] = Neighbour(NUD_REACHABLE, MAC)
    facts.neighbour_by_key[3, "10.0.1.2"] = Neighbour(NUD_REACHABLE, OTHER_MAC)
    before = {node: facts.resolve(node) for node in nodes}
    by_first = {node for node, hop in before.items() if isinstance(hop, NextHop) and hop.ifindex == 2}
    assert 30 < len(by_first) < 70
    facts.link_by_index[3] = link(3, "eth1", is_up=False)
    assert all(facts.resolve(node) == before[node] for node in by_first)


def test_a_vlan_is_a_tag_and_the_device_below(facts: Facts):
    facts.link_by_index[5] = link(5, "eth0.7", vlan=7, parent=2, mac=OTHER_MAC, mtu=1400)
    facts.ways_by_address[NODE] = (Way(5),)
    facts.neighbour_by_key[5, NODE] = Neighbour(NUD_REACHABLE, MAC)
    assert facts.resolve(NODE) == NextHop(ifindex=2, destination_mac=MAC, source_mac=OTHER_MAC, mtu=1400, vlans=(7,))


def test_two_tags_are_told_outer_first(facts: Facts):
    facts.link_by_index[5] = link(5, "eth0.7", vlan=7, parent=2)
    facts.link_by_index[6] = link(6, "eth0.7.9", vlan=9, parent=5)
    facts.ways_by_address[NODE] = (Way(6),)
    facts.neighbour_by_key[6, NODE] = Neighbour(NUD_REACHABLE, MAC)
    hop = facts.resolve(NODE)
    assert isinstance(hop, NextHop)
    assert hop.vlans == (7, 9)


def test_a_vlan_on_a_dead_device_is_no_way(facts: Facts):
    facts.link_by_index[5] = link(5, "eth0.7", vlan=7, parent=2)
    facts.link_by_index[2] = link(2, "eth0", is_up=False)
    facts.ways_by_address[NODE] = (Way(5),)
    assert facts.resolve(NODE) == "link eth0.7 is down"


def test_the_routes_mtu_counts_when_it_is_smaller(facts: Facts):
    for route_mtu, expected in ((1280, 1280), (9000, 1500), (0, 1500)):
        facts.ways_by_address[NODE] = (Way(2, "", route_mtu),)
        hop = facts.resolve(NODE)
        assert isinstance(hop, NextHop)
        assert hop.mtu == expected


class Mouth:
    """Takes what would go to the kernel."""

    def __init__(self) -> None:
        self.pokes: list[tuple[float, str]] = []

    async def neigh(self, command: str, **request: object) -> None:
        assert request["flags"] == 1  # NTF_USE: resolve as for a packet
        self.pokes.append((asyncio.get_running_loop().time(), str(request["dst"])))


async def poked(hops: NextHops, *, during_s: float) -> list[tuple[float, str]]:
    mouth = Mouth()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(during_s):
            await hops._keep_alive(mouth)  # type: ignore[arg-type]
    return mouth.pokes


def tracking(facts: Facts, *addresses: str) -> NextHops:
    hops = NextHops(facts.interfaces)
    hops.facts = facts
    hops.track(frozenset(addresses))
    return hops


@pytest.mark.looptime
async def test_a_silent_node_is_asked_ever_more_rarely(facts: Facts):
    facts.neighbour_by_key[2, NODE] = Neighbour(FAILED, b"")
    pokes = await poked(tracking(facts, NODE), during_s=64)
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(pokes)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 8.0
    assert len(pokes) <= 10


@pytest.mark.looptime
async def test_however_many_nodes_are_silent_the_segment_is_not_flooded(facts: Facts):
    nodes = [f"10.1.{n // 250}.{n % 250}" for n in range(1000)]
    for node in nodes:
        facts.ways_by_address[node] = (Way(2),)
    pokes = await poked(tracking(facts, *nodes), during_s=60)
    by_second = Counter(int(when) for when, _ in pokes)
    assert max(by_second.values()) <= 64
    assert {address for _, address in pokes} == set(nodes)


@pytest.mark.looptime
async def test_a_node_that_answers_is_left_alone_and_a_stale_one_is_confirmed(facts: Facts):
    assert await poked(tracking(facts, NODE), during_s=60) == []
    facts.neighbour_by_key[2, NODE] = Neighbour(STALE, MAC)
    assert await poked(tracking(facts, NODE), during_s=3)


@pytest.mark.looptime
async def test_moves_that_follow_one_another_are_told_together(facts: Facts):
    hops = NextHops(facts.interfaces)
    told: list[float] = []
    clock = asyncio.get_running_loop().time
    async with asyncio.TaskGroup() as group:
        task = group.create_task(hops._tell(lambda: told.append(clock())))
        for _ in range(100):
            hops._moved.set()
            await asyncio.sleep(0.001)
        await asyncio.sleep(1)
        task.cancel()
    assert told[0] == 0.0
    assert 5 <= len(told) <= 12


# --- live ----------------------------------------------------------------------------------------


class Plant:
    """``host`` with eth0 (10.0.0.1/24) and eth1 (10.0.1.1/24) cabled to ``peer`` (.2 each)."""

    def __init__(self) -> None:
        token = os.urandom(3).hex()
        self.host, self.peer = Namespace(f"a2n{token}"), Namespace(f"a2m{token}")
        self.host.create()
        self.peer.create()
        for number in (0, 1):
            cable(Port(self.host, f"eth{number}"), Port(self.peer, f"up{number}"))
            Port(self.host, f"eth{number}").up(f"10.0.{number}.1/24", f"fd00:{number}::1/64")
            Port(self.peer, f"up{number}").up(f"10.0.{number}.2/24", f"fd00:{number}::2/64")

    def delete(self) -> None:
        self.host.delete()
        self.peer.delete()

    def speak(self, address: str) -> None:
        """Make the peer send a datagram."""
        with self.peer.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", (address, 9))

    def mac(self, device: str) -> bytes:
        return bytes.fromhex(Port(self.peer, device).mac.replace(":", ""))

    def index(self, device: str) -> int:
        return int(self.host.run("ip", "-oneline", "link", "show", "dev", device).split(":")[0])


@pytest.fixture
def plant() -> Iterator[Plant]:
    made = Plant()
    try:
        with made.host.entered():
            yield made
    finally:
        made.delete()


@asynccontextmanager
async def following(*addresses: str) -> AsyncIterator[NextHops]:
    hops = NextHops(["eth0", "eth1"])
    hops.track(frozenset(addresses))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(hops.run(lambda: None))
        yield hops
        task.cancel()


async def soon(claim: Callable[[], object], *, limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not claim():
            await asyncio.sleep(0.01)


def leaves_by(hops: NextHops, address: str) -> int:
    hop = hops.hops().get(address)
    return hop.ifindex if hop is not None else 0


@pytest.mark.netns
@pytest.mark.parametrize("address", ["10.0.0.2", "fd00:1::2"])
async def test_a_neighbour_nobody_asked_for_yet_is_resolved(plant: Plant, address: str):
    async with following(address) as hops:
        await soon(lambda: address in hops.hops())
        device = "0" if "10." in address else "1"
        assert hops.hops()[address].destination_mac == plant.mac(f"up{device}")
        assert hops.obstacle(address) == ""


@pytest.mark.netns
async def test_an_address_that_nobody_has_stays_unresolved_and_says_so(plant: Plant):
    async with following("10.0.0.99", "10.0.0.2") as hops:
        await soon(lambda: "10.0.0.2" in hops.hops())
        assert hops.obstacle("10.0.0.99") == "10.0.0.99 does not answer on eth0"


@pytest.mark.netns
async def test_what_is_tracked_later_is_resolved_later_and_what_is_not_is_forgotten(plant: Plant):
    async with following("10.0.0.2") as hops:
        await soon(lambda: "10.0.0.2" in hops.hops())
        hops.track(frozenset({"10.0.1.2"}))
        await soon(lambda: "10.0.1.2" in hops.hops())
        assert "10.0.0.2" not in hops.hops()


@pytest.mark.netns
async def test_a_gateways_new_mac_is_followed(plant: Plant):
    plant.host.ip("route add 10.9.0.0/24 via 10.0.0.2")
    async with following("10.9.0.1") as hops:
        await soon(lambda: "10.9.0.1" in hops.hops())
        plant.peer.ip("link set up0 address 02:00:00:00:00:99")
        plant.speak("10.0.0.1")  # its question who has 10.0.0.1 tells the new MAC
        await soon(lambda: hops.hops()["10.9.0.1"].destination_mac == bytes.fromhex("020000000099"))


@pytest.mark.netns
async def test_a_lost_link_moves_the_way_and_its_return_brings_it_back(plant: Plant):
    plant.host.ip("route add 10.9.0.0/24 nexthop via 10.0.0.2 nexthop via 10.0.1.2")
    async with following(*(f"10.9.0.{n}" for n in range(8))) as hops:
        await soon(lambda: len({leaves_by(hops, f"10.9.0.{n}") for n in range(8)} - {0}) == 2)
        before = {f"10.9.0.{n}": leaves_by(hops, f"10.9.0.{n}") for n in range(8)}
        Port(plant.peer, "up0").down()
        await soon(lambda: {leaves_by(hops, node) for node in before} == {plant.index("eth1")})
        plant.peer.ip("link set up0 up")
        await soon(lambda: {node: leaves_by(hops, node) for node in before} == before)


@pytest.mark.netns
async def test_a_link_set_down_by_hand_takes_its_routes_along(plant: Plant):
    async with following("10.0.0.2") as hops:
        await soon(lambda: "10.0.0.2" in hops.hops())
        plant.host.ip("link set eth0 down")
        await soon(lambda: hops.obstacle("10.0.0.2") == "no route")
        plant.host.ip("link set eth0 up")
        await soon(lambda: "10.0.0.2" in hops.hops())


@pytest.mark.netns
async def test_a_route_change_is_followed(plant: Plant):
    plant.host.ip("route add 10.9.0.0/24 via 10.0.0.2")
    async with following("10.9.0.1") as hops:
        await soon(lambda: leaves_by(hops, "10.9.0.1") == plant.index("eth0"))
        plant.host.ip("route replace 10.9.0.0/24 via 10.0.1.2")
        await soon(lambda: leaves_by(hops, "10.9.0.1") == plant.index("eth1"))
        plant.host.ip("route add blackhole 10.9.0.1/32")
        await soon(lambda: hops.obstacle("10.9.0.1") == "no route")
        plant.host.ip("route delete blackhole 10.9.0.1/32")
        await soon(lambda: leaves_by(hops, "10.9.0.1") == plant.index("eth1"))


@pytest.mark.netns
async def test_a_policy_rule_is_followed(plant: Plant):
    plant.host.ip("route add 10.9.0.0/24 via 10.0.0.2", "route add 10.9.0.0/24 via 10.0.1.2 table 100")
    async with following("10.9.0.1") as hops:
        await soon(lambda: leaves_by(hops, "10.9.0.1") == plant.index("eth0"))
        plant.host.ip("rule add to 10.9.0.0/24 lookup 100")
        await soon(lambda: leaves_by(hops, "10.9.0.1") == plant.index("eth1"))


@pytest.mark.netns
async def test_nexthop_objects_are_followed_as_frr_installs_them(plant: Plant):
    plant.host.ip("nexthop add id 1 via 10.0.0.2 dev eth0", "nexthop add id 2 via 10.0.1.2 dev eth1")
    plant.host.ip("nexthop add id 10 group 1", "route add 10.9.0.0/24 nhid 10")
    async with following("10.9.0.1") as hops:
        await soon(lambda: leaves_by(hops, "10.9.0.1") == plant.index("eth0"))
        plant.host.ip("nexthop replace id 10 group 2")
        await soon(lambda: leaves_by(hops, "10.9.0.1") == plant.index("eth1"))


@pytest.mark.netns
async def test_the_default_gateways_are_tracked_unasked(plant: Plant):
    async with following() as hops:
        plant.host.ip("route add default via 10.0.0.2 metric 200", "route add default via fd00:1::2")
        await soon(lambda: leaves_by(hops, DEFAULT4) == plant.index("eth0"))
        await soon(lambda: leaves_by(hops, DEFAULT6) == plant.index("eth1"))
        plant.host.ip("route add default via 10.0.1.2 metric 100")
        await soon(lambda: leaves_by(hops, DEFAULT4) == plant.index("eth1"))


@pytest.mark.netns
async def test_an_interface_made_anew_is_a_way_again(plant: Plant):
    async with following("10.0.0.2") as hops:
        await soon(lambda: "10.0.0.2" in hops.hops())
        plant.host.ip("link delete eth0")
        await soon(lambda: "10.0.0.2" not in hops.hops())
        cable(Port(plant.host, "eth0"), Port(plant.peer, "up0"))
        Port(plant.peer, "up0").up("10.0.0.2/24")
        Port(plant.host, "eth0").up("10.0.0.1/24")
        await soon(lambda: leaves_by(hops, "10.0.0.2") == plant.index("eth0"))


@pytest.mark.netns
async def test_a_believed_neighbour_is_confirmed_without_a_broadcast(plant: Plant):
    mac = Port(plant.peer, "up0").mac
    plant.host.ip(f"neigh replace 10.0.0.2 lladdr {mac} dev eth0 nud stale")
    plant.host.sysctl({"net/ipv4/neigh/eth0/delay_first_probe_time": "1"})
    async with following("10.0.0.2"):
        await soon(lambda: "REACHABLE" in plant.host.run("ip", "neigh", "show", "10.0.0.2"), limit_s=10)


@pytest.mark.netns
async def test_a_lost_event_socket_only_means_asking_anew(plant: Plant, monkeypatch: pytest.MonkeyPatch):
    failures = iter([OSError(105, "No buffer space available")])
    listen = NextHops._listen

    async def deaf_once(self: NextHops, *arguments: object) -> None:
        for failure in failures:
            raise failure
        await listen(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(NextHops, "_listen", deaf_once)
    plant.host.ip("route add 10.9.0.0/24 via 10.0.0.2")
    async with following("10.9.0.1") as hops:
        await soon(lambda: leaves_by(hops, "10.9.0.1") == plant.index("eth0"))
        plant.host.ip("route replace 10.9.0.0/24 via 10.0.1.2")
        await soon(lambda: leaves_by(hops, "10.9.0.1") == plant.index("eth1"))
