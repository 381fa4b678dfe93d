# SPDX-License-Identifier: Apache-2.0
"""``make demo`` keeps its promises: its exit code, its file, and nothing left behind, however it ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.inventory import REPOSITORY
from tests.lab.lab import folder_of, random_prefix
from tests.lab.netns import NAMESPACES
from tests.lab.poll import wait_for

DEMO = [sys.executable, "-m", "tests.lab.demo"]


@pytest.fixture
def prefix() -> Iterator[str]:
    """A prefix of this test alone, with nothing under it afterwards."""
    chosen = random_prefix()
    yield chosen
    subprocess.run([*DEMO, "--down"], env={**os.environ, "LBA_PREFIX": f"{chosen}demo-"}, cwd=REPOSITORY, check=True)


def start(prefix: str, json_path: Path, *, kube: str = "embedded") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*DEMO, "--kube", kube, "--json", str(json_path)],
        env={**os.environ, "LBA_PREFIX": prefix},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left_behind(prefix: str) -> list[str]:
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if f"/{prefix}" in line]
    namespaces = [path.name for path in NAMESPACES.glob(f"{prefix}*")]
    folders = [str(path) for path in (*Path("/run").glob(f"{prefix}*"), *Path("/run").glob(f"frr-{prefix}*"))]
    return [*mounts, *namespaces, *folders]


@pytest.mark.netns
def test_an_interrupted_demo_leaves_nothing_behind(prefix: str, tmp_path: Path) -> None:
    with start(prefix, tmp_path / "demo.json") as running:
        folder = folder_of(f"{prefix}demo-")
        wait_for("the demo to build its lab", lambda: (folder / "lb2" / "agent.log").exists(), limit_s=60)
        running.send_signal(signal.SIGINT)
        text, _ = running.communicate(timeout=60)
    assert running.returncode == 1, text
    assert left_behind(prefix) == []
    written = json.loads((tmp_path / "demo.json").read_text())
    assert (written["ok"], written["clean"]) == (False, True)


@pytest.mark.netns
def test_a_demo_that_was_killed_is_cleared_away_by_lab_down(prefix: str, tmp_path: Path) -> None:
    with start(prefix, tmp_path / "demo.json") as running:
        folder = folder_of(f"{prefix}demo-")
        wait_for("the demo to build its lab", lambda: (folder / "lb2" / "agent.log").exists(), limit_s=60)
        running.kill()
    assert left_behind(prefix) != []
    subprocess.run([*DEMO, "--down"], env={**os.environ, "LBA_PREFIX": f"{prefix}demo-"}, cwd=REPOSITORY, check=True)
    assert left_behind(prefix) == []


@pytest.mark.netns
def test_a_second_demo_does_not_touch_the_first(prefix: str, tmp_path: Path) -> None:
    with start(prefix, tmp_path / "first.json") as first:
        folder = folder_of(f"{prefix}demo-")
        wait_for("the demo to build its lab", lambda: (folder / "lb1" / "agent.log").exists(), limit_s=60)
        with start(prefix, tmp_path / "second.json") as second:
            text, _ = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "is being used" in text
        assert folder.exists()
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
    assert left_behind(prefix) == []


@pytest.mark.k8s
@pytest.mark.timeout(300)
def test_the_whole_story_holds_with_a_real_control_plane(prefix: str, tmp_path: Path) -> None:
    with start(prefix, tmp_path / "demo.json", kube="real") as running:
        text, _ = running.communicate(timeout=280)
    assert running.returncode == 0, text
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["ok"]
    by_title = {stage["stage"]: stage for stage in written["stages"]}
    killed = next(stage for title, stage in by_title.items() if "SIGKILL" in title)
    assert killed["requests"]["failed"] == 0
    assert min(killed["requests"]["by_lb_host"][name] for name in ("lb1", "lb2")) > 0
    assert killed["route_changes"] == []
    assert left_behind(prefix) == []
