# SPDX-License-Identifier: Apache-2.0
"""A real control plane: etcd, kube-apiserver and, in node namespaces, kube-proxy, as plain processes.

No kubelet, scheduler or controller-manager: Nodes, EndpointSlices and tokens are made by hand. The
flags and their reasons were measured with v1.36 (docs/decisions has the rest).

    with ControlPlane(folder, address="127.0.0.1") as plane:      # on loopback, by itself
        plane.url, plane.ca_file, ADMIN_TOKEN

    ControlPlane(folder, address="10.0.9.1", enter=["nsenter", "--net=..."], spawn=inventory.start)

``spawn`` and ``enter`` let a lab own the processes and put them into its namespace; then the lab
polls readiness itself (``is_ready`` connects from where the caller is).
"""

import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

HERE = Path(__file__).resolve().parent
ADMIN_TOKEN = "admin"
PROXY_TOKEN = "proxy"
SERVICE_NETWORKS = "10.96.0.0/16,fd00:96::/112"
POD_NETWORKS = "10.244.0.0/16,fd00:244::/32"
NOBODY = "198.51.100.1"
"""On loopback the server must still advertise some other address; nothing is ever sent to it."""


class ControlPlaneError(Exception):
    """It does not come up, or its programs are not there."""


class Running(Protocol):
    """A process that somebody started for us."""

    @property
    def pid(self) -> int: ...
    @property
    def alive(self) -> bool: ...
    def kill(self, number: signal.Signals) -> None: ...


Spawn = Callable[[str, list[str]], Running]


@dataclass(frozen=True, slots=True)
class Programs:
    """Where the programs are (tests/k8s/build.sh)."""

    etcd: str
    kube_apiserver: str
    kube_proxy: str

    @classmethod
    def find(cls) -> Self:
        found = subprocess.run(["sh", str(HERE / "build.sh"), "--find"], capture_output=True, text=True, check=False)
        if found.returncode:
            raise ControlPlaneError(found.stderr.strip())
        path_by_name = dict(line.split("=", 1) for line in found.stdout.splitlines())
        return cls(path_by_name["etcd"], path_by_name["kube-apiserver"], path_by_name["kube-proxy"])


@dataclass(slots=True)
class Child:
    """A process of our own, its output in ``log``."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self, number: signal.Signals) -> None:
        if self.alive:
            self.process.send_signal(number)


@dataclass(slots=True)
class ControlPlane:
    """etcd and kube-apiserver on ``address``. Ports 0 are chosen. ``enter`` opens every command line."""

    folder: Path
    address: str
    port: int = 0
    etcd_port: int = 0
    advertise: str = ""
    enter: Sequence[str] = ()
    spawn: Spawn | None = None
    programs: Programs = field(default_factory=Programs.find)
    processes: dict[str, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        self.etcd_port = self.etcd_port or free_port()
        loopback = self.address.startswith("127.")
        self.advertise = self.advertise or (NOBODY if loopback else self.address)

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def ca_file(self) -> Path:
        """The server signs for itself; the file appears once it has started."""
        return self.folder / "certs/apiserver.crt"

    # --- life ---------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start both; does not wait."""
        self._write_files()
        self._start("etcd", self.etcd_command())
        self.start_apiserver()

    def start_apiserver(self) -> None:
        self._start("kube-apiserver", self.apiserver_command())

    def kill_apiserver(self) -> None:
        """As a crash; etcd keeps what it has."""
        self._end("kube-apiserver")

    def restart_apiserver(self) -> None:
        """Watches from before are Expired afterwards."""
        self.kill_apiserver()
        self.start_apiserver()
        self.wait_ready()

    def signal_apiserver(self, number: signal.Signals) -> None:
        """SIGSTOP makes it hang, SIGCONT ends that."""
        self.processes["kube-apiserver"].kill(number)

    def stop(self) -> None:
        """End what we started, by pid."""
        for name in ("kube-apiserver", "etcd"):
            self._end(name)

    def wait_ready(self, *, limit_s: float = 60.0) -> None:
        """Poll /readyz. Raises ControlPlaneError with the end of the log."""
        deadline = time.monotonic() + limit_s
        while not self.is_ready():
            dead = [name for name, process in self.processes.items() if not process.alive]
            if dead or time.monotonic() > deadline:
                what = f"{dead[0]} has ended" if dead else f"not ready within {limit_s:g} s"
                raise ControlPlaneError(f"{what}\n{self.log_tail(dead[0] if dead else 'kube-apiserver')}")
            time.sleep(0.1)

    def is_ready(self) -> bool:
        if not self.ca_file.exists():
            return False
        try:
            context = ssl.create_default_context(cafile=str(self.ca_file))
            with urllib.request.urlopen(f"{self.url}/readyz", context=context, timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def log_tail(self, name: str) -> str:
        log = self.folder / f"{name}.log"
        return log.read_text(errors="replace")[-3000:] if log.exists() else "(no log)"

    # --- command lines ------------------------------------------------------------------------

    def etcd_command(self) -> list[str]:
        client = f"http://127.0.0.1:{self.etcd_port}"
        peer = f"http://127.0.0.1:{free_port()}"
        return [
            self.programs.etcd,
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def apiserver_command(self) -> list[str]:
        return [
            self.programs.kube_apiserver,
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--bind-address={self.address}",
            f"--secure-port={self.port}",
            f"--advertise-address={self.advertise}",
            f"--cert-dir={self.folder / 'certs'}",  # no --tls-cert-file: it signs for itself
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={self.folder / 'sa.key'}",
            f"--service-account-key-file={self.folder / 'sa.key'}",
            f"--service-cluster-ip-range={SERVICE_NETWORKS}",
            "--disable-admission-plugins=ServiceAccount",
            "--event-ttl=1h",
        ]

    def proxy_command(self, node: str, kubeconfig: Path, *, mode: str = "nftables") -> list[str]:
        """kube-proxy of one node, to be run in its namespace; the Node needs its InternalIP first."""
        return [
            self.programs.kube_proxy,
            f"--kubeconfig={kubeconfig}",
            f"--hostname-override={node}",
            f"--proxy-mode={mode}",
            f"--cluster-cidr={POD_NETWORKS}",
            "--conntrack-max-per-core=0",  # nf_conntrack_max is read-only in a namespace
            "--conntrack-tcp-timeout-established=0s",
            "--conntrack-tcp-timeout-close-wait=0s",
        ]

    # --- parts --------------------------------------------------------------------------------

    def _write_files(self) -> None:
        key = self.folder / "sa.key"
        if not key.exists():
            command = ["openssl", "genrsa", "-out", str(key), "2048"]
            subprocess.run(command, check=True, capture_output=True)
        # The name system:kube-proxy is bound to the role that kube-proxy needs.
        tokens = f'{ADMIN_TOKEN},admin,admin,"system:masters"\n{PROXY_TOKEN},system:kube-proxy,kp,""\n'
        (self.folder / "tokens.csv").write_text(tokens)

    def _start(self, name: str, command: list[str]) -> None:
        spawn = self.spawn or self._spawn
        self.processes[name] = spawn(name, [*self.enter, *command])

    def _spawn(self, name: str, command: list[str]) -> Running:
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        return Child(process, log)

    def _end(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process is None:
            return
        process.kill(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while process.alive and time.monotonic() < deadline:
            time.sleep(0.02)


def kubeconfig(url: str, *, token: str, ca_file: Path | None) -> dict[str, object]:
    """A kubeconfig as a JSON value (which is YAML too)."""
    cluster: dict[str, str] = {"server": url} | ({"certificate-authority": str(ca_file)} if ca_file else {})
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "current-context": "test",
    }


def free_port() -> int:
    """A port of the loopback address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
