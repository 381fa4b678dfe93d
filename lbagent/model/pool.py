# SPDX-License-Identifier: Apache-2.0
"""Where external addresses come from, and who holds which."""

from dataclasses import dataclass, field

from lbagent.model.route import PathPolicy
from lbagent.model.service import IpMode, ServiceKey
from lbagent.model.vip import Mode


@dataclass(frozen=True, slots=True, order=True)
class AddressRange:
    """First and last address as integers of one family, both included."""

    family: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSelector:
    """Kubernetes label selector. ``expressions``: (key, operator, values)."""

    labels: tuple[tuple[str, str], ...] = ()
    expressions: tuple[tuple[str, str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A named set of ranges. ``priority``: lower first, 0 last (MetalLB's rule)."""

    name: str
    ranges: tuple[AddressRange, ...]
    auto_assign: bool = True
    disabled: bool = False
    avoid_buggy_ips: bool = False
    priority: int = 0
    namespaces: tuple[str, ...] = ()
    namespace_selectors: tuple[LabelSelector, ...] = ()
    service_selectors: tuple[LabelSelector, ...] = ()
    mode: Mode = Mode.NAT
    policy: PathPolicy = field(default_factory=PathPolicy)
    node_address_type: str = "InternalIP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The addresses a Service shall have in its status, in the order of its ipFamilies.

    ``port_errors``: (port, protocol, error) for ``ingress[].ports``.
    """

    service: ServiceKey
    addresses: tuple[str, ...]
    pools: tuple[str, ...]
    ip_mode: IpMode = IpMode.PROXY
    port_errors: tuple[tuple[int, str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """An address kept back after its release. ``released`` is seconds since the epoch."""

    address: str
    service: ServiceKey
    released: float
