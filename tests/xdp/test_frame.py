# SPDX-License-Identifier: Apache-2.0
"""Frames in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbagent.model.service import Protocol
from lbagent.model.vip import Vip
from lbagent.xdp import frame
from lbagent.xdp.testrun import packet_to


def to(address: str, protocol: Protocol) -> bytes:
    source = "2001:db8::9" if ":" in address else "192.0.2.9"
    return packet_to(Vip(address=address, protocol=protocol, port=80), source=source, source_port=40000)


@pytest.mark.parametrize(
    ("address", "protocol", "said"),
    [
        ("203.0.113.1", Protocol.TCP, "IP 192.0.2.9 > 203.0.113.1 ttl 64 length 40 | TCP 40000 > 80 flags SYN"),
        (
            "203.0.113.1",
            Protocol.UDP,
            "IP 192.0.2.9 > 203.0.113.1 ttl 64 length 32 | UDP 40000 > 80 | data bytes 4 hex 74657374",
        ),
        (
            "2001:db8:1::1",
            Protocol.TCP,
            "IP6 2001:db8::9 > 2001:db8:1::1 hop_limit 64 length 60 | TCP 40000 > 80 flags SYN",
        ),
    ],
)
def test_a_packet_to_a_vip_is_one_readable_line(address: str, protocol: Protocol, said: str) -> None:
    assert frame.text(to(address, protocol)).endswith(said)


def test_vlan_tags_and_tunnels_are_layers_of_their_own() -> None:
    inner = to("203.0.113.1", Protocol.TCP)[14:54]
    outer = bytes.fromhex("4500003c0001400040040000") + bytes([10, 0, 0, 1, 10, 0, 0, 2])
    tagged = bytes(12) + bytes.fromhex("810000050800") + outer + inner
    assert [layer["layer"] for layer in frame.layers(tagged)] == ["Ethernet", "VLAN", "IP", "IP", "TCP"]


def test_a_later_fragment_has_no_ports() -> None:
    data = bytearray(to("203.0.113.1", Protocol.UDP))
    data[20:22] = b"\x00\x10"
    words = frame.layers(bytes(data))
    assert words[1]["fragment_offset"] == 128
    assert all(layer["layer"] != "UDP" for layer in words)


@given(st.binary(max_size=120))
def test_no_bytes_are_too_strange(data: bytes) -> None:
    frame.text(data)


@given(st.integers(0, 60), st.integers(0, 59), st.integers(0, 255))
def test_no_cut_and_no_flipped_byte_is_too_strange(cut: int, at: int, value: int) -> None:
    data = bytearray(to("203.0.113.1", Protocol.TCP))
    data[at] = value
    frame.text(bytes(data[:cut]))
