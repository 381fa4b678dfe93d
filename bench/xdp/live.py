# SPDX-License-Identifier: Apache-2.0
"""Packets per second through an LB host: ``python -m bench.xdp.live`` as root, from the checkout.

    source ── veth ── LB host ── veth ── sink         everything on one core

The source is BPF_PROG_TEST_RUN with live frames, the sink an XDP program that counts and drops. On
the LB host either our data path, or nftables as kube-proxy writes it: verdict map by address and
port, a random one of 50 endpoints, DNAT, masquerade. Rounds are interleaved; best and median.
"""

import argparse
import ctypes
import os
import socket
import statistics
import struct
import subprocess
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from bench.xdp.bench import CACHE, HERE, ORDER
from lbagent.model.service import Protocol, ServiceKey
from lbagent.model.vip import RING_SLOTS, Backend, Forward, Mode, Ring, Vip
from lbagent.xdp import bpf, maps, testrun
from lbagent.xdp import compile as compiler
from lbagent.xdp.nexthop import NextHop
from lbagent.xdp.settings import Settings

EBPF = HERE.parents[1] / "ebpf"
ENDPOINTS = 50
VIP = "10.200.1.1"
CLIENT_SIDE, NODE_SIDE = "02:00:00:00:0a:01", "02:00:00:00:0a:02"
SOURCE, SINK = "02:00:00:00:0a:03", "02:00:00:00:0a:04"
T = TypeVar("T")


class Place:
    """A network namespace with a thread inside it."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        self.name = f"a1live{os.getpid() % 10000}{name}"
        sh(f"ip netns add {self.name}")
        stack.callback(sh, f"ip netns del {self.name}")
        self._thread = ThreadPoolExecutor(1, initializer=self._enter)
        stack.callback(self._thread.shutdown)

    def _enter(self) -> None:
        with open(f"/run/netns/{self.name}", encoding="ascii") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
                raise SystemExit("needs root")

    def do(self, what: Callable[[], T]) -> T:
        return self._thread.submit(what).result()

    def sh(self, *lines: str) -> None:
        for line in lines:
            sh(f"nsenter --net=/run/netns/{self.name} {line}")

    def ifindex(self, name: str) -> int:
        return self.do(lambda: socket.if_nametoindex(name))


def sh(line: str) -> None:
    subprocess.run(line.split(), check=True)


def load(name: str, order: bpf.Map) -> int:
    names = ["bench_order", "bench_jump"]
    code = compiler.build(HERE, main="driver.c", function=name, constants={}, maps=names, cache=CACHE)
    return bpf.load_program(code.bound({"bench_order": order.fd, "bench_jump": -1}), name=name)


def order_map() -> bpf.Map:
    spec = bpf.MapSpec(
        name="bench_order",
        type=bpf.MapType.ARRAY,
        key_bytes=4,
        value_bytes=ORDER.size,
        entries=1,
        flags=bpf.MapFlag.MMAPABLE,
    )
    return bpf.Map.create(spec)


def nodes() -> list[str]:
    return [f"10.2.0.{i + 2}" for i in range(ENDPOINTS)]


def our_data_path(mode: Mode, ifindex_nodes: int, ifindex_clients: int) -> tuple[int, maps.Tables]:
    hz = testrun.kernel_hz()
    sizes = maps.Sizes(snat_addresses=16)
    held = {spec.name: bpf.Map.create(spec) for spec in maps.specs(sizes)}
    code = compiler.build(EBPF, constants=maps.constants(sizes, hz=hz), maps=list(held), cache=CACHE)
    program = bpf.load_program(code.bound({n: m.fd for n, m in held.items()}), name="lb_live")
    tables = maps.Tables(held, sizes=sizes, tick_s=2 ** maps.tick_shift(hz) / hz, clock=time.monotonic)
    snats = tuple(f"10.2.9.{i + 1}" for i in range(16))
    tables.configure(Settings(snat_addresses=snats, tunnel4="10.2.8.0", tunnel4_vary_bits=8))
    way = NextHop(ifindex=ifindex_nodes, destination_mac=mac(SINK), source_mac=mac(NODE_SIDE), mtu=1500)
    for node in nodes():
        tables.set_hop(node, way)
    back = NextHop(ifindex=ifindex_clients, destination_mac=mac(SOURCE), source_mac=mac(CLIENT_SIDE), mtu=1500)
    tables.set_router("0.0.0.0", back)
    slots = array("H", [1 + i % ENDPOINTS for i in range(RING_SLOTS)])
    ring = Ring(fingerprint="0" * 15 + "1", backends=tuple(Backend(address=n) for n in nodes()), slots=slots)
    vip = Vip(address=VIP, protocol=Protocol.UDP, port=80)
    wanted = Forward(vip=vip, service=ServiceKey("", ""), mode=mode, ring=ring.fingerprint, node_port=30080)
    if tables.program([wanted], {ring.fingerprint: ring}):
        raise SystemExit("not programmed")
    return program, tables


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def nftables() -> str:
    endpoints = ", ".join(f"{i} : goto e{i}" for i in range(ENDPOINTS))
    chains = "\n".join(
        f"  chain e{i} {{\n    meta l4proto udp dnat to {node}:30080\n  }}" for i, node in enumerate(nodes())
    )
    return f"""table ip proxy {{
{chains}
  chain service {{
    meta mark set meta mark or 0x4000
    numgen random mod {ENDPOINTS} vmap {{ {endpoints} }}
  }}
  map services {{
    type ipv4_addr . inet_proto . inet_service : verdict
    elements = {{ {VIP} . udp . 80 : goto service }}
  }}
  chain pre {{
    type nat hook prerouting priority dstnat;
    ip daddr . meta l4proto . th dport vmap @services
  }}
  chain post {{
    type nat hook postrouting priority srcnat;
    meta mark and 0x4000 != 0 masquerade
  }}
}}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-n", "--packets", type=int, default=3_000_000)
    parser.add_argument("-c", "--cpu", type=int, default=(os.cpu_count() or 1) - 1)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {arguments.cpu})
    with ExitStack() as stack:
        measure(arguments, stack)


def measure(arguments: argparse.Namespace, stack: ExitStack) -> None:
    source, lb, sink = (Place(name, stack) for name in ("g", "lb", "s"))
    for a, b, here, there, mine, theirs in (
        (source, lb, "g0", "c0", SOURCE, CLIENT_SIDE),
        (lb, sink, "n0", "s0", NODE_SIDE, SINK),
    ):
        peer = f"peer name {there} netns {b.name} address {theirs}"
        sh(f"ip link add {here} netns {a.name} address {mine} type veth {peer}")
        a.sh(f"ip link set {here} up", f"ethtool -K {here} gro on")
        b.sh(f"ip link set {there} up", f"ethtool -K {there} gro on")
    lb.sh("ip addr add 10.1.0.1/16 dev c0", "ip addr add 10.2.0.1/16 dev n0", "sysctl -qw net.ipv4.ip_forward=1")
    lb.sh(*(f"ip neigh add {node} lladdr {SINK} dev n0 nud permanent" for node in nodes()))
    counted, template = order_map(), order_map()
    sinking, sending = load("sink", counted), load("generate", template)
    attach(sink, sinking, "s0", stack)
    out = source.ifindex("g0")
    with counted.map_memory() as seen, template.map_memory() as order:

        def shoot(flows: int, packets: int) -> float:
            """-> million packets per second that reached the sink."""
            frame = testrun.packet_to(
                Vip(address=VIP, protocol=Protocol.UDP, port=80), source="10.1.1.0", source_port=1024
            )
            frame = bytearray(frame.ljust(64, b"\0"))
            frame[:12] = mac(CLIENT_SIDE) + mac(SOURCE)
            frame[40:42] = b"\0\0"
            order[: ORDER.size] = ORDER.pack(bytes(frame).ljust(80, b"\0"), 64, flows, 0, 0, out, 0)
            before = struct.unpack_from("<Q", seen)[0]
            context = struct.pack("<6I", 0, 64, 0, out, 0, 0)
            start = time.perf_counter()
            source.do(
                lambda: bpf.run_packet(
                    sending, bytes(frame), context=context, repeat=packets, flags=bpf.RunFlag.LIVE_FRAMES, batch=64
                )
            )
            return (struct.unpack_from("<Q", seen)[0] - before) / (time.perf_counter() - start) / 1e6

        paths: dict[str, Callable[[], ExitStack]] = {
            "nftables DNAT + masquerade": lambda: with_nftables(lb),
            "lbagent, nat": lambda: with_us(lb, Mode.NAT),
            "lbagent, dsr-l2": lambda: with_us(lb, Mode.DSR_L2),
            "lbagent, dsr-ipip": lambda: with_us(lb, Mode.DSR_IPIP),
        }
        samples: dict[tuple[str, int], list[float]] = {}
        for _ in range(arguments.rounds):
            for name, begin in paths.items():
                for flows in (1_000, 100_000):
                    with begin():
                        shoot(flows, max(2 * flows, 200_000))
                        samples.setdefault((name, flows), []).append(shoot(flows, arguments.packets))
    print(
        f"Linux {os.uname().release}, load {os.getloadavg()[0]:.1f}, {arguments.packets:,} packets x {arguments.rounds}"
    )
    print("| path | flows | Mpps, best | median | times nftables |\n|---|---|---|---|---|")
    for (name, flows), values in samples.items():
        base = statistics.median(samples["nftables DNAT + masquerade", flows])
        median = statistics.median(values)
        print(f"| {name} | {flows:,} | {max(values):.2f} | {median:.2f} | {median / base:.1f} |")


def attach(place: Place, program: int, interface: str, stack: ExitStack) -> None:
    link = place.do(lambda: bpf.create_link(program, socket.if_nametoindex(interface), bpf.Attach.DRIVER))
    stack.callback(os.close, link)


def with_us(lb: Place, mode: Mode) -> ExitStack:
    stack = ExitStack()
    program, tables = our_data_path(mode, lb.ifindex("n0"), lb.ifindex("c0"))
    stack.callback(tables.close)
    stack.callback(os.close, program)
    for interface in ("c0", "n0"):
        attach(lb, program, interface, stack)
    return stack


def with_nftables(lb: Place) -> ExitStack:
    stack = ExitStack()
    subprocess.run(["nsenter", f"--net=/run/netns/{lb.name}", "nft", "-f", "-"], input=nftables().encode(), check=True)
    stack.callback(lb.sh, "nft delete table ip proxy")
    return stack


if __name__ == "__main__":
    main()
