# SPDX-License-Identifier: Apache-2.0
"""ns/packet of the loaded data path: ``python -m bench.xdp.bench`` as root, from the checkout.

All cases run once per round, rounds are interleaved, medians are printed net of the driver (see
driver.c) next to the floor of the same run. Time is thread CPU time. The packet is hot in L1 and no
NIC is involved: these are program costs.
"""

import argparse
import ctypes
import json
import os
import statistics
import struct
import subprocess
import tempfile
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lbagent.model.service import Protocol, ServiceKey
from lbagent.model.vip import RING_SLOTS, Backend, Forward, Mode, Ring, Vip
from lbagent.xdp import bpf, maps, testrun
from lbagent.xdp import compile as compiler
from lbagent.xdp.nexthop import NextHop
from lbagent.xdp.settings import Settings

HERE = Path(__file__).resolve().parent
EBPF = HERE.parents[1] / "ebpf"
CLIENTS, NODES = 2, 3
CACHE = Path(tempfile.gettempdir()) / "lbagent-bench-cache"
BACKENDS = 100
ORDER = struct.Struct("<80s IIIIII 8x")
TX, PASS = 3, 2
PORTS = ((80, Mode.NAT), (81, Mode.DSR_L2), (82, Mode.DSR_IPIP))
FLOWS = {"1 flow": 0, "10k flows": 10_000, "500k flows": 500_000}
NEW = -1
MUST = {
    "not a VIP": 16,
    "dsr-l2 hit, 1 flow": 36,
    "dsr-l2 hit, 10k flows": 48,
    "dsr-l2 hit, 500k flows": 135,
    "dsr-ipip hit, 1 flow": 48,
    "dsr-ipip hit, 10k flows": 60,
    "dsr-ipip hit, 500k flows": 145,
    "dsr-l2 new flow": 140,
    "nat hit, 1 flow": 48,
    "nat hit, 10k flows": 85,
    "nat hit, 500k flows": 250,
    "nat reply": 32,
    "nat new connection": 290,
}


@dataclass
class Case:
    """One packet through one program. ``flows`` 0: one flow; -1: every packet is a new one."""

    name: str
    program: int
    packet: bytes
    flows: int = 0
    want: int = TX
    varied_at: int = 26
    samples: list[float] = field(default_factory=list)


class Bench:
    """The loaded program with 100 nodes, one Vip per mode, protocol and family."""

    def __init__(self, defines: dict[str, int], hz: int) -> None:
        self.sizes = maps.Sizes(snat_addresses=32)
        self.maps = {spec.name: bpf.Map.create(spec) for spec in maps.specs(self.sizes)}
        code = compiler.build(
            EBPF,
            constants={**maps.constants(self.sizes, hz=hz), **defines},
            maps=list(self.maps),
            cache=CACHE,
        )
        self.instructions = len(code.instructions) // 8
        self.program = bpf.load_program(code.bound({n: m.fd for n, m in self.maps.items()}), name="lb_bench")
        tick_s = (1 << maps.tick_shift(hz)) / hz
        self.tables = maps.Tables(self.maps, sizes=self.sizes, tick_s=tick_s, clock=time.monotonic)
        self.tables.configure(
            Settings(
                snat_addresses=tuple(f"10.9.0.{i}" for i in range(1, 17)) + tuple(f"fd00:9::{i}" for i in range(1, 17)),
                tunnel4="10.8.0.0",
                tunnel4_vary_bits=16,
                tunnel6="fd00:8::",
                tunnel6_vary_bits=16,
            )
        )
        hop = NextHop(ifindex=CLIENTS, destination_mac=bytes(6), source_mac=bytes(6), mtu=1500)
        for router in ("0.0.0.0", "::"):
            self.tables.set_router(router, hop)
        rings, forwards = {}, []
        for family, vip in ((4, "10.200.1.1"), (6, "fc00:1::1")):
            nodes = [f"10.0.1.{i + 1}" if family == 4 else f"fc00:2::{i + 1}" for i in range(BACKENDS)]
            for node in nodes:
                self.tables.set_hop(node, hop)
            slots = array("H", [1 + (i * 2654435761 >> 8) % BACKENDS for i in range(RING_SLOTS)])
            ring = Ring(fingerprint=f"{family:016x}", backends=tuple(Backend(address=n) for n in nodes), slots=slots)
            rings[ring.fingerprint] = ring
            forwards += [
                Forward(
                    vip=Vip(address=vip, protocol=protocol, port=port),
                    service=ServiceKey("", ""),
                    mode=mode,
                    ring=ring.fingerprint,
                    node_port=30080,
                )
                for port, mode in PORTS
                for protocol in (Protocol.TCP, Protocol.UDP)
            ]
        failed = self.tables.program(forwards, rings)
        if failed:
            raise SystemExit(str(failed))


def own_interfaces() -> None:
    """A namespace of this thread with the interfaces that the test packets arrive on."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):
        raise SystemExit("needs root")
    command = f"ip link add clients index {CLIENTS} type veth peer name nodes index {NODES}"
    subprocess.run(command.split(), check=True)
    for name in ("clients", "nodes"):
        subprocess.run(["ip", "link", "set", name, "up"], check=True)


def packet(family: int, protocol: Protocol, port: int, *, flags: int = 0x10, vip: str | None = None) -> bytes:
    address = vip or ("10.200.1.1" if family == 4 else "fc00:1::1")
    frame = testrun.packet_to(
        Vip(address=address, protocol=protocol, port=port),
        source="192.168.7.7" if family == 4 else "fc00:3::1",
        source_port=31337,
        flags=flags,
    )
    return frame.ljust(64 if family == 4 else 80, b"\0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-r", "--rounds", type=int, default=9)
    parser.add_argument("-n", "--repeat", type=int, default=1_000_000)
    parser.add_argument("-f", "--only", default="", help="cases whose name holds this")
    parser.add_argument("-c", "--cpu", type=int, default=os.cpu_count() - 1)
    parser.add_argument("-D", "--define", action="append", default=[], help="NAME=VALUE for ebpf/lb.c")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    thread = ThreadPoolExecutor(1, initializer=own_interfaces)
    thread.submit(run, arguments).result()


class Driver:
    """driver.c, loaded: gives a program its packets, each put back first."""

    def __init__(self) -> None:
        array_map = bpf.MapSpec(
            name="bench_order",
            type=bpf.MapType.ARRAY,
            key_bytes=4,
            value_bytes=ORDER.size,
            entries=1,
            flags=bpf.MapFlag.MMAPABLE,
        )
        programs = bpf.MapSpec(name="bench_jump", type=bpf.MapType.PROG_ARRAY, key_bytes=4, value_bytes=4, entries=1)
        self._maps = {spec.name: bpf.Map.create(spec) for spec in (array_map, programs)}
        self._order = self._maps["bench_order"].map_memory()
        self.programs = {name: self._load(name) for name in ("drive", "stub", "grow20", "grow40")}
        self._fresh = 0x1000000

    def _load(self, name: str) -> int:
        code = compiler.build(HERE, main="driver.c", function=name, constants={}, maps=list(self._maps), cache=CACHE)
        return bpf.load_program(code.bound({n: m.fd for n, m in self._maps.items()}), name=name)

    def arm(self, case: Case, packet: bytes, repeat: int) -> None:
        """The next runs are of this case, each new flow newer than all before."""
        salt = 0
        if case.flows == NEW:
            self._fresh += repeat + 50_000
            salt = self._fresh
        flows = 0xFFFFFFFF if case.flows == NEW else case.flows
        head = packet[:80].ljust(80, b"\0")
        self._maps["bench_jump"].update(bytes(4), struct.pack("<I", case.program))
        self._order[: ORDER.size] = ORDER.pack(head, len(packet), flows, case.varied_at, 0, salt, 0)

    def run(self, case: Case, repeat: int) -> float:
        """-> ns per packet."""
        ns, _, action = shoot(self.programs["drive"], case.packet, repeat)
        lost = ORDER.unpack_from(self._order)[6]
        if action != case.want or lost:
            raise SystemExit(f"{case.name}: action {action}, wanted {case.want}; {lost} lost")
        return ns

    def warm(self, case: Case) -> None:
        """Make the flows; those of mode nat begin with a SYN."""
        opening = bytearray(case.packet)
        if case.name.startswith("nat hit"):
            opening[(34 if case.varied_at == 26 else 54) + 13] = 2
        self.arm(case, bytes(opening), 0)
        self.run(case, max(1000, case.flows))


def floor_cases(driver: Driver) -> list[Case]:
    four, six = packet(4, Protocol.TCP, 80), packet(6, Protocol.TCP, 80)
    stub = driver.programs["stub"]
    return [
        Case("driver", stub, four),
        Case("driver, 500k flows", stub, four, flows=500_000),
        Case("driver IPv6", stub, six, varied_at=34),
        Case("driver IPv6, 500k flows", stub, six, flows=500_000, varied_at=34),
        Case("grow 20", driver.programs["grow20"], four),
        Case("grow 40", driver.programs["grow40"], six),
    ]


def family_cases(family: int, hit: int, new: int) -> list[Case]:
    """``new``: another instance, so that its flood of flows leaves the hits alone."""
    suffix, at, stranger = ("", 26, "10.200.9.9") if family == 4 else (" IPv6", 34, "fc00:9::1")

    def case(name: str, program: int, frame: bytes, flows: int = 0, want: int = TX) -> Case:
        return Case(name + suffix, program, frame, flows, want, at)

    cases = [case("not a VIP", hit, packet(family, Protocol.TCP, 80, vip=stranger), want=PASS)]
    for port, mode in reversed(PORTS):
        frame = packet(family, Protocol.TCP, port)
        cases += [case(f"{mode} hit, {label}", hit, frame, flows) for label, flows in FLOWS.items()]
        cases.append(case(f"{mode} UDP hit, 1 flow", hit, packet(family, Protocol.UDP, port)))
    cases.append(case("dsr-l2 new flow", new, packet(family, Protocol.TCP, 81), NEW))
    syn = packet(family, Protocol.TCP, 80, flags=2)
    cases.append(case("nat new connection", new, syn, NEW))
    cases.append(case("nat reply", hit, answer(shoot(hit, syn, 1)[1], family)))
    return cases


def run(arguments: argparse.Namespace) -> None:
    os.sched_setaffinity(0, {arguments.cpu})
    hz = testrun.kernel_hz()
    driver = Driver()
    defines = {k: int(v) for k, _, v in (d.partition("=") for d in arguments.define)}
    hit, new = Bench(defines, hz), Bench(defines, hz)
    print(f"# {hit.instructions} instructions, HZ {hz}, {os.uname().release}, load {os.getloadavg()[0]:.1f}")
    cases = floor_cases(driver)
    for family in (4, 6):
        cases += [c for c in family_cases(family, hit.program, new.program) if arguments.only in c.name]
    for case in cases:
        driver.warm(case)
    for _ in range(arguments.rounds):
        for case in cases:
            driver.arm(case, case.packet, arguments.repeat)
            driver.run(case, case.flows if case.flows > 1 else 20_000)  # touch the working set once
            case.samples.append(driver.run(case, arguments.repeat))
    report(cases, arguments)


def shoot(program: int, frame: bytes, repeat: int) -> tuple[float, bytes, int]:
    """-> (ns per run, the packet afterwards, the action)."""
    context = struct.pack("<6I", 0, len(frame), 0, CLIENTS, 0, 0)
    start = time.thread_time_ns()
    run = bpf.run_packet(program, frame, context=context, repeat=repeat)
    return (time.thread_time_ns() - start) / repeat, run.packet, run.verdict


def answer(packet: bytes, family: int) -> bytes:
    """What the backend sends back."""
    size, at = (4, 26) if family == 4 else (16, 22)
    ports = at + 2 * size
    turned = bytearray(packet)
    turned[at : at + size], turned[at + size : ports] = packet[at + size : ports], packet[at : at + size]
    turned[ports : ports + 2], turned[ports + 2 : ports + 4] = packet[ports + 2 : ports + 4], packet[ports : ports + 2]
    turned[ports + 13] = 0x10
    return bytes(turned)


def report(cases: list[Case], arguments: argparse.Namespace) -> None:
    median = {c.name: statistics.median(c.samples) for c in cases}
    figures = {}
    print(f"{'case':34} {'net':>7} {'must':>5} {'raw min':>8} {'max':>7}")
    for case in cases:
        driver = "driver IPv6" if case.varied_at == 34 or "IPv6" in case.name else "driver"
        if case.flows:
            driver += ", 500k flows"
        is_floor = case.name.startswith(("driver", "grow"))
        net = median[case.name] - (0 if is_floor else median[driver])
        figures[case.name] = round(net, 1)
        must = MUST.get(case.name.removesuffix(" IPv6"), "")
        mark = " <" if must and net > must * (1.2 if "IPv6" in case.name else 1) else ""
        print(f"{case.name:34} {net:7.1f} {must!s:>5} {min(case.samples):8.1f} {max(case.samples):7.1f}{mark}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": os.uname().release, "net_ns": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
