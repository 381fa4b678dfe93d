# SPDX-License-Identifier: Apache-2.0
"""How long changes of the kernel's maps take: ``python -m bench.xdp.tables`` as root, from the checkout."""

import random
import statistics
import time
from array import array
from collections.abc import Callable

from lbagent.model.service import Protocol, ServiceKey
from lbagent.model.vip import RING_SLOTS, Backend, Forward, Mode, Ring, Vip
from lbagent.xdp import maps
from lbagent.xdp.bpf import Map
from lbagent.xdp.counters import Counters
from lbagent.xdp.settings import Settings

ROUNDS = 7
VIPS, NODES = 10_000, 1_000


def ring(number: int) -> Ring:
    backends = tuple(Backend(address=f"10.0.{n >> 8}.{n & 255}") for n in range(NODES))
    slots = array("H", [1 + random.randrange(NODES) for _ in range(RING_SLOTS)])
    return Ring(fingerprint=f"{number:016x}", backends=backends, slots=slots)


def forward(number: int, to: Ring) -> Forward:
    vip = Vip(address=f"192.0.{number >> 11}.{number >> 3 & 255}", protocol=Protocol.TCP, port=1 + (number & 7))
    return Forward(vip=vip, service=ServiceKey("", ""), mode=Mode.NAT, ring=to.fingerprint, node_port=30000)


def timed(what: str, act: Callable[[int], object]) -> None:
    """Median of some rounds, in ms."""
    samples = []
    for turn in range(ROUNDS):
        start = time.perf_counter()
        act(turn)
        samples.append((time.perf_counter() - start) * 1e3)
        time.sleep(0.2)  # so that ids are rested
    print(f"| {what} | {statistics.median(samples):.2f} | {min(samples):.2f} |")


def main() -> None:
    sizes = maps.Sizes(vips=VIPS + 100, backends=NODES + 100)
    held = {spec.name: Map.create(spec) for spec in maps.specs(sizes)}
    tables = maps.Tables(held, sizes=sizes, tick_s=1.024, clock=time.monotonic)
    tables.configure(Settings(snat_addresses=("10.9.0.1",)))
    counters = Counters(held, sizes=sizes)
    rings = [ring(n) for n in range(1, 2 * ROUNDS + 2)]
    given = {r.fingerprint: r for r in rings}
    wanted = [forward(n, rings[0]) for n in range(VIPS)]
    print("| what | median ms | best |\n|---|---|---|")

    def program(_: int) -> None:
        if tables.program(wanted, given):
            raise SystemExit("not all programmed")

    timed(f"{VIPS:,} VIPs programmed (the first time with their ring)", program)
    timed(f"{VIPS:,} VIPs read back", lambda _: tables.read())
    one = [wanted[0]]
    timed(
        f"one VIP to a new ring of {RING_SLOTS:,} slots over {NODES:,} backends, written aside and flipped",
        lambda turn: tables.program([forward(0, rings[1 + turn])], given),
    )
    timed("one VIP out and in again", lambda _: (tables.unprogram([one[0].vip]), tables.program(one, given)))
    timed("all verdict counters", lambda _: counters.verdicts())
    timed(f"counters of {VIPS:,} VIPs", lambda _: counters.vips(range(1, VIPS + 1)))
    timed("flows by backend, a table of 1 M", lambda _: counters.dsr_flows())


if __name__ == "__main__":
    main()
