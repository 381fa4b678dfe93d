# SPDX-License-Identifier: Apache-2.0
"""Random clusters, and targets that perform Steps: the stage of the property tests."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import strategies as st

from lbagent.model.pool import Reservation
from lbagent.model.route import Route
from lbagent.model.service import Ingress, Service, ServiceKey
from lbagent.model.state import Desired, Observed, Snapshot
from lbagent.model.step import Announce, Assign, Program, Release, Report, Step, Unprogram, Withdraw
from lbagent.model.vip import Forward, Vip
from tests.builders import (
    make_endpoint,
    make_node,
    make_pool,
    make_port,
    make_service,
    make_settings,
    make_snapshot,
)

ADDRESSES = ["198.51.100.1", "198.51.100.2", "198.51.100.3", "203.0.113.9", "2001:db8::1", "2001:db8::2"]
POOLS = (make_pool("small", "198.51.100.1-198.51.100.4"), make_pool("six", "2001:db8::/64"))


Pick = Callable[[Sequence[Any]], Any]
"""Chooses one of several: hypothesis, which can shrink what it chose, or a seeded random, which is fast."""


def some(pick: Pick, options: Sequence[Any], most: int) -> list[Any]:
    """Up to ``most`` different ones."""
    left, chosen = list(options), []
    for _ in range(pick(range(min(most, len(left)) + 1))):
        chosen.append(pick(left))
        left.remove(chosen[-1])
    return chosen


def a_service(pick: Pick, name: str) -> Service:
    """A Service that may hold addresses, share them, be deleted, or be none of ours."""
    families = pick([(4,), (4,), (6,), (4, 6), (6, 4)])
    ports = some(pick, [(80, "TCP"), (443, "TCP"), (80, "UDP"), (9, "SCTP")], 3) or [(80, "TCP")]
    annotations = {}
    if pick([False, True]):
        annotations["lbagent.io/allow-shared-ip"] = pick(["one", "two"])
    if pick(range(4)) == 3:
        annotations["lbagent.io/load-balancer-ips"] = pick(ADDRESSES)
    node_port = pick([None, None, None, 0])
    return make_service(
        name,
        ports=[make_port(port, protocol=protocol, node_port=node_port) for port, protocol in ports],
        status=some(pick, ADDRESSES, 2),
        policy=pick(["Cluster", "Local"]),
        families=families,
        family_policy=pick(["PreferDualStack", "RequireDualStack"]) if len(families) == 2 else "SingleStack",
        created=pick(range(4)),
        annotations=annotations,
        deleting=pick(range(6)) == 5,
        type=pick(["LoadBalancer"] * 5 + ["ClusterIP"]),
        load_balancer_class=pick([None, None, None, "lbagent.io/lbagent", "other.io/lb"]),
    )


CONDITIONS: list[dict[str, bool]] = [{}, {}, {"ready": False, "serving": True, "terminating": True}, {"ready": False}]


def a_snapshot(pick: Pick, *, is_leader: bool = True) -> Snapshot:
    """A small listed cluster."""
    nodes = [
        make_node(
            name,
            labels=pick([{}, {}, {"node.kubernetes.io/exclude-from-external-load-balancers": ""}]),
            taints=pick([(), (), ("ToBeDeletedByClusterAutoscaler",)]),
        )
        for name in some(pick, ["node1", "node2", "node3"], 3)
    ]
    chosen = [a_service(pick, name) for name in some(pick, ["a", "b", "c", "d", "e"], 5)]
    endpoints = {
        service.key.name: [
            make_endpoint(
                pick(["node1", "node2", "node3", ""]),
                f"10.244.0.{number}" if family == 4 else f"fd00:244::{number}",
                family=family,
                **pick(CONDITIONS),
            )
            for number in range(pick(range(4)))
            for family in (4, 6)
        ]
        for service in chosen
    }
    return make_snapshot(
        chosen,
        nodes=nodes,
        endpoints=endpoints,
        settings=make_settings(*POOLS, settle_s=0.5),
        is_leader=is_leader,
        draining=pick(range(10)) == 9,
        unreachable=frozenset(some(pick, ["10.0.0.1", "fd00::1"], 1)),
    )


@st.composite
def picks(draw: st.DrawFn) -> Pick:
    """Hypothesis chooses."""
    return lambda options: draw(st.sampled_from(options))


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """A small listed cluster, chosen by hypothesis."""
    return a_snapshot(draw(picks()))


@dataclass
class Targets:
    """Kernel, speaker and cluster that do what Steps say, and complain when a Step is unsafe.

    ``broken`` Vips never prove; ``late`` withdrawals are confirmed only by ``confirm()``.
    """

    now: float = 1_000.0
    late: bool = False
    broken: frozenset[Vip] = frozenset()
    forwards: dict[Vip, Forward] = field(default_factory=dict)
    routes: dict[str, Route] = field(default_factory=dict)
    needs: dict[str, frozenset[Vip]] = field(default_factory=dict)
    attracting: dict[str, float] = field(default_factory=dict)
    services: dict[ServiceKey, Service] = field(default_factory=dict)
    reservations: dict[str, Reservation] = field(default_factory=dict)

    def copy(self) -> "Targets":
        return replace(
            self,
            forwards=dict(self.forwards),
            routes=dict(self.routes),
            needs=dict(self.needs),
            attracting=dict(self.attracting),
            services=dict(self.services),
            reservations=dict(self.reservations),
        )

    def see(self, snapshot: Snapshot) -> Snapshot:
        """The Snapshot with what the targets add to it."""
        return replace(
            snapshot,
            now=self.now,
            wall=self.now,
            services={**snapshot.services, **self.services},
            reservations=dict(self.reservations),
            unproven={vip: "no answer" for vip in self.forwards if vip in self.broken},
        )

    def observed(self) -> Observed:
        return Observed(
            forwards=dict(self.forwards),
            rings=frozenset(forward.ring for forward in self.forwards.values()),
            proven=frozenset(self.forwards) - self.broken,
            routes=frozenset(self.routes.values()),
            attracting=dict(self.attracting),
        )

    def perform(self, step: Step, desired: Desired) -> None:
        match step:
            case Program():
                carried = {ring.fingerprint for ring in step.rings}
                for forward in step.forwards:
                    assert forward.ring in carried
                    self.forwards[forward.vip] = forward
            case Announce():
                assert step.needs, "a route that nothing is behind"
                assert step.needs <= self.forwards.keys()
                if not step.needs & self.broken:
                    self.routes[step.route.prefix] = step.route
                    self.needs[step.route.prefix] = step.needs
                    self.attracting.pop(step.route.address, None)
            case Withdraw():
                assert self.routes.pop(step.route.prefix) == step.route
                self.attracting[step.route.address] = math.inf if self.late else self.now
            case Unprogram():
                for vip in step.vips:
                    others = [v for v in self.forwards if v.address == vip.address and v in desired.forwards]
                    exposed = any(route.address == vip.address for route in self.routes.values())
                    assert others or not exposed, f"{vip} is forgotten while it is announced"
                    assert others or self.attracting.get(vip.address, 0) + 0.5 <= self.now, f"{vip} forgotten too early"
                    del self.forwards[vip]
            case Assign():
                mode, errors = step.assignment.ip_mode, step.assignment.port_errors
                self.write(
                    step.assignment.service,
                    tuple(Ingress(ip=a, ip_mode=mode, port_errors=errors) for a in step.assignment.addresses),  # type: ignore[arg-type]
                )
            case Release():
                self.write(step.service, ())
            case Report():
                pass
        self.check(desired)

    def write(self, key: ServiceKey, ingress: tuple[Ingress, ...]) -> None:
        """A status write; an address that nobody holds any more cools down, as agent/world has it."""
        before = self.services[key].status_addresses
        self.services[key] = replace(self.services[key], ingress=ingress)
        held = {address for service in self.services.values() for address in service.status_addresses}
        for address in set(before) - held:
            self.reservations[address] = Reservation(address=address, service=key, released=self.now)

    def check(self, desired: Desired) -> None:
        """No announced route lacks a programmed Vip that is still wanted, or has none at all."""
        for prefix, route in self.routes.items():
            assert any(vip.address == route.address for vip in self.forwards), (
                f"{prefix} is announced, nothing is there"
            )
            missing = (self.needs[prefix] & desired.forwards.keys()) - self.forwards.keys()
            assert not missing, f"{prefix} is announced without {missing}"

    def tick(self, seconds: float = 1.0) -> None:
        self.now += seconds

    def confirm(self) -> None:
        self.attracting = {a: self.now if until == math.inf else until for a, until in self.attracting.items()}

    def attracting_still(self) -> bool:
        return any(until + 0.5 > self.now for until in self.attracting.values())

    def place(self) -> tuple[object, ...]:
        """Where the targets have come to, without time."""
        return self.forwards, self.routes, {k: s.ingress for k, s in self.services.items()}
