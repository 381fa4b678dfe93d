# SPDX-License-Identifier: Apache-2.0
"""The top-of-rack router: FRR with a session to every LB host, and what can be read back from it."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.lab.frr import Frr
from tests.lab.topology import LB_ASN, TOR_ASN, VIP_RANGES, LbAddresses, Topology

HOLD_TIME_S = 9
ESTABLISHED = "Established"


def configuration(lbs: tuple[LbAddresses, ...]) -> str:
    """As a network engineer would write it: per session and family only the VIPs, as host routes, and nothing back."""
    lines = [
        "hostname tor",
        f"ip prefix-list VIPS seq 5 permit {VIP_RANGES[0]} ge 32",
        f"ipv6 prefix-list VIPS6 seq 5 permit {VIP_RANGES[1]} ge 128",
        "route-map LB-IN permit 10",
        " match ip address prefix-list VIPS",
        "route-map LB-IN6 permit 10",
        " match ipv6 address prefix-list VIPS6",
        "route-map LB-OUT deny 10",
        f"router bgp {TOR_ASN}",
        " bgp router-id 10.255.0.1",
        " bgp bestpath as-path multipath-relax",
        " no bgp default ipv4-unicast",
        " neighbor LB peer-group",
        f" neighbor LB remote-as {LB_ASN}",
        f" neighbor LB timers 3 {HOLD_TIME_S}",
        " neighbor LB timers connect 5",
        " neighbor LB6 peer-group",
        f" neighbor LB6 remote-as {LB_ASN}",
        f" neighbor LB6 timers 3 {HOLD_TIME_S}",
        " neighbor LB6 timers connect 5",
    ]
    for lb in lbs:
        lines += [
            f" neighbor {lb.uplink.ip4} peer-group LB",
            f" neighbor {lb.uplink.ip4} description {lb.name}",
            f" neighbor {lb.uplink.ip6} peer-group LB6",
            f" neighbor {lb.uplink.ip6} description {lb.name}",
        ]
    for word, group, suffix in (("ipv4", "LB", ""), ("ipv6", "LB6", "6")):
        lines += [
            f" address-family {word} unicast",
            f"  neighbor {group} activate",
            f"  neighbor {group} route-map LB-IN{suffix} in",
            f"  neighbor {group} route-map LB-OUT out",
            f"  neighbor {group} maximum-prefix 1000",
            "  maximum-paths 16",
            " exit-address-family",
        ]
    return "\n".join([*lines, "exit", ""])


@dataclass(frozen=True, kw_only=True)
class Session:
    """One BGP session as bgpd counts it. ``established_count`` and messages only ever grow."""

    state: str
    established_count: int
    updates_received: int
    opens_received: int
    notifications_received: int

    @property
    def up(self) -> bool:
        return self.state == ESTABLISHED


class Tor:
    """FRR on the ToR of a topology."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.inventory = topology.inventory
        self.frr = Frr(topology.tor.name, configuration(topology.lbs))

    def start(self) -> None:
        self.frr.start()
        self.inventory.folders.append(str(self.frr.directory))
        for child in self.frr._children:
            self.inventory.adopt("frr", child.pid, log=self.frr.directory / "frr.log", child=child)

    def stop(self) -> None:
        self.frr.stop()

    @property
    def vtysh_command(self) -> str:
        """For a person at a shell."""
        return f"vtysh --vty_socket {self.frr.directory} --config_dir {self.frr.directory}"

    def session(self, lb: LbAddresses, *, family: int = 4) -> Session:
        address = lb.uplink.ip4 if family == 4 else lb.uplink.ip6
        shown: dict[str, Any] = self.frr.json(f"show bgp neighbors {address}").get(address, {})
        messages = shown.get("messageStats", {})
        return Session(
            state=shown.get("bgpState", "unknown"),
            established_count=shown.get("connectionsEstablished", 0),
            updates_received=messages.get("updatesRecv", 0),
            opens_received=messages.get("opensRecv", 0),
            notifications_received=messages.get("notificationsRecv", 0),
        )

    def learned_from(self, address: str) -> dict[str, str]:
        """LB host -> next hop, for every valid BGP path to this VIP."""
        family, length = (6, 128) if ":" in address else (4, 32)
        shown = self.frr.json(f"show bgp ipv{family} unicast {address}/{length}")
        found = {}
        for path in shown.get("paths", ()):
            for lb in self.topology.lbs:
                if path.get("peer", {}).get("peerId") in lb.uplink.addresses_only and path.get("valid"):
                    found[lb.name] = path["nexthops"][0]["ip"]
        return dict(sorted(found.items()))

    def next_hops(self, address: str) -> tuple[str, ...]:
        """LB hosts that the ToR's kernel spreads this VIP over; empty when it has no route."""
        word = "-6" if ":" in address else "-4"
        shown = self.topology.tor.run("ip", word, "-j", "route", "show", address)
        gateways: set[str] = set()
        for route in json.loads(shown or "[]"):
            for hop in (route, *route.get("nexthops", ())):
                if {"dead", "linkdown"}.isdisjoint(hop.get("flags", ())):
                    gateways.add(hop.get("gateway") or hop.get("via", {}).get("host", ""))
        return tuple(lb.name for lb in self.topology.lbs if gateways & set(lb.uplink.addresses_only))

    @contextmanager
    def watching_routes(self, address: str) -> Iterator[list[str]]:
        """Every change of this VIP's route in the ToR's kernel during the ``with``; the list is filled at its end."""
        word = "-6" if ":" in address else "-4"
        changes: list[str] = []
        log = self.inventory.folder / "route-changes.log"
        log.write_text("")
        watcher = self.inventory.start("ip-monitor", self.topology.tor.command("ip", word, "monitor", "route"), log=log)
        try:
            yield changes
        finally:
            watcher.kill(signal.SIGTERM)
            watcher.gone(limit_s=5)
            changes += [line for line in log.read_text().splitlines() if address in line.split()]

    def route_shown(self, address: str) -> str:
        """The route as an operator sees it in vtysh."""
        command = f"show ipv6 route {address}/128" if ":" in address else f"show ip route {address}/32"
        return self.frr.vtysh(command).strip() or f"{command}: (no entry)"

    def kernel_route(self, address: str) -> str:
        """The route as ``ip route`` prints it."""
        word = "-6" if ":" in address else "-4"
        return self.topology.tor.run("ip", word, "route", "show", address).rstrip()
