# SPDX-License-Identifier: Apache-2.0
"""The rights in ansible/files/rbac.yaml, on a real API server: enough, and no more."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lbagent.config import Kubernetes, LeaseConfig
from lbagent.errors import KubeRejected
from lbagent.kube.cluster import Cluster
from lbagent.metrics import Metrics
from lbagent.model.reason import Judgement, Reason
from tests.k8s.conftest import EVENTS, LEASES, NODES, SERVICES, STRATEGIC, Api
from tests.k8s.test_faults import Clocks, assignment, eventually, holds, key, running

pytestmark = pytest.mark.k8s

MANIFEST = Path(__file__).resolve().parents[2] / "ansible/files/rbac.yaml"
CORE = {"Namespace": "namespaces", "ServiceAccount": "serviceaccounts", "Secret": "secrets"}
RBAC = {kind: kind.lower() + "s" for kind in ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")}


def folder_of(manifest: dict[str, Any]) -> str:
    """Where an object of a manifest is posted."""
    group, kind = manifest["apiVersion"], manifest["kind"]
    root = "/api/v1" if group == "v1" else f"/apis/{group}"
    plural = {**CORE, **RBAC, "Lease": "leases"}[kind]
    namespace = manifest["metadata"].get("namespace")
    return f"{root}/namespaces/{namespace}/{plural}" if namespace else f"{root}/{plural}"


@dataclass(frozen=True)
class Account:
    """lbagent's ServiceAccount and a token of it."""

    api: Api
    token: str

    async def code(self, method: str, path: str, body: dict[str, Any] | None = None, *, form: str = "") -> int:
        return (await self.api.call(method, path, body, form=form, token=self.token)).code


@pytest.fixture
async def account(real: Api) -> AsyncIterator[Account]:
    manifests = list(yaml.safe_load_all(MANIFEST.read_text()))
    for manifest in manifests:
        answer = await real.call("POST", folder_of(manifest), manifest)
        assert answer.code in (201, 409), answer
    path = "/api/v1/namespaces/lbagent/serviceaccounts/lbagent/token"
    answer = await real.call("POST", path, {"spec": {"expirationSeconds": 3600}})
    assert answer.code == 201, answer
    yield Account(real, answer.body["status"]["token"])
    for manifest in reversed(manifests):
        if manifest["kind"] != "Namespace":  # nobody is there who would end its Terminating
            await real.call("DELETE", f"{folder_of(manifest)}/{manifest['metadata']['name']}")


def make_cluster(account: Account, folder: Path) -> Cluster:
    settings = Kubernetes(
        kubeconfig=account.api.kubeconfig(folder / "kubeconfig", token=account.token),
        lease=LeaseConfig(duration_s=3, renew_s=0.3),
    )
    return Cluster(settings, host="lb1", clocks=Clocks(), metrics=Metrics(version="test", process=False))


async def test_with_these_rights_everything_works(account: Account, tmp_path: Path) -> None:
    api = account.api
    cluster = make_cluster(account, tmp_path)
    async with running(cluster):
        await api.make_service()
        await eventually(lambda: cluster.listed and key(api) in cluster.services and holds(cluster))
        await cluster.assign(assignment(api))
        await cluster.report(key(api), Judgement(reason=Reason.SATISFIED))
        await eventually(lambda: cluster.services[key(api)].finalizers)
        await cluster.release(key(api), ("192.0.2.1",))
    service = await api.service()
    assert not service["metadata"].get("finalizers")
    assert [c["reason"] for c in service["status"]["conditions"]] == ["satisfied"]
    lease = (await api.call("GET", f"{LEASES.format('lbagent')}/lbagent")).body
    assert lease["spec"]["holderIdentity"] == ""
    reasons = {event["reason"] for event in (await api.call("GET", EVENTS.format(api.namespace))).body["items"]}
    assert reasons == {"IPAllocated", "EnsuredLoadBalancer", "DeletedLoadBalancer"}


async def test_an_event_of_an_earlier_process_may_be_patched(account: Account, tmp_path: Path) -> None:
    api = account.api
    await api.make_service()
    for _ in range(2):
        cluster = make_cluster(account, tmp_path)
        async with running(cluster):
            await eventually(lambda: key(api) in cluster.services and holds(cluster))  # noqa: B023
            await cluster.report(key(api), Judgement(reason=Reason.OUT_OF_IPS))
    events = (await api.call("GET", EVENTS.format(api.namespace))).body["items"]
    assert [event["reason"] for event in events] == ["AllocationFailed"]


async def test_nothing_else_is_allowed(account: Account) -> None:
    api = account.api
    await api.make_service()
    service = f"{SERVICES.format(api.namespace)}/web"
    assert await account.code("GET", SERVICES.format(api.namespace)) == 200
    for method, path, body in [
        ("GET", service, None),
        ("PATCH", service, {"spec": {"externalTrafficPolicy": "Local"}}),
        ("PUT", f"{service}/status", await api.service()),
        ("DELETE", service, None),
        ("POST", SERVICES.format(api.namespace), {"metadata": {"name": "x"}, "spec": {"ports": [{"port": 1}]}}),
        ("GET", "/api/v1/secrets", None),
        ("GET", "/api/v1/namespaces/lbagent/secrets/lbagent-token", None),
        ("GET", "/api/v1/pods", None),
        ("GET", EVENTS.format(api.namespace), None),
        ("PATCH", f"{NODES}/x/status", {}),
        ("GET", LEASES.format("lbagent"), None),
        ("GET", f"{LEASES.format('lbagent')}/other", None),
        ("DELETE", f"{LEASES.format('lbagent')}/lbagent", None),
        ("POST", LEASES.format(api.namespace), {"metadata": {"name": "x"}, "spec": {}}),
    ]:
        assert await account.code(method, path, body) == 403, (method, path)


async def test_the_status_right_reaches_annotations_and_finalizers_of_any_service(account: Account) -> None:
    """Not wanted, but so it is; SECURITY.md says so."""
    api = account.api
    await api.make_service()
    body = {"metadata": {"annotations": {"a": "b"}, "finalizers": ["example.com/x"]}}
    assert await account.code("PATCH", f"{SERVICES.format(api.namespace)}/web/status", body, form=STRATEGIC) == 200
    assert (await api.service())["metadata"]["annotations"] == {"a": "b"}


@pytest.mark.timeout(180)
async def test_a_deleted_account_ends_the_right_to_write_and_what_is_known_stays(
    account: Account, tmp_path: Path
) -> None:
    api = account.api
    await api.make_service()
    cluster = make_cluster(account, tmp_path)
    async with running(cluster):
        await eventually(lambda: key(api) in cluster.services and holds(cluster))
        await api.call("DELETE", "/api/v1/namespaces/lbagent/serviceaccounts/lbagent")
        began = time.monotonic()
        await eventually(lambda: not holds(cluster), limit_s=60)  # the server believes the token for 10 s more
        assert key(api) in cluster.services
        assert cluster.listed
        with pytest.raises(KubeRejected) as caught:
            await cluster._client.get("/api/v1/services")
        assert caught.value.status == 401
        assert time.monotonic() - began < 60
