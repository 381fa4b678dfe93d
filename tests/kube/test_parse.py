# SPDX-License-Identifier: Apache-2.0
"""API JSON -> model values."""

import copy
from typing import Any

import pytest

from lbagent.kube import parse
from lbagent.kube.field import Unreadable
from lbagent.model.service import (
    Condition,
    Endpoint,
    Ingress,
    IpMode,
    NodeAddress,
    Port,
    Protocol,
    ServiceKey,
    TrafficPolicy,
)

FULL: dict[str, Any] = {
    "metadata": {
        "name": "web",
        "namespace": "shop",
        "uid": "u-1",
        "resourceVersion": "42",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"app": "web"},
        "annotations": {"lbagent.io/address-pool": "p", parse.MANIFEST_COPY_ANNOTATION: "x" * 1000},
        "finalizers": ["f"],
        "managedFields": [{"manager": "kubectl"}],
    },
    "spec": {
        "type": "LoadBalancer",
        "loadBalancerClass": "lbagent.io/lbagent",
        "loadBalancerIP": " 192.0.2.7 ",
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 32000,
        "loadBalancerSourceRanges": [" 192.0.2.0/24", "2001:db8::/32 ", " "],
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "ipFamilies": ["IPv6", "IPv4"],
        "ipFamilyPolicy": "PreferDualStack",
        "allocateLoadBalancerNodePorts": False,
        "selector": {"app": "web"},
        "ports": [
            {"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080, "targetPort": "http"},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ],
    },
    "status": {
        "loadBalancer": {
            "ingress": [
                {"ip": "2001:DB8::1", "ipMode": "Proxy"},
                {"hostname": "lb.example.com"},
                {
                    "ip": "192.0.2.7",
                    "ports": [{"port": 80, "protocol": "TCP"}, {"port": 9, "protocol": "SCTP", "error": "No"}],
                },
            ]
        },
        "conditions": [{"type": "a", "status": "True", "reason": "r", "message": "m", "lastTransitionTime": "x"}],
    },
}


def changed(path: str, value: object) -> dict[str, Any]:
    """FULL with one field replaced: ``spec.type``."""
    obj = copy.deepcopy(FULL)
    *folders, last = path.split(".")
    place = obj
    for folder in folders:
        place = place[folder]
    place[last] = value
    return obj


def test_a_service_is_read_field_by_field() -> None:
    service = parse.service(FULL)
    assert service.key == ServiceKey("shop", "web")
    assert (service.uid, service.resource_version, service.created) == ("u-1", "42", 1767225600.0)
    assert service.type == "LoadBalancer"
    assert service.load_balancer_class == "lbagent.io/lbagent"
    assert service.load_balancer_ip == "192.0.2.7"
    assert service.ports == (
        Port(name="http", protocol=Protocol.TCP, port=80, node_port=30080),
        Port(name="dns", protocol=Protocol.UDP, port=53, node_port=0),
    )
    assert service.external_traffic_policy is TrafficPolicy.LOCAL
    assert service.health_check_node_port == 32000
    assert service.source_ranges == ("192.0.2.0/24", "2001:db8::/32")
    assert service.affinity_timeout_s == 60
    assert service.ip_families == (6, 4)
    assert service.ip_family_policy == "PreferDualStack"
    assert service.allocate_node_ports is False
    assert service.selector == {"app": "web"}
    assert service.labels == {"app": "web"}
    assert service.finalizers == ("f",)
    assert service.deleting is False
    assert service.conditions == (Condition(type="a", status="True", reason="r", message="m"),)


def test_the_status_keeps_every_entry_in_its_order() -> None:
    assert parse.service(FULL).ingress == (
        Ingress(ip="2001:db8::1", ip_mode=IpMode.PROXY),
        Ingress(ip=""),
        Ingress(ip="192.0.2.7", port_errors=((9, Protocol.SCTP, "No"),)),
    )
    assert parse.service(FULL).status_addresses == ("2001:db8::1", "192.0.2.7")


def test_kubectls_copy_of_the_manifest_is_left_behind() -> None:
    assert parse.service(FULL).annotations == {"lbagent.io/address-pool": "p"}


def test_a_bare_service_gets_the_defaults_of_the_api() -> None:
    service = parse.service({"metadata": {"name": "web", "namespace": "d"}, "spec": {"ports": [{"port": 80}]}})
    assert service.type == "ClusterIP"
    assert service.load_balancer_class is None
    assert service.ports[0].protocol is Protocol.TCP
    assert service.external_traffic_policy is TrafficPolicy.CLUSTER
    assert service.allocate_node_ports is True
    assert service.ip_families == (4,)
    assert service.affinity_timeout_s == 0
    assert service.ingress == ()


def test_the_family_of_a_service_from_before_dual_stack_is_that_of_its_cluster_address() -> None:
    obj = changed("spec.ipFamilies", None)
    obj["spec"]["clusterIPs"] = ["fd00::1"]
    assert parse.service(obj).ip_families == (6,)
    obj["spec"]["clusterIPs"] = ["None"]
    assert parse.service(obj).ip_families == (4,)


def test_client_affinity_without_a_timeout_lasts_three_hours() -> None:
    assert parse.service(changed("spec.sessionAffinityConfig", None)).affinity_timeout_s == 10_800


def test_source_ranges_come_from_the_annotation_only_when_the_field_is_empty() -> None:
    obj = changed("spec.loadBalancerSourceRanges", [])
    obj["metadata"]["annotations"][parse.SOURCE_RANGES_ANNOTATION] = " 10.0.0.0/8 ,192.0.2.0/24,"
    assert parse.service(obj).source_ranges == ("10.0.0.0/8", "192.0.2.0/24")
    obj["spec"]["loadBalancerSourceRanges"] = ["198.51.100.0/24"]
    assert parse.service(obj).source_ranges == ("198.51.100.0/24",)


def test_a_service_with_a_deletion_time_is_being_deleted() -> None:
    assert parse.service(changed("metadata.deletionTimestamp", "2026-01-01T00:00:00Z")).deleting is True


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("spec.ports", [{"port": "80"}], "spec.ports[0].port is '80', not a whole number"),
        (
            "spec.ports",
            [{"port": 80, "protocol": "QUIC"}],
            "spec.ports[0].protocol is 'QUIC', not one of TCP, UDP, SCTP",
        ),
        ("spec.externalTrafficPolicy", "Some", "spec.externalTrafficPolicy is 'Some', not one of Cluster, Local"),
        ("spec.ipFamilies", ["IPv5"], "spec.ipFamilies is 'IPv5', not IPv4 or IPv6"),
        ("metadata.name", "", "metadata.name is '', not text"),
        (
            "status.loadBalancer",
            {"ingress": [{"ip": "1.2"}]},
            "status.loadBalancer.ingress[0].ip is '1.2', not an IP address",
        ),
        ("metadata.annotations", {"a": 1}, "metadata.annotations.a is 1, not text"),
        ("spec", [], "spec is [], not an object"),
    ],
)
def test_an_unreadable_service_is_refused_by_the_name_of_its_field(path: str, value: object, complaint: str) -> None:
    with pytest.raises(Unreadable) as caught:
        parse.service(changed(path, value))
    assert caught.value.message == complaint


# --- endpoints ----------------------------------------------------------------------------------


def make_slice(*endpoints: dict[str, Any], service: str | None = "web", type_: str = "IPv4") -> dict[str, Any]:
    labels = {parse.SERVICE_OF_SLICE_LABEL: service} if service else {}
    meta = {"name": "web-abc", "namespace": "shop", "labels": labels}
    return {"metadata": meta, "addressType": type_, "endpoints": list(endpoints), "ports": None}


def test_unset_conditions_mean_ready_serving_and_not_terminating() -> None:
    part = parse.endpoint_slice(make_slice({"addresses": ["10.0.0.1"], "nodeName": "n1"}, {"addresses": ["10.0.0.2"]}))
    assert part.service == ServiceKey("shop", "web")
    assert part.endpoints == (Endpoint(address="10.0.0.1", node="n1"), Endpoint(address="10.0.0.2"))


def test_set_conditions_are_kept() -> None:
    conditions = {"ready": False, "serving": True, "terminating": True}
    part = parse.endpoint_slice(make_slice({"addresses": ["10.0.0.1"], "conditions": conditions}))
    assert part.endpoints == (Endpoint(address="10.0.0.1", ready=False, serving=True, terminating=True),)


def test_a_slice_of_ipv6_gives_endpoints_of_family_6_and_one_of_names_gives_none() -> None:
    assert parse.endpoint_slice(make_slice({"addresses": ["fd00::A"]}, type_="IPv6")).endpoints == (
        Endpoint(address="fd00::a", family=6),
    )
    assert parse.endpoint_slice(make_slice({"addresses": ["x.example.com"]}, type_="FQDN")).endpoints == ()


def test_a_slice_without_the_label_belongs_to_nobody_and_no_endpoints_may_be_null() -> None:
    assert parse.endpoint_slice(make_slice(service=None)).service is None
    empty = make_slice()
    empty["endpoints"] = None
    assert parse.endpoint_slice(empty).endpoints == ()


def test_only_the_first_address_of_an_endpoint_counts() -> None:
    part = parse.endpoint_slice(make_slice({"addresses": ["10.0.0.1", "10.0.0.2"]}, {"addresses": []}))
    assert [endpoint.address for endpoint in part.endpoints] == ["10.0.0.1"]


# --- nodes and namespaces -----------------------------------------------------------------------


def test_a_node_is_read_with_addresses_taints_and_readiness() -> None:
    node = parse.node(
        {
            "metadata": {"name": "n1", "labels": {"zone": "a"}},
            "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": "10.0.0.1"},
                    {"type": "InternalIP", "address": "FD00::1"},
                    {"type": "Hostname", "address": "n1"},
                ],
                "conditions": [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": "Unknown"}],
            },
        }
    )
    assert node.addresses == (
        NodeAddress("InternalIP", "10.0.0.1"),
        NodeAddress("InternalIP", "fd00::1"),
        NodeAddress("Hostname", "n1"),
    )
    assert node.taints == ("ToBeDeletedByClusterAutoscaler",)
    assert node.labels == {"zone": "a"}
    assert node.ready is False
    assert node.deleting is False


def test_a_node_that_tells_nothing_of_readiness_counts_as_ready() -> None:
    assert parse.node({"metadata": {"name": "n1"}}).ready is True


def test_labels_of_a_namespace() -> None:
    assert parse.namespace_labels({"metadata": {"name": "shop", "labels": {"team": "a"}}}) == {"team": "a"}


# --- offline ------------------------------------------------------------------------------------


def test_documents_and_lists_are_sorted_by_kind_and_bad_ones_are_named() -> None:
    first = make_slice({"addresses": ["10.0.0.1"]})
    second = make_slice({"addresses": ["10.0.0.2"]})
    first["metadata"]["name"] = "web-aaa"
    documents = [
        None,
        {"kind": "Service", "metadata": {"name": "plain"}, "spec": {"ports": []}},
        {"kind": "List", "items": [FULL | {"kind": "Service"}, second | {"kind": "EndpointSlice"}]},
        {"kind": "EndpointSliceList", "items": [first]},
        {"kind": "Node", "metadata": {"name": "n1"}},
        {"kind": "Namespace", "metadata": {"name": "shop", "labels": {"a": "b"}}},
        {"kind": "Deployment", "metadata": {"name": "x"}},
        {"kind": "Service", "metadata": {"name": "bad"}, "spec": {"ports": [{"port": None}]}},
        "just text",
    ]
    found = parse.objects(documents)
    assert set(found.services) == {ServiceKey("default", "plain"), ServiceKey("shop", "web")}
    assert found.services[ServiceKey("default", "plain")].key.namespace == "default"
    endpoints = found.endpoints[ServiceKey("shop", "web")]
    assert [endpoint.address for endpoint in endpoints] == ["10.0.0.1", "10.0.0.2"]
    assert set(found.nodes) == {"n1"}
    assert found.namespace_labels == {"shop": {"a": "b"}}
    assert found.problems == {
        "Service default/bad": "spec.ports[0].port is None, not a whole number",
        "document 9": "the object is 'just text', not an object",
    }
