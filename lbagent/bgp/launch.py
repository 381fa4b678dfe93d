# SPDX-License-Identifier: Apache-2.0
"""Start ExaBGP, and change its configuration while it runs. The same way for systemd, lab and demo.

``prepare`` puts ``exabgp.conf`` and ``exabgp.env`` below ``paths.run`` and says how to start.
``reload`` replaces them under a running ExaBGP. Both let ExaBGP judge the file first: a file that it
refuses on reload would make it refuse every later one until it is restarted, and a missing one costs
the relay.
"""

import os
import pwd
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lbagent.bgp import render
from lbagent.config import Bgp, Paths, read_password
from lbagent.errors import BgpError

VALIDATE_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to start ExaBGP: for execve or Popen. ``environment`` is complete."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


def prepare(bgp: Bgp, paths: Paths, *, python: str = sys.executable) -> Launch:
    """Write the files for ExaBGP and say how to start it. Raises BgpError, and then has replaced nothing."""
    _install(bgp, paths, python=python)
    env, conf = str(paths.run / "exabgp.env"), str(paths.run / "exabgp.conf")
    argv = (python, "-I", "-m", "exabgp", "--env-file", env, "server", conf)
    return Launch(argv=argv, environment=_environment())


def reload(bgp: Bgp, paths: Paths, *, pid: int, python: str = sys.executable) -> None:
    """Replace the files and tell the ExaBGP that is ``pid``. Raises BgpError, and then nothing has changed.

    Call it when ExaBGP has been ready for a second and not twice within a second: the signal kills an
    ExaBGP that has just been started. The Speaker reads every peer back afterwards (``reconfigure``).
    """
    _install(bgp, paths, python=python)
    try:
        os.kill(pid, signal.SIGUSR1)
    except OSError as error:
        raise BgpError(f"ExaBGP ({pid}) cannot be told to reload: {error}") from error


def execute(bgp: Bgp, paths: Paths) -> None:
    """Become ExaBGP: the body of lbagent-bgp.service. Does not return."""
    launch = prepare(bgp, paths)
    os.execve(launch.argv[0], launch.argv, dict(launch.environment))


def pid_of(epoch: str) -> int:
    """The process behind an epoch, as the relay's hello names it (``SpeakerState.epoch``)."""
    return int(epoch.partition("-")[0])


def _install(bgp: Bgp, paths: Paths, *, python: str) -> None:
    password_by_peer = {peer.name: read_password(peer.password_file) for peer in bgp.peers if peer.password_file}
    text_by_path = {
        paths.run / "exabgp.env": render.exabgp_env(bgp, user=pwd.getpwuid(os.geteuid()).pw_name),
        paths.run / "exabgp.conf": render.exabgp_conf(bgp, paths, python=python, password_by_peer=password_by_peer),
    }
    fresh: dict[Path, Path] = {}
    try:
        paths.run.mkdir(parents=True, exist_ok=True)
        for path, text in text_by_path.items():
            fresh[path] = _write_beside(path, text)
        _validate(python, *fresh.values())
        for path, beside in fresh.items():
            beside.replace(path)
    except OSError as error:
        raise BgpError(f"ExaBGP's configuration cannot be written: {error}") from error
    finally:
        for beside in fresh.values():
            beside.unlink(missing_ok=True)


def _write_beside(path: Path, text: str) -> Path:
    # mkstemp makes it 0600: the file holds the passwords of sessions.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)


def _validate(python: str, env: Path, conf: Path) -> None:
    argv = [python, "-I", "-m", "exabgp", "--env-file", str(env), "validate", "-nr", str(conf)]
    try:
        done = subprocess.run(
            argv, check=False, capture_output=True, text=True, timeout=VALIDATE_TIMEOUT_S, env=_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise BgpError("exabgp validate did not end") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise BgpError(f"ExaBGP refuses its configuration: {said}", hint="nothing was replaced; report this")


def _environment() -> dict[str, str]:
    """Ours without ExaBGP's own variables, which would win over its env file."""
    return {key: value for key, value in os.environ.items() if not key.lower().startswith("exabgp")}
