# SPDX-License-Identifier: Apache-2.0
"""Which source addresses mode nat uses on this host, and the ports taken from the kernel for it.

Dedicated addresses are given by the configuration. Without any, the host lends its own: the one
that the kernel itself would use toward the nodes, with a range of ports that the kernel is told
not to give to its own sockets. A choice once made stays as long as the host has that address,
because the replies of every running flow come to it.
"""

import ipaddress
import socket
from collections.abc import Iterable
from pathlib import Path

from lbagent import log
from lbagent.xdp import codec
from lbagent.xdp.bpf import Map

_LOG = log.get("xdp")
_RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
_ANY_PORT = 9


def held_addresses(snats: Map) -> tuple[str, ...]:
    """What lb_snats holds, in its order."""
    found = []
    for _, value in sorted(snats.items()):
        packed, family = codec.SNAT.unpack(value)
        if family in (4, 6):
            found.append(codec.address_text(packed, family))
    return tuple(found)


def own_addresses(held: Iterable[str], nodes: Iterable[str]) -> tuple[str, ...]:
    """One address of the host per family, IPv4 first: the one held, else the one used toward the nodes."""
    chosen: dict[int, str] = {}
    for address in held:
        if is_own(address):
            chosen.setdefault(ipaddress.ip_address(address).version, address)
    for node in sorted(nodes):
        family = 6 if ":" in node else 4
        if family not in chosen and (source := _source_toward(node)):
            chosen[family] = source
    return tuple(chosen[family] for family in sorted(chosen))


def is_own(address: str) -> bool:
    """Whether the host has this address now."""
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _source_toward(node: str) -> str:
    """The kernel's choice; a connected datagram socket sends nothing."""
    try:
        with socket.socket(_family(node), socket.SOCK_DGRAM) as probe:
            probe.connect((node, _ANY_PORT))
            return str(ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]))
    except OSError:
        return ""


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def reserve_ports(first: int, last: int, *, path: Path = _RESERVED) -> bool:
    """Keep the kernel from giving these ports to its own sockets; both ends included.

    False when it may not be written: the range then must be reserved by sysctl.d.
    """
    try:
        reserved = path.read_text().strip()
        if covers(reserved, first, last):
            return True
        path.write_text(f"{reserved},{first}-{last}".lstrip(","))
    except OSError as error:
        _LOG.warning(
            "ports not reserved",
            ports=f"{first}-{last}",
            error=error.strerror,
            hint=f"sysctl net.ipv4.ip_local_reserved_ports={first}-{last}",
        )
        return False
    _LOG.info("ports reserved", ports=f"{first}-{last}")
    return True


def covers(reserved: str, first: int, last: int) -> bool:
    """Whether a list such as ``8080,20000-29999`` holds all of first..last."""
    next_free = first
    for part in sorted((p.partition("-")[::2] for p in reserved.split(",") if p), key=lambda p: int(p[0])):
        low, high = int(part[0]), int(part[1] or part[0])
        if low <= next_free <= high:
            next_free = high + 1
    return next_free > last
