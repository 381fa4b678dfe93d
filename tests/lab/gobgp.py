# SPDX-License-Identifier: Apache-2.0
"""GoBGP, built once by tests/bgp/build.sh, running inside a network namespace. It has no FIB."""

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab.poll import LabError

BUILD = Path(__file__).resolve().parent.parent / "bgp/build.sh"


def programs() -> dict[str, str]:
    """Path by program, built if need be. Raises LabError with what is missing."""
    done = subprocess.run(["sh", str(BUILD)], capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        raise LabError(done.stderr.strip())
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


class Gobgp:
    """``Gobgp("tor", config).start()``; ``config`` is gobgpd's TOML."""

    def __init__(self, namespace: str, config: str) -> None:
        self.namespace = namespace
        self.config = config
        self._programs = programs()
        self._child: subprocess.Popen[bytes] | None = None
        self._directory = Path()

    def start(self) -> Self:
        """Start it and wait until it answers."""
        self._directory = Path(tempfile.mkdtemp(prefix=f"gobgp-{self.namespace}-"))
        (self._directory / "gobgpd.toml").write_text(self.config)
        argv = [self._programs["gobgpd"], "-f", str(self._directory / "gobgpd.toml"), "--api-hosts", "127.0.0.1:50051"]
        with (self._directory / "log").open("wb") as log:
            self._child = subprocess.Popen(
                [*self._enter, *argv, "--pprof-disable"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 20
        while True:
            try:
                self.gobgp("global")
                return self
            except subprocess.CalledProcessError:
                if self._child.poll() is not None or time.monotonic() > deadline:
                    said = (self._directory / "log").read_text()[-2000:]
                    self.stop()
                    raise RuntimeError(f"gobgpd in {self.namespace} did not start: {said}") from None
                time.sleep(0.05)

    def stop(self) -> None:
        if self._child:
            self._child.terminate()
            try:
                self._child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._child = None
        shutil.rmtree(self._directory, ignore_errors=True)

    def gobgp(self, *words: str) -> str:
        argv = [*self._enter, self._programs["gobgp"], *words]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout

    def bgp_routes(self, family: int = 4) -> dict[str, list[dict[str, Any]]]:
        """Paths by prefix, best first."""
        table: dict[str, list[dict[str, Any]]] = json.loads(self.gobgp("-j", "global", "rib", "-a", f"ipv{family}"))
        return table

    @property
    def _enter(self) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.namespace}"]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
