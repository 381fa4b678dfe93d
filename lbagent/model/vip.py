# SPDX-License-Identifier: Apache-2.0
"""What the kernel forwards: Vip, Backend, Ring, Forward."""

from array import array
from dataclasses import dataclass, field
from enum import StrEnum

from lbagent.model.service import Protocol, ServiceKey

RING_SLOTS = 65_537
"""Prime, so that every permutation step of Maglev visits every slot (NSDI '16, section 3.4)."""


class Mode(StrEnum):
    """How a packet travels from the LB host to the node (ARCHITECTURE.md, Forwarding)."""

    NAT = "nat"
    DSR_L2 = "dsr-l2"
    DSR_IPIP = "dsr-ipip"


class BackendState(StrEnum):
    """``active`` gets new flows, ``draining`` keeps its flows, ``down`` loses them."""

    ACTIVE = "active"
    DRAINING = "draining"
    DOWN = "down"


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Vip:
    """Address, protocol and port that the kernel serves; printed ``192.0.2.1:80/TCP``."""

    address: str
    protocol: Protocol
    port: int

    @property
    def family(self) -> int:
        return 6 if ":" in self.address else 4

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.family == 6 else self.address
        return f"{host}:{self.port}/{self.protocol}"


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Backend:
    """An ingress node as a target of one ring.

    The node port is not here but in the Forward: so all Services that reach the same nodes with
    the same weights share one Ring, and the kernel holds one record per node, not per Service.
    """

    address: str
    node: str = field(compare=False, default="")
    weight: int = 1
    state: BackendState = BackendState.ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """Consistent-hash table over a set of weighted backends.

    ``slots[i]`` is 1 + the index into ``backends`` (sorted by address), 0 = nobody is active.
    ``fingerprint`` names the content: equal on every LB host that sees the same cluster.
    """

    fingerprint: str
    backends: tuple[Backend, ...]
    slots: "array[int]" = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """All that the kernel must hold to serve one Vip.

    ``node_port`` is the destination port in nat mode, 0 in the DSR modes (the packet keeps its own).
    ``ring`` is the fingerprint of a Ring. ``source_ranges`` are CIDRs, empty allows everybody.
    ``affinity_timeout_s`` 0: no client affinity. ``new_flows_per_s``: how many new flows a source
    prefix (IPv4 /24, IPv6 /56) may open, 0 as many as it likes.
    """

    vip: Vip
    service: ServiceKey = field(compare=False)  # the kernel does not know it
    mode: Mode
    ring: str
    node_port: int = 0
    source_ranges: tuple[str, ...] = ()
    affinity_timeout_s: int = 0
    new_flows_per_s: int = 0
