# SPDX-License-Identifier: Apache-2.0
"""FRR from the distribution's packages, running inside a network namespace.

Every instance has its own directory for sockets, pid files, configuration and logs, so any number
of them run side by side. Daemons stay in the foreground as our children and are ended by their id.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DAEMONS = Path("/usr/lib/frr")


def kernel_next_hops(namespace: str, prefix: str, *, protocol: str) -> frozenset[str]:
    """Gateways of the routes to ``prefix`` that ``protocol`` (``ip route show proto``) put into the kernel."""
    family = "-6" if ":" in prefix else "-4"
    argv = ["ip", "-n", namespace, family, "-j", "route", "show", prefix, "proto", protocol]
    routes = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout or "[]")
    hops = set()
    for route in routes:
        for hop in (route, *route.get("nexthops", ())):
            via = hop.get("gateway") or hop.get("via", {}).get("host")
            if via:
                hops.add(via)
    return frozenset(hops)


class Frr:
    """``Frr("tor", config).start()``; ``config`` is what a file frr.conf would hold.

    ``bfdd`` belongs to ``daemons`` when the router shall speak BFD.
    """

    def __init__(self, namespace: str, config: str, *, daemons: tuple[str, ...] = ("zebra", "bgpd")) -> None:
        self.namespace = namespace
        self.config = config
        self.daemons = daemons
        self._children: list[subprocess.Popen[bytes]] = []
        self._directory: Path | None = None

    @property
    def directory(self) -> Path:
        """Where sockets and logs of this instance are; raises before start()."""
        if self._directory is None:
            raise RuntimeError(f"FRR in {self.namespace} is not started")
        return self._directory

    def start(self) -> Self:
        """Start the daemons and wait until each answers on its socket."""
        # Daemons drop to the user frr, who must be able to walk here: not below a 0700 directory.
        self._directory = Path(tempfile.mkdtemp(prefix=f"frr-{self.namespace}-", dir="/run"))
        self._directory.chmod(0o755)
        (self._directory / "vtysh.conf").write_text("")
        configuration = self._directory / "frr.conf"
        configuration.write_text(self.config)
        for path in (self._directory, *self._directory.iterdir()):
            shutil.chown(path, "frr", "frr")
        try:
            for daemon in self.daemons:
                self._children.append(self._spawn(daemon))
                self._wait_for(daemon, self._children[-1])
            self._load(configuration)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the daemons (BGP sessions get a NOTIFICATION) and remove the directory."""
        for child in reversed(self._children):
            child.terminate()
        self._reap()

    def kill(self) -> None:
        """Like the router losing its power: nobody is told anything by the daemons."""
        for child in self._children:
            child.kill()
        self._reap()

    def vtysh(self, *commands: str) -> str:
        """Output of the commands, entered one after the other in one vtysh."""
        argv = list(self._vtysh())
        for command in commands:
            argv += ["-c", command]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"vtysh {commands}: {done.stdout}{done.stderr}")
        return done.stdout

    def configure(self, text: str) -> None:
        """Enter configuration lines (they may change mode, as in frr.conf)."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.vtysh("configure terminal", *lines)

    def json(self, command: str) -> Any:
        """``command`` without the word json; ``{}`` when FRR prints nothing."""
        return json.loads(self.vtysh(f"{command} json") or "{}")

    def bgp_routes(self, family: int = 4) -> dict[str, list[dict[str, Any]]]:
        """Paths by prefix in bgpd's RIB, in short form (peerId, path, nexthops, metric ...)."""
        routes: dict[str, list[dict[str, Any]]] = self.json(f"show bgp ipv{family} unicast").get("routes", {})
        return routes

    def bgp_paths(self, prefix: str) -> list[dict[str, Any]]:
        """Every path to ``prefix`` with all its attributes (communities, med ...)."""
        family = 6 if ":" in prefix else 4
        paths: list[dict[str, Any]] = self.json(f"show bgp ipv{family} unicast {prefix}").get("paths", [])
        return paths

    def kernel_next_hops(self, prefix: str) -> frozenset[str]:
        """Gateways the namespace's kernel uses for ``prefix``, empty when there is no such route."""
        return kernel_next_hops(self.namespace, prefix, protocol="bgp")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self, daemon: str) -> subprocess.Popen[bytes]:
        here = str(self.directory)
        argv = ["nsenter", f"--net=/run/netns/{self.namespace}", str(DAEMONS / daemon), "-A", "127.0.0.1", "-P", "0"]
        argv += ["--vty_socket", here, "-z", f"{here}/zserv.api", "-i", f"{here}/{daemon}.pid", "-f", "/dev/null"]
        argv += ["--log", f"file:{here}/{daemon}.log"]
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _wait_for(self, daemon: str, child: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 20
        while not (self.directory / f"{daemon}.vty").exists():
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{daemon} in {self.namespace} did not start: {self._last_words(daemon)}")
            time.sleep(0.02)

    def _load(self, configuration: Path) -> None:
        argv = [*self._vtysh(), "-f", str(configuration)]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"FRR refuses its configuration: {done.stdout}{done.stderr}")

    def _last_words(self, daemon: str) -> str:
        log = self.directory / f"{daemon}.log"
        return log.read_text()[-2000:] if log.exists() else "no log"

    def _vtysh(self) -> tuple[str, ...]:
        return ("vtysh", "--vty_socket", str(self.directory), "--config_dir", str(self.directory))

    def _reap(self) -> None:
        for child in self._children:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()
        if self._directory and os.environ.get("LBAGENT_KEEP_LAB") != "1":
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory = None
