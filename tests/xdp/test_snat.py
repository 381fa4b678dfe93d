# SPDX-License-Identifier: Apache-2.0
"""Which addresses nat mode borrows from the host, and the ports it takes from the kernel."""

import socket
from pathlib import Path

import pytest

from lbagent.xdp import codec, snat
from lbagent.xdp.bpf import Map, MapSpec, MapType
from lbagent.xdp.snat import covers, own_addresses, reserve_ports


def test_without_a_choice_yet_the_address_toward_the_nodes_is_taken():
    assert own_addresses([], ["127.0.0.9"]) == ("127.0.0.1",)


def test_a_choice_stays_while_the_host_has_the_address():
    assert own_addresses(["127.0.0.77"], ["127.0.0.9"]) == ("127.0.0.77",)


def test_a_choice_falls_when_the_host_loses_the_address():
    assert own_addresses(["192.0.2.77"], ["127.0.0.9"]) == ("127.0.0.1",)


def test_nobody_to_reach_needs_no_address():
    assert own_addresses([], []) == ()


def test_a_node_without_a_route_gives_no_address(monkeypatch: pytest.MonkeyPatch):
    class NoRoute(socket.socket):
        def connect(self, address: object) -> None:
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", NoRoute)
    assert own_addresses([], ["127.0.0.9"]) == ()


@pytest.mark.parametrize(
    ("reserved", "is_covered"),
    [
        ("", False),
        ("20000-29999", True),
        ("1-65535", True),
        ("20000-24999,25000-29999", True),
        ("25000-29999,8080,20000-24999", True),
        ("20000-24999,25001-29999", False),
        ("20001-29999", False),
        ("20000-29998", False),
        ("20000", False),
    ],
)
def test_a_list_of_ranges_covers_or_not(reserved: str, is_covered: bool):
    assert covers(reserved, 20000, 29999) is is_covered


def test_what_was_reserved_before_stays_reserved(tmp_path: Path):
    path = tmp_path / "reserved"
    path.write_text("8080,9148\n")
    assert reserve_ports(20000, 29999, path=path)
    assert path.read_text() == "8080,9148,20000-29999"


def test_reserving_twice_writes_once(tmp_path: Path):
    path = tmp_path / "reserved"
    path.write_text("\n")
    reserve_ports(20000, 29999, path=path)
    reserve_ports(20000, 29999, path=path)
    assert path.read_text() == "20000-29999"


def test_who_may_not_reserve_is_told_what_to_put_into_sysctl(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert not reserve_ports(20000, 29999, path=tmp_path / "nowhere/reserved")
    assert "net.ipv4.ip_local_reserved_ports=20000-29999" in capsys.readouterr().out


@pytest.mark.bpf
def test_held_addresses_come_back_in_their_order():
    spec = MapSpec(name="lb_snats", type=MapType.ARRAY, key_bytes=4, value_bytes=codec.SNAT.size, entries=4)
    with Map.create(spec) as table:
        for number, address in enumerate(("198.51.100.9", "198.51.100.1", "2001:db8::1")):
            family = 6 if ":" in address else 4
            value = codec.SNAT.pack(codec.address_bytes(address), family)
            table.update(number.to_bytes(4, "little"), value)
        assert snat.held_addresses(table) == ("198.51.100.9", "198.51.100.1", "2001:db8::1")
