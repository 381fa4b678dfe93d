# SPDX-License-Identifier: Apache-2.0
"""What lbagent relies on, asked of the emulator and of a real kube-apiserver alike.

A behaviour that the emulator imitates has its case here; where the two differ, the real one is right.
"""

import asyncio
import uuid

from tests.k8s.conftest import EVENTS, LEASES, NODES, SERVICES, SLICES, STRATEGIC, Api

TIMES = "2026-01-01T00:00:00Z"


# --- what a Service is given --------------------------------------------------------------------


async def test_a_load_balancer_gets_a_cluster_address_and_a_node_port_for_each_port(api: Api) -> None:
    spec = (await api.make_service(ports=[{"name": "a", "port": 80}, {"name": "b", "port": 443}]))["spec"]
    assert spec["clusterIP"].startswith("10.96.")
    ports = [port["nodePort"] for port in spec["ports"]]
    assert len(set(ports)) == 2
    assert all(30000 <= port <= 32767 for port in ports)
    assert spec["externalTrafficPolicy"] == "Cluster"
    assert spec["allocateLoadBalancerNodePorts"] is True


async def test_the_same_port_in_two_protocols_gets_one_node_port_number(api: Api) -> None:
    ports = [{"name": "t", "port": 53}, {"name": "u", "port": 53, "protocol": "UDP"}]
    spec = (await api.make_service(ports=ports))["spec"]
    assert spec["ports"][0]["nodePort"] == spec["ports"][1]["nodePort"]
    assert spec["ports"][0]["protocol"] == "TCP"


async def test_local_policy_brings_a_health_check_port_and_cluster_policy_takes_it(api: Api) -> None:
    assert (await api.make_service(externalTrafficPolicy="Local"))["spec"]["healthCheckNodePort"] >= 30000
    answer = await api.patch({"spec": {"externalTrafficPolicy": "Cluster"}})
    assert "healthCheckNodePort" not in answer.body["spec"]


async def test_without_node_port_allocation_there_is_none_but_still_a_health_check_port(api: Api) -> None:
    spec = (await api.make_service(allocateLoadBalancerNodePorts=False, externalTrafficPolicy="Local"))["spec"]
    assert "nodePort" not in spec["ports"][0]
    assert spec["healthCheckNodePort"] >= 30000


async def test_a_chosen_node_port_is_honoured_once_and_only_from_the_range(api: Api) -> None:
    taken = (await api.make_service("a"))["spec"]["ports"][0]["nodePort"]
    assert (await api.try_service("b", ports=[{"port": 80, "nodePort": taken}])).code == 422
    assert (await api.try_service("b", ports=[{"port": 80, "nodePort": 20000}])).code == 422


async def test_a_node_port_stays_while_the_service_is_patched_and_is_free_after_it(api: Api) -> None:
    port = (await api.make_service("a"))["spec"]["ports"][0]["nodePort"]
    assert (await api.patch({"metadata": {"labels": {"x": "y"}}}, name="a")).body["spec"]["ports"][0][
        "nodePort"
    ] == port
    await api.call("DELETE", f"{SERVICES.format(api.namespace)}/a")
    assert (await api.make_service("b", ports=[{"port": 80, "nodePort": port}]))["spec"]["ports"][0]["nodePort"] == port


async def test_two_families_get_two_cluster_addresses_and_one_can_be_given_back(api: Api) -> None:
    spec = (await api.make_service(ipFamilyPolicy="RequireDualStack"))["spec"]
    assert spec["ipFamilies"] == ["IPv4", "IPv6"]
    assert ":" in spec["clusterIPs"][1]
    spec = (await api.patch({"spec": {"ipFamilyPolicy": "SingleStack"}})).body["spec"]
    assert spec["ipFamilies"] == ["IPv4"]
    assert len(spec["clusterIPs"]) == 1


async def test_client_affinity_has_a_default_timeout(api: Api) -> None:
    spec = (await api.make_service(sessionAffinity="ClientIP"))["spec"]
    assert spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"] == 10800


# --- what is refused ----------------------------------------------------------------------------


async def test_a_malformed_source_range_is_refused_but_blanks_are_stored(api: Api) -> None:
    assert (await api.try_service(loadBalancerSourceRanges=["nonsense"])).code == 422
    spec = (await api.make_service(loadBalancerSourceRanges=[" 192.0.2.0/24"]))["spec"]
    assert spec["loadBalancerSourceRanges"] == [" 192.0.2.0/24"]


async def test_the_class_of_a_load_balancer_cannot_change(api: Api) -> None:
    await api.make_service(loadBalancerClass="example.com/a")
    assert (await api.patch({"spec": {"loadBalancerClass": "example.com/b"}})).code == 422


async def test_a_stale_resource_version_is_a_conflict_and_none_means_the_last_writer_wins(api: Api) -> None:
    old = (await api.make_service())["metadata"]["resourceVersion"]
    await api.patch({"metadata": {"labels": {"a": "b"}}})
    stale = {"metadata": {"resourceVersion": old}, "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}}
    assert (await api.patch(stale, status=True)).code == 409
    del stale["metadata"]
    assert (await api.patch(stale, status=True)).code == 200


async def test_nobody_gets_in_without_a_good_token(api: Api) -> None:
    path = SERVICES.format(api.namespace)
    assert (await api.call("GET", path, token=None)).code == 403
    assert (await api.call("GET", path, token="wrong")).code == 401


async def test_what_is_not_there_is_not_found(api: Api) -> None:
    assert (await api.call("GET", f"{SERVICES.format(api.namespace)}/none")).code == 404
    body = {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}}
    assert (await api.call("POST", SERVICES.format("no-such-namespace"), body)).code == 404


# --- status -------------------------------------------------------------------------------------


async def test_the_ip_mode_is_vip_unless_it_says_proxy(api: Api) -> None:
    await api.make_service()

    async def put(entry: dict[str, str]) -> int:
        answer = await api.patch({"status": {"loadBalancer": {"ingress": [entry]}}}, status=True)
        return answer.code

    assert await put({"ip": "192.0.2.1"}) == 200
    assert (await api.service())["status"]["loadBalancer"]["ingress"] == [{"ip": "192.0.2.1", "ipMode": "VIP"}]
    assert await put({"ip": "192.0.2.1", "ipMode": "Proxy"}) == 200
    assert await put({"ip": "192.0.2.1", "ipMode": "Other"}) == 422
    assert await put({"hostname": "example.com", "ipMode": "VIP"}) == 422


async def test_a_port_of_the_status_may_carry_an_error(api: Api) -> None:
    await api.make_service(ports=[{"name": "s", "port": 5000, "protocol": "SCTP"}])
    entry = {
        "ip": "192.0.2.1",
        "ports": [{"port": 5000, "protocol": "SCTP", "error": "lbagent.io/ProtocolNotSupported"}],
    }
    assert (await api.patch({"status": {"loadBalancer": {"ingress": [entry]}}}, status=True)).code == 200
    assert (await api.service())["status"]["loadBalancer"]["ingress"] == [entry | {"ipMode": "VIP"}]


async def test_a_status_sent_to_the_main_resource_is_ignored(api: Api) -> None:
    await api.make_service()
    assert (await api.patch({"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}})).code == 200
    assert (await api.service())["status"]["loadBalancer"] == {}


async def test_a_spec_sent_to_the_status_is_ignored(api: Api) -> None:
    await api.make_service()
    assert (await api.patch({"spec": {"externalTrafficPolicy": "Local"}}, status=True)).code == 200
    assert (await api.service())["spec"]["externalTrafficPolicy"] == "Cluster"


async def test_another_type_clears_addresses_and_node_ports_but_not_conditions(api: Api) -> None:
    await api.make_service()
    condition = {"type": "x/y", "status": "True", "reason": "r", "message": "m", "lastTransitionTime": TIMES}
    status = {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}, "conditions": [condition]}
    await api.patch({"status": status}, status=True)
    changed = (await api.patch({"spec": {"type": "ClusterIP"}})).body
    assert changed["status"]["loadBalancer"] == {}
    assert "nodePort" not in changed["spec"]["ports"][0]
    assert changed["status"]["conditions"][0]["type"] == "x/y"
    back = (await api.patch({"spec": {"type": "LoadBalancer"}})).body
    assert back["spec"]["ports"][0]["nodePort"] >= 30000


async def test_a_strategic_patch_merges_conditions_by_type(api: Api) -> None:
    await api.make_service()

    async def put(**condition: str) -> list[dict[str, str]]:
        answer = await api.patch({"status": {"conditions": [condition]}}, status=True, form=STRATEGIC)
        assert answer.code == 200, answer
        found: list[dict[str, str]] = answer.body["status"].get("conditions", [])
        return found

    whole = {"status": "True", "reason": "r", "message": "m", "lastTransitionTime": TIMES}
    await put(type="a", **whole)
    assert [c["type"] for c in await put(type="b", **whole)] in (["a", "b"], ["b", "a"])
    merged = {c["type"]: c for c in await put(type="a", status="True", reason="other", message="n")}
    assert merged["a"]["reason"] == "other"
    assert merged["a"]["lastTransitionTime"] == TIMES
    left = await put(**{"type": "a", "$patch": "delete"})
    assert [c["type"] for c in left] == ["b"]


async def test_addresses_and_finalizer_travel_in_one_patch_of_the_status(api: Api) -> None:
    await api.make_service()
    await api.patch({"metadata": {"finalizers": ["example.com/other"]}})
    both = {
        "metadata": {"finalizers": ["example.com/ours"]},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}},
    }
    assert (await api.patch(both, status=True, form=STRATEGIC)).code == 200
    service = await api.service()
    assert set(service["metadata"]["finalizers"]) == {"example.com/other", "example.com/ours"}
    assert service["status"]["loadBalancer"]["ingress"][0]["ip"] == "192.0.2.1"
    off = {
        "metadata": {"$deleteFromPrimitiveList/finalizers": ["example.com/ours"]},
        "status": {"loadBalancer": {"ingress": None}},
    }
    assert (await api.patch(off, status=True, form=STRATEGIC)).code == 200
    service = await api.service()
    assert service["metadata"]["finalizers"] == ["example.com/other"]
    assert "ingress" not in service["status"]["loadBalancer"]


async def test_a_write_that_changes_nothing_makes_no_new_version(api: Api) -> None:
    await api.make_service()
    patch = {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1", "ipMode": "Proxy"}]}}}
    first = (await api.patch(patch, status=True)).body["metadata"]["resourceVersion"]
    assert (await api.patch(patch, status=True)).body["metadata"]["resourceVersion"] == first


async def test_a_write_may_bring_its_own_time_limit(api: Api) -> None:
    await api.make_service()
    path = f"{SERVICES.format(api.namespace)}/web/status?timeout=2500ms"
    assert (await api.call("PATCH", path, {"status": {"loadBalancer": {}}})).code == 200


# --- deletion -----------------------------------------------------------------------------------


async def test_a_finalizer_keeps_the_object_until_it_is_taken_off(api: Api) -> None:
    await api.make_service()
    await api.patch({"metadata": {"finalizers": ["example.com/ours"]}})
    await api.call("DELETE", f"{SERVICES.format(api.namespace)}/web")
    assert "deletionTimestamp" in (await api.service())["metadata"]
    off = {"metadata": {"$deleteFromPrimitiveList/finalizers": ["example.com/ours"]}}
    assert (await api.patch(off, status=True, form=STRATEGIC)).code == 200
    assert (await api.call("GET", f"{SERVICES.format(api.namespace)}/web")).code == 404


# --- other kinds --------------------------------------------------------------------------------


async def test_a_node_made_by_hand_carries_a_taint_and_takes_its_addresses_by_status(api: Api) -> None:
    name = f"n-{uuid.uuid4().hex[:6]}"
    node = (await api.call("POST", NODES, {"metadata": {"name": name}})).body
    assert [taint["key"] for taint in node["spec"]["taints"]] == ["node.kubernetes.io/not-ready"]
    status = {"addresses": [{"type": "InternalIP", "address": "192.0.2.9"}]}
    answer = await api.call("PATCH", f"{NODES}/{name}/status", {"status": status})
    assert answer.body["status"]["addresses"] == status["addresses"]


async def test_a_namespace_carries_its_name_as_a_label(api: Api) -> None:
    body = (await api.call("GET", f"/api/v1/namespaces/{api.namespace}")).body
    assert body["metadata"]["labels"]["kubernetes.io/metadata.name"] == api.namespace


async def test_an_endpoint_slice_is_stored_as_sent(api: Api) -> None:
    endpoint = {"addresses": ["10.0.0.1"], "nodeName": "n1", "conditions": {"ready": False, "serving": True}}
    body = {
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [endpoint],
        "ports": [{"name": "", "protocol": "TCP", "port": 8080}],
    }
    assert (await api.call("POST", SLICES.format(api.namespace), body)).body["endpoints"] == [endpoint]


async def test_a_lease_can_stand_free_be_taken_and_be_given_back(api: Api) -> None:
    folder = LEASES.format(api.namespace)
    lease = (await api.call("POST", folder, {"metadata": {"name": "l"}, "spec": {}})).body
    for holder in ("me", ""):
        lease["spec"] = {"holderIdentity": holder, "leaseDurationSeconds": 15, "leaseTransitions": 1}
        lease["spec"]["renewTime"] = "2026-11-26T17:56:49.408026Z"
        stale = lease
        answer = await api.call("PUT", f"{folder}/l", lease)
        assert answer.code == 200, answer
        lease = answer.body
    assert (await api.call("PUT", f"{folder}/l", stale)).code == 409
    assert (await api.call("POST", folder, {"metadata": {"name": "l"}, "spec": {}})).code == 409


async def test_an_event_is_counted_under_its_name(api: Api) -> None:
    service = await api.make_service()
    body = {
        "metadata": {"name": "web.1"},
        "involvedObject": {
            "kind": "Service",
            "namespace": api.namespace,
            "name": "web",
            "uid": service["metadata"]["uid"],
        },
        "type": "Warning",
        "reason": "AllocationFailed",
        "message": "m",
        "count": 1,
        "firstTimestamp": TIMES,
        "lastTimestamp": TIMES,
    }
    assert (await api.call("POST", EVENTS.format(api.namespace), body)).code == 201
    assert (await api.call("POST", EVENTS.format(api.namespace), body)).code == 409
    answer = await api.call("PATCH", f"{EVENTS.format(api.namespace)}/web.1", {"count": 2, "lastTimestamp": TIMES})
    assert answer.body["count"] == 2


# --- lists and watches --------------------------------------------------------------------------


async def test_pages_of_a_list_are_one_moment(api: Api) -> None:
    for name in ("a", "b", "c"):
        await api.make_service(name)
    path = SERVICES.format(api.namespace)
    first = (await api.call("GET", f"{path}?limit=2")).body
    await api.make_service("d")
    token = first["metadata"]["continue"]
    second = (await api.call("GET", f"{path}?limit=2&continue={token}")).body
    assert [item["metadata"]["name"] for page in (first, second) for item in page["items"]] == ["a", "b", "c"]
    assert "continue" not in second["metadata"]
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert "kind" not in first["items"][0]


async def test_a_watch_tells_what_happened_since_and_ends_at_its_time(api: Api) -> None:
    path = SERVICES.format(api.namespace)
    version = (await api.call("GET", path)).body["metadata"]["resourceVersion"]
    await api.make_service()
    await api.patch({"metadata": {"labels": {"a": "b"}}})
    await api.call("DELETE", f"{path}/web")
    events = await api.watch(path, resourceVersion=version, timeoutSeconds=1)
    assert [event["type"] for event in events] == ["ADDED", "MODIFIED", "DELETED"]
    versions = [int(event["object"]["metadata"]["resourceVersion"]) for event in events]
    assert versions == sorted(set(versions))
    assert events[0]["object"]["kind"] == "Service"


async def test_a_watch_gets_a_bookmark_before_its_end(api: Api) -> None:
    path = SERVICES.format(api.namespace)
    version = (await api.call("GET", path)).body["metadata"]["resourceVersion"]

    async def write_a_little() -> None:  # the real one sends no bookmark before something has happened
        for number in range(5):
            await api.make_service(f"s{number}")
            await asyncio.sleep(0.3)

    watching = api.watch(path, resourceVersion=version, timeoutSeconds=5, allowWatchBookmarks="true")
    events, _ = await asyncio.gather(watching, write_a_little())
    marks = [event["object"] for event in events if event["type"] == "BOOKMARK"]
    assert marks
    assert int(marks[-1]["metadata"]["resourceVersion"]) > int(version)


async def test_after_a_restart_an_old_version_is_gone_inside_an_answer_of_200(api: Api) -> None:
    path = SERVICES.format(api.namespace)
    version = (await api.call("GET", path)).body["metadata"]["resourceVersion"]
    await api.make_service()
    await api.restart()
    events = await api.watch(path, resourceVersion=version, timeoutSeconds=5)
    assert [event["type"] for event in events] == ["ERROR"]
    assert events[0]["object"]["code"] == 410
    assert events[0]["object"]["reason"] == "Expired"


async def test_a_watch_from_the_future_says_nothing(api: Api) -> None:
    path = SERVICES.format(api.namespace)
    version = int((await api.call("GET", path)).body["metadata"]["resourceVersion"])
    events = await api.watch(path, resourceVersion=version + 1_000_000, timeoutSeconds=1)
    assert events == []


async def test_a_limited_list_tells_the_present_version(api: Api) -> None:
    path = SERVICES.format(api.namespace)
    before = int((await api.call("GET", f"{path}?limit=1")).body["metadata"]["resourceVersion"])
    await api.make_service()
    await asyncio.sleep(0)
    assert int((await api.call("GET", f"{path}?limit=1")).body["metadata"]["resourceVersion"]) > before
