# SPDX-License-Identifier: Apache-2.0
"""Configuration -> what the engineer of the ToR router pastes: our peer, as seen from the other end.

Each snippet accepts host routes of our pools and nothing else, announces nothing to us, spreads flows
by ports over all LB hosts, limits the number of prefixes and honours the graceful-shutdown community.
Passwords are not printed: the word PASSWORD stands where one belongs.
"""

import ipaddress
import re
from enum import StrEnum

from lbagent.bgp import render
from lbagent.config import Config, Family, Peer, parse_range
from lbagent.errors import ConfigError
from lbagent.model.pool import AddressRange

ECMP = 16
"""LB hosts a route may be spread over."""
MOST_PREFIXES = 10_000
"""Limit of a session when the configuration (``max_routes``) and the pools are larger."""


class RouterOs(StrEnum):
    """The first three are run in our tests; the others are written from their vendors' manuals."""

    FRR = "frr"
    BIRD = "bird"
    GOBGP = "gobgp"
    EOS = "eos"
    NXOS = "nxos"
    JUNOS = "junos"
    SONIC = "sonic"


def snippet(config: Config, *, peer: str, os: RouterOs) -> str:
    """The router's side of the session ``peer``. Raises ConfigError for a peer that is not configured."""
    found = next((candidate for candidate in config.bgp.peers if candidate.name == peer), None)
    if found is None:
        names = ", ".join(candidate.name for candidate in config.bgp.peers)
        raise ConfigError(f"no peer is named {peer}", hint=f"configured: {names}")
    return render.template(f"tor/{os.value}.j2").render(_values(config, found))


def _values(config: Config, peer: Peer) -> dict[str, object]:
    bgp = config.bgp
    hold_time_s = bgp.hold_time_s if peer.hold_time_s is None else peer.hold_time_s
    local_as = peer.local_as or bgp.local_as
    ranges = _announced(config)
    return {
        "host": config.host.name,
        "name": f"LBAGENT-{config.host.name}",
        "symbol": re.sub(r"\W", "_", f"lbagent_{config.host.name}_{peer.name}"),
        "tor": peer.name,
        "address": peer.address,
        "lb": peer.local_address,
        "tor_as": peer.peer_as,
        "lb_as": local_as,
        "is_internal": local_as == peer.peer_as,
        "families": [family.value for family in peer.announced_families],
        "prefixes": {family.value: _networks(ranges, int(family.value[-1])) for family in Family},
        "host_length": {Family.IPV4.value: 32, Family.IPV6.value: 128},
        "hold_time_s": hold_time_s,
        "keepalive_s": hold_time_s // 3,
        "gtsm": peer.gtsm,
        "multihop_ttl": peer.multihop_ttl,
        "has_password": peer.password_file is not None,
        "graceful_restart_s": peer.graceful_restart_s,
        "extended_next_hop": render.needs_extended_next_hop(peer),
        "max_prefixes": {f.value: peer.max_routes or _size(ranges, int(f.value[-1])) for f in Family},
        "ecmp": ECMP,
        "bfd_ms": peer.bfd_ms,
        "bfd_multiplier": peer.bfd_multiplier,
    }


def _announced(config: Config) -> list[AddressRange]:
    """Pools, and SNAT addresses of our own (announced where they are not on a link)."""
    texts = [text for pool in config.pools for text in pool.addresses]
    return [parse_range(text) for text in (*texts, *config.xdp.snat.addresses)]


def _size(ranges: list[AddressRange], family: int) -> int:
    return min(MOST_PREFIXES, sum(item.last - item.first + 1 for item in ranges if item.family == family))


def _networks(ranges: list[AddressRange], family: int) -> list[str]:
    kind = ipaddress.IPv4Address if family == 4 else ipaddress.IPv6Address
    return [
        str(network)
        for item in ranges
        if item.family == family
        for network in ipaddress.summarize_address_range(kind(item.first), kind(item.last))
    ]
