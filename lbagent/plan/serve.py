# SPDX-License-Identifier: Apache-2.0
"""What one Service that holds addresses needs of kernel and speaker: forwards, rings, routes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lbagent.model.reason import Judgement, Reason
from lbagent.model.route import Route
from lbagent.model.service import IpMode, Port, Service
from lbagent.model.vip import Backend, Forward, Mode, Vip
from lbagent.plan import request as requests
from lbagent.plan.eligible import Choice, Selection, Usable
from lbagent.plan.facts import Held, mode_of
from lbagent.plan.request import Request


@dataclass(frozen=True, slots=True)
class Served:
    """What one Service needs of kernel and speaker. ``obstacle`` is its worst address's; None: all are served."""

    forwards: Mapping[Vip, Forward] = field(default_factory=dict)
    backends_by_ring: Mapping[str, tuple[Backend, ...]] = field(default_factory=dict)
    vips_by_route: Mapping[Route, frozenset[Vip]] = field(default_factory=dict)
    selection_by_vip: Mapping[Vip, Selection] = field(default_factory=dict)
    obstacle: Judgement | None = None


NOT_SERVED = Served()


def serve(
    service: Service, wish: Request, held: tuple[Held, ...], usable_by_family: Mapping[int, Usable], choice: Choice
) -> Served:
    """Forwards, rings and routes of one Service that holds addresses."""
    wanted = mode_of(wish, held)
    forwards: dict[Vip, Forward] = {}
    rings: dict[str, tuple[Backend, ...]] = {}
    routes: dict[Route, frozenset[Vip]] = {}
    selections: dict[Vip, Selection] = {}
    obstacle: Judgement | None = None
    for item in held:
        mode = wanted
        if waits := _waits_for_status(service, item.address, wanted):
            obstacle = obstacle or Judgement(reason=Reason.PENDING_ASSIGNMENT, detail=waits)
            mode = Mode.NAT  # which works whatever the status says, so a change of mode costs no route
        active = set()
        for port in _ports(service, mode):
            selection = choice.select(
                service,
                usable_by_family[item.family],
                family=item.family,
                address_type=item.pool.node_address_type,
                protocol=port.protocol,
                node_port=port.node_port,
            )
            vip = Vip(address=item.address, protocol=port.protocol, port=port.port)
            selections[vip] = selection
            if selection.reason:
                obstacle = obstacle or _obstacle(item, port, selection, len(held) > 1)
            if not selection.backends:
                continue
            forwards[vip] = Forward(
                vip=vip,
                service=service.key,
                mode=mode,
                ring=selection.fingerprint,
                node_port=port.node_port if mode is Mode.NAT else 0,
                source_ranges=wish.source_ranges,
                affinity_timeout_s=service.affinity_timeout_s,
            )
            rings[selection.fingerprint] = selection.backends
            if selection.reason is None:
                active.add(vip)
        if active:
            prefix = f"{item.address}/{32 if item.family == 4 else 128}"
            routes[Route(prefix=prefix, policy=item.pool.policy)] = frozenset(active)
    return Served(forwards, rings, routes, selections, obstacle)


def _ports(service: Service, mode: Mode) -> Iterator[Port]:
    return (port for port in service.ports if not requests.port_error(port, mode))


def _waits_for_status(service: Service, address: str, mode: Mode) -> str:
    """In a DSR mode nodes take packets for the VIP only once the status says ipMode VIP; before, they would loop."""
    if mode is Mode.NAT:
        return ""
    written = next((i.ip_mode for i in service.ingress if i.ip == address), None)
    return "" if written in (None, IpMode.VIP) else f"{address}: ipMode VIP is not written yet"


def _obstacle(item: Held, port: Port, selection: Selection, several: bool) -> Judgement:
    assert selection.reason is not None
    about = [text for text in (f"IPv{item.family}" if several else "", selection.detail) if text]
    if selection.reason is Reason.NO_HEALTHY_BACKENDS:
        about.insert(0, f"port {port.port}/{port.protocol}")
    return Judgement(reason=selection.reason, detail=": ".join(about))
