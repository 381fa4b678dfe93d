# SPDX-License-Identifier: Apache-2.0
"""Nouns for tests: the only way tests build them. Every argument has a plain default.

>>> make_snapshot(services=[make_service("web", status=["192.0.2.1"])], nodes=3)
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lbagent.model.pool import AddressRange, LabelSelector, Pool
from lbagent.model.service import (
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
from lbagent.model.state import Observed, Settings, Snapshot
from lbagent.model.vip import Backend, BackendState, Mode, Vip
from lbagent.plan.request import parse_address

NOW = 1_000.0
WALL = 1_800_000_000.0


def make_key(text: str) -> ServiceKey:
    """``web`` or ``shop/web``; the default namespace is ``default``."""
    namespace, _, name = text.rpartition("/")
    return ServiceKey(namespace or "default", name)


def make_port(port: int = 80, *, protocol: str = "TCP", node_port: int | None = None, name: str = "") -> Port:
    """A port; its node port is 30000 + port unless given (0: none)."""
    return Port(
        name=name or f"{protocol.lower()}-{port}",
        protocol=Protocol(protocol),
        port=port,
        node_port=30_000 + port % 2_768 if node_port is None else node_port,
    )


def make_service(
    name: str = "web",
    *,
    ports: Iterable[int | Port] = (80,),
    status: Iterable[str] = (),
    ip_mode: IpMode | None = IpMode.PROXY,
    policy: str = "Cluster",
    families: Iterable[int] = (4,),
    family_policy: str | None = None,
    created: float = 0.0,
    **fields: Any,
) -> Service:
    """A LoadBalancer Service ``default/web``; ``status`` are the addresses already written."""
    families = tuple(families)
    return Service(
        key=make_key(name),
        uid=f"uid-{name}",
        created=created,
        ports=tuple(p if isinstance(p, Port) else make_port(p) for p in ports),
        ingress=tuple(Ingress(ip=address, ip_mode=ip_mode) for address in status),
        external_traffic_policy=TrafficPolicy(policy),
        health_check_node_port=32_000 if policy == "Local" else 0,
        ip_families=families,
        ip_family_policy=family_policy or ("SingleStack" if len(families) == 1 else "RequireDualStack"),
        **fields,
    )


def make_node(name: str = "node1", *addresses: str, labels: Mapping[str, str] | None = None, **fields: Any) -> Node:
    """A node with InternalIPs; ``node7`` gets 10.0.0.7 and fd00::7 when none are given."""
    number = int("".join(c for c in name if c.isdigit()) or 1)
    addresses = addresses or (f"10.0.{number // 256}.{number % 256}", f"fd00::{number:x}")
    return Node(
        name=name,
        addresses=tuple(NodeAddress("InternalIP", address) for address in addresses),
        labels=labels or {},
        **fields,
    )


def make_endpoint(node: str = "node1", address: str = "", *, family: int = 4, **conditions: bool) -> Endpoint:
    """A ready endpoint on a node; ``ready=False, serving=True, terminating=True`` for a closing one."""
    make_endpoint.count += 1  # type: ignore[attr-defined]
    number = make_endpoint.count  # type: ignore[attr-defined]
    if not address:
        address = f"10.244.{number // 256 % 256}.{number % 256}" if family == 4 else f"fd00:244::{number % 65536:x}"
    conditions.setdefault("serving", conditions.get("ready", True))
    return Endpoint(address=address, node=node, family=family, **conditions)


make_endpoint.count = 0  # type: ignore[attr-defined]


def closing_endpoint(node: str = "node1", **fields: Any) -> Endpoint:
    """Terminating, but still serving."""
    return make_endpoint(node, ready=False, serving=True, terminating=True, **fields)


def make_range(text: str) -> AddressRange:
    """``192.0.2.0/28`` or ``192.0.2.1-192.0.2.9``."""
    import ipaddress

    if "-" in text:
        first, last = (parse_address(part) for part in text.split("-"))
        assert first
        assert last
        return AddressRange(first[0], first[1], last[1])
    network = ipaddress.ip_network(text)
    return AddressRange(network.version, int(network.network_address), int(network.broadcast_address))


def make_pool(name: str = "default", *ranges: str, **fields: Any) -> Pool:
    """A pool over 198.51.100.0/24 unless ranges are given."""
    return Pool(name=name, ranges=tuple(make_range(text) for text in ranges or ("198.51.100.0/24",)), **fields)


def make_selector(**labels: str) -> LabelSelector:
    """Labels that must be equal."""
    return LabelSelector(labels=tuple(sorted(labels.items())))


def make_settings(*pools: Pool, **fields: Any) -> Settings:
    """Settings with one default pool unless pools are given; every mode is available."""
    fields.setdefault("modes", frozenset(Mode))
    return Settings(pools=pools or (make_pool(),), **fields)


def make_snapshot(
    services: Iterable[Service] = (),
    *,
    nodes: int | Iterable[Node] = 3,
    endpoints: Mapping[str, Iterable[Endpoint]] | None = None,
    settings: Settings | None = None,
    **fields: Any,
) -> Snapshot:
    """A listed cluster as the lease holder sees it.

    Every Service has one ready endpoint a family on each of the first two nodes, unless
    ``endpoints`` says otherwise (by ``name`` or ``namespace/name``).
    """
    services = tuple(services)
    if isinstance(nodes, int):
        nodes = [make_node(f"node{n}") for n in range(1, nodes + 1)]
    nodes = tuple(nodes)
    given = {make_key(name): tuple(ends) for name, ends in (endpoints or {}).items()}
    for service in services:
        if service.key not in given:
            given[service.key] = tuple(
                make_endpoint(node.name, family=family) for family in service.ip_families for node in nodes[:2]
            )
    values: dict[str, Any] = {"now": NOW, "wall": WALL, "host": "lb1", "listed": True, "is_leader": True}
    return Snapshot(
        **values | fields,
        settings=settings or make_settings(),
        services={service.key: service for service in services},
        endpoints=given,
        nodes={node.name: node for node in nodes},
    )


def make_observed(**fields: Any) -> Observed:
    """Targets that hold nothing."""
    return Observed(**fields)


def make_backend(
    number: int = 1, *, weight: int = 1, state: BackendState = BackendState.ACTIVE, node: str = ""
) -> Backend:
    """The node ``10.0.0.<number>``."""
    return Backend(
        address=f"10.0.{number // 256}.{number % 256}", node=node or f"node{number}", weight=weight, state=state
    )


def make_vip(text: str = "198.51.100.1:80/TCP") -> Vip:
    """``192.0.2.1:80/TCP`` or ``[2001:db8::1]:80/UDP``."""
    where, _, protocol = text.partition("/")
    address, _, port = where.rpartition(":")
    return Vip(address=address.strip("[]"), protocol=Protocol(protocol or "TCP"), port=int(port))
