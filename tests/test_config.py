# SPDX-License-Identifier: Apache-2.0
"""The configuration file: what is refused, where it is said to stand, what becomes of it."""

from pathlib import Path

import pytest

from lbagent import config
from lbagent.errors import ConfigError
from lbagent.model.pool import AddressRange

GOOD = """\
host: {name: lb1}
pools:
  - name: default
    addresses: [203.0.113.0/28, 203.0.113.32-203.0.113.40]
    policies: [std]
bgp:
  local_as: 65001
  router_id: 10.0.1.1
  peers:
    - name: tor1
      address: 10.0.1.2
      local_address: 10.0.1.1
      peer_as: 65101
  policies:
    - {name: std, communities: ["65001:100"]}
    - {name: far, communities: [no-export], prepend: 2, peers: [tor1]}
xdp:
  interfaces: [eth0]
"""


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        config.parse(text, name="f.yaml")
    return list(refused.value.problems)


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_small_file_is_enough() -> None:
    settings = config.parse(GOOD).settings()
    (pool,) = settings.pools
    assert pool.ranges[0] == AddressRange(4, 0xCB007100, 0xCB00710F)
    assert pool.ranges[1].last - pool.ranges[1].first == 8
    assert pool.policy.communities == ("65001:100",)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("host: {name: lb1}", "host: {name: lb1, colour: red}", "f.yaml:1: host.colour: unknown key"),
        ("  local_as: 65001\n", "", "f.yaml:6: bgp.local_as: is missing"),
        ("peer_as: 65101", "peer_as: 0", "f.yaml:13: bgp.peers[0].peer_as: 0 should be greater than or equal to 1"),
        (
            "policies: [std]",
            "policies: [nosuch]",
            "f.yaml:5: pools[0].policies[0]: nosuch is not defined under bgp.policies",
        ),
        ("peers: [tor1]", "peers: [tor9]", "f.yaml:16: bgp.policies[1].peers[0]: tor9 is not defined under bgp.peers"),
        ("203.0.113.32-203.0.113.40", "203.0.113.9-203.0.113.40", "overlaps default: 203.0.113.0/28"),
        ("203.0.113.32-203.0.113.40", "203.0.113.41-203.0.113.40", "ends before it starts"),
        ("203.0.113.32-203.0.113.40", "203.0.113.1-2001:db8::1", "has ends of different families"),
        ("203.0.113.0/28", "203.0.113.1/28", "has host bits set"),
        (
            "router_id: 10.0.1.1",
            "router_id: 10.0.1.1\n  hold_time_s: 2",
            "f.yaml:9: bgp.hold_time_s: 2 is neither 0 nor 3",
        ),
        ("local_address: 10.0.1.1", "local_address: fd00::1", "bgp.peers[0].local_address: is of another family"),
        ("peer_as: 65101", "peer_as: 65001\n      multihop_ttl: 3", "bgp.peers[0].multihop_ttl: is for eBGP"),
        ("peer_as: 65101", "peer_as: 65101\n      gtsm: true\n      multihop_ttl: 3", "gtsm: excludes multihop_ttl"),
        ("peer_as: 65101", "peer_as: 65101\n      families: [ipv4, ipv6]", "bgp.peers[0].next_hop.ipv6: is needed"),
        (
            "peer_as: 65101",
            "peer_as: 65101\n      password_file: /nonexistent/key",
            "bgp.peers[0].password_file: cannot be read",
        ),
        ("host: {name: lb1}", "kubernetes: {stale_after_s: 60}", "kubernetes.stale_after_s: 60 is less than 180"),
        (
            "policies: [std]\n",
            "policies: [std]\n    mode: dsr-l2\n",
            "f.yaml:6: pools[0].mode: dsr-l2 is not among xdp.modes",
        ),
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


def test_a_password_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("s3cr3t\n")
    key.chmod(0o644)
    text = changed("peer_as: 65101", f"peer_as: 65101\n      password_file: {key}")
    assert "may be read by everybody" in problems(text)[0]
    key.chmod(0o640)
    config.parse(text)
    assert config.read_password(key) == "s3cr3t"


def test_an_empty_password_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("\n")
    key.chmod(0o600)
    with pytest.raises(ConfigError, match="1 to 80"):
        config.read_password(key)


def test_policies_on_one_pool_are_united() -> None:
    settings = config.parse(changed("policies: [std]", "policies: [std, far]")).settings()
    policy = settings.pools[0].policy
    assert policy.communities == ("65001:100", "no-export")
    assert policy.prepend == 2
    assert policy.peers == ()  # std goes to everybody
