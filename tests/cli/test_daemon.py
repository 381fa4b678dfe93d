# SPDX-License-Identifier: Apache-2.0
"""`lbagent` as an operator types it: exit codes and what is printed."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lbagent.bgp.tor import RouterOs
from lbagent.cli import daemon
from lbagent.errors import XdpError
from tests.config.example import GOOD


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "lbagent.yaml"
    path.write_text(GOOD)
    return path


def lbagent(*arguments: str) -> Any:
    return CliRunner().invoke(daemon.main, list(arguments))


def test_a_good_configuration_is_fine(config: Path) -> None:
    result = lbagent("check", str(config))
    assert result.exit_code == 0
    assert "fine (1 pools, 1 peers)" in result.output


def test_a_bad_configuration_names_every_mistake_and_exits_1(config: Path) -> None:
    config.write_text(GOOD.replace("peer_as: 65101", "peer_as: x").replace("{name: lb1}", "{nam: lb1}"))
    result = lbagent("check", str(config))
    assert result.exit_code == 1
    assert [line.split(": ")[1] for line in result.output.splitlines()] == ["host.nam", "bgp.peers[0].peer_as"]


def test_the_daemon_refuses_to_start_on_a_bad_configuration(config: Path) -> None:
    config.write_text("{}")
    result = lbagent("run", "--config", str(config))
    assert result.exit_code == 1
    assert "bgp: is missing" in result.output


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_expected_error_is_one_line_with_its_hint(
    config: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    error = XdpError("no bpffs at /sys/fs/bpf", hint="mount -t bpf bpf /sys/fs/bpf")

    async def refuse(path: Path, settings: object) -> None:
        raise ExceptionGroup("tasks", [error]) if wrapped else error

    monkeypatch.setattr("lbagent.agent.run.run", refuse)
    result = lbagent("run", "--config", str(config))
    assert result.exit_code == 1
    assert result.output == "lbagent: no bpffs at /sys/fs/bpf (mount -t bpf bpf /sys/fs/bpf)\n"


def test_a_bug_keeps_its_traceback(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(path: Path, settings: object) -> None:
        raise ExceptionGroup("tasks", [ZeroDivisionError("oops")])

    monkeypatch.setattr("lbagent.agent.run.run", crash)
    result = lbagent("run", "--config", str(config))
    assert isinstance(result.exception, ExceptionGroup)


def test_exabgps_files_are_written_and_judged_by_exabgp(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "bgp"
    result = lbagent("render", "exabgp", "--config", str(config), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "peer-as 65101;" in (out / "exabgp.conf").read_text()
    assert (out / "exabgp.conf").stat().st_mode & 0o077 == 0


def test_the_command_is_installed() -> None:
    assert (
        "External load-balancer tier"
        in subprocess.run(
            ["lbagent", "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": str(Path(daemon.sys.executable).parent)},
        ).stdout
    )


@pytest.mark.parametrize("system", daemon.TOR_SYSTEMS)
def test_the_routers_side_is_rendered_for_every_system(config: Path, system: str) -> None:
    result = lbagent("render", "tor", "--config", str(config), "--peer", "tor1", "--os", system)
    assert result.exit_code == 0, result.output
    assert "65001" in result.output


def test_the_systems_are_those_that_the_room_knows() -> None:
    assert set(daemon.TOR_SYSTEMS) == {system.value for system in RouterOs}


def test_an_unknown_router_is_named(config: Path) -> None:
    result = lbagent("render", "tor", "--config", str(config), "--peer", "nosuch", "--os", "frr")
    assert result.exit_code == 1
    assert "nosuch" in result.output


def test_uninstall_without_yes_only_says_what_it_means(config: Path) -> None:
    result = lbagent("uninstall", "--config", str(config))
    assert result.exit_code == 1
    assert "ends forwarding" in result.output


def test_bfdd_is_configured_from_the_same_file(config: Path) -> None:
    config.write_text(GOOD.replace("peer_as: 65101", "peer_as: 65101\n      bfd_ms: 300"))
    result = lbagent("render", "bfdd", "--config", str(config))
    assert result.exit_code == 0
    assert "peer 10.0.1.2" in result.output
