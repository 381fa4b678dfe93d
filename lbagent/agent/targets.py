# SPDX-License-Identifier: Apache-2.0
"""What the agent asks of the world outside: Kernel, Speaker, Cluster.

The rooms xdp, bpf and kube satisfy these protocols; tests put fakes in their place, and contract
tests hold the fakes against the real things. Methods without ``async`` return at once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lbagent.config import Bgp
from lbagent.errors import LbagentError
from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement
from lbagent.model.route import PeerState, Route
from lbagent.model.service import Endpoint, Node, Service, ServiceKey
from lbagent.model.vip import Forward, Ring, Vip

Changed = Callable[[], None]
"""Called by a target when something it watches has changed; only sets a flag."""


class KernelState(Protocol):
    """Read back from the maps and links, not remembered.

    ``unproven``: what is wrong with the forwarding of a Vip, in words. ``attached``: interface ->
    mode; ``obstacles``: interface -> why it does not run our program. ``repairs``: entries that the
    kernel's door has put right by itself since it was opened.
    """

    @property
    def forwards(self) -> Mapping[Vip, Forward]: ...
    @property
    def rings(self) -> frozenset[str]: ...
    @property
    def unproven(self) -> Mapping[Vip, str]: ...
    @property
    def attached(self) -> Mapping[str, str]: ...
    @property
    def obstacles(self) -> Mapping[str, str]: ...
    @property
    def repairs(self) -> int: ...


class Count(Protocol):
    """Since the maps were made; survives daemons."""

    @property
    def packets(self) -> int: ...
    @property
    def bytes(self) -> int: ...


class Tally(Protocol):
    """Counters by their own names. ``backends`` is by node address."""

    @property
    def verdicts(self) -> Mapping[Any, Count]: ...
    @property
    def vips(self) -> Mapping[Vip, Count]: ...
    @property
    def backends(self) -> Mapping[str, Count]: ...


class Kernel(Protocol):
    """The XDP forwarder (lbagent.xdp.forwarder)."""

    @property
    def reachable(self) -> frozenset[str]:
        """Tracked node addresses whose next hop is resolved."""

    def track(self, addresses: frozenset[str]) -> None:
        """Keep the next hops of exactly these node addresses current."""

    def observed(self) -> KernelState:
        """What the kernel holds now; a Vip that has changed is proven on the way."""

    def program(self, forwards: Sequence[Forward], rings: Sequence[Ring]) -> Mapping[Vip, LbagentError]:
        """Serve these Vips; returns those refused, each with what is wrong."""

    def unprogram(self, vips: Sequence[Vip]) -> None:
        """Forget these Vips."""

    def prove(self, vips: Sequence[Vip]) -> Mapping[Vip, str]:
        """Run a synthetic packet for each; '' when it reached an active backend."""

    def counters(self) -> Tally:
        """What was forwarded and dropped."""

    def trace(self, packet: bytes) -> Any:
        """What the loaded program would do with this frame: action, verdict, backend_id, packet."""

    def backend_address(self, number: int) -> str:
        """Address of the kernel's backend number, '' when there is none."""

    async def run(self, changed: Changed) -> None:
        """Follow links and neighbours for ever."""


class SpeakerState(Protocol):
    """What the speaker knows. ``adopted``: what ExaBGP announced before we came is known."""

    @property
    def connected(self) -> bool: ...
    @property
    def adopted(self) -> bool: ...
    @property
    def restarts(self) -> int: ...
    @property
    def routes(self) -> frozenset[Route]: ...
    @property
    def attracting(self) -> Mapping[str, float]: ...
    @property
    def peers(self) -> Mapping[str, PeerState]: ...


class Speaker(Protocol):
    """The BGP side (lbagent.bgp.speaker)."""

    def want(self, routes: frozenset[Route]) -> None:
        """Announce exactly these routes; the speaker owns the difference."""

    def reconfigure(self, bgp: Bgp) -> None:
        """Peers were added, removed or changed."""

    def observed(self) -> SpeakerState:
        """What it was told, and what the peers have."""

    async def run(self) -> None:
        """Keep the connection to the relay for ever."""


class Cluster(Protocol):
    """The Kubernetes API (lbagent.kube)."""

    @property
    def services(self) -> Mapping[ServiceKey, Service]: ...
    @property
    def endpoints(self) -> Mapping[ServiceKey, tuple[Endpoint, ...]]: ...
    @property
    def nodes(self) -> Mapping[str, Node]: ...
    @property
    def namespace_labels(self) -> Mapping[str, Mapping[str, str]]: ...
    @property
    def listed(self) -> bool: ...
    @property
    def age_s(self) -> float:
        """Seconds since the API last answered."""

    @property
    def lease_holder(self) -> str:
        """Who holds the lease, as last read; '' for nobody."""

    def holds_lease(self, now: float) -> bool:
        """May this host write addresses at ``now``?"""

    async def assign(self, assignment: Assignment) -> None:
        """Write the addresses into the Service's status. Raises KubeError."""

    async def release(self, service: ServiceKey, addresses: tuple[str, ...]) -> None:
        """Clear them. Raises KubeError."""

    async def report(self, service: ServiceKey, judgement: Judgement) -> None:
        """Event and condition, deduplicated. Raises KubeError."""

    async def run(self, changed: Changed) -> None:
        """Watch and renew the lease for ever."""
