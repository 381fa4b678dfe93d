# SPDX-License-Identifier: Apache-2.0
"""Which LB host carried a request, as the ToR saw it: independent of everything that is being shown.

The ToR notes, per link to an LB host, the client address and port of every SYN that leaves by it.
"""

import json
from collections import Counter
from collections.abc import Iterable

from tests.lab.netns import Namespace
from tests.lab.topology import LbAddresses
from tests.lab.traffic import Ledger

TABLE = "lab_tap"


class Tap:
    """``clear()`` before a measurement: a client port that is used again may have been seen on both links."""

    def __init__(self, tor: Namespace, lbs: Iterable[LbAddresses]) -> None:
        self.tor = tor
        self.names = [lb.name for lb in lbs]

    def start(self) -> None:
        sets, rules = [], []
        for name in self.names:
            for family, protocol in (("ipv4_addr", "ip"), ("ipv6_addr", "ip6")):
                note = f"{name}_{protocol}"
                sets.append(
                    f"set {note} {{ type {family} . inet_service; size 65535; flags dynamic,timeout; timeout 15m; }}"
                )
                rules.append(
                    f'oifname "{name}" tcp flags & (syn | ack) == syn add @{note} {{ {protocol} saddr . tcp sport }}'
                )
        chain = "chain forward { type filter hook forward priority 0; policy accept; " + "; ".join(rules) + "; }"
        self.tor.run("nft", "-f", "-", text=f"table inet {TABLE} {{\n" + "\n".join([*sets, chain]) + "\n}\n")

    def clear(self) -> None:
        """Forget what was noted. A new table: a flushed set shrinks, and what comes while it grows again is lost."""
        self.tor.run("nft", "delete", "table", "inet", TABLE)
        self.start()

    def clients_by_host(self) -> dict[str, set[tuple[str, int]]]:
        """Client addresses and ports noted on each link."""
        listed = json.loads(self.tor.run("nft", "-j", "list", "table", "inet", TABLE))["nftables"]
        clients: dict[str, set[tuple[str, int]]] = {name: set() for name in self.names}
        for item in listed:
            if "set" in item:
                host = item["set"]["name"].rpartition("_")[0]
                for element in item["set"].get("elem", ()):
                    value = element["elem"]["val"] if "elem" in element else element
                    address, port = value["concat"]
                    clients[host].add((address, port))
        return clients

    def carriers(self, ledger: Ledger) -> dict[str, int]:
        """Answered requests by LB host; ``unseen`` or ``several`` when the ToR noted no host, or more than one."""
        clients = self.clients_by_host()
        counted: Counter[str] = Counter(dict.fromkeys(self.names, 0))
        for request in ledger.requests:
            if request.ok:
                seen = [name for name in self.names if request.client in clients[name]]
                counted[seen[0] if len(seen) == 1 else "several" if seen else "unseen"] += 1
        return dict(sorted(counted.items()))
