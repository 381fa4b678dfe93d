# SPDX-License-Identifier: Apache-2.0
"""Is this machine fit? Each check is one Finding: what was looked for, what was found, what to do.

Nothing is changed. Rooms answer for their own libraries; this file only asks.
"""

import importlib.metadata
import importlib.util
import os
import platform
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lbagent.config import Config, load
from lbagent.errors import ConfigError

_CAPABILITIES = {12: "CAP_NET_ADMIN", 38: "CAP_PERFMON", 39: "CAP_BPF"}
_BPF_FS_MAGIC = "bpf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of ``lbagent doctor``."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine(path: Path) -> Iterator[Finding]:
    """All checks, those of the machine first, then those that need the configuration."""
    for check in (_python, _bcc, _headers, _bpffs, _capabilities, _exabgp):
        yield check()
    try:
        settings = load(path)
    except ConfigError as error:
        yield Finding(
            name="configuration",
            ok=False,
            found=error.problems[0] if error.problems else str(error),
            remedy=f"lbagent check {path}",
        )
        return
    yield Finding(name="configuration", ok=True, found=str(path))
    for ask in (_interfaces, _kubeconfig, _folders):
        yield from ask(settings)


def _python() -> Finding:
    version = platform.python_version()
    return Finding(
        name="python",
        ok=sys.version_info >= (3, 11),
        found=f"{version} ({sys.executable})",
        remedy="use the distribution's Python 3.11 or later",
    )


def _bcc() -> Finding:
    remedy = "apt install python3-bpfcc; make the virtual environment from /usr/bin/python3 with --system-site-packages"
    try:
        version = importlib.metadata.version("bcc")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    spec = importlib.util.find_spec("bcc")
    if spec is None or spec.origin is None:
        return Finding(name="bcc", ok=False, found="not installed", remedy=remedy)
    library = Path(spec.origin).parent / "libbcc.py"
    if not library.exists():
        return Finding(
            name="bcc",
            ok=False,
            found=f"{spec.origin} {version} is an unrelated library of the same name (no BPF class)",
            remedy=f"pip uninstall bcc; {remedy}",
        )
    return Finding(name="bcc", ok=True, found=f"{version} ({Path(spec.origin).parent})")


def _headers() -> Finding:
    from lbagent.xdp.compile import find_headers

    release = platform.release()
    headers = find_headers(release)
    if headers is None:
        return Finding(name="kernel headers", ok=False, found="none", remedy=f"apt install linux-headers-{release}")
    return Finding(name="kernel headers", ok=True, found=f"{headers.release} (kernel {release})")


def _bpffs() -> Finding:
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split()
        if kind == _BPF_FS_MAGIC:
            return Finding(name="bpffs", ok=True, found=place)
    return Finding(name="bpffs", ok=False, found="not mounted", remedy="mount -t bpf bpf /sys/fs/bpf")


def _capabilities() -> Finding:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    effective = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), 16)
    missing = [name for bit, name in _CAPABILITIES.items() if not effective >> bit & 1]
    return Finding(
        name="capabilities",
        ok=not missing,
        found="missing " + ", ".join(missing) if missing else "all three",
        remedy="run as root, or through lbagent.service",
    )


def _exabgp() -> Finding:
    try:
        version = importlib.metadata.version("exabgp")
    except importlib.metadata.PackageNotFoundError:
        return Finding(name="exabgp", ok=False, found="not installed", remedy="pip install 'exabgp>=5.0.15,<6'")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    return Finding(
        name="exabgp", ok=(5, 0, 15) <= numbers < (6,), found=version, remedy="pip install 'exabgp>=5.0.15,<6'"
    )


def _interfaces(settings: Config) -> Iterator[Finding]:
    present = {name for _, name in socket.if_nameindex()}
    for name in settings.xdp.interfaces:
        driver = Path(f"/sys/class/net/{name}/device/driver")
        kind = driver.resolve().name if driver.exists() else "virtual"
        yield Finding(
            name=f"interface {name}",
            ok=name in present,
            found=kind if name in present else "no such interface",
            remedy="correct xdp.interfaces; ip -br link",
        )


def _kubeconfig(settings: Config) -> Iterator[Finding]:
    path = settings.kubernetes.kubeconfig
    if path is not None:
        readable = os.access(path, os.R_OK)
        yield Finding(
            name="kubeconfig",
            ok=readable,
            found=str(path) if readable else f"{path} cannot be read",
            remedy="see docs/how-to/install.md",
        )


def _folders(settings: Config) -> Iterator[Finding]:
    for name, path in (("run", settings.paths.run), ("state", settings.paths.state)):
        place = path if path.exists() else path.parent
        writable = os.access(place, os.W_OK)
        yield Finding(
            name=f"paths.{name}",
            ok=writable,
            found=str(path) if writable else f"{place} is not writable",
            remedy="systemd-tmpfiles --create, or choose another folder",
        )
