# SPDX-License-Identifier: Apache-2.0
"""One small world for all packet tables: an LB host with two interfaces, its VIPs, nodes, routers.

        client network                    node network
  router  10.0.1.1  ── ifindex CLIENTS │ LB │ ifindex NODES ──  node 1  10.0.2.21  fd00:2::21
  router  10.0.1.2                                              node 2, node 3 likewise

The interfaces are a veth pair in a network namespace that belongs to one thread, in which the test
runs are made: BPF_PROG_TEST_RUN takes a frame's interface from there.
"""

import functools
import itertools
import subprocess
from array import array
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from scapy.layers.inet import IP
from scapy.layers.l2 import Ether

from lbagent.model.service import Protocol, ServiceKey
from lbagent.model.vip import RING_SLOTS, Backend, BackendState, Forward, Mode, Ring, Vip
from lbagent.xdp import bpf, counters, maps, testrun
from lbagent.xdp import compile as compiler
from lbagent.xdp.nexthop import NextHop
from lbagent.xdp.settings import Settings
from lbagent.xdp.verdict import Verdict

EBPF = Path(__file__).resolve().parents[2] / "ebpf"
T = TypeVar("T")
TRACES = ("lb_nat", "lb_flows", "lb_counters", "lb_answers")  # and three LRU maps

CLIENTS, NODES = 2, 3  # interface indexes
LB_CLIENTS, LB_NODES = "02:00:00:00:00:01", "02:00:00:00:00:02"
ROUTER1, ROUTER2 = "02:00:00:00:01:01", "02:00:00:00:01:02"
NODE = {n: f"02:00:00:00:02:{n:02x}" for n in range(1, 8)}
NODE4 = {n: f"10.0.2.{20 + n}" for n in range(1, 8)}
NODE6 = {n: f"fd00:2::{20 + n}" for n in range(1, 8)}

SIZES = maps.Sizes(vips=128, backends=64, rings=32, flows=1024, snat_addresses=4, snat_ports=4096)
SNAT4, SNAT6 = ("10.0.2.11", "10.0.2.12"), ("fd00:2::11", "fd00:2::12")
PORT_FIRST = 20000
SETTINGS = Settings(
    snat_addresses=(*SNAT4, *SNAT6),
    port_first=PORT_FIRST,
    port_count=4096,
    tunnel4="10.0.9.0",
    tunnel4_vary_bits=8,
    tunnel6="fd00:9::",
    tunnel6_vary_bits=16,
)
VIP4, VIP6 = "203.0.113.1", "2001:db8:1::1"
CLIENT4, CLIENT6 = "192.0.2.7", "2001:db8:c::7"


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def hop(destination: str, *, ifindex: int = NODES, vlans: tuple[int, ...] = (), mtu: int = 1500) -> NextHop:
    source = LB_NODES if ifindex == NODES else LB_CLIENTS
    return NextHop(ifindex=ifindex, destination_mac=mac(destination), source_mac=mac(source), mtu=mtu, vlans=vlans)


@functools.cache
def slots_round(*numbers: int) -> "array[int]":
    """Slots that go round these numbers."""
    return array("H", (numbers * (RING_SLOTS // len(numbers) + 1))[:RING_SLOTS])


def ring(fingerprint: int, *backends: Backend) -> Ring:
    """Slots go round the active ones."""
    slots = slots_round(*([i + 1 for i, b in enumerate(backends) if b.state is BackendState.ACTIVE] or [0]))
    return Ring(fingerprint=f"{fingerprint:016x}", backends=backends, slots=slots)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened to a frame. ``packet`` is what left (for a pass: what the kernel got)."""

    verdict: Verdict
    action: str
    packet: bytes


class World:
    """The loaded program and its maps. ``reset`` forgets every flow and count."""

    def __init__(self, sizes: maps.Sizes = SIZES, *, cache: Path | None = None) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=_own_interfaces)
        hz = testrun.kernel_hz()
        self.sizes = sizes
        self.tick_s = (1 << maps.tick_shift(hz)) / hz
        self.maps = {spec.name: bpf.Map.create(spec) for spec in maps.specs(sizes)}
        self.code = compiler.build(EBPF, constants=maps.constants(sizes, hz=hz), maps=list(self.maps), cache=cache)
        self.program = bpf.load_program(self.code.bound({name: m.fd for name, m in self.maps.items()}), name="lb_test")
        self.tables = maps.Tables(self.maps, sizes=sizes, tick_s=self.tick_s, clock=itertools.count(1.0).__next__)
        self.counters = counters.Counters(self.maps, sizes=sizes)
        self.memory = {name: self.maps[name].map_memory() for name in (*TRACES, "lb_config")}
        self.settings = SETTINGS

    def close(self) -> None:
        self._thread.shutdown()

    def reset(self) -> None:
        for name in TRACES:
            self.memory[name][:] = bytes(len(self.memory[name]))
        for name in ("lb_affinity", "lb_fragments", "lb_limits"):
            self.maps[name].delete_all(b"".join(entry[0] for entry in list(self.maps[name].items())))

    def trace(self) -> list[object]:
        """Everything a packet may change."""
        changed: list[object] = [bytes(self.memory[name]) for name in TRACES]
        return changed + [sorted(self.maps[name].items()) for name in ("lb_affinity", "lb_fragments", "lb_limits")]

    def send(self, packet: bytes, ifindex: int = CLIENTS) -> Outcome:
        """As if it had arrived there. The verdict is the one counter that moved."""
        before = self.counters.verdicts()
        action, out = self._thread.submit(testrun.run_on, self.program, packet, ifindex).result()
        after = self.counters.verdicts()
        moved = [verdict for verdict in Verdict if after[verdict] != before[verdict]]
        assert len(moved) == 1, f"one verdict per packet, not {moved}"
        return Outcome(moved[0], action, out)

    def try_out(self, packet: bytes) -> testrun.Trial:
        return self._thread.submit(testrun.trial, self.program, packet).result()

    def on_thread(self, what: Callable[[], T]) -> T:
        return self._thread.submit(what).result()

    def expire(self, seconds: float) -> None:
        """Make every flow that much older, instead of waiting."""
        ticks = int(seconds / self.tick_s) + 1
        with memoryview(self.memory["lb_nat"]).cast("Q") as words:
            for i in range(3, len(words), 4):
                if words[i]:
                    words[i] = (words[i] - (ticks << 32)) & (1 << 64) - 1
        with memoryview(self.memory["lb_flows"]).cast("Q") as words:
            for i in range(len(words)):
                if words[i]:
                    age = ((words[i] >> 16 & 0xFFF) - ticks) & 0xFFF
                    words[i] = words[i] & ~(0xFFF << 16) | age << 16
        for name, at in (("lb_affinity", 0), ("lb_fragments", 32)):
            for key, value in list(self.maps[name].items()):
                seen = int.from_bytes(value[at : at + 4], "little") - ticks
                self.maps[name].update(key, value[:at] + (seen & 0xFFFFFFFF).to_bytes(4, "little") + value[at + 4 :])


def _own_interfaces() -> None:
    """In this thread only: a namespace with two interfaces of known index."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    command = f"ip link add clients index {CLIENTS} type veth peer name nodes index {NODES}"
    subprocess.run(command.split(), check=True)
    for name in ("clients", "nodes"):
        subprocess.run(["ip", "link", "set", name, "up"], check=True)


def populate(world: World) -> None:
    """The VIPs that the tables speak of, on both families; see ``SERVED``."""
    tables = world.tables
    tables.configure(world.settings)
    tables.set_router("0.0.0.0", hop(ROUTER1, ifindex=CLIENTS))
    tables.set_router("::", hop(ROUTER1, ifindex=CLIENTS))
    tables.set_router("10.0.1.1", hop(ROUTER1, ifindex=CLIENTS))
    tables.set_router("10.0.1.2", hop(ROUTER2, ifindex=CLIENTS))
    tables.set_router("10.0.1.3", hop(ROUTER2, ifindex=CLIENTS, vlans=(300,)))
    for n in (1, 2, 3):
        for address in (NODE4[n], NODE6[n]):
            tables.set_hop(address, hop(NODE[n]))
    for address in (NODE4[5], NODE6[5]):
        tables.set_hop(address, hop(NODE[5], vlans=(100,)))
        tables.set_router(address, hop(NODE[5], vlans=(100,)))
    for address in (NODE4[6], NODE6[6]):
        tables.set_hop(address, hop(NODE[6], vlans=(100, 200)))
    for address in (NODE4[7], NODE6[7]):
        tables.set_hop(address, hop(NODE[7], mtu=1400, ifindex=CLIENTS))
    forwards, rings = served()
    failed = tables.program(forwards, rings)
    assert not failed, failed


ONE_NODE, THREE_NODES, NOBODY, NO_WAY, TAGGED, DOUBLE, NARROW, ONE_NODE6 = range(1, 9)


@functools.cache
def served() -> tuple[list[Forward], dict[str, Ring]]:
    """Port -> what it is, for both families and both protocols where the number is even or odd alike."""
    forwards: list[Forward] = []
    rings: dict[str, Ring] = {}
    for address, node in ((VIP4, NODE4), (VIP6, NODE6)):
        family = 6 if ":" in address else 4
        sets = {
            ONE_NODE: (1,),
            THREE_NODES: (1, 2, 3),
            NO_WAY: (4,),
            TAGGED: (5,),
            DOUBLE: (6,),
            NARROW: (7,),
            NOBODY: (),
        }
        mine = {}
        for kind, nodes in sets.items():
            mine[kind] = ring(kind + 16 * family, *(Backend(address=node[n]) for n in nodes))
        mine[ONE_NODE6] = ring(ONE_NODE6 + 16 * family, Backend(address=NODE6[1]))
        rings |= {r.fingerprint: r for r in mine.values()}
        ranges = ("192.0.2.0/24",) if family == 4 else ("2001:db8:c::/48",)
        for protocol in (Protocol.TCP, Protocol.UDP):

            def serve(
                port: int,
                mode: Mode,
                kind: int,
                *,
                ranges: tuple[str, ...] = (),
                affinity_timeout_s: int = 0,
                new_flows_per_s: int = 0,
                protocol: Protocol = protocol,
                address: str = address,
                mine: Mapping[int, Ring] = mine,
            ) -> None:
                forwards.append(
                    Forward(
                        vip=Vip(address=address, protocol=protocol, port=port),
                        service=ServiceKey("", ""),
                        mode=mode,
                        ring=mine[kind].fingerprint,
                        node_port=30000 + port if mode is Mode.NAT else 0,
                        source_ranges=ranges,
                        affinity_timeout_s=affinity_timeout_s,
                        new_flows_per_s=new_flows_per_s,
                    )
                )

            serve(80, Mode.NAT, ONE_NODE)
            serve(81, Mode.DSR_L2, ONE_NODE)
            serve(82, Mode.DSR_IPIP, ONE_NODE)
            serve(83, Mode.DSR_IPIP, ONE_NODE6)
            serve(84, Mode.NAT, ONE_NODE, ranges=ranges)
            serve(85, Mode.DSR_L2, ONE_NODE, ranges=ranges)
            serve(86, Mode.NAT, NOBODY)
            serve(87, Mode.NAT, NO_WAY)
            serve(88, Mode.NAT, TAGGED)
            serve(89, Mode.NAT, DOUBLE)
            serve(90, Mode.NAT, THREE_NODES)
            serve(91, Mode.DSR_L2, THREE_NODES)
            serve(92, Mode.NAT, THREE_NODES, affinity_timeout_s=600)
            serve(93, Mode.DSR_L2, THREE_NODES, affinity_timeout_s=600)
            serve(94, Mode.DSR_IPIP, NARROW)
            serve(95, Mode.DSR_L2, NOBODY)
            serve(96, Mode.DSR_L2, NO_WAY)
            serve(97, Mode.DSR_L2, TAGGED)
            serve(98, Mode.DSR_IPIP, TAGGED)
            serve(99, Mode.NAT, NARROW)
            serve(100, Mode.NAT, ONE_NODE, new_flows_per_s=10)
            serve(101, Mode.DSR_L2, ONE_NODE, new_flows_per_s=10)
    return forwards, rings


def frame(packet: IP, *, source: str = ROUTER1, destination: str = LB_CLIENTS) -> Ether:
    return Ether(src=source, dst=destination) / packet
