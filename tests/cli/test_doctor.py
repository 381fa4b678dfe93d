# SPDX-License-Identifier: Apache-2.0
"""lbagent doctor: each missing part is one line that says what to install or grant."""

import importlib.machinery
import importlib.metadata
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lbagent.cli import doctor


def finding(name: str, path: Path = Path("/nonexistent.yaml")) -> doctor.Finding:
    return next(f for f in doctor.examine(path) if f.name == name)


def test_every_finding_that_fails_has_a_remedy(tmp_path: Path) -> None:
    assert all(f.ok or f.remedy for f in doctor.examine(tmp_path / "nosuch.yaml"))


def test_a_missing_configuration_is_the_last_finding(tmp_path: Path) -> None:
    last = list(doctor.examine(tmp_path / "nosuch.yaml"))[-1]
    assert (last.name, last.ok) == ("configuration", False)


def test_the_unrelated_bcc_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    impostor = tmp_path / "bcc" / "__init__.py"
    spec = importlib.machinery.ModuleSpec("bcc", None, origin=str(impostor))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.10")
    found = finding("bcc")
    assert not found.ok
    assert "unrelated library" in found.found
    assert "pip uninstall bcc" in found.remedy


def test_a_missing_bcc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    found = finding("bcc")
    assert not found.ok
    assert "python3-bpfcc" in found.remedy


@pytest.mark.parametrize(
    ("version", "ok"), [("5.0.14", False), ("5.0.15", True), ("5.1.0", True), ("6.0.0", False), ("4.2.21", False)]
)
def test_the_version_of_exabgp_is_bounded_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, version: str, ok: bool
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert doctor._exabgp().ok is ok


def test_missing_capabilities_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    none = SimpleNamespace(read_text=lambda encoding: "Name:\tx\nCapEff:\t0000000000001000\n")
    monkeypatch.setattr(doctor, "Path", lambda name: none)
    found = doctor._capabilities()
    assert not found.ok
    assert found.found == "missing CAP_PERFMON, CAP_BPF"
