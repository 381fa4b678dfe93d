# SPDX-License-Identifier: Apache-2.0
"""What every test may rely on, decided once: privileges, order, seeds, and the count per level.

Levels: *thought* (pure), *rooms* (adapters against fakes of their protocol), *bpf* (packets through
the real program), *netns* (the lab), *k8s* (a real control plane),
*deploy* (units and roles). Privileged levels skip with a
reason where something is missing. With ``CI=true`` (or ``LBAGENT_REQUIRE=bpf,netns``) the same
reason is a failure.
"""

import asyncio
import importlib.util
import os
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import hypothesis
import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PRIVILEGED = ("bpf", "netns", "k8s", "deploy")
LEVELS = ("thought", "rooms", *PRIVILEGED)
ROOMS = frozenset({"kube", "bgp", "xdp", "probe", "agent", "cli", "fakes"})

hypothesis.settings.register_profile("laptop", max_examples=100, deadline=None)
# CI judges a commit, so it must give the same answer twice; searching is for laptops.
hypothesis.settings.register_profile("ci", max_examples=100, deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") == "true" else "laptop")


def _root() -> str:
    return "" if os.geteuid() == 0 else "needs root"


def _bcc() -> str:
    return "" if importlib.util.find_spec("bcc") else "needs BCC: apt-get install python3-bpfcc"


def _headers() -> str:
    release = os.uname().release
    found = Path(f"/lib/modules/{release}/build").exists()
    return "" if found else f"needs kernel headers in /lib/modules/{release}/build: scripts/setup puts them there"


def _bpffs() -> str:
    return "" if os.path.ismount("/sys/fs/bpf") else "needs bpffs: mount -t bpf bpf /sys/fs/bpf"


def _command(name: str, package: str) -> Callable[[], str]:
    def check() -> str:
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/lib/frr")
        return "" if found else f"needs {name}: apt-get install {package}"

    return check


def _control_plane() -> str:
    found = subprocess.run(
        ["sh", str(CHECKOUT / "tests/k8s/build.sh"), "--find"], capture_output=True, text=True, check=False
    )
    return "" if found.returncode == 0 else found.stderr.strip() or "tests/k8s/build.sh --find failed"


def _ansible() -> str:
    return "" if (CHECKOUT / ".venv-ansible/.locked").exists() else "needs ansible-lint: make ansible"


_KERNEL = (_root, _bcc, _headers, _bpffs)
_LAB = (
    *_KERNEL,
    _command("ip", "iproute2"),
    _command("ethtool", "ethtool"),
    _command("nft", "nftables"),
    _command("bgpd", "frr"),
    _command("vtysh", "frr"),
)
NEEDS: dict[str, tuple[Callable[[], str], ...]] = {
    "bpf": _KERNEL,
    "netns": _LAB,
    "k8s": (*_LAB, _control_plane),
    "deploy": (
        _root,
        _bpffs,
        _command("systemd-analyze", "systemd"),
        _command("systemd-nspawn", "systemd-container"),
        _command("debootstrap", "debootstrap"),
        _ansible,
    ),
}


@cache
def missing(level: str) -> str:
    """What this machine lacks for a level, in words; empty when nothing."""
    return next((reason for need in NEEDS[level] if (reason := need())), "")


def required_levels() -> frozenset[str]:
    """Levels whose absence is a failure."""
    if os.environ.get("CI") == "true":
        return frozenset(PRIVILEGED)
    return frozenset(filter(None, os.environ.get("LBAGENT_REQUIRE", "").split(",")))


def level_of(item: pytest.Item) -> str:
    """The most demanding marker, else the folder."""
    for level in reversed(PRIVILEGED):
        if item.get_closest_marker(level):
            return level
    folder = item.path.relative_to(CHECKOUT / "tests").parts[0]
    return "rooms" if folder in ROOMS else "thought"


class LevelReport:
    """Counts and seconds per level, for the summary at the end."""

    def __init__(self) -> None:
        self.level_by_test: dict[str, str] = {}
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Only the levels asked for, cheap ones first; within a level the random order stays."""
        self.level_by_test = {item.nodeid: level_of(item) for item in items}
        if asked := config.getoption("--level"):
            others = [item for item in items if self.level_by_test[item.nodeid] not in asked]
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if self.level_by_test[item.nodeid] in asked]
        items.sort(key=lambda item: LEVELS.index(self.level_by_test[item.nodeid]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        level = self.level_by_test[report.nodeid]
        self.seconds[level] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[level][report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("levels")
        for level in LEVELS:
            counts = self.outcomes[level]
            if counts:
                words = ", ".join(f"{counts[o]} {o}" for o in ("passed", "failed", "skipped") if counts[o])
                terminalreporter.write_line(f"{level:<8} {words} in {self.seconds[level]:.1f}s")
        seed = terminalreporter.config.getoption("randomly_seed", default=None)
        terminalreporter.write_line(f"seed     {seed} (repeat with: pytest -p randomly --randomly-seed={seed})")


def pytest_configure(config: pytest.Config) -> None:
    asyncio.set_event_loop(None)  # looptime asks for a loop in every test; nobody would close one made then
    config.pluginmanager.register(LevelReport(), "levels")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/golden")
    parser.addoption("--level", action="append", choices=LEVELS, help="only tests of this level; may be repeated")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for level in PRIVILEGED:
        if item.get_closest_marker(level) and (reason := missing(level)):
            if level in required_levels():
                pytest.fail(f"{level}: {reason}", pytrace=False)
            pytest.skip(f"{level}: {reason}")


@pytest.fixture
def update_golden(pytestconfig: pytest.Config) -> bool:
    """Whether golden files shall be rewritten rather than compared."""
    return bool(pytestconfig.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test speaks to the systemd that may have started the test run."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
