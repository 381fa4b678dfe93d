# SPDX-License-Identifier: Apache-2.0
"""build.sh finds programs by a fixed order, and says what is not there."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "build.sh"
PROGRAMS = ("etcd", "kube-apiserver", "kube-proxy")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment with the basic commands, but neither Go nor etcd."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sh", "dirname", "awk", "head", "mkdir", "flock", "nice", "mv", "cat"):
        found = next(p for p in ("/usr/bin", "/bin") if Path(p, name).exists())
        (commands / name).symlink_to(Path(found, name))
    return {"PATH": str(commands), "HOME": str(tmp_path / "home")}


def build(environment: dict[str, str], *argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["sh", str(SCRIPT), *argv], env=environment, capture_output=True, text=True, check=False)


def put(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        os.chmod(folder / name, 0o755)
    return folder


def test_without_go_and_programs_it_says_what_is_left_out(bare: dict[str, str]) -> None:
    done = build(bare)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "left out: etcd kube-apiserver kube-proxy" in done.stderr
    assert "install Go" in done.stderr


def test_the_ecosystems_folder_comes_first_and_the_rest_from_ours(bare: dict[str, str], tmp_path: Path) -> None:
    assets = put(tmp_path / "assets", "etcd", "kube-apiserver")
    ours = put(tmp_path / "ours", *PROGRAMS)
    done = build({**bare, "KUBEBUILDER_ASSETS": str(assets)}, "--find", str(ours))
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        f"etcd={assets}/etcd",
        f"kube-apiserver={assets}/kube-apiserver",
        f"kube-proxy={ours}/kube-proxy",
    ]


def test_the_cache_is_outside_the_checkout_and_by_version(bare: dict[str, str], tmp_path: Path) -> None:
    done = build({**bare, "XDG_CACHE_HOME": str(tmp_path / "cache")}, "--find")
    assert f"{tmp_path}/cache/lbagent/kubernetes/v1." in done.stderr


def test_the_etcd_of_the_distribution_will_do(bare: dict[str, str], tmp_path: Path) -> None:
    ours = put(tmp_path / "ours", "kube-apiserver", "kube-proxy")
    put(Path(bare["PATH"]), "etcd")
    done = build(bare, "--find", str(ours))
    assert done.returncode == 0
    assert f"etcd={bare['PATH']}/etcd" in done.stdout


def test_what_is_there_is_not_built_again(bare: dict[str, str], tmp_path: Path) -> None:
    ours = put(tmp_path / "ours", *PROGRAMS)
    go = put(tmp_path / "go", "go") / "go"
    go.write_text("#!/bin/sh\necho built >&2; exit 1\n")
    environment = {**bare, "PATH": f"{go.parent}:{bare['PATH']}"}
    assert build(environment, str(ours)).returncode == 0
    (ours / "kube-proxy").unlink()
    done = build(environment, str(ours))
    assert done.returncode == 1
    assert "building kube-proxy" in done.stderr


def test_a_failed_build_leaves_nothing_that_looks_built(bare: dict[str, str], tmp_path: Path) -> None:
    go = put(tmp_path / "go", "go") / "go"
    go.write_text("#!/bin/sh\nexit 1\n")
    build({**bare, "PATH": f"{go.parent}:{bare['PATH']}"}, str(tmp_path / "ours"))
    assert build(bare, "--find", str(tmp_path / "ours")).returncode == 3
