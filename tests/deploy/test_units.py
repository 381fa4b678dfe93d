# SPDX-License-Identifier: Apache-2.0
"""The units, as far as systemd judges them without running them."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from lbagent.agent.loop import PERIOD_S

CHECKOUT = Path(__file__).resolve().parent.parent.parent
SYSTEMD = CHECKOUT / "systemd"
UNITS = ("lbagent.service", "lbagent-bgp.service")
PREFIX = "/opt/lbagent/current/bin/"

pytestmark = pytest.mark.deploy


def directives(unit: str) -> list[tuple[str, str]]:
    """Key and value of every assignment."""
    lines = (SYSTEMD / unit).read_text().splitlines()
    return [(k, v) for k, sep, v in (line.partition("=") for line in lines if not line.startswith("#")) if sep]


def values(unit: str, key: str) -> list[str]:
    return [v for k, v in directives(unit) if k == key]


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    """With executables of the right names in place of a release, verify has nothing to say."""
    for unit in UNITS:
        text = (SYSTEMD / unit).read_text()
        for key, value in directives(unit):
            if key.startswith("Exec"):
                program = tmp_path / "bin" / value.split()[0].removeprefix(PREFIX)
                program.parent.mkdir(exist_ok=True)
                program.write_text("#!/bin/sh\n")
                program.chmod(0o755)
        (tmp_path / unit).write_text(text.replace(PREFIX, f"{tmp_path}/bin/"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / unit) for unit in UNITS)],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in verified.stderr.splitlines() if "lbagent" in line]
    assert (verified.returncode, ours) == (0, [])


@pytest.mark.parametrize(("unit", "exposure"), [("lbagent.service", 25), ("lbagent-bgp.service", 17)])
def test_the_sandbox_leaves_little_open(unit: str, exposure: int) -> None:
    """Exposure in tenths; above the threshold systemd-analyze fails."""
    judged = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=yes", f"--threshold={exposure}", str(SYSTEMD / unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.returncode == 0, judged.stdout + judged.stderr


def test_the_agent_has_three_capabilities_and_the_speaker_one() -> None:
    for key in ("CapabilityBoundingSet", "AmbientCapabilities"):
        assert values("lbagent.service", key) == ["CAP_BPF CAP_NET_ADMIN CAP_PERFMON"]
        assert values("lbagent-bgp.service", key) == ["CAP_NET_BIND_SERVICE"]


def test_what_runs_before_a_unit_accepts_the_example_configuration(tmp_path: Path) -> None:
    """Each ExecStartPre for real, with this checkout's programs and the example's configuration."""
    programs = CHECKOUT / ".venv/bin"
    for unit in UNITS:
        for line in values(unit, "ExecStartPre"):
            command = line.replace(PREFIX, f"{programs}/").replace("/run/lbagent-bgp", str(tmp_path))
            command = command.replace("/etc/lbagent", str(CHECKOUT / "docs/reference"))
            done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "exabgp.conf": 0o600,
        "exabgp.env": 0o600,
    }


def test_the_watchdog_outlasts_the_longest_pause_between_two_passes() -> None:
    (watchdog_s,) = values("lbagent.service", "WatchdogSec")
    assert int(watchdog_s) >= 2 * PERIOD_S


def test_neither_unit_stops_with_the_other() -> None:
    for unit in UNITS:
        other = next(u for u in UNITS if u != unit)
        for key in ("Requires", "BindsTo", "PartOf", "Requisite", "Conflicts", "PropagatesStopTo"):
            assert all(other not in value for value in values(unit, key)), (unit, key)


def test_both_units_are_restarted_for_ever() -> None:
    for unit in UNITS:
        assert values(unit, "Restart") == ["always"]
        assert values(unit, "StartLimitIntervalSec") == ["0"]


@pytest.fixture
def empty_root(tmp_path: Path) -> Path:
    """A root file system with nothing but what a host has before us, after sysusers and tmpfiles ran."""
    for folder in ("etc", "run", "sys/fs/bpf", "usr/lib"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("sysusers.d", "tmpfiles.d"):
        shutil.copytree(SYSTEMD / folder, tmp_path / "usr/lib" / folder)
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}"], check=True, capture_output=True)
    # The ACL names a user of that root, which only a host that was booted from it can look up.
    subprocess.run(["systemd-tmpfiles", f"--root={tmp_path}", "--create"], check=False, capture_output=True)
    return tmp_path


def entries(file: Path) -> dict[str, list[str]]:
    return {fields[0]: fields for fields in (line.split(":") for line in file.read_text().splitlines())}


def test_the_units_run_as_users_without_a_shell_in_the_group_of_the_services(empty_root: Path) -> None:
    users, groups = entries(empty_root / "etc/passwd"), entries(empty_root / "etc/group")
    for unit in UNITS:
        (user,), (group,) = values(unit, "User"), values(unit, "Group")
        assert users[user][3] == groups[group][2]
        assert users[user][6].endswith("nologin")


def test_only_the_daemon_reaches_its_pins_and_operators_reach_the_sockets(empty_root: Path) -> None:
    users, groups = entries(empty_root / "etc/passwd"), entries(empty_root / "etc/group")
    pins, sockets = (empty_root / "sys/fs/bpf/lbagent").stat(), (empty_root / "run/lbagent").stat()
    assert (str(pins.st_uid), pins.st_mode & 0o7777) == (users["lbagent"][2], 0o700)
    assert (str(sockets.st_gid), sockets.st_mode & 0o7777) == (groups["lbagent"][2], 0o2750)
    assert (empty_root / "sys/fs/bpf").stat().st_mode & 0o7777 == 0o711
