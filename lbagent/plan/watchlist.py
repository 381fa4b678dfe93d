# SPDX-License-Identifier: Apache-2.0
"""What should be probed: Snapshot -> ProbeTargets, one per node and source, shared by all Services.

Policy Local: healthCheckNodePort of the nodes that have endpoints. Both policies: kube-proxy's
/healthz of every eligible node. Node ports by TCP connect as far as the limit goes, Service by
Service; the annotation ``lbagent.io/probe: node-port`` puts a Service first, ``none`` leaves it out.
"""

from collections.abc import Iterator

from lbagent.model.service import Endpoint, Protocol, Service, TrafficPolicy
from lbagent.model.state import ProbeTarget, Snapshot
from lbagent.plan import request
from lbagent.plan.eligible import is_excluded, node_address

ANNOTATION = "lbagent.io/probe"
NODE_PORT, NONE = "node-port", "none"


def watchlist(snapshot: Snapshot) -> frozenset[ProbeTarget]:
    """Complete; whatever the order of the Services, the same."""
    address_by_node = _addresses(snapshot)
    targets: set[ProbeTarget] = set()
    asked: list[Service] = []
    others: list[Service] = []
    for key in sorted(snapshot.services):
        service = snapshot.services[key]
        if not service.status_addresses or request.foreign(service, snapshot.settings):
            continue
        wish = service.annotations.get(ANNOTATION, "").strip()
        if wish == NONE:
            continue
        (asked if wish == NODE_PORT else others).append(service)
        if service.external_traffic_policy is TrafficPolicy.LOCAL and service.health_check_node_port:
            for address in _serving(service, snapshot, address_by_node):
                targets.add(ProbeTarget(address, "local", service.health_check_node_port))
    if asked or others:
        port = snapshot.settings.proxy_port
        targets |= {ProbeTarget(address, "proxy", port) for held in address_by_node.values() for address in held}
    room = snapshot.settings.node_port_probes
    for service in [*asked, *others]:
        more = set(_node_ports(service, snapshot, address_by_node)) - targets
        if len(more) > room:
            break
        room -= len(more)
        targets |= more
    return frozenset(targets)


def _addresses(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    """Addresses of each eligible node, of the types that pools forward to, both families."""
    types = sorted({pool.node_address_type for pool in snapshot.settings.pools})
    found = {}
    for name, node in snapshot.nodes.items():
        if not is_excluded(node):
            held = {node_address(node, family=f, address_type=t) for t in types for f in (4, 6)} - {""}
            found[name] = tuple(sorted(held))
    return found


def _families(service: Service) -> set[bool]:
    return {":" in address for address in service.status_addresses}


def _serving(service: Service, snapshot: Snapshot, address_by_node: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Addresses of the nodes that matter to the Service, in its families."""
    families = _families(service)
    names: set[str]
    if service.external_traffic_policy is TrafficPolicy.LOCAL:
        names = {e.node for e in snapshot.endpoints.get(service.key, ()) if _counts(e)}
    else:
        names = set(address_by_node)
    for name in sorted(names):
        for address in address_by_node.get(name, ()):
            if (":" in address) in families:
                yield address


def _counts(endpoint: Endpoint) -> bool:
    return bool(endpoint.node) and (endpoint.ready or (endpoint.serving and endpoint.terminating))


def _node_ports(
    service: Service, snapshot: Snapshot, address_by_node: dict[str, tuple[str, ...]]
) -> Iterator[ProbeTarget]:
    ports = [p.node_port for p in service.ports if p.protocol is Protocol.TCP and p.node_port]
    for address in _serving(service, snapshot, address_by_node):
        for port in ports:
            yield ProbeTarget(address, "tcp", port)
