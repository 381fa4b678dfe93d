# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes objects, as far as we use them: Service, Endpoint, Node.

Addresses are canonical text (``str(ipaddress.ip_address(x))``) everywhere in the model, so that
they compare, hash and print alike.  Source: Kubernetes API v1 and discovery.k8s.io/v1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Protocol(StrEnum):
    """Transport protocol of a Service port."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"


class TrafficPolicy(StrEnum):
    """``spec.externalTrafficPolicy``."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class IpMode(StrEnum):
    """``status.loadBalancer.ingress[].ipMode``: does the VIP reach the node in the packet?"""

    VIP = "VIP"
    PROXY = "Proxy"


@dataclass(frozen=True, slots=True, order=True)
class ServiceKey:
    """Namespace and name; printed ``namespace/name``."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One port of a Service. ``node_port`` 0: none allocated."""

    name: str
    protocol: Protocol
    port: int
    node_port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingress:
    """One entry of ``status.loadBalancer.ingress``. ``ip_mode`` None: unset."""

    ip: str
    ip_mode: IpMode | None = None
    port_errors: tuple[tuple[int, Protocol, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A Service as read. ``created`` is seconds since the epoch, 0 when unknown.

    ``status_addresses`` is what the cluster believes we gave; it is the truth every host reads.
    """

    key: ServiceKey
    uid: str = ""
    resource_version: str = ""
    created: float = 0.0
    type: str = "LoadBalancer"
    load_balancer_class: str | None = None
    load_balancer_ip: str = ""
    ports: tuple[Port, ...] = ()
    external_traffic_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    health_check_node_port: int = 0
    source_ranges: tuple[str, ...] = ()
    affinity_timeout_s: int = 0
    ip_families: tuple[int, ...] = (4,)
    ip_family_policy: str = "SingleStack"
    allocate_node_ports: bool = True
    selector: Mapping[str, str] = field(default_factory=dict, hash=False)
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)
    finalizers: tuple[str, ...] = ()
    deleting: bool = False
    ingress: tuple[Ingress, ...] = ()
    conditions: tuple["Condition", ...] = ()

    @property
    def status_addresses(self) -> tuple[str, ...]:
        return tuple(i.ip for i in self.ingress if i.ip)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """``status.conditions[]`` without its times."""

    type: str
    status: str
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One endpoint of one EndpointSlice, conditions with their defaults applied.

    ``node`` is empty when the slice names none.  Duplicates over slices are the planner's affair.
    """

    address: str
    node: str = ""
    family: int = 4
    ready: bool = True
    serving: bool = True
    terminating: bool = False


@dataclass(frozen=True, slots=True, order=True)
class NodeAddress:
    """``type`` is InternalIP, ExternalIP, Hostname ..."""

    type: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """An ingress node. ``taints`` holds the keys only."""

    name: str
    addresses: tuple[NodeAddress, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    taints: tuple[str, ...] = ()
    deleting: bool = False
    ready: bool = True
