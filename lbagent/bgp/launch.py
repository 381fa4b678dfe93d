# SPDX-License-Identifier: Apache-2.0
"""Start ExaBGP, and change its configuration while it runs. The same way for systemd, lab and demo.

``install`` puts ``exabgp.conf`` and ``exabgp.env`` into a folder and says how to start ExaBGP; done
again under a running ExaBGP and followed by SIGUSR1 (``reload``) it is a change of configuration.
ExaBGP itself judges the files before they replace anything: after one reload of a file that it
refuses it would refuse every later one too, and a missing file costs the relay.
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


def install(bgp: Bgp, paths: Paths, folder: Path, *, user: str = "", python: str = sys.executable) -> Launch:
    """Write the files, whole or not at all. Raises BgpError, and then has replaced nothing.

    ``user``: who ExaBGP becomes when it is started as root; default: whoever we are. ``python`` runs
    ExaBGP and the relay.
    """
    password_by_peer = {peer.name: read_password(peer.password_file) for peer in bgp.peers if peer.password_file}
    text_by_name = {
        "exabgp.env": render.exabgp_env(bgp, user=user or pwd.getpwuid(os.geteuid()).pw_name),
        "exabgp.conf": render.exabgp_conf(bgp, paths, python=python, password_by_peer=password_by_peer),
    }
    beside_by_name: dict[str, Path] = {}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, text in text_by_name.items():
            beside_by_name[name] = _write_beside(folder / name, text)
        _validate(python, env=beside_by_name["exabgp.env"], conf=beside_by_name["exabgp.conf"])
        for name, beside in beside_by_name.items():
            beside.replace(folder / name)
    except OSError as error:
        raise BgpError(f"ExaBGP's configuration cannot be written: {error}") from error
    finally:
        for beside in beside_by_name.values():
            beside.unlink(missing_ok=True)
    return command(folder, python=python)


def command(folder: Path, *, python: str = sys.executable) -> Launch:
    """How to start ExaBGP with the files in ``folder``."""
    argv = (python, "-I", "-m", "exabgp", "--env-file", f"{folder}/exabgp.env", "server", f"{folder}/exabgp.conf")
    return Launch(argv=argv, environment=_environment())


def reload(pid: int) -> None:
    """Tell ExaBGP to read its installed files again. Raises BgpError.

    Not within a second of its start (the signal would kill it) and not twice within a second. The
    Speaker reads every peer back afterwards (``Speaker.reconfigure``).
    """
    try:
        os.kill(pid, signal.SIGUSR1)
    except OSError as error:
        raise BgpError(f"ExaBGP ({pid}) cannot be told to reload: {error}") from error


def pid_of(epoch: str) -> int:
    """The process behind an epoch, as ``SpeakerState.epoch`` names it."""
    return int(epoch.partition("-")[0])


def _write_beside(path: Path, text: str) -> Path:
    # mkstemp makes it 0600: the file holds the passwords of sessions.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)


def _validate(python: str, *, env: Path, conf: Path) -> None:
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
