# SPDX-License-Identifier: Apache-2.0
"""Changes to the real maps: what is read back, what another daemon finds, what has no room."""

import dataclasses
from array import array
from collections.abc import Iterator

import pytest

from lbagent.errors import TableFull, XdpError
from lbagent.model.service import Protocol, ServiceKey
from lbagent.model.vip import RING_SLOTS, Backend, Forward, Mode, Ring, Vip
from lbagent.xdp import codec, maps
from lbagent.xdp.bpf import Map
from lbagent.xdp.counters import Counters
from lbagent.xdp.index import index_hash
from lbagent.xdp.maps import Sizes, Tables
from lbagent.xdp.nexthop import NextHop
from lbagent.xdp.settings import Settings

SIZES = Sizes(vips=16, backends=8, rings=4, flows=1024, snat_ports=1024)
TICK_S = 1.024


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def held() -> Iterator[dict[str, Map]]:
    made = {spec.name: Map.create(spec) for spec in maps.specs(SIZES)}
    yield made
    for table in made.values():
        table.close()


def opened(held: dict[str, Map], clock: Clock) -> Tables:
    tables = Tables(held, sizes=SIZES, tick_s=TICK_S, clock=clock)
    tables.configure(Settings(snat_addresses=("10.0.0.9",), port_count=1024))
    return tables


@pytest.fixture
def tables(held: dict[str, Map], clock: Clock) -> Iterator[Tables]:
    tables = opened(held, clock)
    yield tables
    tables.close()


def ring(fingerprint: int, *nodes: int) -> Ring:
    backends = tuple(Backend(address=f"10.0.0.{n}") for n in nodes)
    slots = array("H", [1 + i % len(nodes) for i in range(RING_SLOTS)] if nodes else [0] * RING_SLOTS)
    return Ring(fingerprint=f"{fingerprint:016x}", backends=backends, slots=slots)


def forward(port: int, to: Ring, *, address: str = "192.0.2.1", **more: object) -> Forward:
    vip = Vip(address=address, protocol=Protocol.TCP, port=port)
    wanted = Forward(vip=vip, service=ServiceKey("a", "b"), mode=Mode.NAT, ring=to.fingerprint, node_port=30000 + port)
    return dataclasses.replace(wanted, **more)


def given(*rings: Ring) -> dict[str, Ring]:
    return {r.fingerprint: r for r in rings}


pytestmark = pytest.mark.bpf


def test_what_was_programmed_is_read_back_equal(tables: Tables) -> None:
    one, two = ring(1, 1, 2), ring(2, 3)
    wanted = [
        forward(80, one),
        forward(81, two, mode=Mode.DSR_L2, node_port=0),
        forward(80, two, address="2001:db8::1", mode=Mode.DSR_IPIP, node_port=0),
        forward(82, one, source_ranges=("192.0.2.0/24", "2001:db8::/32"), affinity_timeout_s=10_800),
        forward(83, one, new_flows_per_s=50),
    ]
    assert tables.program(wanted, given(one, two)) == {}
    assert tables.read() == {f.vip: f for f in wanted}
    assert tables.rings() == {one.fingerprint, two.fingerprint}
    assert set(tables.backend_ids()) == {"10.0.0.1", "10.0.0.2", "10.0.0.3"}


def test_another_daemon_finds_the_same(held: dict[str, Map], clock: Clock, tables: Tables) -> None:
    one = ring(1, 1, 2)
    wanted = [forward(80, one), forward(81, one, source_ranges=("10.0.0.0/8",))]
    tables.program(wanted, given(one))
    ids = tables.backend_ids()
    other = opened(held, clock)
    assert other.read() == {f.vip: f for f in wanted}
    assert other.backend_ids() == ids
    assert other.vip_id(wanted[0].vip) == tables.vip_id(wanted[0].vip)
    assert other.program(wanted, {}) == {}, "its rings are there already"
    other.unprogram([f.vip for f in wanted])
    assert other.read() == {}
    other.close()


def test_programming_the_same_again_changes_nothing(held: dict[str, Map], tables: Tables) -> None:
    one = ring(1, 1, 2)
    tables.program([forward(80, one)], given(one))
    before = {name: sorted(table.items()) for name, table in held.items() if name not in ("lb_flows", "lb_nat")}
    tables.program([forward(80, one)], given(one))
    assert {name: sorted(table.items()) for name, table in held.items() if name in before} == before


def test_a_new_ring_is_another_one_and_the_old_goes_when_nobody_uses_it(tables: Tables, clock: Clock) -> None:
    one, two = ring(1, 1, 2), ring(2, 2, 3)
    tables.program([forward(80, one), forward(81, one)], given(one))
    tables.program([forward(80, two)], given(two))
    assert tables.rings() == {one.fingerprint, two.fingerprint}
    tables.program([forward(81, two)], given(two))
    assert tables.rings() == {two.fingerprint}
    assert set(tables.backend_ids()) == {"10.0.0.2", "10.0.0.3"}


def test_an_id_rests_before_it_is_used_again(tables: Tables, clock: Clock) -> None:
    """So a packet that still holds it meets nobody else."""
    rings = [ring(n, 1) for n in range(1, 6)]
    for number, each in enumerate(rings[:4]):
        assert tables.program([forward(80, each)], given(each)) == {}, number
    (error,) = tables.program([forward(80, rings[4])], given(rings[4])).values()
    assert isinstance(error, TableFull)
    assert tables.read()[forward(80, rings[3]).vip].ring == rings[3].fingerprint, "what was there still is"
    clock.now += 1
    assert tables.program([forward(80, rings[4])], given(rings[4])) == {}


def test_one_vip_too_many_harms_no_other(tables: Tables) -> None:
    one = ring(1, 1)
    wanted = [forward(port, one) for port in range(1, 19)]
    failed = tables.program(wanted, given(one))
    assert len(failed) == 2
    assert all("raise xdp.limits" in error.hint for error in failed.values())
    assert len(tables.read()) == 16


def test_a_ring_with_too_many_backends_fails_its_own_vips_only(tables: Tables) -> None:
    small, large = ring(1, 1), ring(2, *range(2, 12))
    failed = tables.program([forward(80, large), forward(81, small)], given(small, large))
    assert set(failed) == {forward(80, large).vip}
    assert set(tables.read()) == {forward(81, small).vip}
    assert set(tables.backend_ids()) == {"10.0.0.1"}, "nothing of the failed one is left"


def test_a_ring_that_is_neither_there_nor_given_is_an_error(tables: Tables) -> None:
    (error,) = tables.program([forward(80, ring(9, 1))], {}).values()
    assert type(error) is XdpError


def test_a_vip_that_goes_takes_ring_backends_and_ranges_with_it(held: dict[str, Map], tables: Tables) -> None:
    one = ring(1, 1, 2)
    wanted = forward(80, one, source_ranges=("10.0.0.0/8", "fd00::/8"))
    tables.program([wanted], given(one))
    tables.unprogram([wanted.vip, wanted.vip])
    assert tables.read() == {}
    assert tables.rings() == frozenset()
    assert tables.backend_ids() == {}
    assert list(held["lb_ranges4"].items()) == list(held["lb_ranges6"].items()) == []
    with held["lb_vips"].map_memory() as memory:
        assert memory[:] == bytes(len(memory))


def test_equal_source_ranges_are_kept_once(held: dict[str, Map], tables: Tables) -> None:
    one = ring(1, 1)
    ranges = ("10.0.0.0/8", "192.0.2.0/24")
    tables.program([forward(80, one, source_ranges=ranges), forward(81, one, source_ranges=ranges)], given(one))
    assert len(list(held["lb_ranges4"].items())) == 2
    tables.program([forward(80, one)], {})
    assert tables.read()[forward(81, one).vip].source_ranges == ranges


def test_a_way_known_before_the_backend_is_used_from_the_start(held: dict[str, Map], tables: Tables) -> None:
    way = NextHop(ifindex=7, destination_mac=b"\2dest!", source_mac=b"\2sourc", mtu=1500)
    tables.set_hop("10.0.0.1", way)
    one = ring(1, 1)
    tables.program([forward(80, one)], given(one))
    assert path_of(held, "lb_backends", tables.backend_ids()["10.0.0.1"]) == (way, True)
    tables.set_hop("10.0.0.1", None)
    assert path_of(held, "lb_backends", tables.backend_ids()["10.0.0.1"])[1] is False


def path_of(held: dict[str, Map], name: str, number: int) -> tuple[NextHop, bool]:
    record = held[name].lookup(number.to_bytes(4, "little"))
    assert record is not None
    _, path, _, *hops = codec.NEIGHBOUR.unpack(record)
    ifindex, destination, source, _, _ = codec.HOP.unpack(hops[path & codec.PATH_SECOND])
    hop = NextHop(ifindex=ifindex, destination_mac=destination, source_mac=source, mtu=path >> 16)
    return hop, bool(path & codec.PATH_USABLE)


def test_a_changed_way_is_written_aside_first(held: dict[str, Map], tables: Tables) -> None:
    """Whichever moment a packet reads it, address pair and interface belong together."""
    ways = [NextHop(ifindex=n, destination_mac=bytes([n] * 6), source_mac=bytes([n] * 6), mtu=1500) for n in (1, 2, 3)]
    for way in ways:
        tables.set_router("10.0.0.254", way)
        (number,) = {int.from_bytes(v, "little") for k, v in held["lb_router_ids"].items()}
        assert path_of(held, "lb_routers", number)[0] == way
    record = held["lb_routers"].lookup(number.to_bytes(4, "little")) or b""
    assert codec.hop_bytes(ways[1]) in record, "the way before is still there, unused"


@pytest.mark.parametrize("lost_between", [False, True])
def test_a_router_with_a_new_mac_is_not_known_by_the_old_one(
    held: dict[str, Map], tables: Tables, lost_between: bool
) -> None:
    old, new = (NextHop(ifindex=2, destination_mac=bytes([n] * 6), source_mac=bytes(6), mtu=1500) for n in (2, 4))
    tables.set_router("10.0.0.254", old)
    if lost_between:
        tables.set_router("10.0.0.254", None)
    tables.set_router("10.0.0.254", new)
    assert [key for key, _ in held["lb_router_ids"].items()] == [codec.router_key(new)]


def test_too_many_snat_addresses_are_refused(tables: Tables) -> None:
    with pytest.raises(TableFull, match="SNAT"):
        tables.configure(Settings(snat_addresses=("10.0.0.1", "10.0.0.2")))


def test_counters_start_at_zero_for_a_new_owner(held: dict[str, Map], tables: Tables, clock: Clock) -> None:
    one = ring(1, 1)
    tables.program([forward(80, one)], given(one))
    counters = Counters(held, sizes=SIZES)
    number = tables.vip_id(forward(80, one).vip)
    with held["lb_counters"].map_memory() as memory:
        at = (SIZES.counters + maps.COUNTER_VERDICTS + number) * codec.COUNTER.size  # of the second CPU
        memory[at : at + codec.COUNTER.size] = codec.COUNTER.pack(1, 2, 3, 4, 5, 6, 0, 0)
    count = counters.vips([number])[number]
    assert (count.packets, count.bytes, count.replies, count.reply_bytes, count.flows, count.drops) == (
        1,
        2,
        3,
        4,
        5,
        6,
    )
    tables.unprogram([forward(80, one).vip])
    for port in range(100, 116):  # every id is given once, the one that rests last
        clock.now += 1
        tables.program([forward(port, one)], given(one))
    assert set(tables.read()) == {forward(port, one).vip for port in range(100, 116)}
    assert counters.vips([number])[number].packets == 0
    counters.close()


@pytest.mark.parametrize(("hz", "shift"), [(100, 7), (250, 8), (300, 9), (1000, 10), (1024, 10)])
def test_a_tick_is_about_a_second(hz: int, shift: int) -> None:
    assert maps.tick_shift(hz) == shift
    assert 1.0 <= 2**shift / hz < 2.0


def test_sizes_follow_from_the_limits() -> None:
    sizes = Sizes(vips=4096, flows=1_000_000, snat_ports=10_000)
    assert sizes.flow_lines == 131_072
    assert sizes.nat_shift == 12
    specs = {spec.name: spec for spec in maps.specs(sizes)}
    assert specs["lb_flows"].value_bytes * specs["lb_flows"].entries <= 16 << 20, "a million flows in 16 MiB"
    wide = {spec.name: spec for spec in maps.specs(Sizes(snat_addresses=16))}
    assert wide["lb_nat"].value_bytes * wide["lb_nat"].entries <= 32 << 20, "half a million NAT flows in 32 MiB"
    assert all(len(spec.name) <= 15 for spec in specs.values())


def test_the_hash_of_a_vip_is_its_key_in_the_index() -> None:
    vip = Vip(address="192.0.2.1", protocol=Protocol.UDP, port=53)
    assert codec.vip_hash(vip) == index_hash("192.0.2.1", 53, 17)
