# SPDX-License-Identifier: Apache-2.0
"""Rings and records that somebody changed behind our back, on real maps without a program."""

import struct
from collections.abc import Callable, Iterator

import pytest

from lbagent.model.vip import Backend
from lbagent.plan.ring import ring
from lbagent.xdp import codec, maps
from lbagent.xdp.bpf import Map
from lbagent.xdp.drift import Rings, changed_by

pytestmark = pytest.mark.bpf

SIZES = maps.Sizes(vips=16, backends=32, rings=4, flows=1024, snat_ports=1024)
NODES = ring(Backend(address=f"10.0.0.{n}") for n in range(1, 4))
OTHERS = ring(Backend(address=f"10.0.1.{n}") for n in range(1, 4))
RING_BYTES = codec.ring_lines(SIZES.backends + 1) * codec.LINE


@pytest.fixture
def held() -> Iterator[dict[str, Map]]:
    """The maps of lb.c with NODES as ring 1 (backends 1-3) and OTHERS as ring 2 (backends 4-6)."""
    made = {spec.name: Map.create(spec) for spec in maps.specs(SIZES)}
    with made["lb_backends"].map_memory() as backends, made["lb_rings"].map_memory() as rings:
        for number, wanted, first in ((1, NODES, 1), (2, OTHERS, 4)):
            id_by_address = {b.address: first + i for i, b in enumerate(wanted.backends)}
            for address, backend in id_by_address.items():
                record = codec.NEIGHBOUR.pack(codec.address_bytes(address), 0, 4, bytes(20), bytes(20))
                backends[backend * 64 : backend * 64 + 64] = record
            packed = codec.ring_bytes(wanted, id_by_address, SIZES.backends + 1)
            rings[number * RING_BYTES : number * RING_BYTES + len(packed)] = packed
    yield made
    for table in made.values():
        table.close()


def spoil(table: Map, at: int) -> None:
    with table.map_memory() as memory:
        memory[at] ^= 0xFF


def names(held: dict[str, Map]) -> set[str]:
    with held["lb_rings"].map_memory() as memory:
        heads = [struct.unpack_from("<Q", memory, n * RING_BYTES)[0] for n in range(SIZES.rings + 1)]
    return {f"{head:016x}" for head in heads if head}


def test_whole_rings_keep_their_names(held: dict[str, Map]):
    looked_after = Rings(held)
    for _ in range(3):
        assert looked_after.unname_spoilt() == ()
    assert names(held) == {NODES.fingerprint, OTHERS.fingerprint}


@pytest.mark.parametrize("at", [64, 64 + 2 * 65536, RING_BYTES - 128, RING_BYTES - 64])
def test_a_changed_slot_or_member_costs_that_ring_its_name(held: dict[str, Map], at: int):
    looked_after = Rings(held)
    looked_after.unname_spoilt()
    spoil(held["lb_rings"], RING_BYTES + at)
    assert looked_after.unname_spoilt() == (NODES.fingerprint,)
    assert names(held) == {OTHERS.fingerprint}


def test_a_backend_with_another_address_spoils_the_rings_that_name_it(held: dict[str, Map]):
    looked_after = Rings(held)
    looked_after.unname_spoilt()
    spoil(held["lb_backends"], 5 * 64 + 3)
    assert looked_after.unname_spoilt() == (OTHERS.fingerprint,)


def test_a_ring_of_an_earlier_daemon_is_spoilt_when_a_backend_does_not_exist(held: dict[str, Map]):
    with held["lb_backends"].map_memory() as backends:
        backends[64:128] = bytes(64)
    assert Rings(held).unname_spoilt() == (NODES.fingerprint,)


def test_another_way_to_a_backend_is_no_damage(held: dict[str, Map]):
    looked_after = Rings(held)
    looked_after.unname_spoilt()
    spoil(held["lb_backends"], 64 + 16)  # path
    spoil(held["lb_backends"], 64 + 30)  # a hop
    assert looked_after.unname_spoilt() == ()


def test_a_ring_in_the_place_of_another_is_not_compared_with_it(held: dict[str, Map]):
    looked_after = Rings(held)
    looked_after.unname_spoilt()
    with held["lb_rings"].map_memory() as rings:
        second = rings[2 * RING_BYTES : 3 * RING_BYTES]
        rings[RING_BYTES : 2 * RING_BYTES] = second
        rings[2 * RING_BYTES : 3 * RING_BYTES] = bytes(RING_BYTES)
    assert looked_after.unname_spoilt() == ()


def test_only_what_had_to_be_written_again_is_named(held: dict[str, Map]):
    def write() -> None:
        with held["lb_config"].map_memory() as memory:
            memory[:8] = b"settings"
        with held["lb_index"].map_memory() as memory:
            memory[:8] = b"an entry"

    def twice(action: Callable[[], None]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return changed_by(action, held), changed_by(action, held)

    assert twice(write) == (("lb_config", "lb_index"), ())
    with held["lb_index"].map_memory() as memory:
        memory[:8] = bytes(8)
    assert changed_by(write, held) == ("lb_index",)
