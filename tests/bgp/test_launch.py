# SPDX-License-Identifier: Apache-2.0
"""ExaBGP's files: whole or not at all, for nobody else's eyes, judged by ExaBGP first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lbagent.bgp import launch
from lbagent.config import Bgp, Paths
from lbagent.errors import BgpError, ConfigError

PEER = {"name": "tor1", "address": "10.0.1.2", "local_address": "10.0.1.1", "peer_as": 65101}
BGP = Bgp.model_validate({"local_as": 65001, "router_id": "10.0.1.1", "peers": [PEER]})


def test_the_files_are_written_for_their_owner_only(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    secret.chmod(0o600)
    bgp = Bgp.model_validate(
        {"local_as": 65001, "router_id": "10.0.1.1", "peers": [{**PEER, "password_file": str(secret)}]}
    )
    how = launch.install(bgp, Paths(run=tmp_path), tmp_path / "bgp", user="nobody")
    conf = tmp_path / "bgp/exabgp.conf"
    assert 'md5-password "s3cr3t";' in conf.read_text()
    assert "user = 'nobody'" in (tmp_path / "bgp/exabgp.env").read_text()
    assert conf.stat().st_mode & 0o777 == 0o600
    assert how.argv[0] == sys.executable
    assert how.argv[-2:] == ("server", str(conf))
    assert sorted(path.name for path in conf.parent.iterdir()) == ["exabgp.conf", "exabgp.env"]


def test_a_configuration_that_exabgp_refuses_replaces_nothing(tmp_path: Path) -> None:
    launch.install(BGP, Paths(run=tmp_path), tmp_path)
    before = (tmp_path / "exabgp.conf").read_text()
    with pytest.raises(BgpError, match="refuses its configuration"):
        launch.install(BGP.model_copy(update={"router_id": "nonsense"}), Paths(run=tmp_path), tmp_path)
    assert (tmp_path / "exabgp.conf").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exabgp.conf", "exabgp.env"]


def test_a_missing_password_is_never_an_empty_one(tmp_path: Path) -> None:
    bgp = Bgp.model_validate(
        {"local_as": 65001, "router_id": "10.0.1.1", "peers": [{**PEER, "password_file": str(tmp_path / "gone")}]}
    )
    with pytest.raises(ConfigError, match="cannot be read"):
        launch.install(bgp, Paths(run=tmp_path), tmp_path / "bgp")
    assert not (tmp_path / "bgp").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BgpError, match="cannot be written"):
        launch.install(BGP, Paths(run=tmp_path), tmp_path / "file")


def test_variables_of_exabgp_around_us_do_not_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("exabgp_tcp_port", "1")
    monkeypatch.setenv("EXABGP_ENVFILE", "/elsewhere")
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    environment = launch.command(tmp_path).environment
    assert not [key for key in environment if "exabgp" in key.lower()]
    assert environment["NOTIFY_SOCKET"] == "/run/systemd/notify"


def test_an_exabgp_that_is_gone_cannot_be_told_to_reload() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(BgpError, match="cannot be told to reload"):
        launch.reload(gone.pid)


def test_the_epoch_names_the_process() -> None:
    assert launch.pid_of(f"{os.getpid()}-12345") == os.getpid()
