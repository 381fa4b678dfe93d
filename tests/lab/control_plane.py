# SPDX-License-Identifier: Apache-2.0
"""The lab's Kubernetes API, in the namespace ``cp``, and whoever serves the node ports with it.

``Embedded``: the emulator and our own node ports. ``Real``: etcd, kube-apiserver and one kube-proxy per node;
the agents then have the rights of ``ansible/files/rbac.yaml`` and no more.
"""

import json
import sys
from typing import Protocol

import yaml

from tests.k8s.controlplane import ADMIN_TOKEN, PROXY_TOKEN, ControlPlane
from tests.lab.fetch import fetch
from tests.lab.inventory import REPOSITORY, Inventory, Process
from tests.lab.kube import Api, Refused
from tests.lab.poll import LabError, wait_for
from tests.lab.topology import CONTROL_PLANE, NodeAddresses, Topology

PORT = 6443
TOKEN = "lab"
HEALTH_URL = "http://127.0.0.1:10256/healthz"


class Cluster(Protocol):
    """What a lab needs of either form."""

    @property
    def api(self) -> Api:
        """For the lab itself, with every right."""

    @property
    def agent_token(self) -> str:
        """For lbagent."""

    def start(self) -> None:
        """Returns when the API answers."""

    def serve_node_ports(self) -> None:
        """Once the Nodes are registered."""

    @property
    def server(self) -> Process:
        """The process that can be killed or stopped."""


class Embedded:
    """No download, no Go, there in a second."""

    def __init__(self, inventory: Inventory, topology: Topology) -> None:
        self.inventory = inventory
        self.topology = topology
        place = topology.control_plane
        self.api = Api(url=f"http://{CONTROL_PLANE.ip4}:{PORT}", token=TOKEN, namespace=place)
        self.agent_token = TOKEN

    def start(self) -> None:
        emulator = [sys.executable, "-m", "tests.fakes.apiserver", "--listen", f"{CONTROL_PLANE.ip4}:{PORT}"]
        argv = self.api.namespace.command(*emulator, "--token", TOKEN)
        self.server = self.inventory.start("apiserver", argv)
        log = self.inventory.folder / "apiserver.log"
        wait_for("the embedded Kubernetes API", lambda: answers(self.api, "/api/v1/services"), limit_s=15, logs=[log])
        _create_namespaces(self.api)

    def serve_node_ports(self) -> None:
        pairs = [f"{node.name}={self.topology.namespace(node.name).name}" for node in self.topology.nodes]
        proxy = [sys.executable, "-m", "tests.lab.nodeport", "--url", self.api.url, "--token", TOKEN]
        self.inventory.start("nodeport", [*proxy, "--from-namespace", self.api.namespace.name, *pairs])
        for node in self.topology.nodes:
            _wait_healthy(self.inventory, self.topology, node, log="nodeport.log")


class Real:
    """The programs of a cluster, as they are."""

    def __init__(self, inventory: Inventory, topology: Topology) -> None:
        self.inventory = inventory
        self.topology = topology
        place = topology.control_plane
        self.plane = ControlPlane(
            inventory.folder / "control-plane",
            address=CONTROL_PLANE.ip4,
            port=PORT,
            enter=place.command(),
            spawn=inventory.start,
        )
        self.api = Api(url=self.plane.url, token=ADMIN_TOKEN, ca_file=self.plane.ca_file, namespace=place)
        self.agent_token = ""

    @property
    def server(self) -> Process:
        found = self.plane.processes["kube-apiserver"]
        assert isinstance(found, Process)
        return found

    def start(self) -> None:
        self.plane.start()
        logs = [self.inventory.folder / f"{name}.log" for name in ("etcd", "kube-apiserver")]
        wait_for("kube-apiserver to be ready", lambda: answers(self.api, "/readyz"), limit_s=90, logs=logs)
        _create_namespaces(self.api)
        for manifest in yaml.safe_load_all((REPOSITORY / "ansible/files/rbac.yaml").read_text()):
            self.api.apply(manifest)
        request = {"spec": {"expirationSeconds": 86400}}
        path = "/api/v1/namespaces/lbagent/serviceaccounts/lbagent/token"
        self.agent_token = self.api.call("POST", path, request)["status"]["token"]

    def serve_node_ports(self) -> None:
        kubeconfig = self.inventory.folder / "kube-proxy.kubeconfig"
        kubeconfig.write_text(json.dumps(self.api.kubeconfig(PROXY_TOKEN)))
        for node in self.topology.nodes:
            place = self.topology.namespace(node.name)
            argv = place.command(*self.plane.proxy_command(node.name, kubeconfig))
            self.inventory.start(f"kube-proxy-{node.name}", argv)
        for node in self.topology.nodes:
            _wait_healthy(self.inventory, self.topology, node, log=f"kube-proxy-{node.name}.log")


def choose(kube: str, inventory: Inventory, topology: Topology) -> Cluster:
    """By the word of ``KUBE=``."""
    forms: dict[str, type[Embedded] | type[Real]] = {"embedded": Embedded, "real": Real}
    if kube not in forms:
        raise LabError(f"KUBE={kube}: choose {' or '.join(forms)}")
    return forms[kube](inventory, topology)


def answers(api: Api, path: str) -> bool:
    if api.ca_file and not api.ca_file.exists():
        return False
    try:
        api.call("GET", path)
    except Refused:
        return False
    return True


def _create_namespaces(api: Api) -> None:
    for name in ("default", "lbagent"):
        api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})


def _wait_healthy(inventory: Inventory, topology: Topology, node: NodeAddresses, *, log: str) -> None:
    place = topology.namespace(node.name)
    wait_for(
        f"node ports of {node.name} to be served",
        lambda: fetch(place, HEALTH_URL).status == 200,
        limit_s=30,
        logs=[inventory.folder / log],
    )
