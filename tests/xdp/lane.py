# SPDX-License-Identifier: Apache-2.0
"""A short street: client -- LB host -- two nodes, in namespaces of its own, with real servers on the nodes.

client c0 10.0.1.2 --- wan 10.0.1.1 | LB | lan1 10.0.2.1 --- n0 10.0.2.2 node 1
                                         | lan2 10.0.3.1 --- n0 10.0.3.2 node 2
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lbagent.config import Attach, Limits, Paths, Snat, Xdp
from lbagent.model.service import Protocol, ServiceKey
from lbagent.model.vip import Backend, BackendState, Forward, Mode, Ring, Vip
from lbagent.plan.ring import ring as build_ring
from lbagent.xdp.forwarder import Forwarder
from tests.lab.netns import Namespace, Port, cable

NODES = ("10.0.2.2", "10.0.3.2")
ROUTER = "10.0.1.2"  # the client itself delivers its packets
INTERFACES = ("wan", "lan1", "lan2")
TCP_VIP = Vip(address="203.0.113.1", protocol=Protocol.TCP, port=80)
UDP_VIP = Vip(address="203.0.113.1", protocol=Protocol.UDP, port=53)
TCP_NODE_PORT, UDP_NODE_PORT = 30080, 30053


def ring_over(*nodes: str, down: Iterable[str] = ()) -> Ring:
    dead = frozenset(down)
    return build_ring(Backend(address=a, state=BackendState.DOWN if a in dead else BackendState.ACTIVE) for a in nodes)


def forward_to(ring: Ring, vip: Vip = TCP_VIP, **changes: object) -> Forward:
    port = TCP_NODE_PORT if vip.protocol is Protocol.TCP else UDP_NODE_PORT
    values = {"mode": Mode.NAT, "node_port": port} | changes
    return Forward(vip=vip, service=ServiceKey("", ""), ring=ring.fingerprint, **values)  # type: ignore[arg-type]


@dataclass
class Lane:
    """The street, its servers, and folders for one LB host's state."""

    folder: Path
    mtu: int = 1500
    token: str = field(default_factory=lambda: os.urandom(3).hex())

    def __post_init__(self) -> None:
        self.client, self.lb, *self.nodes = (Namespace(f"a2{part}{self.token}") for part in ("c", "l", "n", "m"))
        self.pins = Path(f"/sys/fs/bpf/lbagent-lane-{self.token}")
        self.paths = Paths(bpf=self.pins, state=self.folder / "state", run=self.folder / "run")
        self._open: list[socket.socket] = []

    def build(self) -> None:
        for namespace in (self.client, self.lb, *self.nodes):
            namespace.create()
        cable(Port(self.lb, "wan"), Port(self.client, "c0"), mtu=self.mtu)
        Port(self.lb, "wan").up("10.0.1.1/24")
        Port(self.client, "c0").up("10.0.1.2/24")
        self.client.ip("route add default via 10.0.1.1")
        Port(self.client, "c0").offload(tx=False)
        for number in (1, 2):
            self.connect_node(number)
            self.serve(number)

    def connect_node(self, number: int) -> None:
        """Cable of a node, new or anew."""
        near, far = Port(self.lb, f"lan{number}"), Port(self.nodes[number - 1], "n0")
        cable(near, far, mtu=self.mtu)
        near.up(f"10.0.{number + 1}.1/24")
        far.up(f"10.0.{number + 1}.2/24")
        far.namespace.ip(f"route add default via 10.0.{number + 1}.1")
        far.offload(tx=False)

    def clear(self) -> None:
        for opened in self._open:
            opened.close()
        for namespace in (self.client, self.lb, *self.nodes):
            namespace.delete()
        shutil.rmtree(self.pins, ignore_errors=True)

    # --- nodes -------------------------------------------------------------------------------

    def serve(self, number: int) -> None:
        """TCP: names itself and the source it saw, then echoes. UDP: echoes."""
        with self.nodes[number - 1].entered():
            listener = socket.create_server(("0.0.0.0", TCP_NODE_PORT), backlog=256)
            datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            datagrams.bind(("0.0.0.0", UDP_NODE_PORT))
        self._open += [listener, datagrams]
        name = f"node{number}".encode()
        threading.Thread(target=self._accept, args=(listener, name), daemon=True).start()
        threading.Thread(target=self._echo, args=(datagrams,), daemon=True).start()

    def _accept(self, listener: socket.socket, name: bytes) -> None:
        while True:
            try:
                connection, source = listener.accept()
            except OSError:
                return  # the lane was cleared
            threading.Thread(target=self._talk, args=(connection, name, source[0]), daemon=True).start()

    def _talk(self, connection: socket.socket, name: bytes, source: str) -> None:
        with connection:
            try:
                connection.sendall(name + b" " + source.encode() + b"\n")
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return

    def _echo(self, datagrams: socket.socket) -> None:
        while True:
            try:
                data, source = datagrams.recvfrom(2048)
                datagrams.sendto(data, source)
            except OSError:
                return

    # --- client ------------------------------------------------------------------------------

    def connect(self, timeout_s: float = 3.0) -> tuple[socket.socket, str, str]:
        """A connection through the VIP -> (socket, who answered, which source it saw)."""
        with self.client.entered():
            connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        try:
            connection.connect((TCP_VIP.address, TCP_VIP.port))
            hello = b""
            while not hello.endswith(b"\n"):
                hello += connection.recv(100) or b"?\n"
        except OSError:
            connection.close()
            raise
        name, source = hello.decode().split()
        return connection, name, source

    def ask(self) -> str:
        """One short connection -> who answered."""
        connection, name, _ = self.connect()
        connection.close()
        return name

    def datagrams(self) -> socket.socket:
        """A connected UDP socket to the VIP."""
        with self.client.entered():
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.settimeout(3.0)
        made.connect((UDP_VIP.address, UDP_VIP.port))
        return made

    # --- LB host -----------------------------------------------------------------------------

    def xdp(self, **changes: object) -> Xdp:
        return Xdp(
            **({"interfaces": INTERFACES, "attach": Attach.NATIVE, "snat": Snat(), "limits": Limits()} | changes)
        )  # type: ignore[arg-type]

    def forwarder(self, **changes: object) -> Forwarder:
        """Of a daemon in this process; use it inside ``lb.entered()``."""
        return Forwarder(self.xdp(**changes), self.paths, clock=time.monotonic, routers=frozenset({ROUTER}))

    def daemon(self) -> subprocess.Popen[str]:
        """A daemon of its own that serves both VIPs and prints ``ready``."""
        return subprocess.Popen(
            self.lb.command(sys.executable, "-m", "tests.xdp.daemon", self.paths.model_dump_json()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
