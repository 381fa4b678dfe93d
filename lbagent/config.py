# SPDX-License-Identifier: Apache-2.0
"""The one configuration file: ``load(path) -> Config``, or a ConfigError with every mistake at once.

Each mistake reads ``file:line: key: message``. Unknown keys are refused. Rules that span several
keys are in ``_contradictions``, one function per rule. The only reader of the YAML file.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Hashable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lbagent.errors import ConfigError
from lbagent.model.pool import AddressRange, LabelSelector, Pool
from lbagent.model.route import PathPolicy
from lbagent.model.state import Settings
from lbagent.model.vip import Mode

DEFAULT_PATH = Path("/etc/lbagent/lbagent.yaml")

QUIET_API_S = 180.0
"""Bookmarks come once a minute; two may be missed."""

Location = tuple[str | int, ...]
"""Where a key stands: ``("bgp", "peers", 0, "peer_as")``."""


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


# --- rules that span several keys -----------------------------------------------------------------

Problem = tuple[Location, str]


def _unique(items: tuple[Any, ...], where: Location, key: str) -> Iterator[Problem]:
    seen: dict[Hashable, int] = {}
    for index, item in enumerate(items):
        value = getattr(item, key)
        if value in seen:
            yield (*where, index, key), f"{value} is there already, as number {seen[value] + 1}"
        seen.setdefault(value, index)


def _overlaps(config: Config) -> Iterator[Problem]:
    ranges = [
        (parse_range(text), (p, i), f"{pool.name}: {text}")
        for p, pool in enumerate(config.pools)
        for i, text in enumerate(pool.addresses)
    ]
    ranges.sort(key=lambda item: item[0])
    widest_by_family: dict[int, tuple[int, str]] = {}
    for found, (p, i), text in ranges:
        last, taken_by = widest_by_family.get(found.family, (-1, ""))
        if found.first <= last:
            yield ("pools", p, "addresses", i), f"overlaps {taken_by}: an address may be in one range only"
        if found.last > last:
            widest_by_family[found.family] = (found.last, text)


def _undefined_names(config: Config) -> Iterator[Problem]:
    policies = {p.name for p in config.bgp.policies}
    peers = {p.name for p in config.bgp.peers}
    for p, pool in enumerate(config.pools):
        for i, name in enumerate(pool.policies):
            if name not in policies:
                yield ("pools", p, "policies", i), f"{name} is not defined under bgp.policies"
    for p, policy in enumerate(config.bgp.policies):
        for i, name in enumerate(policy.peers):
            if name not in peers:
                yield ("bgp", "policies", p, "peers", i), f"{name} is not defined under bgp.peers"


def _hold_times(config: Config) -> Iterator[Problem]:
    places: list[tuple[Location, int | None]] = [(("bgp",), config.bgp.hold_time_s)]
    places += [(("bgp", "peers", i), peer.hold_time_s) for i, peer in enumerate(config.bgp.peers)]
    for where, value in places:
        if value not in (None, 0) and not 3 <= value <= 65535:
            yield (*where, "hold_time_s"), f"{value} is neither 0 nor 3 to 65535 (RFC 4271, 4.2)"


def _sessions(config: Config) -> Iterator[Problem]:
    for i, peer in enumerate(config.bgp.peers):
        where: Location = ("bgp", "peers", i)
        internal = (peer.local_as or config.bgp.local_as) == peer.peer_as
        if (":" in peer.address) != (":" in peer.local_address):
            yield (*where, "local_address"), "is of another family than address"
        if peer.gtsm and peer.multihop_ttl:
            yield (*where, "gtsm"), "excludes multihop_ttl: GTSM is for direct neighbours"
        if internal and peer.multihop_ttl:
            yield (*where, "multihop_ttl"), "is for eBGP; an iBGP session needs none"
        if peer.passive and not config.bgp.listen:
            yield (*where, "passive"), "needs bgp.listen: true"
        for family in peer.announced_families:
            explicit = peer.next_hop.ipv4 if family is Family.IPV4 else peer.next_hop.ipv6
            if family is Family.IPV6 and peer.family is Family.IPV4 and not explicit:
                yield (
                    (*where, "next_hop", "ipv6"),
                    "is needed: IPv6 routes over an IPv4 session have no next hop of their own",
                )


def _passwords(config: Config) -> Iterator[Problem]:
    for i, peer in enumerate(config.bgp.peers):
        if peer.password_file:
            try:
                read_password(peer.password_file)
            except ConfigError as error:
                yield ("bgp", "peers", i, "password_file"), error.message


def _timings(config: Config) -> Iterator[Problem]:
    lease, stale_after_s = config.kubernetes.lease, config.kubernetes.stale_after_s
    if 0 < stale_after_s < QUIET_API_S:
        yield (
            ("kubernetes", "stale_after_s"),
            f"{stale_after_s:g} is less than {QUIET_API_S:g}: a quiet API may be silent so long",
        )
    if lease.renew_s * 2 > lease.duration_s:
        yield (
            ("kubernetes", "lease", "renew_s"),
            f"{lease.renew_s:g} is more than half of duration_s {lease.duration_s:g}",
        )
    if config.probe.timeout_s > config.probe.interval_s:
        yield (
            ("probe", "timeout_s"),
            f"{config.probe.timeout_s:g} is longer than interval_s {config.probe.interval_s:g}",
        )


def _modes(config: Config) -> Iterator[Problem]:
    for p, pool in enumerate(config.pools):
        if pool.mode not in config.xdp.modes:
            yield ("pools", p, "mode"), f"{pool.mode.value} is not among xdp.modes"


_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    lambda c: _unique(c.pools, ("pools",), "name"),
    lambda c: _unique(c.bgp.peers, ("bgp", "peers"), "name"),
    lambda c: _unique(c.bgp.peers, ("bgp", "peers"), "address"),
    lambda c: _unique(c.bgp.policies, ("bgp", "policies"), "name"),
    _overlaps,
    _undefined_names,
    _hold_times,
    _sessions,
    _passwords,
    _timings,
    _modes,
)


def read_password(path: Path) -> str:
    """The TCP MD5 key in a file that only its owner (and group) may read. Raises ConfigError."""
    if not path.is_absolute():
        path = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/run/credentials/lbagent-bgp.service")) / path
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot be read: {error}") from error
    if mode & 0o007:
        raise ConfigError(f"{path} may be read by everybody: chmod 0640 {path}")
    if not re.fullmatch(r"[A-Za-z0-9!#$%&()*+,./:<=>?@^_~-]{1,80}", text):
        raise ConfigError(f"{path} must hold 1 to 80 letters, digits or !#$%&()*+,./:<=>?@^_~-")
    return text


# --- the file, with the line of every key -----------------------------------------------------------


class _Lines(yaml.SafeLoader):
    """Safe loader that notes the line of every key, and refuses a key given twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[tuple[int, str]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                self.duplicates.append((key.start_mark.line + 1, str(key.value)))
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _lines(node: yaml.Node | None, where: Location = ()) -> Iterator[tuple[Location, int]]:
    if node is not None:
        yield where, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            for place, line in _lines(value, (*where, key.value)):
                yield place, key.start_mark.line + 1 if place == (*where, key.value) else line
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*where, index))


def _say(where: Location) -> str:
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "(file)"


def _sentence(error: Any) -> str:
    kind, message = error["type"], str(error["msg"])
    if kind == "extra_forbidden":
        return "unknown key"
    if kind == "missing":
        return "is missing"
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    value = error.get("input")
    shown = f"{value!r} " if isinstance(value, str | int | float | bool) else ""
    return f"{shown}{message[:1].lower()}{message[1:]}"


def _causes(errors: Sequence[Any]) -> Iterator[Any]:
    """Without "too short" of a list whose items were refused: that is a consequence, not a mistake."""
    places = [tuple(e["loc"]) for e in errors]
    for error, place in zip(errors, places, strict=True):
        inside = any(len(other) > len(place) and other[: len(place)] == place for other in places)
        if not (error["type"] == "too_short" and inside):
            yield error


def parse(text: str, *, name: str = "lbagent.yaml") -> Config:
    """The configuration in ``text``. Raises ConfigError with one ``problems`` line per mistake."""
    try:
        loader = _Lines(text)
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise _refused(name, [f"{name}:{line}: (file): not YAML: {error.problem}"]) from error
    except yaml.YAMLError as error:
        raise _refused(name, [f"{name}:1: (file): not YAML: {error}"]) from error
    if not isinstance(tree, dict):
        raise _refused(name, [f"{name}:1: (file): is not a mapping; start from docs/reference/config.md"])
    line_by_place = dict(_lines(node))

    def problem(where: Location, message: str) -> tuple[int, str]:
        place = where
        while place not in line_by_place:
            place = place[:-1]
        return line_by_place[place], f"{name}:{line_by_place[place]}: {_say(where)}: {message}"

    found = [(line, f"{name}:{line}: {key}: is given twice") for line, key in loader.duplicates]
    config: Config | None = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found += [problem(tuple(e["loc"]), _sentence(e)) for e in _causes(error.errors())]
    if config is not None:
        found += [problem(where, message) for rule in _RULES for where, message in rule(config)]
    if found or config is None:
        raise _refused(name, [text for _, text in sorted(set(found))])
    return config


def _refused(name: str, problems: list[str]) -> ConfigError:
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    return ConfigError(f"{name} has {count}", hint=f"lbagent check {name}", problems=tuple(problems))


def load(path: Path) -> Config:
    """The configuration in a file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", problems=(f"{path}:1: (file): {error}",)) from error
    return parse(text, name=str(path))
