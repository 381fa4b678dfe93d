# SPDX-License-Identifier: Apache-2.0
"""Rules that span several keys; secrets."""

from pathlib import Path

import pytest

from lbagent import config
from lbagent.errors import ConfigError
from tests.config.example import changed


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        config.parse(text, name="f.yaml")
    return list(refused.value.problems)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "policies: [std]",
            "policies: [nosuch]",
            "f.yaml:5: pools[0].policies[0]: nosuch is not defined under bgp.policies",
        ),
        ("peers: [tor1]", "peers: [tor9]", "f.yaml:16: bgp.policies[1].peers[0]: tor9 is not defined under bgp.peers"),
        ("203.0.113.32-203.0.113.40", "203.0.113.9-203.0.113.40", "overlaps default: 203.0.113.0/28"),
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
    ],
)
def test_a_contradiction_is_named_with_its_line_and_key(old: str, new: str, said: str) -> None:
    assert any(said in line for line in problems(changed(old, new)))


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


def test_a_systemd_credential_is_looked_at_only_where_it_can_be_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = changed("peer_as: 65101", "peer_as: 65101\n      password_file: tor1")
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    config.parse(text)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert "password_file" in problems(text)[0]
