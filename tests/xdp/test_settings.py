# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest

from lbagent.xdp import codec
from lbagent.xdp.settings import NAT_STATES, Settings, settings_bytes

LAYOUT = (Path(__file__).resolve().parents[2] / "ebpf/layout.h").read_text(encoding="utf-8")


def config(settings: Settings, tick_s: float = 1.0) -> tuple[object, ...]:
    return codec.CONFIG.unpack(settings_bytes(settings, tick_s))


def test_the_states_are_the_kernels() -> None:
    body = LAYOUT.split("enum nat_state {")[1].split("}")[0]
    names = re.findall(r"LB_NAT_(\w+)", body)
    assert tuple(name.lower() for name in names if name != "STATES") == NAT_STATES


def test_families_are_counted_and_ports_come_in_buckets_of_four() -> None:
    settings = Settings(snat_addresses=("10.0.0.1", "fd00::1", "10.0.0.2"), port_first=20000, port_count=10_001)
    _, first4, count4, first6, count6, port_first, buckets, *_ = config(settings)
    assert (first4, count4, first6, count6) == (0, 2, 2, 1)
    assert (port_first, buckets) == (20000, 2500)


def test_times_are_ticks_and_a_free_slot_has_none() -> None:
    held = config(Settings(timeouts_s={"syn": 20}), 2.0)
    timeout = dict(zip(NAT_STATES, held[-32:-16], strict=False))
    pressure = dict(zip(NAT_STATES, held[-16:], strict=False))
    assert timeout["free"] == pressure["free"] == 0, "free at once"
    assert (timeout["syn"], timeout["established"]) == (10, 3720)
    assert pressure["established"] == timeout["established"], "a live slot is never taken early"
    assert pressure["syn"] < timeout["syn"]
    assert all(pressure[state] <= timeout[state] for state in NAT_STATES)


@pytest.mark.parametrize(("word", "number"), [("drop", 0), ("answer", 1), ("pass", 2)])
def test_policies_are_numbers(word: str, number: int) -> None:
    held = config(Settings(no_port=word, options=word, echo=word))
    assert held[7:10] == (number, number, number)


def test_a_tunnels_source_varies_in_its_last_bits() -> None:
    held = config(Settings(tunnel4="10.8.0.0", tunnel4_vary_bits=8, tunnel6="fd00:8::", tunnel6_vary_bits=16))
    assert held[10:14] == (b"\x0a\x08\0\0", b"\0\0\0\xff", bytes.fromhex("fd000008") + bytes(12), b"\0\0\xff\xff")
