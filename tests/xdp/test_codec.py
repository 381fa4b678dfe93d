# SPDX-License-Identifier: Apache-2.0
import ipaddress
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbagent.model.service import Protocol, ServiceKey
from lbagent.model.vip import RING_SLOTS, Backend, BackendState, Forward, Mode, Ring, Vip
from lbagent.xdp import codec
from lbagent.xdp.nexthop import NextHop

addresses = st.ip_addresses().map(str)
vips = st.builds(
    Vip,
    address=addresses,
    protocol=st.sampled_from([Protocol.TCP, Protocol.UDP]),
    port=st.integers(1, 65535),
)
records = st.builds(
    codec.VipRecord,
    vip=vips,
    mode=st.sampled_from(Mode),
    node_port=st.integers(0, 65535),
    ring_id=st.integers(0, 65535),
    ranges_id=st.integers(0, 65535),
    affinity_s=st.integers(0, 86_400),
    affinity_ticks=st.integers(0, 86_400),
    salt=st.integers(0, (1 << 64) - 1),
    new_flows_per_tick=st.integers(0, 1 << 30),
)


@given(records)
def test_a_vip_is_read_back_as_it_was_written(record: codec.VipRecord) -> None:
    assert codec.vip_record(record.packed()) == record


@given(records)
def test_the_target_is_the_first_word(record: codec.VipRecord) -> None:
    assert int.from_bytes(record.packed()[:8], "little") == record.target


@pytest.mark.parametrize("spoilt", [bytes(64), b"\xff" * 64, bytes(4) + b"\x01" + bytes(59)])
def test_a_record_we_could_not_have_written_is_none(spoilt: bytes) -> None:
    assert codec.vip_record(spoilt) is None


def test_a_forward_equals_what_was_wanted_but_for_the_service() -> None:
    record = codec.VipRecord(
        vip=Vip(address="2001:db8::1", protocol=Protocol.UDP, port=53),
        mode=Mode.DSR_IPIP,
        node_port=0,
        ring_id=3,
        ranges_id=2,
        affinity_s=127,
        affinity_ticks=125,
        salt=5,
        new_flows_per_tick=9,
    )
    assert codec.forward(record, fingerprint="00ff", ranges=("192.0.2.0/24",)) == Forward(
        vip=record.vip,
        service=ServiceKey("default", "dns"),
        mode=Mode.DSR_IPIP,
        ring="00ff",
        source_ranges=("192.0.2.0/24",),
        affinity_timeout_s=127,
        new_flows_per_s=9,
    )


@given(st.lists(st.ip_addresses().flatmap(
    lambda a: st.integers(0, a.max_prefixlen).map(lambda n: f"{a}/{n}")), max_size=8))  # fmt: skip
def test_source_ranges_are_read_back_in_one_canonical_form(ranges: list[str]) -> None:
    canonical = codec.canonical_ranges(ranges)
    assert codec.canonical_ranges(reversed(canonical)) == canonical
    keys = [codec.range_key(network, 7) for network in canonical]
    assert [codec.range_of(key) for key in keys] == [(7, network) for network in canonical]
    assert {ipaddress.ip_network(r, strict=False) for r in ranges} == {ipaddress.ip_network(c) for c in canonical}


def test_a_ring_holds_ids_and_who_may_keep_and_who_may_get_flows() -> None:
    backends = (
        Backend(address="10.0.0.1"),
        Backend(address="10.0.0.2", state=BackendState.DRAINING),
        Backend(address="10.0.0.3", state=BackendState.DOWN),
    )
    ring = Ring(fingerprint="00000000000000ab", backends=backends, slots=array("H", [1] * (RING_SLOTS - 1) + [0]))
    packed = codec.ring_bytes(ring, {"10.0.0.1": 600, "10.0.0.2": 2, "10.0.0.3": 3}, 1000)
    assert len(packed) == codec.ring_lines(1000) * codec.LINE
    assert packed[:8] == (0xAB).to_bytes(8, "little")
    slots = packed[codec.LINE : codec.LINE + 2 * RING_SLOTS]
    assert slots == (600).to_bytes(2, "little") * (RING_SLOTS - 1) + bytes(2)
    size = codec.member_lines(1000) * codec.LINE
    kept, active = packed[-2 * size : -size], packed[-size:]
    assert int.from_bytes(kept, "little") == 1 << 600 | 1 << 2
    assert int.from_bytes(active, "little") == 1 << 600


def test_a_way_names_interface_macs_and_tags() -> None:
    hop = NextHop(ifindex=5, destination_mac=b"\2dest!", source_mac=b"\2sourc", mtu=9000, vlans=(100, 200))
    assert codec.hop_bytes(hop) == b"\5\0\0\0\2dest!\2sourc\0\x64\0\xc8"
    assert codec.hop_bytes(None) == bytes(20)
    assert codec.neighbour_path(hop, second=True) == codec.PATH_SECOND | codec.PATH_USABLE | 9000 << 16
    assert codec.neighbour_path(None, second=True) == codec.PATH_SECOND
    assert codec.router_key(hop) == b"\5\0\0\0\2dest!\0\x64"
