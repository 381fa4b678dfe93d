# SPDX-License-Identifier: Apache-2.0
"""Configuration -> the files ExaBGP and bfdd read. Pure: texts in, texts out; the only door to jinja2.

What ExaBGP accepts without a word but should not (graceful restart above 12 bits, a neighbor
without families, values that a template overrides) cannot come out of here: the configuration is
checked before, and every neighbor block is complete.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from lbagent import assets
from lbagent.bgp import relay
from lbagent.config import Bgp, Family, Paths, Peer

SOCKET = "bgp.sock"
"""Name of the relay's socket below ``paths.run``."""


def exabgp_conf(bgp: Bgp, paths: Paths, *, python: str, password_by_peer: Mapping[str, str]) -> str:
    """ExaBGP's configuration. ``python`` runs the relay; ``password_by_peer`` is by name of the peer."""
    return template("exabgp.conf.j2").render(
        relay=shlex.join(_relay_command(bgp, paths, python=python)),
        router_id=bgp.router_id,
        peers=[_neighbor(bgp, peer, password_by_peer.get(peer.name, "")) for peer in bgp.peers],
    )


def exabgp_env(bgp: Bgp, *, user: str) -> str:
    """ExaBGP's environment file. ``user``: who it becomes when it is started as root."""
    return template("exabgp.env.j2").render(listen=bgp.listen, port=bgp.port, user=user)


def bfdd_conf(bgp: Bgp) -> str:
    """Configuration of FRR's bfdd for the peers that have ``bfd_ms``."""
    return template("bfdd.conf.j2").render(peers=[peer for peer in bgp.peers if peer.bfd_ms])


def _relay_command(bgp: Bgp, paths: Paths, *, python: str) -> list[str]:
    # -I: whatever the environment says about Python, the relay is the standard library and its own file.
    command = [python, "-I", str(Path(relay.__file__).resolve()), "--socket", str(paths.run / SOCKET)]
    return [*command, "--agent-grace-s", f"{bgp.agent_grace_s:g}"]


def _neighbor(bgp: Bgp, peer: Peer, password: str) -> dict[str, Any]:
    """Every value of one neighbor block, defaults filled in."""
    return {
        "address": peer.address,
        "description": peer.description or peer.name,
        "local_address": peer.local_address,
        "local_as": peer.local_as or bgp.local_as,
        "peer_as": peer.peer_as,
        "port": peer.port,
        "hold_time_s": bgp.hold_time_s if peer.hold_time_s is None else peer.hold_time_s,
        "passive": peer.passive,
        "password": password,
        "gtsm": peer.gtsm,
        "multihop_ttl": peer.multihop_ttl,
        "graceful_restart_s": peer.graceful_restart_s,
        "families": [family.value for family in peer.announced_families],
        "ipv4_over_ipv6": needs_extended_next_hop(peer),
        "add_path": peer.add_path,
    }


def needs_extended_next_hop(peer: Peer) -> bool:
    """IPv4 routes with an IPv6 next hop (RFC 8950): both sides must say so."""
    return Family.IPV4 in peer.announced_families and ":" in (peer.next_hop.ipv4 or peer.local_address)


def template(name: str) -> jinja2.Template:
    """A file below ``bgp/``; a value that it does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(assets.path("bgp")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # not HTML; the configuration restricts the characters
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)
