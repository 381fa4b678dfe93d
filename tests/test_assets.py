# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from lbagent import assets


def test_a_checkout_finds_the_folders_at_its_root() -> None:
    root = Path(__file__).resolve().parent.parent
    assert assets.path("ebpf") == root / "ebpf"
    assert assets.path("bgp") == root / "bgp"
    assert assets.path("ebpf").is_dir()


def test_a_wheel_finds_them_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_assets" / "ebpf").mkdir(parents=True)
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path)
    assert assets.path("ebpf") == tmp_path / "_assets" / "ebpf"
