# SPDX-License-Identifier: Apache-2.0
"""The whole lab: ``with Lab.up(...) as lab`` gives the machines, and takes everything away at the end."""

import fcntl
import os
import secrets
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.lab import control_plane
from tests.lab.control_plane import Cluster
from tests.lab.fetch import fetch
from tests.lab.inventory import Inventory, inhabitants
from tests.lab.kube import Api, PodEndpoint, endpoint_slice
from tests.lab.lbhost import LbHost
from tests.lab.netns import Namespace
from tests.lab.poll import LabError, wait_for
from tests.lab.tap import Tap
from tests.lab.topology import HTTP_PORT, NodeAddresses, Topology
from tests.lab.tor import Tor

LABS = Path("/run")
POD_PROGRAM = Path(__file__).with_name("pod.py")


def folder_of(prefix: str) -> Path:
    """Where the lab with this prefix keeps its files; the same for who builds it and who removes it."""
    return LABS / f"{prefix}lab"


def random_prefix() -> str:
    """For tests: labs side by side do not meet."""
    return f"lbt-{secrets.token_hex(3)}-"


def is_used(folder: Path) -> bool:
    """Does a living process hold the lock of the lab in this folder?"""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@dataclass(kw_only=True)
class Pod:
    """A running pod. ``ready`` is what its EndpointSlice says."""

    name: str
    node: NodeAddresses
    v4: str
    v6: str
    ready: bool = True


@dataclass(kw_only=True)
class Lab:
    """The machines by role."""

    inventory: Inventory
    topology: Topology
    tor: Tor
    tap: Tap
    cluster: Cluster
    hosts: dict[str, LbHost]
    lock: IO[str]
    pods_by_service: dict[str, list[Pod]] = field(default_factory=dict)

    @classmethod
    def up(cls, *, prefix: str, kube: str = "embedded", lb_count: int = 2, node_count: int = 3) -> "Lab":
        """Everything but Services and running LB hosts. What a failure leaves half-built is removed."""
        folder = folder_of(prefix)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # FRR and ExaBGP run as users of their own
        lock = (folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise LabError(f"a lab {prefix}* is being used; choose another LBA_PREFIX") from None
        if (folder / "inventory.json").exists():
            lock.close()
            raise LabError(f"a lab {prefix}* is there already; remove it (make lab-down), or choose another LBA_PREFIX")
        inventory = Inventory(prefix=prefix, folder=folder)
        try:
            topology = Topology(inventory, lb_count=lb_count, node_count=node_count)
            topology.build()
            tor = Tor(topology)
            tor.start()
            tap = Tap(topology.tor, topology.lbs)
            tap.start()
            cluster = control_plane.choose(kube, inventory, topology)
            cluster.start()
            for node in topology.nodes:
                cluster.api.create_node(node.name, node.segment.addresses_only)
            cluster.serve_node_ports()
            hosts = {
                lb.name: LbHost(lb, topology=topology, inventory=inventory, cluster=cluster) for lb in topology.lbs
            }
        except BaseException:
            inventory.remove()
            lock.close()
            raise
        return cls(inventory=inventory, topology=topology, tor=tor, tap=tap, cluster=cluster, hosts=hosts, lock=lock)

    @property
    def api(self) -> Api:
        return self.cluster.api

    @property
    def client(self) -> Namespace:
        return self.topology.client

    @property
    def logs(self) -> list[Path]:
        return [log for host in self.hosts.values() for log in host.logs]

    def deploy(self, name: str, *, pods: int = 3, families: tuple[int, ...] = (4,), **spec: Any) -> list[Pod]:
        """A Service with pods spread over the nodes. Returns when every pod answers on its own address."""
        started = [self._start_pod(f"{name}-{number + 1}", number) for number in range(pods)]
        self.pods_by_service[name] = started
        if families == (6,):
            spec.setdefault("ipFamilies", ["IPv6"])
        elif families == (4, 6):
            spec.setdefault("ipFamilies", ["IPv4", "IPv6"])
            spec.setdefault("ipFamilyPolicy", "RequireDualStack")
        self.api.create_service(name, **spec)
        self.publish_endpoints(name, families=families)
        return started

    def _start_pod(self, name: str, number: int) -> Pod:
        nodes = self.topology.nodes
        node = nodes[number % len(nodes)]
        interface = self.topology.add_pod(node, name)
        place = self.topology.namespace(name)
        argv = [sys.executable, str(POD_PROGRAM), "--name", name, "--node", node.name]
        self.inventory.start(name, place.command(*argv))
        wait_for(
            f"pod {name} to listen",
            lambda: f":{HTTP_PORT} " in place.run("ss", "-Hltn"),
            limit_s=15,
            logs=[self.inventory.folder / f"{name}.log"],
        )
        return Pod(name=name, node=node, v4=interface.ip4, v6=interface.ip6)

    def publish_endpoints(self, name: str, *, families: tuple[int, ...] = (4,)) -> None:
        """Write the EndpointSlices of a Service from its pods."""
        for family in families:
            endpoints = tuple(
                PodEndpoint(
                    address=pod.v4 if family == 4 else pod.v6, node=pod.node.name, ready=pod.ready, serving=pod.ready
                )
                for pod in self.pods_by_service[name]
            )
            self.api.put_slice(endpoint_slice(name, endpoints))

    def wait_node_ports(self, name: str, *, limit_s: float = 20.0) -> None:
        """Until every node that has to serve this Service's TCP ports does, as a client sees it.

        LB hosts announce a Service as soon as its endpoints are ready; the nodes' rules come a little later.
        """
        spec = self.api.service(name)["spec"]
        ready = [pod.node for pod in self.pods_by_service[name] if pod.ready]
        local = spec.get("externalTrafficPolicy") == "Local"
        nodes = self.topology.nodes if ready and not local else ready
        families = [6 if word == "IPv6" else 4 for word in spec.get("ipFamilies") or ["IPv4"]]
        for port in (one["nodePort"] for one in spec["ports"] if one["protocol"] == "TCP"):
            for node in nodes:
                for address in (node.segment.ip4 if family == 4 else node.segment.ip6 for family in families):
                    url = f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/"
                    wait_for(
                        f"{node.name} to serve {url}",
                        partial(fetch, self.client, url),
                        limit_s=limit_s,
                        logs=[self.inventory.folder / "nodeport.log"],
                    )

    def undeploy(self, name: str) -> None:
        """Delete a Service, its slices and its pods; no matter how much of it is there."""
        self.api.delete_service(name)
        for family in ("ipv4", "ipv6"):
            self.api.delete(f"/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/{name}-{family}")
        for pod in self.pods_by_service.pop(name, ()):
            self.stop_pod(pod)

    def stop_pod(self, pod: Pod) -> None:
        """The process and its namespace; its EndpointSlice is not told."""
        place = self.topology.namespace(pod.name)
        self.inventory.kill_processes(inhabitants(place))
        place.delete()

    def has_service(self, name: str) -> bool:
        items = self.api.call("GET", "/api/v1/namespaces/default/services")["items"]
        return any(item["metadata"]["name"] == name for item in items)

    def addresses_of(self, name: str, *, limit_s: float = 20.0) -> tuple[str, ...]:
        """Wait for the addresses in the Service's status: one per family that it asks for."""

        def seen() -> tuple[str, ...]:
            item = self.api.service(name)
            ingress = item.get("status", {}).get("loadBalancer", {}).get("ingress") or ()
            families = item["spec"].get("ipFamilies") or ["IPv4"]
            return tuple(one["ip"] for one in ingress) if len(ingress) >= len(families) else ()

        return wait_for(f"addresses in the status of default/{name}", seen, limit_s=limit_s, logs=self.logs)

    def address_of(self, name: str) -> str:
        """The first one."""
        return self.addresses_of(name)[0]

    def wait_routes(self, address: str, hosts: tuple[str, ...], *, limit_s: float = 30.0) -> tuple[str, ...]:
        """Until the ToR's kernel spreads this VIP over exactly these LB hosts."""

        def seen() -> tuple[str, ...]:
            for name in hosts:
                self.hosts[name].check_alive()
            return self.tor.next_hops(address)

        return wait_for(
            f"the ToR's kernel to route {address} to {' and '.join(hosts) or 'nobody'}",
            seen,
            until=lambda now: now == hosts,
            limit_s=limit_s,
            logs=self.logs,
        )

    def release(self) -> None:
        """Leave the lab up and let go of it."""
        self.lock.close()

    def down(self) -> list[str]:
        """Remove everything; returns what could not be removed."""
        self.tor.stop()
        problems = self.inventory.remove()
        self.lock.close()
        return problems

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.environ.get("LBAGENT_KEEP_LAB") == "1":
            self.release()
            return
        problems = self.down()
        if problems and error is None:
            raise LabError("left behind: " + "; ".join(problems))
