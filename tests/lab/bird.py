# SPDX-License-Identifier: Apache-2.0
"""BIRD 2 from the distribution's package, running inside a network namespace."""

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab.frr import kernel_next_hops


class Bird:
    """``Bird("tor", config).start()``; ``config`` is what bird.conf would hold."""

    def __init__(self, namespace: str, config: str) -> None:
        self.namespace = namespace
        self.config = config
        self._child: subprocess.Popen[bytes] | None = None
        self._directory = Path()

    def start(self) -> Self:
        """Start it and wait until it answers."""
        self._directory = Path(tempfile.mkdtemp(prefix=f"bird-{self.namespace}-", dir="/run"))
        (self._directory / "bird.conf").write_text(self.config)
        log = (self._directory / "log").open("wb")
        argv = ["nsenter", f"--net=/run/netns/{self.namespace}", "bird", "-f"]
        argv += ["-c", str(self._directory / "bird.conf"), "-s", str(self._socket)]
        with log:
            self._child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not self._socket.exists():
            if self._child.poll() is not None or time.monotonic() > deadline:
                said = (self._directory / "log").read_text()
                self.stop()
                raise RuntimeError(f"bird in {self.namespace} did not start: {said}")
            time.sleep(0.02)
        return self

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

    def birdc(self, command: str) -> str:
        """What birdc prints."""
        argv = ["birdc", "-r", "-s", str(self._socket), command]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout

    def bgp_routes(self, family: int = 4) -> dict[str, list[dict[str, Any]]]:
        """Paths by prefix; each with its attributes as BIRD words them (``BGP.community`` ...)."""
        routes: dict[str, list[dict[str, Any]]] = {}
        prefix = ""
        for line in self.birdc(f"show route table master{family} where source = RTS_BGP all").splitlines():
            if match := re.match(r"(\S+)?\s+unicast \[(\w+) ", line):
                prefix = match[1] or prefix
                routes.setdefault(prefix, []).append({"protocol": match[2]})
            elif match := re.match(r"\s+via (\S+) ", line):
                routes[prefix][-1]["via"] = match[1]
            elif match := re.match(r"\s+(BGP\.\w+): (.*)", line):
                routes[prefix][-1][match[1]] = match[2]
        return routes

    def kernel_next_hops(self, prefix: str) -> frozenset[str]:
        """Gateways the namespace's kernel uses for ``prefix``."""
        return kernel_next_hops(self.namespace, prefix, protocol="bird")

    @property
    def _socket(self) -> Path:
        return self._directory / "ctl"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
