# SPDX-License-Identifier: Apache-2.0
"""What a Service asks for: addresses, pool, sharing, mode, source ranges; and whether it is ours.

Annotations are ours first, then MetalLB's under both of its prefixes, so that a cluster migrates
without touching a manifest. What cannot be understood is a Judgement, never a guess.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import IpMode, Port, Protocol, Service
from lbagent.model.state import Settings
from lbagent.model.vip import Mode

ADDRESSES = ("lbagent.io/load-balancer-ips", "metallb.io/loadBalancerIPs", "metallb.universe.tf/loadBalancerIPs")
POOL = ("lbagent.io/address-pool", "metallb.io/address-pool", "metallb.universe.tf/address-pool")
SHARING_KEY = ("lbagent.io/allow-shared-ip", "metallb.io/allow-shared-ip", "metallb.universe.tf/allow-shared-ip")
MODE = "lbagent.io/mode"
SOURCE_RANGES = "service.beta.kubernetes.io/load-balancer-source-ranges"

PROTOCOL_NOT_SUPPORTED = "lbagent.io/ProtocolNotSupported"
NO_NODE_PORT = "lbagent.io/NoNodePort"
"""For ``ingress[].ports[].error``: a CamelCase word, prefixed with a domain when it is not Kubernetes' own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The understood wishes. ``refusal`` stands for those that are not; ``address_refusal`` for the address alone."""

    address_by_family: tuple[tuple[int, str], ...] = ()
    pools: tuple[str, ...] = ()
    sharing_key: str = ""
    mode: Mode | None = None
    source_ranges: tuple[str, ...] = ()
    address_refusal: Judgement | None = None
    refusal: Judgement | None = None

    def address(self, family: int) -> str:
        """The address asked for in a family, '' when any will do."""
        return dict(self.address_by_family).get(family, "")


NO_WISH = Request()


def foreign(service: Service, settings: Settings) -> Reason | None:
    """Why a Service is none of our business, None when it is ours."""
    if service.type != "LoadBalancer":
        return Reason.NOT_LOAD_BALANCER
    if service.load_balancer_class:
        return None if service.load_balancer_class == settings.load_balancer_class else Reason.NOT_OURS
    return None if settings.class_less else Reason.NOT_OURS


def read(service: Service) -> Request:
    """The wishes of a Service."""
    addresses: tuple[tuple[int, str], ...] = ()
    address_refusal = refusal = None
    mode: Mode | None = None
    ranges: tuple[str, ...] = ()
    try:
        addresses = _addresses(service)
    except _NotUnderstood as problem:
        address_refusal = problem.judgement
    try:
        mode = _mode(service)
        ranges = _source_ranges(service)
    except _NotUnderstood as problem:
        refusal = problem.judgement
    return Request(
        address_by_family=addresses,
        pools=_words(_annotation(service, POOL)),
        sharing_key=_annotation(service, SHARING_KEY),
        mode=mode,
        source_ranges=ranges,
        address_refusal=address_refusal,
        refusal=refusal,
    )


def ip_mode(mode: Mode) -> IpMode:
    """Does the node see the VIP in the packet? The truth, for kube-proxy acts on it."""
    return IpMode.PROXY if mode is Mode.NAT else IpMode.VIP


def port_error(port: Port, mode: Mode) -> str:
    """Why a port cannot be forwarded, '' when it can."""
    if port.protocol is Protocol.SCTP:
        return PROTOCOL_NOT_SUPPORTED
    if mode is Mode.NAT and not port.node_port:
        return NO_NODE_PORT
    return ""


def ports_refusal(service: Service, modes: Iterable[Mode], settings: Settings) -> Judgement | None:
    """Why no port at all can be forwarded in any of these modes, None when one can."""
    refusals = [_ports_refusal(service, mode, settings) for mode in modes]
    return None if None in refusals else refusals[0]


def _ports_refusal(service: Service, mode: Mode, settings: Settings) -> Judgement | None:
    errors = {port_error(port, mode) for port in service.ports}
    if errors <= {PROTOCOL_NOT_SUPPORTED}:
        return Judgement(reason=Reason.NO_SUPPORTED_PORT)
    if mode not in settings.modes:
        offered = ", ".join(sorted(settings.modes))
        return Judgement(reason=Reason.MODE_UNAVAILABLE, detail=f"{mode}; this host offers {offered}")
    if "" in errors:
        return None
    return Judgement(reason=Reason.NO_NODE_PORT)


class _NotUnderstood(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.judgement = Judgement(reason=reason, detail=detail)


def _annotation(service: Service, names: tuple[str, ...]) -> str:
    return next((value for name in names if (value := service.annotations.get(name, "").strip())), "")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _addresses(service: Service) -> tuple[tuple[int, str], ...]:
    asked = _words(_annotation(service, ADDRESSES))
    if asked and service.load_balancer_ip:
        raise _NotUnderstood(Reason.BAD_REQUEST, "both spec.loadBalancerIP and an annotation ask for addresses")
    if not asked and service.load_balancer_ip:
        asked = (service.load_balancer_ip.strip(),)
    found: dict[int, str] = {}
    for text in asked:
        parsed = parse_address(text)
        if parsed is None:
            raise _NotUnderstood(Reason.BAD_REQUEST, f"{text!r} is not an IP address")
        family, value = parsed
        if family in found:
            raise _NotUnderstood(Reason.BAD_REQUEST, f"asks for two IPv{family} addresses")
        if family not in service.ip_families:
            raise _NotUnderstood(Reason.BAD_REQUEST, f"asks for {text}, but is not of family IPv{family}")
        found[family] = address_text(family, value)
    return tuple(sorted(found.items()))


def _mode(service: Service) -> Mode | None:
    text = service.annotations.get(MODE, "").strip()
    if not text:
        return None
    try:
        return Mode(text)
    except ValueError:
        known = ", ".join(mode.value for mode in Mode)
        raise _NotUnderstood(Reason.MODE_UNAVAILABLE, f"{MODE}: {text!r} is none of {known}") from None


def _source_ranges(service: Service) -> tuple[str, ...]:
    """The field wins over the annotation; blanks are trimmed, for the API stores them."""
    given = service.source_ranges or tuple(service.annotations.get(SOURCE_RANGES, "").split(","))
    networks = set()
    for text in given:
        word = text.strip()
        if not word:
            continue
        if "/" not in word:
            raise _NotUnderstood(Reason.BAD_SOURCE_RANGES, f"{text!r} has no prefix length")
        try:
            networks.add(ipaddress.ip_network(word, strict=False))
        except ValueError:
            raise _NotUnderstood(Reason.BAD_SOURCE_RANGES, f"{text!r} is not a CIDR") from None
    return tuple(str(n) for n in sorted(networks, key=lambda n: (n.version, int(n.network_address), n.prefixlen)))


@lru_cache(maxsize=65_536)
def parse_address(text: str) -> tuple[int, int] | None:
    """(family, integer) of an address, None when it is none. IPv4 written as IPv6 counts as IPv4."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            return None
        if address.ipv4_mapped:
            return 4, int(address.ipv4_mapped)
    return address.version, int(address)


def address_text(family: int, value: int) -> str:
    """Canonical text of an address."""
    return str(ipaddress.IPv4Address(value) if family == 4 else ipaddress.IPv6Address(value))
