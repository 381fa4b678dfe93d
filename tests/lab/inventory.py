# SPDX-License-Identifier: Apache-2.0
"""What a lab has put on this machine, kept in a file, so that it can be taken away again by name and by pid.

The file is written before each thing is made: a lab whose maker was killed can still be removed.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from tests.lab.netns import Namespace, run
from tests.lab.poll import LabError

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Process:
    """A process we started. ``started`` (clock ticks since boot) tells it from a later owner of its pid."""

    name: str
    pid: int
    started: int
    log: str

    @property
    def alive(self) -> bool:
        state = _state(self.pid)
        return state == ("alive", self.started)

    def kill(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stop(self, *, limit_s: float = 5.0) -> None:
        """SIGTERM, and SIGKILL when that is not heard."""
        self.kill(signal.SIGTERM)
        if not self.gone(limit_s=limit_s):
            self.kill(signal.SIGKILL)
            self.gone(limit_s=limit_s)

    def gone(self, *, limit_s: float) -> bool:
        """Wait for its end, and collect its exit status if it is our child."""
        deadline = time.monotonic() + limit_s
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        reap(self.pid)
        return True


def _state(pid: int) -> tuple[str, int] | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return ("dead" if fields[0] in "ZX" else "alive", int(fields[19]))


@dataclass
class Inventory:
    """Belongings of one lab. ``prefix`` opens every name, ``folder`` holds its files, ``folders`` are further ones."""

    prefix: str
    folder: Path
    namespaces: list[str] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    mounts: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> "Inventory":
        stored = json.loads((folder / "inventory.json").read_text())
        processes = [Process(**one) for one in stored.pop("processes")]
        return cls(**{**stored, "folder": folder, "processes": processes})

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / "inventory.draft"
        draft.write_text(json.dumps(asdict(self), default=str, indent=1))
        draft.replace(self.folder / "inventory.json")

    def namespace(self, name: str) -> Namespace:
        """Make a namespace ``<prefix><name>``."""
        made = Namespace(self.prefix + name)
        if made.name not in self.namespaces:
            self.namespaces.append(made.name)
            self.save()
        made.create()
        return made

    def start(
        self, name: str, argv: list[str], *, environment: dict[str, str] | None = None, log: Path | None = None
    ) -> Process:
        """Start a process of its own session; its output is appended to ``<folder>/<name>.log``."""
        log = log or self.folder / f"{name}.log"
        self.folder.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )
        return self.adopt(name, child.pid, log=log, child=child)

    def adopt(self, name: str, pid: int, *, log: Path, child: "subprocess.Popen[bytes] | None" = None) -> Process:
        """Take responsibility for a running process."""
        state = _state(pid)
        process = Process(name=name, pid=pid, started=state[1] if state else -1, log=str(log))
        if child is not None:
            _children[pid] = child
        self.processes = [one for one in self.processes if not one.gone(limit_s=0)] + [process]
        self.save()
        return process

    def mount_bpffs(self, path: Path) -> None:
        """A bpffs of its own: pins of two labs, or of two hosts of one, cannot meet; unmounting drops them all."""
        path.mkdir(parents=True, exist_ok=True)
        if str(path) not in self.mounts:
            self.mounts.append(str(path))
            self.save()
        run("mount", "-t", "bpf", "-o", "mode=0755", "bpf", str(path))

    def unmount(self, path: Path) -> None:
        while os.path.ismount(path):
            run("umount", str(path))
        if str(path) in self.mounts:
            self.mounts.remove(str(path))
            self.save()

    def remove(self) -> list[str]:
        """Take everything away, whatever state it is in; returns what could not be removed."""
        self.kill_processes(self.processes)
        self.kill_processes([process for name in self.namespaces for process in inhabitants(Namespace(name))])
        problems = [f"process {one.name} ({one.pid}) is still there" for one in self.processes if one.alive]
        for path in list(self.mounts):
            problems += attempt(partial(self.unmount, Path(path)))
        for name in self.namespaces:
            problems += attempt(Namespace(name).delete)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        if not problems:
            shutil.rmtree(self.folder, ignore_errors=True)
        return problems

    def kill_processes(self, processes: list[Process]) -> None:
        """SIGTERM to all at once, then SIGKILL to who is still there."""
        for number, limit_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            for process in processes:
                process.kill(number)
            deadline = time.monotonic() + limit_s
            for process in processes:
                process.gone(limit_s=max(0.0, deadline - time.monotonic()))


_children: "dict[int, subprocess.Popen[bytes]]" = {}


def reap(pid: int) -> None:
    """Collect the exit status of our own child, so that no zombie and no ResourceWarning stays."""
    child = _children.pop(pid, None)
    if child is not None:
        child.wait()


def inhabitants(namespace: Namespace) -> list[Process]:
    """Who lives in a namespace: grandchildren that nobody named, such as ExaBGP's relay."""
    if not namespace.exists:
        return []
    pids = [int(pid) for pid in run("ip", "netns", "pids", namespace.name).split()]
    return [
        Process(name=f"pid {pid}", pid=pid, started=state[1], log="")
        for pid in pids
        if (state := _state(pid)) is not None
    ]


def attempt(act: Callable[[], object]) -> list[str]:
    """Perform one part of a removal; what went wrong is told, and the other parts still happen."""
    try:
        act()
    except (OSError, LabError) as error:
        return [str(error)]
    return []
