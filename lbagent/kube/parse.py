# SPDX-License-Identifier: Apache-2.0
"""API JSON -> model values. The only file that knows the field names of Kubernetes.

Tolerant of what we do not use, strict about what we do: a field of the wrong type makes that one
object Unreadable, with the path of the field. Unset fields get the defaults of the API. Sources:
Kubernetes API reference, v1 and discovery.k8s.io/v1.

Memory matters (10,000 Services, 100,000 endpoints): texts that repeat are interned, and what
nobody reads (managedFields, kubectl's copy of the manifest) is left behind with the JSON.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from sys import intern

from lbagent.kube.field import Field, Unreadable
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

SOURCE_RANGES_ANNOTATION = "service.beta.kubernetes.io/load-balancer-source-ranges"
SERVICE_OF_SLICE_LABEL = "kubernetes.io/service-name"
MANIFEST_COPY_ANNOTATION = "kubectl.kubernetes.io/last-applied-configuration"
CLIENT_IP_TIMEOUT_S = 10_800  # DefaultClientIPServiceAffinitySeconds

_FAMILY_BY_NAME = {"IPv4": 4, "IPv6": 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """An EndpointSlice: part of the endpoints of one Service (None: of nobody)."""

    service: ServiceKey | None
    endpoints: tuple[Endpoint, ...]


def name_of(obj: object) -> ServiceKey:
    """Namespace ('' for cluster-wide kinds) and name of any object. Raises Unreadable."""
    meta = Field(obj).child("metadata")
    return ServiceKey(intern(meta.text("namespace")), meta.text("name", required=True))


def resource_version_of(obj: object) -> str:
    """``metadata.resourceVersion`` of an object, a list or a bookmark; '' when there is none."""
    return Field(obj).child("metadata").text("resourceVersion")


def service(obj: object) -> Service:
    """A Service. Source ranges: the field before the annotation, blanks trimmed."""
    top = Field(obj)
    meta, spec, status = top.child("metadata"), top.child("spec"), top.child("status")
    balancer = status.child("loadBalancer")
    annotations = meta.texts_by_key("annotations")
    annotations.pop(MANIFEST_COPY_ANNOTATION, None)
    ranges = spec.texts("loadBalancerSourceRanges") or tuple(annotations.get(SOURCE_RANGES_ANNOTATION, "").split(","))
    return Service(
        key=name_of(obj),
        uid=meta.text("uid"),
        resource_version=meta.text("resourceVersion"),
        created=meta.time("creationTimestamp"),
        type=intern(spec.text("type", default="ClusterIP")),
        load_balancer_class=spec.text("loadBalancerClass") or None,
        load_balancer_ip=spec.text("loadBalancerIP").strip(),
        ports=tuple(_port(port) for port in spec.children("ports")),
        external_traffic_policy=spec.word("externalTrafficPolicy", TrafficPolicy) or TrafficPolicy.CLUSTER,
        health_check_node_port=spec.number("healthCheckNodePort"),
        source_ranges=tuple(text.strip() for text in ranges if text.strip()),
        affinity_timeout_s=_affinity_timeout_s(spec),
        ip_families=_families(spec),
        ip_family_policy=intern(spec.text("ipFamilyPolicy", default="SingleStack")),
        allocate_node_ports=spec.flag("allocateLoadBalancerNodePorts", default=True),
        selector=spec.texts_by_key("selector"),
        labels=meta.texts_by_key("labels"),
        annotations=annotations,
        finalizers=meta.texts("finalizers"),
        deleting="deletionTimestamp" in meta,
        ingress=tuple(_ingress(entry) for entry in balancer.children("ingress")),
        conditions=tuple(
            Condition(
                type=intern(condition.text("type")),
                status=intern(condition.text("status")),
                reason=intern(condition.text("reason")),
                message=condition.text("message"),
            )
            for condition in status.children("conditions")
        ),
    )


def endpoint_slice(obj: object) -> Slice:
    """An EndpointSlice. Unset conditions: ready and serving are true, terminating is false."""
    top = Field(obj)
    key = name_of(obj)
    owner = top.child("metadata").texts_by_key("labels").get(SERVICE_OF_SLICE_LABEL)
    family = _FAMILY_BY_NAME.get(top.text("addressType"))
    endpoints = [] if family is None else [_endpoint(entry, family) for entry in top.children("endpoints")]
    return Slice(
        service=ServiceKey(key.namespace, intern(owner)) if owner else None,
        endpoints=tuple(endpoint for endpoint in endpoints if endpoint is not None),
    )


def node(obj: object) -> Node:
    """A Node. One that reports no Ready condition counts as ready."""
    top = Field(obj)
    meta, status = top.child("metadata"), top.child("status")
    ready = [c.text("status") == "True" for c in status.children("conditions") if c.text("type") == "Ready"]
    return Node(
        name=intern(name_of(obj).name),
        addresses=tuple(_node_address(address) for address in status.children("addresses")),
        labels=meta.texts_by_key("labels"),
        taints=tuple(intern(taint.text("key")) for taint in top.child("spec").children("taints")),
        deleting="deletionTimestamp" in meta,
        ready=all(ready),
    )


def namespace_labels(obj: object) -> Mapping[str, str]:
    """The labels of a Namespace."""
    return Field(obj).child("metadata").texts_by_key("labels")


def merge_slices(slices: Iterable[Slice]) -> tuple[Endpoint, ...]:
    """All endpoints of one Service, in the order of its slices."""
    return tuple(endpoint for part in slices for endpoint in part.endpoints)


# --- offline: objects from files --------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Objects:
    """What a pile of manifests holds. ``problems``: sentence by object that could not be read."""

    services: dict[ServiceKey, Service] = field(default_factory=dict)
    endpoints: dict[ServiceKey, tuple[Endpoint, ...]] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    namespace_labels: dict[str, Mapping[str, str]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def objects(documents: Iterable[object]) -> Objects:
    """Sort decoded YAML or JSON documents (objects or lists of them) by kind.

    Kinds we do not use are passed over. An unreadable object is named in ``problems`` and costs
    nobody else anything. A Service without a namespace lives in ``default``, as with kubectl.
    """
    found = Objects()
    slices: dict[ServiceKey, dict[str, Slice]] = {}
    for number, document in enumerate(_flatten(documents)):
        label = f"document {number + 1}"
        try:
            kind, key = Field(document).text("kind"), name_of(document)
            if not key.namespace:
                key = ServiceKey("default", key.name)
            label = f"{kind} {key}" if kind in ("Service", "EndpointSlice") else f"{kind} {key.name}"
            match kind:
                case "Service":
                    found.services[key] = service(_with_namespace(document, key.namespace))
                case "EndpointSlice":
                    part = endpoint_slice(_with_namespace(document, key.namespace))
                    if part.service:
                        slices.setdefault(part.service, {})[key.name] = part
                case "Node":
                    found.nodes[key.name] = node(document)
                case "Namespace":
                    found.namespace_labels[key.name] = namespace_labels(document)
        except Unreadable as error:
            found.problems[label] = error.message
    for owner, by_name in slices.items():
        found.endpoints[owner] = merge_slices(by_name[name] for name in sorted(by_name))
    return found


def _flatten(documents: Iterable[object]) -> Iterator[object]:
    for document in documents:
        if document is None:
            continue
        kind = document.get("kind") if isinstance(document, dict) else None
        if isinstance(document, dict) and isinstance(kind, str) and kind.endswith("List"):
            items = document.get("items") or []
            for item in items:  # the items of a typed list carry no kind of their own
                yield {"kind": kind.removesuffix("List")} | item if isinstance(item, dict) else item
        else:
            yield document


def _with_namespace(document: object, namespace: str) -> object:
    assert isinstance(document, dict)
    return document | {"metadata": document["metadata"] | {"namespace": namespace}}


# --- parts ------------------------------------------------------------------------------------


def _port(port: Field) -> Port:
    return Port(
        name=intern(port.text("name")),
        protocol=port.word("protocol", Protocol) or Protocol.TCP,
        port=port.number("port", required=True),
        node_port=port.number("nodePort"),
    )


def _ingress(entry: Field) -> Ingress:
    return Ingress(
        ip=entry.address("ip", default=""),
        ip_mode=entry.word("ipMode", IpMode),
        port_errors=tuple(
            (port.number("port"), port.word("protocol", Protocol) or Protocol.TCP, port.text("error"))
            for port in entry.children("ports")
            if port.text("error")
        ),
    )


def _endpoint(entry: Field, family: int) -> Endpoint | None:
    address = entry.first_address("addresses")  # consumers use no other one (API reference)
    if not address:
        return None
    conditions = entry.child("conditions")
    return Endpoint(
        address=address,
        node=intern(entry.text("nodeName")),
        family=family,
        ready=conditions.flag("ready", default=True),
        serving=conditions.flag("serving", default=True),
        terminating=conditions.flag("terminating", default=False),
    )


def _node_address(address: Field) -> NodeAddress:
    type_ = intern(address.text("type"))
    return NodeAddress(type_, address.address("address") if type_.endswith("IP") else address.text("address"))


def _affinity_timeout_s(spec: Field) -> int:
    if spec.text("sessionAffinity") != "ClientIP":
        return 0
    client_ip = spec.child("sessionAffinityConfig").child("clientIP")
    return client_ip.number("timeoutSeconds", default=CLIENT_IP_TIMEOUT_S)


def _families(spec: Field) -> tuple[int, ...]:
    """``spec.ipFamilies``; from before dual stack, what the cluster addresses tell; else IPv4."""
    named = []
    for name in spec.texts("ipFamilies"):
        if name not in _FAMILY_BY_NAME:
            raise spec.wrong("ipFamilies", name, "IPv4 or IPv6")
        named.append(_FAMILY_BY_NAME[name])
    if named:
        return tuple(named)
    return tuple(6 if ":" in ip else 4 for ip in spec.texts("clusterIPs") if ip not in ("", "None")) or (4,)
