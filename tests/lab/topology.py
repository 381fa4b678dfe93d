# SPDX-License-Identifier: Apache-2.0
"""Who is cabled to whom, and with which addresses.

::

    client ── tor ──┬── lb1 ──┐
               │    └── lb2 ──┤
               └──────────────┴── switch ── node1 … nodeN ── pods
                                    └────── cp (Kubernetes API)

Every LB host has ``eth0`` to the ToR and ``eth1`` to the nodes' segment. The nodes' default route is the
ToR, as in a real rack, so that replies which bypass the LB host (dsr) find their way.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from tests.lab.inventory import Inventory
from tests.lab.netns import Namespace, Port, cable, catch_reflected

VIP_RANGES = ("203.0.113.0/24", "2001:db8:f::/112")
"""What the ToR accepts from LB hosts, as /32 and /128."""
POOLS = ("203.0.113.1-203.0.113.99", "2001:db8:f::1-2001:db8:f::99")
"""What the LB hosts give to Services."""
POD_RANGES = ("10.244.0.0/16", "fd00:244::/32")
FIVE_TUPLE = str(0x01 | 0x02 | 0x04 | 0x10 | 0x20)
"""Addresses, protocol and ports; kernel, Documentation/networking/ip-sysctl.rst."""
TOR_ASN = 65101
LB_ASN = 65001
HTTP_PORT = 8080
UDP_PORT = 8081


@dataclass(frozen=True)
class Interface:
    """Addresses of one interface with their prefix lengths, IPv4 first."""

    device: str
    v4: str
    v6: str

    @property
    def addresses(self) -> tuple[str, str]:
        return (self.v4, self.v6)

    @property
    def addresses_only(self) -> tuple[str, str]:
        return (self.ip4, self.ip6)

    @property
    def ip4(self) -> str:
        return self.v4.partition("/")[0]

    @property
    def ip6(self) -> str:
        return self.v6.partition("/")[0]


CLIENT = Interface("eth0", "198.51.100.10/24", "2001:db8:c::10/64")
TOR_CLIENTS = Interface("clients", "198.51.100.1/24", "2001:db8:c::1/64")
TOR_NODES = Interface("nodes", "10.1.0.1/24", "fd00:1::1/64")
CONTROL_PLANE = Interface("eth0", "10.1.0.5/24", "fd00:1::5/64")


@dataclass(frozen=True)
class LbAddresses:
    """LB host number ``n``: uplink, its ToR end, the node side, and what it translates sources to."""

    n: int

    @property
    def name(self) -> str:
        return f"lb{self.n}"

    @property
    def uplink(self) -> Interface:
        return Interface("eth0", f"10.0.{self.n}.1/24", f"fd00:0:{self.n}::1/64")

    @property
    def tor(self) -> Interface:
        return Interface(self.name, f"10.0.{self.n}.2/24", f"fd00:0:{self.n}::2/64")

    @property
    def inside(self) -> Interface:
        return Interface("eth1", f"10.1.0.{10 + self.n}/24", f"fd00:1::{10 + self.n}/64")

    @property
    def snat(self) -> Interface:
        """Dedicated to translation; on eth1, so that the kernel answers ARP and ND for it."""
        return Interface("eth1", f"10.1.0.{110 + self.n}/24", f"fd00:1::{110 + self.n}/64")


@dataclass(frozen=True)
class NodeAddresses:
    """Node number ``n``; its pods live behind ``cni0``."""

    n: int

    @property
    def name(self) -> str:
        return f"node{self.n}"

    @property
    def segment(self) -> Interface:
        return Interface("eth0", f"10.1.0.{20 + self.n}/24", f"fd00:1::{20 + self.n}/64")

    @property
    def pods(self) -> Interface:
        return Interface("cni0", f"10.244.{self.n}.1/24", f"fd00:244:{self.n}::1/64")

    def pod(self, m: int) -> Interface:
        return Interface("eth0", f"10.244.{self.n}.{10 + m}/24", f"fd00:244:{self.n}::{10 + m}/64")


@dataclass
class Topology:
    """The cabling of one lab; ``build()`` once. Pods and LB hosts may come and go."""

    inventory: Inventory
    lb_count: int = 2
    node_count: int = 3
    mtu: int = 1500
    pods_on_node: dict[int, int] = field(default_factory=dict)

    @cached_property
    def lbs(self) -> tuple[LbAddresses, ...]:
        return tuple(LbAddresses(n + 1) for n in range(self.lb_count))

    @cached_property
    def nodes(self) -> tuple[NodeAddresses, ...]:
        return tuple(NodeAddresses(n + 1) for n in range(self.node_count))

    def namespace(self, name: str) -> Namespace:
        return Namespace(self.inventory.prefix + name)

    @property
    def client(self) -> Namespace:
        return self.namespace("client")

    @property
    def tor(self) -> Namespace:
        return self.namespace("tor")

    @property
    def control_plane(self) -> Namespace:
        return self.namespace("cp")

    def build(self) -> None:
        """Everything but LB hosts and pods."""
        for name in ("client", "tor", "switch", "cp"):
            self.inventory.namespace(name)
        self._build_switch()
        self._build_tor()
        self._build_client()
        self._attach_to_segment(self.control_plane, CONTROL_PLANE, port="cp")
        for node in self.nodes:
            self._build_node(node)

    def _build_switch(self) -> None:
        switch = self.namespace("switch")
        switch.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0", "link set br0 up")
        # The segment is a wire: what crosses it must not meet the packet filter.
        switch.sysctl({"net/bridge/bridge-nf-call-iptables": "0", "net/bridge/bridge-nf-call-ip6tables": "0"})

    def _build_tor(self) -> None:
        self.tor.sysctl(
            {
                "net/ipv4/ip_forward": "1",
                "net/ipv6/conf/all/forwarding": "1",
                # ECMP by the five-tuple, as a switch does it. Policy 1 (layer 4) would take the hash that the
                # sender's socket left in the packet, which is random and moves a flow when it retransmits.
                "net/ipv4/fib_multipath_hash_policy": "3",
                "net/ipv6/fib_multipath_hash_policy": "3",
                "net/ipv4/fib_multipath_hash_fields": FIVE_TUPLE,
                "net/ipv6/fib_multipath_hash_fields": FIVE_TUPLE,
                # A next hop without carrier takes no traffic, even before BGP knows.
                "net/ipv4/conf/all/ignore_routes_with_linkdown": "1",
                "net/ipv6/conf/all/ignore_routes_with_linkdown": "1",
                # The lab counts what clients are told; a rate limit would turn "no route" into silence.
                "net/ipv4/icmp_ratelimit": "0",
                "net/ipv6/icmp/ratelimit": "0",
            }
        )
        self._plug_into_segment(self.tor, TOR_NODES, port="tor")

    def _build_client(self) -> None:
        port = Port(self.client, CLIENT.device)
        uplink = Port(self.tor, TOR_CLIENTS.device)
        cable(uplink, port, mtu=self.mtu)
        port.offload(tx=False)
        uplink.up(*TOR_CLIENTS.addresses)
        port.up(*CLIENT.addresses)
        self.client.ip(
            f"route add default via {TOR_CLIENTS.ip4}",
            f"route add ::/0 via {TOR_CLIENTS.ip6}",
        )

    def _plug_into_segment(
        self, namespace: Namespace, interface: Interface, *, port: str, addresses: Iterable[str] = ()
    ) -> Port:
        """Cable a machine to the switch; ``port`` is the name of the switch's end."""
        machine = Port(namespace, interface.device)
        switch = Port(self.namespace("switch"), port)
        cable(machine, switch, mtu=self.mtu)
        switch.namespace.ip(f"link set {port} master br0", f"link set {port} up")
        machine.up(*interface.addresses, *addresses)
        return machine

    def _attach_to_segment(self, namespace: Namespace, interface: Interface, *, port: str) -> None:
        """An end host of the segment, with the ToR as its default route."""
        self._plug_into_segment(namespace, interface, port=port).offload(tx=False)
        namespace.ip(f"route add default via {TOR_NODES.ip4}", f"route add ::/0 via {TOR_NODES.ip6}")

    def _build_node(self, node: NodeAddresses) -> None:
        namespace = self.inventory.namespace(node.name)
        self._attach_to_segment(namespace, node.segment, port=node.name)
        namespace.ip(
            "link add cni0 type bridge forward_delay 0 mcast_snooping 0",
            *(f"address add {address} dev cni0" for address in node.pods.addresses),
            "link set cni0 up",
            *(
                f"route add {other.pods.v4.replace('.1/', '.0/')} via {other.segment.ip4}"
                for other in self.nodes
                if other != node
            ),
            *(
                f"route add {other.pods.v6.replace('::1/', '::/')} via {other.segment.ip6}"
                for other in self.nodes
                if other != node
            ),
        )
        namespace.sysctl(
            {
                "net/ipv4/ip_forward": "1",
                "net/ipv6/conf/all/forwarding": "1",
                "net/bridge/bridge-nf-call-iptables": "0",
                "net/bridge/bridge-nf-call-ip6tables": "0",
            }
        )

    def add_pod(self, node: NodeAddresses, name: str) -> Interface:
        """A namespace ``<prefix><name>`` behind a node; returns its addresses."""
        number = self.pods_on_node.get(node.n, 0)
        self.pods_on_node[node.n] = number + 1
        interface = node.pod(number)
        host = Port(self.namespace(node.name), f"pod{number}")
        port = Port(self.inventory.namespace(name), interface.device)
        cable(host, port, mtu=self.mtu)
        port.offload(tx=False)
        host.namespace.ip(f"link set {host.device} master cni0", f"link set {host.device} up")
        port.up(*interface.addresses)
        port.namespace.ip(f"route add default via {node.pods.ip4}", f"route add ::/0 via {node.pods.ip6}")
        return interface

    def add_lb(self, lb: LbAddresses) -> Namespace:
        """Cable an LB host, also one that was removed before."""
        namespace = self.inventory.namespace(lb.name)
        uplink = Port(namespace, lb.uplink.device)
        tor = Port(self.tor, lb.tor.device)
        cable(uplink, tor, mtu=self.mtu)
        catch_reflected(tor)
        tor.up(*lb.tor.addresses)
        uplink.up(*lb.uplink.addresses)
        # Deprecated, so that the host itself never speaks from an address that is for translation alone.
        self._plug_into_segment(
            namespace, lb.inside, port=lb.name, addresses=[f"{one} preferred_lft 0" for one in lb.snat.addresses]
        )
        namespace.ip(f"route add default via {lb.tor.ip4}", f"route add ::/0 via {lb.tor.ip6}")
        return namespace

    def cut_lb(self, lb: LbAddresses) -> None:
        """Pull both cables: the ToR and the switch lose carrier at once."""
        namespace = self.namespace(lb.name)
        namespace.ip(f"link delete {lb.uplink.device}", f"link delete {lb.inside.device}")
