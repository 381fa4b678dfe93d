# SPDX-License-Identifier: Apache-2.0
"""Maps on bpffs: taken over, moved to another size, and never lost half way."""

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from lbagent.errors import XdpError
from lbagent.xdp import codec
from lbagent.xdp.bpf import Map, MapFlag, MapSpec, MapType
from lbagent.xdp.pins import folder_of, forget_all_but, make_folder, open_maps

pytestmark = pytest.mark.bpf


def array(name: str, entries: int, value_bytes: int = 64) -> MapSpec:
    return MapSpec(
        name=name, type=MapType.ARRAY, key_bytes=4, value_bytes=value_bytes, entries=entries, flags=MapFlag.MMAPABLE
    )


def hashed(name: str, entries: int) -> MapSpec:
    return MapSpec(name=name, type=MapType.HASH, key_bytes=8, value_bytes=4, entries=entries)


def specs(*, vips: int = 8, backends: int = 100, rings: int = 2, flows: int = 16) -> tuple[MapSpec, ...]:
    return (
        hashed("lb_router_ids", 4 * vips),
        array("lb_vips", vips),
        array("lb_backends", backends),
        array("lb_rings", rings * codec.ring_lines(backends)),
        array("lb_flows", flows),
    )


def ids(maps: dict[str, Map]) -> dict[str, int]:
    return {name: table.id for name, table in maps.items()}


def close(maps: dict[str, Map]) -> None:
    for table in maps.values():
        table.close()


def put(table: Map, index: int, value: bytes) -> None:
    table.update(struct.pack("<I", index), value.ljust(64, b"\0"))


def get(table: Map, index: int) -> bytes:
    value = table.lookup(struct.pack("<I", index))
    assert value is not None
    return value.rstrip(b"\0")


def opened(root: Path, wanted: Sequence[MapSpec], live: dict[str, Map] | None = None) -> dict[str, Map]:
    return open_maps(root, wanted, [t.id for t in live.values()] if live else [])


def test_maps_of_an_earlier_daemon_are_taken_over(pins: Path):
    first = opened(pins, specs())
    again = opened(pins, specs(), first)
    assert ids(again) == ids(first)
    close(first | again)


def test_maps_are_taken_over_although_no_interface_runs_the_program_any_more(pins: Path):
    first = opened(pins, specs())
    again = opened(pins, specs())
    assert ids(again) == ids(first)


def test_a_lost_pin_costs_that_map_alone(pins: Path):
    first = opened(pins, specs())
    (folder_of(pins, specs()) / "lb_flows").unlink()
    again = opened(pins, specs(), first)
    assert {name for name in again if again[name].id != first[name].id} == {"lb_flows"}


def test_larger_maps_get_the_content_and_equal_ones_are_kept(pins: Path):
    small = opened(pins, specs())
    small["lb_router_ids"].update(bytes(8), b"\3\0\0\0")
    put(small["lb_vips"], 3, b"vip")
    put(small["lb_backends"], 99, b"backend")
    large = opened(pins, specs(vips=1000), small)
    assert large["lb_router_ids"].lookup(bytes(8)) == b"\3\0\0\0"
    assert get(large["lb_vips"], 3) == b"vip"
    assert large["lb_vips"].spec.entries == 1000
    assert large["lb_backends"].id == small["lb_backends"].id


def test_rings_follow_when_more_backends_make_them_longer(pins: Path):
    small = opened(pins, specs(backends=100, rings=2))
    short, long = codec.ring_lines(100), codec.ring_lines(2000)
    put(small["lb_rings"], short, b"head")  # of ring 1
    put(small["lb_rings"], short + codec.SLOT_LINES, b"last slots")
    put(small["lb_rings"], short + codec.SLOT_LINES + 1, b"kept")
    put(small["lb_rings"], short + codec.SLOT_LINES + 2, b"active")
    large = opened(pins, specs(backends=2000, rings=4), small)["lb_rings"]
    assert get(large, long) == b"head"
    assert get(large, long + codec.SLOT_LINES) == b"last slots"
    assert get(large, long + codec.SLOT_LINES + 1) == b"kept"
    assert get(large, long + codec.SLOT_LINES + 1 + codec.member_lines(2000)) == b"active"


def test_smaller_maps_keep_what_fits(pins: Path):
    large = opened(pins, specs(vips=1000))
    put(large["lb_vips"], 3, b"vip")
    put(large["lb_vips"], 999, b"too far")
    assert get(opened(pins, specs(vips=8), large)["lb_vips"], 3) == b"vip"


def test_flows_start_anew_in_a_table_of_another_size_and_it_is_said(pins: Path, capsys: pytest.CaptureFixture[str]):
    small = opened(pins, specs())
    put(small["lb_flows"], 1, b"flow")
    assert get(opened(pins, specs(flows=32), small)["lb_flows"], 1) == b""
    assert "table starts anew" in capsys.readouterr().out


def test_a_daemon_killed_while_it_moved_leaves_the_live_maps_alone(pins: Path):
    live = opened(pins, specs())
    put(live["lb_vips"], 1, b"before")
    close(opened(pins, specs(vips=16), live))  # killed before the program was exchanged
    put(live["lb_vips"], 1, b"changed since")
    again = opened(pins, specs(vips=16), live)
    assert get(again["lb_vips"], 1) == b"changed since"
    assert folder_of(pins, specs()).exists()


def test_after_the_exchange_only_the_new_maps_stay_pinned(pins: Path):
    live = opened(pins, specs())
    opened(pins, specs(vips=16), live)
    forget_all_but(pins, specs(vips=16))
    assert [path.name for path in pins.iterdir()] == [folder_of(pins, specs(vips=16)).name]


def test_maps_of_another_layout_are_not_read(pins: Path, monkeypatch: pytest.MonkeyPatch):
    live = opened(pins, specs())
    put(live["lb_vips"], 1, b"another meaning")
    monkeypatch.setattr(codec, "LAYOUT", codec.LAYOUT + 1)
    assert get(opened(pins, specs(), live)["lb_vips"], 1) == b""


def test_the_folder_is_named_by_layout_and_specs():
    names = {folder_of(Path("/"), specs(vips=n)).name for n in (8, 16)}
    assert len(names) == 2
    assert all(name.startswith(f"v{codec.LAYOUT}-") for name in names)


def test_without_bpffs_the_remedy_is_named(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(XdpError, match="mount -t bpf"):
        make_folder(blocked / "maps")
