# SPDX-License-Identifier: Apache-2.0
"""A short street: client -- LB host -- two nodes, in namespaces of its own, with real servers on the nodes.

client c0 10.0.1.2 --- wan 10.0.1.1 | LB | lan1 10.0.2.1 --- n0 10.0.2.2 node 1
                                         | lan2 10.0.3.1 --- n0 10.0.3.2 node 2
"""

import os
import shutil
import socket
import struct
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
from lbagent.xdp import bpf
from lbagent.xdp.forwarder import Forwarder
from lbagent.xdp.link import interface_index
from tests.lab.netns import Namespace, Port, cable

NODES = ("10.0.2.2", "10.0.3.2")
NODES6 = ("fd00:2::2", "fd00:3::2")
ROUTERS = frozenset({"10.0.1.2", "fd00:1::2"})  # the client itself delivers its packets
INTERFACES = ("wan", "lan1", "lan2")
TCP_VIP = Vip(address="203.0.113.1", protocol=Protocol.TCP, port=80)
UDP_VIP = Vip(address="203.0.113.1", protocol=Protocol.UDP, port=53)
TCP_VIP6 = Vip(address="2001:db8:cafe::1", protocol=Protocol.TCP, port=80)
UDP_VIP6 = Vip(address="2001:db8:cafe::1", protocol=Protocol.UDP, port=53)
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
        Port(self.lb, "wan").up("10.0.1.1/24", "fd00:1::1/64")
        Port(self.client, "c0").up("10.0.1.2/24", "fd00:1::2/64")
        self.client.ip("route add default via 10.0.1.1", "route add default via fd00:1::1")
        Port(self.client, "c0").offload(tx=False)
        for number in (1, 2):
            self.connect_node(number)
            self.serve(number)

    def connect_node(self, number: int) -> None:
        """Cable of a node, new or anew."""
        near, far = Port(self.lb, f"lan{number}"), Port(self.nodes[number - 1], "n0")
        cable(near, far, mtu=self.mtu)
        net = number + 1
        near.up(f"10.0.{net}.1/24", f"fd00:{net}::1/64")
        far.up(f"10.0.{net}.2/24", f"fd00:{net}::2/64")
        far.namespace.ip(f"route add default via 10.0.{net}.1", f"route add default via fd00:{net}::1")
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
            listener = socket.create_server(
                ("::", TCP_NODE_PORT), family=socket.AF_INET6, backlog=256, dualstack_ipv6=True
            )
            datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            datagrams.bind(("::", UDP_NODE_PORT))
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
            threading.Thread(
                target=self._talk, args=(connection, name, source[0].removeprefix("::ffff:")), daemon=True
            ).start()

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

    def connect(self, timeout_s: float = 3.0, *, vip: Vip = TCP_VIP) -> tuple[socket.socket, str, str]:
        """A connection through the VIP -> (socket, who answered, which source it saw)."""
        with self.client.entered():
            connection = socket.socket(_family(vip), socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        try:
            connection.connect((vip.address, vip.port))
            hello = b""
            while not hello.endswith(b"\n"):
                hello += connection.recv(100) or b"?\n"
        except OSError:
            connection.close()
            raise
        name, source = hello.decode().split()
        return connection, name, source

    def ask(self, vip: Vip = TCP_VIP) -> str:
        """One short connection -> who answered."""
        connection, name, _ = self.connect(vip=vip)
        connection.close()
        return name

    def datagrams(self, vip: Vip = UDP_VIP) -> socket.socket:
        """A connected UDP socket to the VIP."""
        with self.client.entered():
            made = socket.socket(_family(vip), socket.SOCK_DGRAM)
        made.settimeout(3.0)
        made.connect((vip.address, vip.port))
        return made

    # --- LB host -----------------------------------------------------------------------------

    def xdp(self, **changes: object) -> Xdp:
        return Xdp(
            **({"interfaces": INTERFACES, "attach": Attach.NATIVE, "snat": Snat(), "limits": Limits()} | changes)
        )  # type: ignore[arg-type]

    def forwarder(self, **changes: object) -> Forwarder:
        """Of a daemon in this process; use it inside ``lb.entered()``."""
        return Forwarder(self.xdp(**changes), self.paths, clock=time.monotonic, routers=ROUTERS)

    def daemon(self, *, vips: int = 4096) -> subprocess.Popen[str]:
        """A daemon of its own that serves both VIPs and prints ``ready``; another limit moves the maps."""
        return subprocess.Popen(
            self.lb.command(sys.executable, "-m", "tests.xdp.daemon", self.paths.model_dump_json(), str(vips)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )


class OneArm(Lane):
    """Everybody on one segment; packets leave the LB host by the interface they came in."""

    interfaces = ("wan",)
    nodes_v4 = ("10.0.1.11", "10.0.1.12")

    def build(self) -> None:
        segment = self.segment = Namespace(f"a2s{self.token}")
        for namespace in (segment, self.client, self.lb, *self.nodes):
            namespace.create()
        segment.ip("link add br0 type bridge", "link set br0 up")
        ends = (
            (Port(self.lb, "wan"), "10.0.1.1"),
            (Port(self.client, "c0"), "10.0.1.2"),
            (Port(self.nodes[0], "n0"), self.nodes_v4[0]),
            (Port(self.nodes[1], "n0"), self.nodes_v4[1]),
        )
        for number, (end, address) in enumerate(ends):
            plug = Port(segment, f"plug{number}")
            cable(end, plug)
            segment.ip(f"link set {plug.device} master br0 up")
            end.up(f"{address}/24")
            if end.device != "wan":
                end.offload(tx=False)
        self._catch_reflected(Port(segment, "plug0"))
        self.client.ip("route add default via 10.0.1.1")
        for number in (1, 2):
            self.serve(number)

    def _catch_reflected(self, peer: Port) -> None:
        """A veth device loses what its peer sends by XDP_TX unless it runs XDP itself: GRO will do for
        XDP_REDIRECT only (measured on 6.18: the sender counts the frame as sent, nobody receives it)."""
        pass_on = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)
        program = bpf.load_program(pass_on, name="pass")
        with peer.namespace.entered():
            bpf.create_link(program, interface_index(peer.device), bpf.Attach.DRIVER)  # ends with this process
        os.close(program)

    def clear(self) -> None:
        super().clear()
        self.segment.delete()


def _family(vip: Vip) -> socket.AddressFamily:
    return socket.AF_INET6 if vip.family == 6 else socket.AF_INET
