# SPDX-License-Identifier: Apache-2.0
"""The configuration file: what is refused, and where it is said to stand."""

from pathlib import Path

import pytest

from lbagent import config
from lbagent.errors import ConfigError
from tests.config.example import GOOD, changed


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        config.parse(text, name="f.yaml")
    return list(refused.value.problems)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("host: {name: lb1}", "host: {name: lb1, colour: red}", "f.yaml:1: host.colour: unknown key"),
        ("  local_as: 65001\n", "", "f.yaml:6: bgp.local_as: is missing"),
        ("peer_as: 65101", "peer_as: 0", "f.yaml:13: bgp.peers[0].peer_as: 0 should be greater than or equal to 1"),
        ("203.0.113.32-203.0.113.40", "203.0.113.41-203.0.113.40", "ends before it starts"),
        ("203.0.113.32-203.0.113.40", "203.0.113.1-2001:db8::1", "has ends of different families"),
        ("203.0.113.0/28", "203.0.113.1/28", "has host bits set"),
        ("65001:100", "65536:100", "has a part above 65535"),
        ("65001:100", "red", "is neither 65001:100, nor"),
        ("interfaces: [eth0]", "interfaces: []", "f.yaml:18: xdp.interfaces"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_key(old: str, new: str, said: str) -> None:
    assert any(said in line for line in problems(changed(old, new)))


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    text = changed("peer_as: 65101", "peer_as: x\n      colour: red").replace("{name: lb1}", "{nam: lb1}")
    said = problems(text)
    assert [line.split(": ")[1] for line in said] == ["host.nam", "bgp.peers[0].peer_as", "bgp.peers[0].colour"]


def test_a_key_given_twice_is_a_mistake() -> None:
    assert "f.yaml:19: interfaces: is given twice" in problems(GOOD + "  interfaces: [eth1]\n")


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "a: [", "a: *x", "\t"])
def test_what_is_no_mapping_is_refused_with_a_line(text: str) -> None:
    assert problems(text)[0].startswith("f.yaml:1")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "nosuch.yaml")
