# SPDX-License-Identifier: Apache-2.0
"""The house tests itself: names, sizes, licences, pages made from code, and what a wheel carries."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from lbagent.config import load
from lbagent.metrics import CATALOGUE
from lbagent.model.reason import Reason
from lbagent.xdp.verdict import Verdict

CHECKOUT = Path(__file__).resolve().parent.parent
LINES = 700
REFERENCE = CHECKOUT / "docs/reference"

TESTED_BY: dict[str, str] = {
    "lbagent/agent/targets.py": "tests/agent/test_loop.py",  # protocols; its fakes fulfil them
}
"""Modules whose tests are in a file of another name."""

SOURCES = {".py", ".c", ".h", ".sh", ".service", ".conf", ".yml", ".yaml", ".j2", ".toml"}
WITHOUT_SPDX = re.compile(
    r"""
    ^tests/golden/        # compared byte by byte
    | ^tests/.*/testdata/
    | \.j2$               # the rendered file is the operator's
    """,
    re.VERBOSE,
)
REGISTRY = re.compile(r"pypi\.org|files\.pythonhosted|proxy\.golang|registry\.npmjs|deb\.debian")
PRIVATE = re.compile(r"(?<![\w.])/(work|root|home/\w+)/(?!\*)[\w.]+")


@cache
def tracked() -> tuple[str, ...]:
    """Names of the files in git, or of all files where there is no git (an unpacked sdist)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return tuple(name for name in listed.stdout.split("\0") if name and (CHECKOUT / name).is_file())
    return tuple(str(p.relative_to(CHECKOUT)) for p in CHECKOUT.rglob("*") if p.is_file() and ".venv" not in p.parts)


def texts(*suffixes: str) -> Iterator[tuple[str, str]]:
    """Name and text of every tracked text file, or of those with these suffixes."""
    for name in tracked():
        if not suffixes or Path(name).suffix in suffixes:
            content = (CHECKOUT / name).read_bytes()
            if b"\0" not in content[:8192]:
                yield name, content.decode()


def test_no_source_file_is_too_long_to_read() -> None:
    long = {n: t.count("\n") for n, t in texts(".py", ".c", ".h", ".sh") if t.count("\n") > LINES}
    assert long == {}


def test_every_module_has_the_test_file_of_its_name() -> None:
    missing = []
    for name in tracked():
        module = Path(name)
        if module.parts[0] != "lbagent" or module.suffix != ".py" or module.name == "__init__.py":
            continue
        test = Path("tests", *module.parts[1:-1], f"test_{module.name}")
        if not (CHECKOUT / TESTED_BY.get(name, test)).exists():
            missing.append(f"{name} (wants {test})")
    assert not missing, "\n".join(missing)


def test_an_excuse_is_only_for_a_module_without_the_file_of_its_name() -> None:
    for name in TESTED_BY:
        assert (CHECKOUT / name).exists()
        assert not (CHECKOUT / "tests" / Path(*Path(name).parts[1:-1]) / f"test_{Path(name).name}").exists(), name


def test_every_source_says_its_licence_at_the_top() -> None:
    silent = []
    for name in tracked():
        executable = os.access(CHECKOUT / name, os.X_OK)
        if (Path(name).suffix in SOURCES or executable or name == "Makefile") and not WITHOUT_SPDX.search(name):
            text = (CHECKOUT / name).read_text()
            if "SPDX-License-Identifier:" not in "".join(text.splitlines(keepends=True)[:3]):
                silent.append(name)
    assert not silent, "\n".join(silent)


def test_what_the_kernel_loads_is_gpl_and_the_rest_is_apache() -> None:
    for name, text in texts(".c", ".h", ".py"):
        if found := re.search(r"SPDX-License-Identifier: (\S+)", "\n".join(text.splitlines()[:3])):
            expected = "Apache-2.0" if name.endswith(".py") else "GPL-2.0"
            assert found[1].startswith(expected), name


def test_nothing_names_a_private_path_or_a_registry() -> None:
    found = []
    for name, text in texts():
        found += [f"{name}: {m[0]}" for m in PRIVATE.finditer(text)]
        found += [f"{name}: {m[0]}" for m in REGISTRY.finditer(text)]
    assert not found, "\n".join(found)


def test_no_module_is_called_by_a_word_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "base", "manager", "handler", "misc", "data", "info"}
    assert [n for n in tracked() if n.startswith("lbagent/") and Path(n).stem in empty] == []


def test_the_generated_pages_are_fresh() -> None:
    checked = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_reference_has_every_reason_verdict_and_metric() -> None:
    reasons, metrics = (REFERENCE / "reasons.md").read_text(), (REFERENCE / "metrics.md").read_text()
    for reason in Reason:
        assert f"`{reason.value}`" in reasons
    for spec in CATALOGUE:
        assert f"`{spec.name}`" in metrics
    verdicts = (REFERENCE / "verdicts.md").read_text()
    for verdict in Verdict:
        assert f"| `{verdict.word}` | {verdict.value} |" in verdicts


def test_the_example_configuration_is_accepted() -> None:
    assert load(REFERENCE / "lbagent.yaml").host.name == "lb1"


def test_links_between_pages_lead_somewhere() -> None:
    links = [(n, target) for n, text in texts(".md") for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)]
    local = [(n, target) for n, target in links if "://" not in target and not target.startswith("mailto:")]
    dead = [f"{n}: {target}" for n, target in local if not (CHECKOUT / n).parent.joinpath(target).exists()]
    assert not dead, "\n".join(dead)


def test_decisions_are_numbered_without_a_gap() -> None:
    numbers = sorted(int(p.name[:4]) for p in (CHECKOUT / "docs/decisions").glob("[0-9]*.md"))
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    hatchling(CHECKOUT, "sdist", out)
    (sdist,) = out.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", sdist, "-C", out], check=True)
    hatchling(out / sdist.name.removesuffix(".tar.gz"), "wheel", out)
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def hatchling(source: Path, target: str, out: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)],
        cwd=source,
        check=True,
        capture_output=True,
    )


def test_the_wheel_carries_what_kernel_exabgp_and_systemd_read(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[1]).namelist())
    for folder, inside in (("ebpf", "lbagent/_assets/ebpf"), ("bgp", "lbagent/_assets/bgp"), ("lbagent", "lbagent")):
        for name in tracked():
            if name.startswith(f"{folder}/"):
                assert f"{inside}/{name.partition('/')[2]}" in names
    shared = {name.partition(".data/data/")[2] for name in names}
    assert {"lib/systemd/system/lbagent.service", "lib/systemd/system/lbagent-bgp.service"} <= shared
    assert {"lib/sysusers.d/lbagent.conf", "lib/tmpfiles.d/lbagent.conf"} <= shared
    for page in (CHECKOUT / "docs/man").iterdir():
        assert f"share/man/man{page.suffix[1:]}/{page.name}" in shared


def test_the_wheel_carries_nothing_else(built: tuple[Path, Path]) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(built[1]).namelist()}
    assert {re.sub(r"-[\d.]+\.", "-VERSION.", top) for top in tops} == {
        "lbagent",
        "lbagent-VERSION.dist-info",
        "lbagent-VERSION.data",
    }


def test_the_wheel_names_every_dependency_and_bounds_bcc(built: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(built[1])
    (metadata,) = [wheel.read(n).decode() for n in wheel.namelist() if n.endswith("dist-info/METADATA")]
    assert "Requires-Dist: bcc>=0.26" in metadata
    assert "License-Expression: Apache-2.0 AND GPL-2.0-only" in metadata
