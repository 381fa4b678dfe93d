# SPDX-License-Identifier: Apache-2.0
"""The lab's Kubernetes API, in the namespace ``cp``: embedded (the emulator) or real."""

import sys

from tests.lab.inventory import Inventory
from tests.lab.kube import Api, Refused
from tests.lab.poll import wait_for
from tests.lab.topology import CONTROL_PLANE, Topology

EMBEDDED_PORT = 6443
TOKEN = "lab"


def start_embedded(inventory: Inventory, topology: Topology) -> Api:
    """The emulator, and one process that serves the node ports of all nodes."""
    place = topology.control_plane
    api = Api(url=f"http://{CONTROL_PLANE.ip4}:{EMBEDDED_PORT}", token=TOKEN, namespace=place)
    listen = f"{CONTROL_PLANE.ip4}:{EMBEDDED_PORT}"
    emulator = [sys.executable, "-m", "tests.fakes.apiserver", "--listen", listen, "--token", TOKEN]
    inventory.start("apiserver", place.command(*emulator))
    wait_for(
        "the embedded Kubernetes API", lambda: _answers(api), limit_s=15, logs=[inventory.folder / "apiserver.log"]
    )
    pairs = [f"{node.name}={topology.namespace(node.name).name}" for node in topology.nodes]
    proxy = [sys.executable, "-m", "tests.lab.nodeport", "--url", api.url, "--token", TOKEN]
    inventory.start("nodeport", [*proxy, "--from-namespace", place.name, *pairs])
    return api


def _answers(api: Api) -> bool:
    try:
        api.call("GET", "/api/v1/services")
    except Refused as error:
        return error.status < 500
    return True
