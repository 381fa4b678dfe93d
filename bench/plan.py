# SPDX-License-Identifier: Apache-2.0
"""How long the plan takes for a large cluster: 10,000 Services, 1,000 nodes, 30,000 endpoints.

Prints the table of docs/benchmarks.md, section "Plan". Times are CPU time of this process, so that
other work on the machine is not counted. ``python -m bench.plan [--services N] [--nodes N] [--json]``.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lbagent.model.pool import AddressRange, Pool
from lbagent.model.service import (
    Condition,
    Endpoint,
    Ingress,
    IpMode,
    Node,
    NodeAddress,
    Port,
    Protocol,
    Service,
    ServiceKey,
    TrafficPolicy,
)
from lbagent.model.state import Observed, ProbeTarget, Pulse, Settings, Snapshot
from lbagent.model.vip import RING_SLOTS, Backend, BackendState, Ring
from lbagent.plan.desire import Memory, desire
from lbagent.plan.ring import _slots, ring
from lbagent.plan.steps import steps

RUNS = 15
LOCAL_EVERY = 200
"""Every 200th Service is of policy Local and so has a ring of its own; all others share one."""


def cluster(services: int, nodes: int, *, written: bool) -> Snapshot:
    """A cluster whose Services have three endpoints each; ``written``: every status holds its address."""
    pool = Pool(name="default", ranges=(AddressRange(4, 0xC6120000, 0xC613FFFF),))  # 198.18.0.0/15
    all_nodes = {
        f"node{n}": Node(
            name=f"node{n}",
            addresses=(NodeAddress("InternalIP", f"10.{n >> 8}.{n & 255}.1"), NodeAddress("Hostname", f"node{n}")),
            labels={"kubernetes.io/hostname": f"node{n}"},
        )
        for n in range(nodes)
    }
    all_services: dict[ServiceKey, Service] = {}
    endpoints: dict[ServiceKey, tuple[Endpoint, ...]] = {}
    for n in range(services):
        key = ServiceKey(f"team{n % 50}", f"service{n}")
        address = f"198.{18 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"
        all_services[key] = Service(
            key=key,
            uid=str(n),
            created=float(n),
            ports=(Port(name="http", protocol=Protocol.TCP, port=80, node_port=30_000 + n % 2_768),),
            external_traffic_policy=TrafficPolicy.CLUSTER if n % LOCAL_EVERY else TrafficPolicy.LOCAL,
            health_check_node_port=0 if n % LOCAL_EVERY else 31_000,
            ingress=(Ingress(ip=address, ip_mode=IpMode.PROXY),) if written else (),
            conditions=(Condition(type="lbagent.io/Satisfied", status="True", reason="satisfied"),) if written else (),
        )
        endpoints[key] = tuple(
            Endpoint(address=f"10.2{i}.{n >> 8}.{n & 255}", node=f"node{(n * 7 + i * 13) % nodes}") for i in range(3)
        )
    return Snapshot(
        now=1_000.0,
        wall=1.8e9,
        listed=True,
        is_leader=True,
        settings=Settings(pools=(pool,)),
        services=all_services,
        endpoints=endpoints,
        nodes=all_nodes,
    )


def median_ms(work: Callable[[], Any], *, runs: int = RUNS, prepare: Callable[[], Any] = lambda: None) -> float:
    """Median of several runs, the preparation not counted."""
    spent = []
    for _ in range(runs):
        prepare()
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
    return statistics.median(spent) * 1e3


def reread(snapshot: Snapshot, **changes: Any) -> Snapshot:
    """The next Snapshot as agent/world makes it: fresh mappings of the same objects."""
    return replace(
        snapshot,
        services=dict(snapshot.services),
        endpoints=dict(snapshot.endpoints),
        nodes=dict(snapshot.nodes),
        **changes,
    )


RING_CASES: tuple[tuple[int, str, Callable[[int], int]], ...] = (
    (10, "equal", lambda n: 1),
    (100, "equal", lambda n: 1),
    (100, "1 to 4", lambda n: n % 4 + 1),
    (1_000, "equal", lambda n: 1),
    (1_000, "1 to 4", lambda n: n % 4 + 1),
    (1_000, "one of 100, others 1", lambda n: 1 if n else 100),
)


def ring_figures(count: int, weight: Callable[[int], int]) -> tuple[float, float, float, float, float, int, float]:
    """Build (ms), with one down (ms), most / fair, least / fair, most / fair with one down, moved, moved by a leave."""

    def fleet(down: int | None = None) -> list[Backend]:
        states = {down: BackendState.DOWN}
        return [
            Backend(address=f"10.{n >> 8}.{n & 255}.1", weight=weight(n), state=states.get(n, BackendState.ACTIVE))
            for n in range(count)
        ]

    def shares(found: Ring) -> list[float]:
        slots = Counter(found.slots)
        total = sum(b.weight for b in found.backends if b.state is BackendState.ACTIVE)
        return [
            slots[number] * total / (RING_SLOTS * b.weight)
            for number, b in enumerate(found.backends, start=1)
            if b.state is BackendState.ACTIVE
        ]

    def owners(found: Ring) -> list[str]:
        names = ["", *(b.address for b in found.backends)]
        return [names[number] for number in found.slots]

    gone = 2
    build = median_ms(lambda: ring(fleet()), runs=5, prepare=_slots.cache_clear)
    rebuild = median_ms(lambda: ring(fleet(gone)), runs=5, prepare=_slots.cache_clear)
    whole, down, left = ring(fleet()), ring(fleet(gone)), ring([b for n, b in enumerate(fleet()) if n != gone])
    name = fleet()[gone].address
    moved = [
        sum(a != b != "" and a != name for a, b in zip(owners(whole), owners(r), strict=True)) for r in (down, left)
    ]
    even = shares(whole)
    return build, rebuild, max(even), min(even), max(shares(down)), moved[0], moved[1] / RING_SLOTS


def print_rings() -> None:
    """The table of rings."""
    heads = ("backends", "weights", "build, ms", "with one down, ms", "most / fair", "least / fair")
    heads += ("most / fair with one down", "others' slots moved when one is down", "when one leaves")
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for count, words, weight in RING_CASES:
        build, rebuild, most, least, most_down, moved, left = ring_figures(count, weight)
        print(f"| {count:,} | {words} | {build:.0f} | {rebuild:.0f} |", end="")
        print(f" {most:.3f} | {least:.3f} | {most_down:.3f} | {moved} | {left:.2%} |")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--services", type=int, default=10_000)
    arguments.add_argument("--nodes", type=int, default=1_000)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--rings", action="store_true", help="only the table of rings")
    given = arguments.parse_args()
    if given.rings:
        print_rings()
        return
    figures: dict[str, float] = {}

    fresh = cluster(given.services, given.nodes, written=False)

    def from_scratch() -> None:
        _slots.cache_clear()
        desired = desire(fresh)
        sum(1 for _ in steps(Observed(), desired, fresh))

    figures["assign every address, from scratch"] = median_ms(from_scratch, runs=3)

    snapshot = cluster(given.services, given.nodes, written=True)

    def restart() -> None:
        _slots.cache_clear()
        desired = desire(snapshot)
        sum(1 for _ in steps(Observed(), desired, snapshot))

    figures["plan and all steps, rings included, from scratch"] = median_ms(restart, runs=3)
    figures["plan only, from scratch"] = median_ms(lambda: desire(snapshot), runs=5)

    memory = Memory()
    desired = desire(snapshot, memory)
    # Read back from the kernel: equal, never the same objects.
    held = {replace(vip): replace(forward) for vip, forward in desired.forwards.items()}
    observed = Observed(
        forwards=held,
        rings=frozenset(desired.rings),
        proven=frozenset(held),
        routes=frozenset(replace(route) for route in desired.routes),
    )

    def again(name: str, changes: Callable[[int], dict[str, Any]], expected: int | None = None) -> None:
        count = 0
        spent_desire, spent_steps = [], []
        for run in range(RUNS):
            later = reread(snapshot)
            for field, value in changes(run).items():
                later = replace(later, **{field: value})
            started = time.process_time()
            now = desire(later, memory)
            middle = time.process_time()
            count = sum(1 for step in steps(observed, now, later) if type(step).__name__ != "Report")
            spent_desire.append(middle - started)
            spent_steps.append(time.process_time() - middle)
            desire(reread(snapshot), memory)
        figures[f"{name}: desire"] = statistics.median(spent_desire) * 1e3
        figures[f"{name}: steps"] = statistics.median(spent_steps) * 1e3
        assert expected is None or count == expected, (name, count)

    some = list(snapshot.services)[777]
    again("nothing changed", lambda run: {}, 0)
    again(
        "one Service changed",
        lambda run: {
            "services": {**snapshot.services, some: replace(snapshot.services[some], affinity_timeout_s=60 + run)}
        },
        1,
    )
    again("one Service deleted", lambda run: {"services": {k: s for k, s in snapshot.services.items() if k != some}}, 1)
    new = ServiceKey("team1", "new")
    again(
        "one Service created",
        lambda run: {"services": {**snapshot.services, new: replace(snapshot.services[some], key=new, ingress=())}},
        1,
    )
    again(
        "one endpoint changed",
        lambda run: {"endpoints": {**snapshot.endpoints, some: (*snapshot.endpoints[some][:2],)}},
        0,
    )
    health = {
        ProbeTarget(node.addresses[0].address, "proxy", 10_256): Pulse(up=True, since=0.0)
        for node in snapshot.nodes.values()
    }
    again("a thousand probes say up", lambda run: {"health": health})
    again(
        "one node tainted (every Service changes)",
        lambda run: {
            "nodes": {
                **snapshot.nodes,
                f"node{run}": replace(snapshot.nodes[f"node{run}"], taints=("ToBeDeletedByClusterAutoscaler",)),
            }
        },
    )
    backends = next(iter(desired.rings.values())).backends
    figures[f"one ring of {len(backends)} backends"] = median_ms(lambda: ring(backends), prepare=_slots.cache_clear)
    figures["largest resident set of this process, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    if given.json:
        json.dump(figures, sys.stdout, indent=1)
        return
    print(f"{given.services} Services, {given.nodes} nodes, {3 * given.services} endpoints;", end=" ")
    print(f"Python {platform.python_version()}, {platform.machine()}, median of {RUNS}\n")
    print("| what | ms |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value:.1f} |")
    print_rings()


if __name__ == "__main__":
    main()
