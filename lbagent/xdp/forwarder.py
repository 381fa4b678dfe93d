# SPDX-License-Identifier: Apache-2.0
"""The agent's door to the kernel: what is forwarded, where nodes are, whether it provably works.

Nothing here is remembered that the kernel holds: ``open`` takes over pinned maps, the program and
its attachments, so that a daemon may be killed at any moment and the next one continues without a
lost packet. What goes wrong with one VIP or one interface is kept as words beside that one; only
what makes forwarding impossible as a whole (no compiler and no bytecode, no bpffs, no capability,
a program the verifier refuses) is raised by ``open``.
"""

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from lbagent import assets, log
from lbagent.config import Attach, Paths, Xdp
from lbagent.errors import XdpError
from lbagent.model.vip import Forward, Ring, Vip
from lbagent.xdp import bpf, drift, maps, pins, proof, snat, testrun
from lbagent.xdp.compile import Bytecode, build
from lbagent.xdp.counters import Count, Counters
from lbagent.xdp.link import Links, Programs
from lbagent.xdp.nexthop import DEFAULT4, DEFAULT6, NextHop, NextHops
from lbagent.xdp.settings import Settings
from lbagent.xdp.verdict import Verdict

_LOG = log.get("xdp")
_REPAIR_S = 5.0
"""So the bound is the loop's 30 s and a little, also among events. One look: 5 ms (64 rings, 4,096 backends)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the kernel holds now. ``unproven``: what is wrong with a VIP's forwarding, in words.

    ``attached``: interface -> mode, of those that run exactly our program. ``obstacles``: why an
    interface does not. ``repairs``: kernel entries found changed by somebody else since the daemon
    started, VIPs apart: those the planner compares itself.
    """

    forwards: Mapping[Vip, Forward] = field(default_factory=dict)
    rings: frozenset[str] = frozenset()
    proven: frozenset[Vip] = frozenset()
    unproven: Mapping[Vip, str] = field(default_factory=dict)
    attached: Mapping[str, Attach] = field(default_factory=dict)
    obstacles: Mapping[str, str] = field(default_factory=dict)
    repairs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Counters by their own names: verdicts, VIPs, backends by address."""

    verdicts: Mapping[Verdict, Count]
    vips: Mapping[Vip, Count]
    backends: Mapping[str, Count]


class Forwarder:
    """One data path on this host. ``clock``: monotonic seconds.

    ``routers``: machines that send us clients' packets (the BGP peers). Replies of nat mode return
    to the one a flow came from; the default gateways serve clients of any other.
    """

    def __init__(
        self, xdp: Xdp, paths: Paths, *, clock: Callable[[], float], routers: frozenset[str] = frozenset()
    ) -> None:
        self._xdp = xdp
        self._paths = paths
        self._clock = clock
        self._routers = routers
        self._hops = NextHops(xdp.interfaces)
        self._hops.track(routers)
        self._nodes: frozenset[str] = frozenset()
        self._known: Mapping[str, NextHop] = {}
        self._settings: Settings | None = None
        self._repairs = 0
        self._next_repair = 0.0
        self._obstacle_by_interface: dict[str, XdpError] = {}
        self._complaint_by_vip: dict[Vip, str] = {}  # '' proven; absent: not tried since it changed
        self._programs = Programs(paths.bpf / "programs")
        self._links = Links(paths.bpf / "links", self._programs)

    # --- life --------------------------------------------------------------------------------

    async def open(self) -> None:
        """Take over or make the maps, compile if the source is new, load, attach or exchange.

        Raises XdpError with a hint. An interface that cannot be attached does not raise: it is in
        ``observed().obstacles``, is tried again, and nothing is proven until all are attached.
        """
        sizes = sizes_of(self._xdp)
        self._specs = maps.specs(sizes)
        hz = await asyncio.to_thread(testrun.kernel_hz)
        self._bytecode = await compile_for(self._xdp, self._paths, hz=hz)
        self._programs.open()
        self._links.open()
        self._maps = pins.open_maps(self._paths.bpf, self._specs, self._live_map_ids())
        self._tables = maps.Tables(self._maps, sizes=sizes, tick_s=2 ** maps.tick_shift(hz) / hz, clock=self._clock)
        self._counters = Counters(self._maps, sizes=sizes)
        self._rings = drift.Rings(self._maps)
        self._concluded: frozenset[str] = frozenset()
        self._waiting = frozenset(self._tables.backend_ids())  # of an earlier daemon, not yet confirmed
        if not self._xdp.snat.addresses:
            snat.reserve_ports(*self._xdp.snat.port_range)
        self._configure()
        # Native drivers take packets in several buffers only from who says so; then any MTU will do. In
        # generic mode headers might lie outside the first buffer, where the program does not look.
        frags = self._xdp.attach is Attach.NATIVE
        self._program = self._programs.load(self._bytecode, self._maps, frags=frags)
        self._attach()

    async def run(self, changed: Callable[[], None]) -> None:
        """Follow links, neighbours and routes for ever; ``changed`` after reachability or attachment moved."""

        def heard() -> None:
            attached = self._attach()
            if self._take_hops() or attached:
                changed()

        await self._hops.run(heard)

    def close(self) -> None:
        """Let go. Everything stays pinned, attached and forwarding."""
        self._counters.close()
        self._tables.close()
        for opened in self._maps.values():
            opened.close()
        self._links.close()
        self._programs.close()

    # --- nodes -------------------------------------------------------------------------------

    def track(self, addresses: frozenset[str]) -> None:
        """Keep next hops for exactly these node addresses."""
        if addresses == self._nodes:
            return
        for gone in self._nodes - addresses:
            self._tables.forget_hop(gone)
        self._nodes = addresses
        self._hops.track(addresses | self._routers)
        self._configure()

    @property
    def reachable(self) -> frozenset[str]:
        """Tracked nodes that packets can be sent to.

        After a start also those that the kernel sends to already, until something else is heard.
        """
        return self._nodes & (self._known.keys() | self._waiting)

    def obstacle(self, address: str) -> str:
        """Why a tracked node is not reachable, in words."""
        return self._hops.obstacle(address)

    # --- VIPs --------------------------------------------------------------------------------

    def observed(self) -> Held:
        """Read back from the kernel; what has changed since its last proof is tried again here."""
        self._repair()
        forwards = self._tables.read()
        self._attach()
        for vip in self._complaint_by_vip.keys() - forwards.keys():
            del self._complaint_by_vip[vip]
        self._try(forward for vip, forward in forwards.items() if vip not in self._complaint_by_vip)
        attached = self._links.attached()
        return Held(
            forwards=forwards,
            rings=self._tables.rings(),
            proven=frozenset(vip for vip, complaint in self._complaint_by_vip.items() if not complaint),
            unproven={vip: complaint for vip, complaint in self._complaint_by_vip.items() if complaint},
            attached={name: a.mode for name, a in sorted(attached.items()) if a.program_id == self._program.id},
            obstacles={name: str(error) for name, error in self._obstacle_by_interface.items()},
            repairs=self._repairs,
        )

    def program(self, forwards: Iterable[Forward], rings: Iterable[Ring]) -> dict[Vip, XdpError]:
        """Serve these VIPs exactly so -> what failed, by VIP (TableFull names its limit); the others hold.

        Rings and backends are written aside first, so no packet sees half a change.
        """
        wanted = tuple(forwards)
        for forward in wanted:
            self._complaint_by_vip.pop(forward.vip, None)
        return self._tables.program(wanted, {ring.fingerprint: ring for ring in rings})

    def unprogram(self, vips: Iterable[Vip]) -> None:
        """Stop serving these VIPs; what nobody else uses goes with them."""
        gone = tuple(vips)
        self._tables.unprogram(gone)
        for vip in gone:
            self._complaint_by_vip.pop(vip, None)

    def prove(self, vips: Iterable[Vip]) -> dict[Vip, str]:
        """Send a packet of each VIP through the loaded program, without a trace in flows or counters.

        '' when it left rewritten for an active backend, else what is wrong.
        """
        held = self._tables.read()
        wanted = tuple(vips)
        self._try(held[vip] for vip in wanted if vip in held)
        return {vip: self._complaint_by_vip[vip] if vip in held else "the kernel does not hold it" for vip in wanted}

    def trace(self, packet: bytes) -> testrun.Trial:
        """What the loaded program would do with this frame, without a trace (``lbctl trace``)."""
        return testrun.trial(self._program.fd, packet)

    def backend_address(self, number: int) -> str:
        """Address behind a Trial's ``backend_id``, '' when there is none."""
        return next((a for a, known in self._tables.backend_ids().items() if known == number), "")

    def counters(self) -> Tally:
        """Since the maps were made; daemons come and go."""
        number_by_vip = {vip: self._tables.vip_id(vip) for vip in self._tables.read()}
        number_by_backend = self._tables.backend_ids()
        vips = self._counters.vips(number_by_vip.values())
        backends = self._counters.backends(number_by_backend.values())
        return Tally(
            verdicts=self._counters.verdicts(),
            vips={vip: vips[number] for vip, number in number_by_vip.items()},
            backends={address: backends[number] for address, number in number_by_backend.items()},
        )

    # --- how ---------------------------------------------------------------------------------

    def _live_map_ids(self) -> frozenset[int]:
        """Maps that packets go through now."""
        running = (self._programs.find(a.program_id) for a in self._links.attached().values())
        return frozenset(m for p in running if p is not None for m in bpf.program_info(p.fd).map_ids)

    def _configure(self) -> None:
        """Tell the data path its SNAT addresses, if they are not what it has."""
        low, high = self._xdp.snat.port_range
        held = snat.held_addresses(self._maps["lb_snats"])
        addresses = tuple(str(a) for a in self._xdp.snat.addresses) or snat.own_addresses(held, self._nodes)
        own_by_family = {6 if ":" in a else 4: a for a in snat.own_addresses((), self._nodes)}
        settings = Settings(
            snat_addresses=addresses,
            port_first=low,
            port_count=high - low + 1,
            tunnel4=own_by_family.get(4, DEFAULT4),
            tunnel6=own_by_family.get(6, DEFAULT6),
        )
        if settings != self._settings:
            self._tables.configure(settings)
            self._settings = settings
            self._complaint_by_vip.clear()

    def _attach(self) -> bool:
        """Every configured interface runs our program, the others do not -> whether anything moved."""
        moved = False
        for interface in self._links.interfaces() - set(self._xdp.interfaces):
            self._links.detach(interface)
            moved = True
        for interface in self._xdp.interfaces:
            try:
                moved |= self._links.attach(interface, self._program, self._xdp.attach)
                moved |= self._obstacle_by_interface.pop(interface, None) is not None
            except XdpError as error:
                before = self._obstacle_by_interface.get(interface)
                if str(before) != str(error):
                    _LOG.error("interface not attached", interface=interface, error=error.message, hint=error.hint)
                    self._obstacle_by_interface[interface] = error
                    moved = True
        if moved:
            self._complaint_by_vip.clear()
        if moved and not self._obstacle_by_interface:  # nothing else is in use any more
            self._programs.forget_all_but(self._program)
            pins.forget_all_but(self._paths.bpf, self._specs)
        return moved

    def _take_hops(self) -> bool:
        """Bring the ways in the kernel up to date -> whether any of them moved."""
        hops, concluded = self._hops.hops(), self._hops.concluded()
        waiting = self._waiting - concluded
        if (hops, waiting, concluded) == (self._known, self._waiting, self._concluded):
            return False
        self._known, self._waiting, self._concluded = hops, waiting, concluded
        self._write_hops()
        self._configure()
        self._complaint_by_vip.clear()
        return True

    def _repair(self) -> None:
        """Look, at most every few seconds, whether the maps still hold what we wrote."""
        now = self._clock()
        if now < self._next_repair:
            return
        self._next_repair = now + _REPAIR_S
        found = [f"ring {fingerprint}" for fingerprint in self._rings.unname_spoilt()]
        found += drift.changed_by(self._write_again, self._maps)
        found += [f"pin of {name}" for name in self._pin_again()]
        for what in found:
            _LOG.warning("kernel entry repaired", what=what)
        if found:
            self._repairs += len(found)
            self._complaint_by_vip.clear()

    def _write_again(self) -> None:
        if self._settings is not None:
            self._tables.configure(self._settings)
        self._write_hops()

    def _pin_again(self) -> Iterable[str]:
        # The link first: while it has no pin, the death of this daemon ends forwarding.
        yield from self._links.pin_again()
        yield from self._programs.pin_again()
        yield from pins.pin_again(self._paths.bpf, self._specs, self._maps)

    def _write_hops(self) -> None:
        """Every way as we know it; what is there already is not written again."""
        # Of the same moment: what has been heard since `_known` was taken must not pass for unreachable.
        heard = self._known.keys() | self._concluded
        for address in sorted(self._nodes & heard):
            self._tables.set_hop(address, self._known.get(address))
        for address in sorted((self._routers | {DEFAULT4, DEFAULT6}) & heard):
            self._tables.set_router(address, self._known.get(address))

    def _try(self, forwards: Iterable[Forward]) -> None:
        """Send a packet of each through the loaded program and keep what is wrong with its outcome."""
        obstacle = next((f"{name}: {error.message}" for name, error in self._obstacle_by_interface.items()), "")
        address_by_id = {number: address for address, number in self._tables.backend_ids().items()}
        for forward in forwards:
            complaint = obstacle
            if not complaint:
                outcome = testrun.trial(self._program.fd, proof.sample(forward))
                complaint = proof.complaint(forward, outcome, address_by_id, self._known)
            self._complaint_by_vip[forward.vip] = complaint


def sizes_of(xdp: Xdp) -> maps.Sizes:
    """What the maps are made for. The host's own addresses may be two: one per family."""
    low, high = xdp.snat.port_range
    return maps.Sizes(
        vips=xdp.limits.vips,
        backends=xdp.limits.backends,
        rings=xdp.limits.rings,
        flows=xdp.limits.flows,
        snat_addresses=len(xdp.snat.addresses) or 2,
        snat_ports=high - low + 1,
    )


async def compile_for(xdp: Xdp, paths: Paths, *, hz: int) -> Bytecode:
    """The bytecode of this configuration: from the cache, else compiled and cached (seconds).

    Called before an upgrade it keeps the compiler out of the restart.
    """
    sizes = sizes_of(xdp)
    return await asyncio.to_thread(
        build,
        assets.path("ebpf"),
        constants=maps.constants(sizes, hz=hz),
        maps=[spec.name for spec in maps.specs(sizes)],
        cache=paths.state / "cache",
    )


def uninstall(paths: Paths) -> None:
    """Take the program off every interface and forget all maps: forwarding ends here."""
    programs = Programs(paths.bpf / "programs")
    programs.open()
    links = Links(paths.bpf / "links", programs)
    links.open()
    for interface in sorted(links.interfaces()):
        links.detach(interface)
    links.close()
    programs.close()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(paths.bpf)
