# SPDX-License-Identifier: Apache-2.0
"""What the configuration file may say, section by section, and what the planner makes of it.

Each key carries its meaning (``description``), from which docs/reference/config.md is made.
"""

import ipaddress
import re
import socket
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from lbagent.model.pool import AddressRange, LabelSelector, Pool
from lbagent.model.route import PathPolicy
from lbagent.model.state import Settings
from lbagent.model.vip import Mode


def _address(text: str) -> str:
    return str(ipaddress.ip_address(text))


def _address4(text: str) -> str:
    return str(ipaddress.IPv4Address(text))


def _range(text: str) -> str:
    parse_range(text)
    return text


def _ports(text: str) -> str:
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 65535:
        raise ValueError("is not a port range such as 20000-29999")
    return text


def _community(text: str) -> str:
    if text in WELL_KNOWN_COMMUNITIES:
        return text
    parts = text.split(":")
    limits = {2: 0xFFFF, 3: 0xFFFFFFFF}
    if len(parts) not in limits or not all(p.isascii() and p.isdigit() for p in parts):
        raise ValueError("is neither 65001:100, nor 65001:1:2, nor one of " + ", ".join(WELL_KNOWN_COMMUNITIES))
    if any(int(p) > limits[len(parts)] for p in parts):
        raise ValueError(f"has a part above {limits[len(parts)]}")
    return text


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


WELL_KNOWN_COMMUNITIES = ("no-export", "no-advertise", "no-export-subconfed", "graceful-shutdown", "blackhole")

Address = Annotated[str, AfterValidator(_address)]
RouterId = Annotated[str, AfterValidator(_address4)]
Range = Annotated[str, AfterValidator(_range)]
PortRange = Annotated[str, AfterValidator(_ports)]
Community = Annotated[str, AfterValidator(_community)]
Asn = Annotated[int, Field(ge=1, le=4_294_967_295)]
TcpPort = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$")]


def parse_range(text: str) -> AddressRange:
    """``192.0.2.0/28`` or ``192.0.2.1-192.0.2.9`` as integers of one family. Raises ValueError."""
    first, dash, last = (part.strip() for part in text.partition("-"))
    if not dash:
        network = ipaddress.ip_network(first)
        return AddressRange(network.version, int(network.network_address), int(network.broadcast_address))
    low, high = ipaddress.ip_address(first), ipaddress.ip_address(last)
    if low.version != high.version:
        raise ValueError("has ends of different families")
    if int(low) > int(high):
        raise ValueError("ends before it starts")
    return AddressRange(low.version, int(low), int(high))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Host(_Section):
    """The LB host itself."""

    name: Name = Field(default_factory=socket.gethostname, description="Name of this LB host, as lease holder")


class LeaseConfig(_Section):
    """The Lease by which one LB host is elected to write addresses."""

    namespace: Name = Field(default="lbagent", description="Namespace of the Lease")
    name: Name = Field(default="lbagent", description="Name of the Lease")
    duration_s: Seconds = Field(default=15, description="How long others must wait after the last renewal")
    renew_s: Seconds = Field(default=5, description="How often the holder renews")


class Kubernetes(_Section):
    """The cluster to serve."""

    kubeconfig: Path | None = Field(default=None, description="Path of a kubeconfig")
    load_balancer_class: str = Field(default="lbagent.io/lbagent", description="The class we serve")
    class_less: bool = Field(default=True, description="Also serve Services that name no class")
    lease: LeaseConfig = LeaseConfig()
    watch_timeout_s: Seconds = Field(default=300, description="The server ends a watch after this time")
    request_timeout_s: Seconds = Field(default=10, description="Limit of every other request")
    node_drain_s: float = Field(
        default=30, ge=0, description="A node that is deleted or excluded keeps its connections this long"
    )
    finalizer: bool = Field(default=True, description="Hold a deleted Service until its route is gone")
    stale_after_s: float = Field(
        default=0, ge=0, description="Age of the API's last answer that counts as stale; 0: never"
    )
    stale_action: "StaleAction" = Field(default="keep", validate_default=True, description="What a stale host does")


class StaleAction(StrEnum):
    """Fail static, or give the traffic to others."""

    KEEP = "keep"
    WITHDRAW = "withdraw"


class Selector(_Section):
    """A Kubernetes label selector."""

    match_labels: dict[str, str] = Field(default={}, description="Labels that must be equal")
    match_expressions: tuple["Expression", ...] = Field(default=(), description="Further requirements")

    def to_model(self) -> LabelSelector:
        return LabelSelector(
            labels=tuple(sorted(self.match_labels.items())),
            expressions=tuple((e.key, e.operator.value, e.values) for e in self.match_expressions),
        )


class Operator(StrEnum):
    """Operators of a label selector."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class Expression(_Section):
    """One requirement of a label selector."""

    key: str = Field(description="Label")
    operator: Operator = Field(description="In, NotIn, Exists or DoesNotExist")
    values: tuple[str, ...] = Field(default=(), description="For In and NotIn")


class PoolConfig(_Section):
    """Addresses to give to Services, and how their traffic is forwarded and announced."""

    name: Name = Field(description="Name, as Services ask for it")
    addresses: Annotated[tuple[Range, ...], BeforeValidator(_as_list)] = Field(
        min_length=1, description="CIDRs and first-last ranges, IPv4 and IPv6"
    )
    auto_assign: bool = Field(default=True, description="Give to Services that ask for nothing particular")
    disabled: bool = Field(default=False, description="Give nothing new, keep what is given")
    avoid_buggy_ips: bool = Field(default=False, description="Never give IPv4 addresses that end in .0 or .255")
    priority: int = Field(default=0, ge=0, description="Lower first; 0 last")
    namespaces: tuple[str, ...] = Field(default=(), description="Namespaces admitted; empty: all")
    namespace_selectors: tuple[Selector, ...] = Field(default=(), description="Namespaces admitted by label")
    service_selectors: tuple[Selector, ...] = Field(default=(), description="Services admitted by label")
    mode: Mode = Field(default=Mode.NAT, description="Default forwarding mode")
    policies: tuple[Name, ...] = Field(default=(), description="Names of bgp.policies for its routes")
    node_address_type: str = Field(default="InternalIP", description="Which address of a node to forward to")


class Family(StrEnum):
    """Address family of a BGP session."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"


class NextHop(_Section):
    """Explicit next hops; needed where a family travels over a session of the other family."""

    ipv4: Address | None = Field(default=None, description="Next hop of IPv4 routes")
    ipv6: Address | None = Field(default=None, description="Next hop of IPv6 routes")


class Peer(_Section):
    """One BGP session to a ToR router."""

    name: Name = Field(description="Name, as shown")
    address: Address = Field(description="Address of the router")
    local_address: Address = Field(description="Our address of this session")
    peer_as: Asn = Field(description="AS of the router")
    local_as: Asn | None = Field(default=None, description="Our AS on this session; default bgp.local_as")
    description: str = Field(default="", pattern=r"^[A-Za-z0-9 ._:/-]{0,80}$", description="Free text")
    port: TcpPort = Field(default=179, description="TCP port of the router")
    hold_time_s: int | None = Field(default=None, description="0 or 3 and more; default bgp.hold_time_s")
    passive: bool = Field(default=False, description="Wait for the router to connect")
    multihop_ttl: int | None = Field(
        default=None, ge=2, le=255, description="TTL of our packets on a multihop eBGP session"
    )
    gtsm: bool = Field(default=False, description="Generalized TTL security, RFC 5082")
    password_file: Path | None = Field(
        default=None, description="File with the TCP MD5 key; a bare name is a systemd credential"
    )
    families: tuple[Family, ...] = Field(default=(), description="Default: the family of the session")
    next_hop: NextHop = NextHop()
    graceful_restart_s: int = Field(default=0, ge=0, le=4095, description="Restart time; 0: off")
    add_path: bool = Field(default=False, description="Offer to send add-path")
    bfd_ms: int = Field(default=0, ge=0, le=60_000, multiple_of=10, description="BFD: between two packets; 0: off")
    bfd_multiplier: int = Field(default=3, ge=2, le=255, description="BFD: packets missed until the router lets go")
    max_routes: int = Field(default=0, ge=0, description="Never announce more than this; 0: no limit of ours")

    @property
    def family(self) -> Family:
        return Family.IPV6 if ":" in self.address else Family.IPV4

    @property
    def announced_families(self) -> tuple[Family, ...]:
        return self.families or (self.family,)


class PolicyConfig(_Section):
    """Attributes for announcements, chosen by name from pools and Services."""

    name: Name = Field(description="Name, as pools and Services choose it")
    communities: tuple[Community, ...] = Field(default=(), description="Standard, large or well-known")
    local_preference: int | None = Field(default=None, ge=0, le=4_294_967_295, description="iBGP only")
    med: int | None = Field(default=None, ge=0, le=4_294_967_295, description="Multi-exit discriminator")
    prepend: int = Field(default=0, ge=0, le=16, description="Repeat our AS this many times more")
    peers: tuple[Name, ...] = Field(default=(), description="Announce to these peers only; empty: all")


class DrainConfig(_Section):
    """How a host leaves (RFC 8326 first, then withdrawal)."""

    communities: tuple[Community, ...] = Field(default=("graceful-shutdown",), description="Added while draining")
    local_preference: int | None = Field(default=0, ge=0, description="Set while draining, iBGP only")
    med: int | None = Field(default=None, ge=0, description="Set while draining")
    prepend: int = Field(default=0, ge=0, le=16, description="Added while draining")
    wait_s: Seconds = Field(default=30, description="Withdraw at the latest after this time")


class Bgp(_Section):
    """Our speaker, ExaBGP."""

    local_as: Asn = Field(description="Our AS")
    router_id: RouterId = Field(description="Our router id")
    hold_time_s: int = Field(default=9, description="0 or 3 and more")
    listen: bool = Field(default=True, description="Also accept sessions, so that a rebooted router is back in seconds")
    port: TcpPort = Field(default=179, description="Port we listen on")
    peers: tuple[Peer, ...] = Field(min_length=1, description="The routers")
    policies: tuple[PolicyConfig, ...] = Field(default=(), description="Named announcement policies")
    drain: DrainConfig = DrainConfig()
    settle_s: float = Field(default=0.5, ge=0, description="Keep forwarding this long after a withdrawal is confirmed")
    agent_grace_s: float = Field(default=0, ge=0, description="Withdraw all when the agent is away this long; 0: never")


class Attach(StrEnum):
    """Where the program runs: in the driver, or (slow, explicit only) in the stack."""

    NATIVE = "native"
    GENERIC = "generic"


class Snat(_Section):
    """Source addresses of nat mode."""

    addresses: tuple[Address, ...] = Field(
        default=(), description="Dedicated addresses; empty: the host's own, with `ports`"
    )
    ports: PortRange | None = Field(
        default=None,
        description="Ports to use; default 1024-65535 of dedicated addresses, 20000-29999 of the host's own",
    )

    @property
    def port_range(self) -> tuple[int, int]:
        """First and last port, both included."""
        first, last = (self.ports or ("1024-65535" if self.addresses else "20000-29999")).split("-")
        return int(first), int(last)


class Limits(_Section):
    """Sizes of the kernel tables; a change takes effect with a new layout (see docs/reference)."""

    vips: int = Field(default=4096, ge=16, le=65535, description="Vips (address, protocol, port)")
    backends: int = Field(default=4096, ge=16, le=65535, description="Node addresses")
    rings: int = Field(default=64, ge=4, le=4096, description="Different backend sets, old and new together")
    flows: int = Field(
        default=1 << 20, ge=1024, le=1 << 26, description="Tracked DSR flows, rounded up to a power of two"
    )


class Xdp(_Section):
    """The forwarder."""

    interfaces: tuple[Name, ...] = Field(min_length=1, description="Where packets of clients and of nodes arrive")
    attach: Attach = Field(default=Attach.NATIVE, description="generic only where the driver cannot do better")
    snat: Snat = Snat()
    modes: tuple[Mode, ...] = Field(
        default=(Mode.NAT,), min_length=1, description="Forwarding modes that routers and nodes are prepared for"
    )
    limits: Limits = Limits()


class Probe(_Section):
    """The backends' pulse."""

    enabled: bool = Field(default=True, description="Probe the nodes from this host")
    interval_s: Seconds = Field(default=0.5, description="Between two probes of one target")
    timeout_s: Seconds = Field(default=0.4, description="Limit of one probe")
    rise: int = Field(default=2, ge=1, description="Successes that bring a target up")
    fall: int = Field(default=3, ge=1, description="Failures that take a target down")
    concurrency: int = Field(default=1024, ge=1, description="Probes under way at the same time")
    proxy_port: TcpPort = Field(default=10256, description="Port of kube-proxy's /healthz")
    node_ports: int = Field(
        default=2000, ge=0, description="Probe at most this many node ports by TCP connect, Service by Service"
    )
    panic: "Panic" = Field(
        default="withdraw", validate_default=True, description="When probes leave no backend that the API would have"
    )


class Panic(StrEnum):
    """Believe the probes, or the API."""

    WITHDRAW = "withdraw"
    FORWARD = "forward"


class Guard(_Section):
    """One pass may not do more harm than this, unless the configuration changed."""

    withdraw_share: float = Field(
        default=0.5, gt=0, le=1, description="Share of the announced routes one pass may withdraw"
    )
    withdraw_at_least: int = Field(default=10, ge=0, description="Never held back up to this number")


class Http(_Section):
    """Metrics and health."""

    listen: str = Field(default="127.0.0.1:9273", pattern=r"^.+:\d+$", description="Address:port")


class Paths(_Section):
    """Where lbagent keeps things."""

    run: Path = Field(default=Path("/run/lbagent"), description="Sockets")
    state: Path = Field(default=Path("/var/lib/lbagent"), description="Last snapshot, bytecode cache")
    bpf: Path = Field(default=Path("/sys/fs/bpf/lbagent"), description="Pinned maps and links")


class Log(_Section):
    """Logging to stderr, hence to the journal."""

    level: str = Field(default="info", pattern="^(debug|info|warning|error)$", description="Least severity")
    format: str = Field(default="logfmt", pattern="^(logfmt|json)$", description="One line per change, either way")


class Config(_Section):
    """The whole file."""

    host: Host = Field(default_factory=Host)
    kubernetes: Kubernetes = Kubernetes()
    pools: tuple[PoolConfig, ...] = Field(default=(), description="Where addresses come from")
    cool_down_s: float = Field(default=60, ge=0, description="A released address is not given again for this time")
    namespace_quota: dict[str, int] = Field(
        default={}, description="Addresses a namespace may hold; '*' for all others"
    )
    allow_renumber: bool = Field(default=False, description="Accept a reload that takes addresses from Services")
    bgp: Bgp
    xdp: Xdp
    probe: Probe = Probe()
    guard: Guard = Guard()
    http: Http = Http()
    log: Log = Log()
    paths: Paths = Paths()

    def settings(self) -> Settings:
        """What the planner needs, as model values."""
        policy_by_name = {p.name: _path_policy(p) for p in self.bgp.policies}
        return Settings(
            pools=tuple(_pool(p, policy_by_name) for p in self.pools),
            modes=frozenset(self.xdp.modes),
            load_balancer_class=self.kubernetes.load_balancer_class,
            class_less=self.kubernetes.class_less,
            cool_down_s=self.cool_down_s,
            settle_s=self.bgp.settle_s,
            guard_withdraw_share=self.guard.withdraw_share,
            guard_withdraw_at_least=self.guard.withdraw_at_least,
            panic_keep=self.probe.panic is Panic.FORWARD,
            proxy_port=self.probe.proxy_port,
            node_port_probes=self.probe.node_ports,
            node_drain_s=self.kubernetes.node_drain_s,
            namespace_quota=self.namespace_quota,
        )


def _path_policy(policy: PolicyConfig) -> PathPolicy:
    return PathPolicy(
        name=policy.name,
        communities=tuple(sorted(set(policy.communities))),
        local_preference=policy.local_preference,
        med=policy.med,
        prepend=policy.prepend,
        peers=tuple(sorted(policy.peers)),
    )


def merge_policies(policies: tuple[PathPolicy, ...]) -> PathPolicy:
    """Several policies on one prefix: union of communities and peers, highest preference, longest prepend.

    A policy without peers means all peers, and so does the union with it (MetalLB's and Cilium's rule).
    """
    if not policies:
        return PathPolicy()
    preferences = [p.local_preference for p in policies if p.local_preference is not None]
    meds = [p.med for p in policies if p.med is not None]
    everybody = any(not p.peers for p in policies)
    return PathPolicy(
        name="+".join(p.name for p in policies),
        communities=tuple(sorted({c for p in policies for c in p.communities})),
        local_preference=max(preferences, default=None),
        med=min(meds, default=None),
        prepend=max(p.prepend for p in policies),
        peers=() if everybody else tuple(sorted({peer for p in policies for peer in p.peers})),
    )


def _pool(pool: PoolConfig, policy_by_name: dict[str, PathPolicy]) -> Pool:
    return Pool(
        name=pool.name,
        ranges=tuple(parse_range(text) for text in pool.addresses),
        auto_assign=pool.auto_assign,
        disabled=pool.disabled,
        avoid_buggy_ips=pool.avoid_buggy_ips,
        priority=pool.priority,
        namespaces=pool.namespaces,
        namespace_selectors=tuple(s.to_model() for s in pool.namespace_selectors),
        service_selectors=tuple(s.to_model() for s in pool.service_selectors),
        mode=pool.mode,
        policy=merge_policies(tuple(policy_by_name[name] for name in pool.policies)),
        node_address_type=pool.node_address_type,
    )
