# SPDX-License-Identifier: Apache-2.0
"""The files ExaBGP reads: as reviewed, and accepted by ExaBGP itself."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lbagent.bgp import relay, render
from lbagent.config import Bgp, Paths, Peer

GOLDEN = Path(__file__).resolve().parent.parent / "golden/exabgp"
PYTHON = "/opt/lbagent/bin/python"
PLAIN: dict[str, Any] = {"name": "tor1", "address": "10.0.1.2", "local_address": "10.0.1.1", "peer_as": 65101}
PLAIN6: dict[str, Any] = {"name": "tor6", "address": "fd00:1::2", "local_address": "fd00:1::1", "peer_as": 65101}
SECTIONS: dict[str, dict[str, Any]] = {
    "one-peer": {"peers": [PLAIN]},
    "everything": {
        "agent_grace_s": 300,
        "port": 1179,
        "peers": [
            {
                **PLAIN,
                "description": "rack 1 unit 40",
                "hold_time_s": 3,
                "passive": True,
                "gtsm": True,
            },
            {**PLAIN6, "families": ["ipv4", "ipv6"], "graceful_restart_s": 15, "add_path": True},
            {"name": "spine", "address": "10.9.9.2", "local_address": "10.9.9.1", "peer_as": 65200}
            | {"multihop_ttl": 3, "local_as": 65099, "port": 1790, "families": ["ipv4", "ipv6"]}
            | {"next_hop": {"ipv6": "fd00:1::1"}, "hold_time_s": 0},
        ],
    },
    "not-listening": {"listen": False, "peers": [PLAIN]},
}
PASSWORDS = {"tor1": "a#(b)=:%$&~c,.@^*+"}


def section(name: str) -> Bgp:
    return Bgp.model_validate({"local_as": 65001, "router_id": "10.0.1.1", **SECTIONS[name]})


@pytest.fixture(autouse=True)
def relay_in_a_fixed_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "__file__", "/opt/lbagent/lbagent/bgp/relay.py")


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("suffix", ["conf", "env"])
def test_the_rendered_file_is_as_it_was_reviewed(name: str, suffix: str, update_golden: bool) -> None:
    text = render.exabgp_env(section(name), user="lbagent-bgp")
    if suffix == "conf":
        paths = Paths(run=Path("/run/lbagent"))
        text = render.exabgp_conf(section(name), paths, python=PYTHON, password_by_peer=PASSWORDS)
    golden = GOLDEN / f"{name}.{suffix}"
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", SECTIONS)
def test_exabgp_accepts_the_rendered_files(name: str, tmp_path: Path) -> None:
    conf = render.exabgp_conf(section(name), Paths(run=tmp_path), python=sys.executable, password_by_peer=PASSWORDS)
    (tmp_path / "exabgp.conf").write_text(conf)
    (tmp_path / "exabgp.env").write_text(render.exabgp_env(section(name), user="nobody"))
    argv = [sys.executable, "-I", "-m", "exabgp", "--env-file", str(tmp_path / "exabgp.env")]
    done = subprocess.run(
        [*argv, "validate", "-nr", str(tmp_path / "exabgp.conf")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_environment_file_says_to_exabgp_what_we_mean(tmp_path: Path) -> None:
    (tmp_path / "env").write_text(render.exabgp_env(section("everything"), user="nobody"))
    argv = [sys.executable, "-I", "-m", "exabgp", "--env-file", str(tmp_path / "env"), "env"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    for line in ("chunk = 1000", "cli = false", "bind = '0.0.0.0 ::'", "port = 1179", "user = 'nobody'"):
        assert line in said


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (PLAIN, False),
        (PLAIN6, False),
        ({**PLAIN6, "families": ["ipv4", "ipv6"]}, True),
        ({**PLAIN6, "families": ["ipv4", "ipv6"], "next_hop": {"ipv4": "10.0.1.1"}}, False),
        ({**PLAIN, "next_hop": {"ipv4": "fd00:1::1"}}, True),
    ],
)
def test_an_extended_next_hop_is_offered_where_it_is_needed(peer: dict[str, Any], expected: bool) -> None:
    assert render.needs_extended_next_hop(Peer.model_validate(peer)) is expected
