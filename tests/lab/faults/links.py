# SPDX-License-Identifier: Apache-2.0
"""Cables and nodes."""

import json
import time
from functools import partial

from tests.lab.lbhost import LbHost
from tests.lab.netns import Port
from tests.lab.scene import FALL_S, Scene


def cut_uplink(scene: Scene) -> None:
    """The ToR's end goes down, so that the LB host loses carrier, as when a cable is pulled.

    Without kernel next-hop groups: FRR 8.4 does not put back the member that the kernel took out of one with the link,
    while bgpd and zebra show both paths. What is judged here is the LB host.
    """
    lb, tor = scene.host.lb, scene.lab.topology.tor
    scene.lab.tor.frr.configure("no zebra nexthop kernel enable")
    scene.undo.callback(scene.lab.tor.frr.configure, "zebra nexthop kernel enable")
    port = Port(tor, lb.tor.device)
    tor.sysctl({f"net/ipv6/conf/{lb.tor.device}/keep_addr_on_down": "1"})
    scene.undo.callback(tor.ip, f"link set {lb.tor.device} up")
    scene.inject_now()
    port.down()
    scene.lab.wait_routes(scene.address, (scene.other.name,))
    scene.say(f"the other host alone after {time.monotonic() - scene.injected_s:.1f} s")
    time.sleep(12.0)  # longer than the hold time
    lost = [one for one in scene.load.ledger.failures if one.sent_s > scene.injected_s + 1.0]
    scene.require(not lost, f"{len(lost)} requests failed while the other host carried all")
    tor.ip(f"link set {lb.tor.device} up")
    scene.inject_now()
    scene.lab.wait_routes(scene.address, tuple(scene.lab.hosts), limit_s=60)
    scene.repaired()
    back = time.monotonic()
    time.sleep(3.0)
    carried = scene.carried(scene.host, since_s=back)
    scene.require(carried, "its route is back, but it carried nothing")
    scene.say(f"it carried {carried} requests in the 3 s after it was back")


def freeze_node(scene: Scene) -> None:
    """Its cable is dead and nobody says so: no carrier lost at the LB hosts, no word from the API.

    It runs no pod of the Service: what the other nodes' kube-proxy sends to a dead pod, no load balancer can save.
    """
    switch, node = scene.lab.topology.namespace("switch"), scene.empty_node
    scene.undo.callback(switch.ip, f"link set {node.name} up")
    scene.inject_now()
    switch.ip(f"link set {node.name} down")
    time.sleep(FALL_S + 5.0)
    failures = scene.load.ledger.failures
    last_s = max((one.sent_s - scene.injected_s for one in failures), default=0.0)
    scene.repair_s = last_s
    scene.stop_counting()
    scene.say(f"taken out by its probes: the last request that failed was sent {last_s:.1f} s after")
    switch.ip(f"link set {node.name} up")
    back = time.monotonic()
    for host in scene.lab.hosts.values():
        scene.wait(f"{host.name} to use {node.name} again", partial(_is_whole, host), limit_s=20)
    scene.say(f"in use again {time.monotonic() - back:.1f} s after its return")


def change_mac(scene: Scene) -> None:
    """To another and back. The node does not announce it."""
    node = scene.lab.topology.namespace(scene.empty_node.name)
    first = json.loads(node.run("ip", "-j", "link", "show", "dev", "eth0"))[0]["address"]
    scene.undo.callback(node.ip, f"link set dev eth0 address {first}")
    for mac in ("02:1b:00:00:be:ef", first):
        scene.inject_now()
        node.ip(f"link set dev eth0 address {mac}")
        for host in scene.lab.hosts.values():
            _wait_neighbour(scene, host, mac)
        scene.repaired()
        learned = time.monotonic()
        time.sleep(FALL_S + 3.0)
        by_source = scene.load.ledger.between(learned).by_source
        carried = by_source.get(scene.empty_node.segment.ip4, 0)
        scene.say(
            f"known after {learned - scene.injected_s:.1f} s; {carried} requests went by the node in the next 6 s"
        )
        scene.require(carried, "the node is not used again")


def _wait_neighbour(scene: Scene, host: LbHost, mac: str) -> None:
    address = scene.empty_node.segment.ip4
    scene.wait(
        f"{host.name} to know {address} as {mac}",
        lambda: mac in host.namespace.run("ip", "-4", "neigh", "show", address, "dev", "eth1").lower(),
        limit_s=60,
    )


def _is_whole(host: LbHost) -> bool:
    """Have the host's probes judged nobody down?"""
    return all(up for name, up in host.metrics().items() if name.startswith("lbagent_backend_up"))
