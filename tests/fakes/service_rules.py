# SPDX-License-Identifier: Apache-2.0
"""What kube-apiserver does to a Service on its way in: defaults, allocation, refusals.

Each rule was seen on a real server (tests/k8s/test_contract.py). Works on JSON, in place.
"""

import copy
import ipaddress
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

NODE_PORTS = range(30000, 32768)
CLUSTER_NETWORKS = {"IPv4": ipaddress.ip_network("10.96.0.0/16"), "IPv6": ipaddress.ip_network("fd00:96::/112")}


class Invalid(Exception):
    """The server would answer 422."""


@dataclass(slots=True)
class Allocator:
    """Which cluster addresses and node ports are taken, and by which Service."""

    owner_by_port: dict[tuple[str, int], str] = field(default_factory=dict)
    owner_by_address: dict[str, str] = field(default_factory=dict)

    def address(self, family: str, owner: str) -> str:
        for offset in range(10, 60000):
            address = str(CLUSTER_NETWORKS[family][offset])
            if address not in self.owner_by_address:
                self.owner_by_address[address] = owner
                return address
        raise Invalid("range is full")

    def port(self, protocol: str, wanted: int, owner: str) -> int:
        """``wanted`` 0: any that is free for TCP and UDP alike."""
        if wanted and wanted not in NODE_PORTS:
            raise Invalid(f"Invalid value: {wanted}: provided port is not in the valid range 30000-32767")
        if wanted and self.owner_by_port.get((protocol, wanted), owner) != owner:
            raise Invalid(f"Invalid value: {wanted}: provided port is already allocated")
        port = wanted or next(n for n in NODE_PORTS if not any(k[1] == n for k in self.owner_by_port))
        self.owner_by_port[protocol, port] = owner
        return port

    def free(self, service: Json) -> None:
        owner = service["metadata"]["uid"]
        self.owner_by_port = {k: v for k, v in self.owner_by_port.items() if v != owner}
        self.owner_by_address = {k: v for k, v in self.owner_by_address.items() if v != owner}


def prepare(new: Json, old: Json | None, allocator: Allocator) -> None:
    """Default, check and allocate ``new``, which replaces ``old``. Raises Invalid."""
    spec = new.setdefault("spec", {})
    owner = new["metadata"]["uid"]
    _default(spec)
    _check(new, old)
    if old is None or not spec.get("clusterIPs"):
        spec["clusterIPs"] = [allocator.address(family, owner) for family in spec["ipFamilies"]]
    while len(spec["clusterIPs"]) < len(spec["ipFamilies"]):
        spec["clusterIPs"].append(allocator.address(spec["ipFamilies"][len(spec["clusterIPs"])], owner))
    spec["clusterIP"] = spec["clusterIPs"][0]
    _node_ports(spec, old, allocator, owner)
    _health_port(spec, old, allocator, owner)
    for key in [k for k, v in allocator.owner_by_port.items() if v == owner and k not in _ports_held(spec)]:
        del allocator.owner_by_port[key]
    status = new.setdefault("status", {})
    if spec["type"] != "LoadBalancer":
        status["loadBalancer"] = {}
    status.setdefault("loadBalancer", {})
    for ingress in status["loadBalancer"].get("ingress", []):
        if ingress.get("ip"):
            ingress.setdefault("ipMode", "VIP")


def _default(spec: Json) -> None:
    spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    if spec["sessionAffinity"] == "ClientIP":
        spec.setdefault("sessionAffinityConfig", {}).setdefault("clientIP", {}).setdefault("timeoutSeconds", 10800)
    else:
        spec.pop("sessionAffinityConfig", None)
    spec.setdefault("internalTrafficPolicy", "Cluster")
    for port in spec.setdefault("ports", []):
        port.setdefault("protocol", "TCP")
        port.setdefault("targetPort", port.get("port"))
    policy = spec.setdefault("ipFamilyPolicy", "SingleStack")
    families = spec.setdefault("ipFamilies", ["IPv4"])
    if policy == "SingleStack":
        del families[1:]
        del spec.get("clusterIPs", [])[1:]
    elif len(families) == 1:
        families.append("IPv6" if families[0] == "IPv4" else "IPv4")
    if spec["type"] == "LoadBalancer":
        spec.setdefault("allocateLoadBalancerNodePorts", True)
        spec.setdefault("externalTrafficPolicy", "Cluster")
        return
    for key in ("allocateLoadBalancerNodePorts", "loadBalancerClass", "healthCheckNodePort"):
        spec.pop(key, None)
    if spec["type"] == "NodePort":
        spec.setdefault("externalTrafficPolicy", "Cluster")
    else:
        spec.pop("externalTrafficPolicy", None)


def _check(new: Json, old: Json | None) -> None:
    spec = new["spec"]
    if not spec["ports"]:
        raise Invalid("spec.ports: Required value")
    for cidr in spec.get("loadBalancerSourceRanges") or []:
        try:
            ipaddress.ip_network(cidr.strip(), strict=False)
        except ValueError:
            raise Invalid(f"spec.loadBalancerSourceRanges: Invalid value: {cidr!r}") from None
    both = old is not None and old["spec"]["type"] == spec["type"] == "LoadBalancer"
    if old is not None and both and old["spec"].get("loadBalancerClass") != spec.get("loadBalancerClass"):
        raise Invalid("spec.loadBalancerClass: Invalid value: may not change once set")
    for ingress in new.get("status", {}).get("loadBalancer", {}).get("ingress", []):
        mode = ingress.get("ipMode")
        if mode is not None and not ingress.get("ip"):
            raise Invalid("status.loadBalancer.ingress[0].ipMode: Forbidden: may not be specified when `ip` is not set")
        if mode not in (None, "VIP", "Proxy"):
            raise Invalid(f'status.loadBalancer.ingress[0].ipMode: Unsupported value: "{mode}"')


def _node_ports(spec: Json, old: Json | None, allocator: Allocator, owner: str) -> None:
    wants = spec["type"] == "NodePort" or (
        spec["type"] == "LoadBalancer" and spec["allocateLoadBalancerNodePorts"] is not False
    )
    kept = {(p["protocol"], p["port"]): p.get("nodePort", 0) for p in (old or {"spec": {}})["spec"].get("ports", [])}
    given: dict[int, int] = {}  # the same port number in two protocols gets the same node port
    for port in spec["ports"]:
        if not wants:
            if spec["type"] == "ClusterIP":
                port.pop("nodePort", None)
            elif port.get("nodePort"):
                allocator.port(port["protocol"], port["nodePort"], owner)
            continue
        wanted = port.get("nodePort") or kept.get((port["protocol"], port["port"]), 0) or given.get(port["port"], 0)
        port["nodePort"] = allocator.port(port["protocol"], wanted, owner)
        given[port["port"]] = port["nodePort"]


def _health_port(spec: Json, old: Json | None, allocator: Allocator, owner: str) -> None:
    if spec["type"] != "LoadBalancer" or spec["externalTrafficPolicy"] != "Local":
        spec.pop("healthCheckNodePort", None)
        return
    before = copy.copy((old or {"spec": {}})["spec"].get("healthCheckNodePort", 0))
    if before and spec.get("healthCheckNodePort", before) != before:
        raise Invalid("spec.healthCheckNodePort: Invalid value: field is immutable")
    spec["healthCheckNodePort"] = allocator.port("TCP", spec.get("healthCheckNodePort") or before, owner)


def _ports_held(spec: Json) -> set[tuple[str, int]]:
    held = {(p["protocol"], p["nodePort"]) for p in spec["ports"] if p.get("nodePort")}
    if spec.get("healthCheckNodePort"):
        held.add(("TCP", spec["healthCheckNodePort"]))
    return held
