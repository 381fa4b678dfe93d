# SPDX-License-Identifier: Apache-2.0
"""Node ports without kube-proxy: the smallest nftables rule set with kube-proxy's observable behaviour.

Runs beside the embedded API as ``python -m tests.lab.nodeport``, one process for all nodes. Every node gets:

* node port, policy Cluster: any usable endpoint, source masqueraded
* node port, policy Local: local endpoints only, source kept; dropped when there is none
* no endpoint anywhere: refused
* ``ingress[].ip`` with ipMode VIP: the same for VIP:port (dsr modes stand on it)
* ``:10256/healthz`` and, for policy Local, the healthCheckNodePort

Like kube-proxy it falls back to endpoints that terminate but still serve when none is ready. Left out:
ClusterIPs, session affinity, topology hints, and forgetting UDP flows of endpoints that went.
"""

import argparse
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.lab.kube import Api, Object
from tests.lab.netns import Namespace
from tests.lab.poll import LabError

TABLE = "lab_proxy"
MASQUERADE_MARK = "0x4000"  # kube-proxy's
LOOK_S = 0.1
HEALTH_PORT = 10256


def usable(endpoints: list[Object]) -> list[Object]:
    """Ready ones, else those that terminate but serve (KEP-1669)."""
    ready = [one for one in endpoints if one.get("conditions", {}).get("ready", True)]
    return ready or [
        one for one in endpoints if one.get("conditions", {}).get("serving") and one["conditions"].get("terminating")
    ]


def targets(slices: list[Object], port_name: str, family: int, *, node: str = "") -> list[tuple[str, int]]:
    """(address, port) of the usable endpoints of one Service port; ``node`` narrows to local ones."""
    wanted = "IPv6" if family == 6 else "IPv4"
    endpoints: list[Object] = []
    for slice_ in slices:
        if slice_["addressType"] == wanted:
            for port in slice_.get("ports") or ():
                if (port.get("name") or "") == port_name:
                    endpoints += [{**one, "port": port["port"]} for one in slice_.get("endpoints") or ()]
    if node:
        endpoints = [one for one in endpoints if one.get("nodeName") == node]
    return sorted({(one["addresses"][0], one["port"]) for one in usable(endpoints)})


def rules(node: str, services: list[Object], slices_by_service: dict[str, list[Object]]) -> str:
    """The complete rule set of one node (pure)."""
    translate: list[str] = []
    refuse: list[str] = []
    for item in sorted(services, key=lambda one: one["metadata"]["name"]):
        meta, spec = item["metadata"], item["spec"]
        slices = slices_by_service.get(f"{meta['namespace']}/{meta['name']}", [])
        local = spec.get("externalTrafficPolicy") == "Local"
        for port in spec.get("ports") or ():
            protocol = port.get("protocol", "TCP").lower()
            for family in (4, 6):
                everywhere = targets(slices, port.get("name") or "", family)
                here = targets(slices, port.get("name") or "", family, node=node) if local else everywhere
                for match in _matches(item, port, protocol, family):
                    if here:
                        translate.append(_translate(match, here, family, masquerade=not local))
                    elif everywhere:
                        refuse.append(f"{match} drop")
                    else:
                        refuse.append(f"{match} reject")
    join = "\n    ".join
    return f"""
table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    {join(translate)}
  }}
  chain refused {{
    type filter hook prerouting priority -110; policy accept;
    {join(line for line in refuse if line.endswith("drop"))}
  }}
  chain input {{
    type filter hook input priority 0; policy accept;
    {join(line for line in refuse if line.endswith("reject"))}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    meta mark & {MASQUERADE_MARK} == {MASQUERADE_MARK} masquerade fully-random
  }}
}}
"""


def _matches(item: Object, port: Object, protocol: str, family: int) -> Iterator[str]:
    word = "ip6" if family == 6 else "ip"
    if port.get("nodePort"):
        version = "ipv6" if family == 6 else "ipv4"
        yield f"meta nfproto {version} fib daddr type local {protocol} dport {port['nodePort']}"
    for ingress in item.get("status", {}).get("loadBalancer", {}).get("ingress") or ():
        address = ingress.get("ip", "")
        if ingress.get("ipMode", "VIP") == "VIP" and (":" in address) == (family == 6) and address:
            yield f"{word} daddr {address} {protocol} dport {port['port']}"


def _translate(match: str, to: list[tuple[str, int]], family: int, *, masquerade: bool) -> str:
    mark = f"meta mark set meta mark | {MASQUERADE_MARK} " if masquerade else ""
    choices = ", ".join(f"{number} : {address} . {port}" for number, (address, port) in enumerate(to))
    word = "ip6" if family == 6 else "ip"
    return f"{match} {mark}dnat {word} to numgen random mod {len(to)} map {{ {choices} }}"


class Health:
    """The health ports of one node; ``count_by_port`` holds the ready local endpoints per healthCheckNodePort."""

    def __init__(self, node: str, namespace: Namespace) -> None:
        self.node = node
        self.namespace = namespace
        self.count_by_port: dict[int, int] = {}
        self._server_by_port: dict[int, ThreadingHTTPServer] = {}

    def show(self, count_by_port: dict[int, int]) -> None:
        """Open and close ports so that exactly these answer, and 10256."""
        self.count_by_port = count_by_port
        wanted = {HEALTH_PORT, *count_by_port}
        for port in wanted - self._server_by_port.keys():
            self._server_by_port[port] = self._listen(port)
        for port in self._server_by_port.keys() - wanted:
            server = self._server_by_port.pop(port)
            server.shutdown()
            server.server_close()

    def _listen(self, port: int) -> ThreadingHTTPServer:
        health = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                count = health.count_by_port.get(port, 0)
                status = 200 if port == HEALTH_PORT or count else 503
                body = json.dumps({"node": health.node, "localEndpoints": count, "serviceProxyHealthy": True}).encode()
                self.send_response(status)
                if port != HEALTH_PORT:
                    self.send_header("X-Load-Balancing-Endpoint-Weight", str(count))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6
            daemon_threads = True

            def server_bind(self) -> None:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                self.socket.bind(self.server_address)

        with self.namespace.entered():
            server = Server(("::", port), Answer)
        threading.Thread(target=server.serve_forever, daemon=True, name=f"{self.node}:{port}").start()
        return server


class Proxy:
    """Looks at the API and keeps every node's rules and health ports true."""

    def __init__(self, api: Api, namespace_by_node: dict[str, Namespace]) -> None:
        self.api = api
        self.namespace_by_node = namespace_by_node
        self.health_by_node = {node: Health(node, place) for node, place in namespace_by_node.items()}
        self.text_by_node: dict[str, str] = {}

    def look(self) -> None:
        """One pass; only what differs is loaded."""
        services = [
            item
            for item in self.api.call("GET", "/api/v1/services")["items"]
            if item["spec"].get("type") in ("LoadBalancer", "NodePort")
        ]
        slices_by_service: dict[str, list[Object]] = {}
        for slice_ in self.api.call("GET", "/apis/discovery.k8s.io/v1/endpointslices")["items"]:
            meta = slice_["metadata"]
            owner = (meta.get("labels") or {}).get("kubernetes.io/service-name", "")
            slices_by_service.setdefault(f"{meta['namespace']}/{owner}", []).append(slice_)
        for node, namespace in self.namespace_by_node.items():
            text = rules(node, services, slices_by_service)
            if text != self.text_by_node.get(node):
                namespace.run("nft", "-f", "-", text=text)
                self.text_by_node[node] = text
                print(f"{node}: rules loaded, {text.count(' dnat ')} ports translated", flush=True)
            self.health_by_node[node].show(_local_counts(node, services, slices_by_service))

    def run(self) -> None:
        while True:
            try:
                self.look()
            except (OSError, LabError) as error:
                print(f"look failed, rules stay: {error}", flush=True)
            time.sleep(LOOK_S)


def _local_counts(node: str, services: list[Object], slices_by_service: dict[str, list[Object]]) -> dict[int, int]:
    """Ready local endpoints by healthCheckNodePort; v4 and v6 are added up, real kube-proxy answers per family."""
    counts: dict[int, int] = {}
    for item in services:
        port = item["spec"].get("healthCheckNodePort")
        if port:
            slices = slices_by_service.get(f"{item['metadata']['namespace']}/{item['metadata']['name']}", [])
            counts[port] = sum(
                one.get("nodeName") == node and one.get("conditions", {}).get("ready", True)
                for slice_ in slices
                for one in slice_.get("endpoints") or ()
            )
    return counts


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--url", required=True)
    arguments.add_argument("--token", required=True)
    arguments.add_argument("--from-namespace", required=True, help="network namespace that reaches the API")
    arguments.add_argument("--ca", type=Path)
    arguments.add_argument("node", nargs="+", help="NODE=NAMESPACE")
    chosen: Any = arguments.parse_args()
    api = Api(url=chosen.url, token=chosen.token, ca_file=chosen.ca, namespace=Namespace(chosen.from_namespace))
    pairs = (pair.split("=", 1) for pair in chosen.node)
    Proxy(api, {node: Namespace(name) for node, name in pairs}).run()


if __name__ == "__main__":
    main()
