# SPDX-License-Identifier: Apache-2.0
"""The lab's own view of the Kubernetes API: a few JSON calls from inside a namespace, and the objects it makes.

Not lbagent's client on purpose: what the lab reads back does not depend on the code that it examines.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.fetch import fetch
from tests.lab.netns import Namespace
from tests.lab.poll import LabError

Object = dict[str, Any]

FOLDER_BY_KIND = {
    "Namespace": "namespaces",
    "ServiceAccount": "serviceaccounts",
    "Secret": "secrets",
    "Lease": "leases",
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "Role": "roles",
    "RoleBinding": "rolebindings",
}


class Refused(LabError):
    """The API answered no. ``status`` is the HTTP status."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Api:
    """Where the API is and who we are; requests leave from ``namespace``."""

    url: str
    token: str
    namespace: Namespace
    ca_file: Path | None = None

    def call(self, method: str, path: str, body: Object | None = None, *, patch: str = "merge") -> Object:
        """One request. Raises Refused on an HTTP error, OSError when the API cannot be reached."""
        kind = f"application/{patch}-patch+json" if method == "PATCH" else "application/json"
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind, "Accept": "application/json"}
        text = json.dumps(body) if body is not None else None
        url = self.url + path
        response = fetch(self.namespace, url, method=method, body=text, headers=headers, ca_file=self.ca_file)
        if response.status >= 400:
            raise Refused(f"{method} {path}: {response.status} {response.text[:500]}", status=response.status)
        if not response.text.startswith("{"):
            return {"text": response.text}  # /readyz says ok
        answer: Object = json.loads(response.text)
        return answer

    def kubeconfig(self, token: str = "") -> Object:
        """As a file for lbagent and kube-proxy; JSON is YAML."""
        cluster: Object = {"server": self.url}
        if self.ca_file:
            cluster["certificate-authority"] = str(self.ca_file)
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "lab", "user": {"token": token or self.token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
            "current-context": "lab",
        }

    def apply(self, manifest: Object) -> None:
        """Create an object of any kind in FOLDER_BY_KIND, unless it is there."""
        meta = manifest["metadata"]
        root = "/api/v1" if manifest["apiVersion"] == "v1" else f"/apis/{manifest['apiVersion']}"
        space = f"/namespaces/{meta['namespace']}" if "namespace" in meta else ""
        try:
            self.call("POST", f"{root}{space}/{FOLDER_BY_KIND[manifest['kind']]}", manifest)
        except Refused as error:
            if error.status != 409:
                raise

    def create_node(self, name: str, addresses: tuple[str, ...]) -> None:
        self.call("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
        status = {
            "addresses": [{"type": "InternalIP", "address": address} for address in addresses],
            "conditions": [{"type": "Ready", "status": "True", "reason": "Lab", "message": "made by hand"}],
        }
        self.call("PATCH", f"/api/v1/nodes/{name}/status", {"status": status})

    def create_service(self, name: str, *, namespace: str = "default", **spec: Any) -> Object:
        return self.call("POST", f"/api/v1/namespaces/{namespace}/services", service(name, namespace=namespace, **spec))

    def service(self, name: str, *, namespace: str = "default") -> Object:
        return self.call("GET", f"/api/v1/namespaces/{namespace}/services/{name}")

    def delete_service(self, name: str, *, namespace: str = "default") -> None:
        self.delete(f"/api/v1/namespaces/{namespace}/services/{name}")

    def delete(self, path: str) -> None:
        """Delete what may already be gone."""
        try:
            self.call("DELETE", path)
        except Refused as error:
            if error.status != 404:
                raise

    def put_slice(self, slice_: Object) -> None:
        """Create an EndpointSlice, or replace its endpoints."""
        meta = slice_["metadata"]
        folder = f"/apis/discovery.k8s.io/v1/namespaces/{meta['namespace']}/endpointslices"
        try:
            self.call("POST", folder, slice_)
        except Refused as error:
            if error.status != 409:
                raise
            self.call("PATCH", f"{folder}/{meta['name']}", {"endpoints": slice_["endpoints"]})

    def events(self, *, namespace: str = "default") -> list[Object]:
        items: list[Object] = self.call("GET", f"/api/v1/namespaces/{namespace}/events").get("items", [])
        return items


def service(
    name: str,
    *,
    namespace: str = "default",
    ports: tuple[tuple[str, str, int], ...] = (("http", "TCP", 80), ("ask", "UDP", 53)),
    annotations: dict[str, str] | None = None,
    **spec: Any,
) -> Object:
    """A Service of type LoadBalancer. ``ports``: (name, protocol, port). ``spec`` adds or replaces fields."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "annotations": annotations or {}},
        "spec": {
            "type": "LoadBalancer",
            "ports": [{"name": label, "protocol": protocol, "port": port} for label, protocol, port in ports],
            **spec,
        },
    }


@dataclass(frozen=True, kw_only=True)
class PodEndpoint:
    """A pod as an EndpointSlice tells of it."""

    address: str
    node: str
    ready: bool = True
    serving: bool = True
    terminating: bool = False


def endpoint_slice(
    service_name: str,
    endpoints: tuple[PodEndpoint, ...],
    *,
    namespace: str = "default",
    ports: tuple[tuple[str, str, int], ...] = (("http", "TCP", 8080), ("ask", "UDP", 8081)),
) -> Object:
    """The slice of one family, made by hand. ``ports``: (name of the Service's port, protocol, pod's port)."""
    family = "IPv6" if endpoints and ":" in endpoints[0].address else "IPv4"
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{service_name}-{family.lower()}",
            "namespace": namespace,
            "labels": {"kubernetes.io/service-name": service_name},
        },
        "addressType": family,
        "ports": [{"name": name, "protocol": protocol, "port": port} for name, protocol, port in ports],
        "endpoints": [
            {
                "addresses": [one.address],
                "nodeName": one.node,
                "conditions": {"ready": one.ready, "serving": one.serving, "terminating": one.terminating},
            }
            for one in endpoints
        ],
    }
