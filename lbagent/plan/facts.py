# SPDX-License-Identifier: Apache-2.0
"""What follows from one Service, its namespace and the settings alone: the Facts of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from lbagent.model.pool import Assignment, Pool
from lbagent.model.reason import Judgement, Reason
from lbagent.model.service import Service, ServiceKey
from lbagent.model.state import Settings
from lbagent.model.vip import Mode
from lbagent.plan import request as requests
from lbagent.plan.pools import PoolIndex, admits, index
from lbagent.plan.request import NO_WISH, Request, parse_address


@dataclass(frozen=True, slots=True)
class Held:
    """An address of a Service, in its pool. ``value`` is the address as an integer."""

    address: str
    family: int
    value: int
    pool: Pool


@dataclass(frozen=True, slots=True)
class Holding:
    """What a Service may keep of its status, at most one address a family, in the order of its families.

    ``lost``: (address, Judgement) for those it may not keep; ``surplus`` are given back in peace.
    """

    held: tuple[Held, ...] = ()
    lost: tuple[tuple[str, Judgement], ...] = ()
    surplus: tuple[str, ...] = ()

    def of(self, family: int) -> Held | None:
        """The address held in a family."""
        return next((h for h in self.held if h.family == family), None)


NOTHING_HELD = Holding()


@dataclass(frozen=True, slots=True)
class Facts:
    """``foreign``: why it is not ours. ``refusal``: why it cannot be forwarded whatever its backends.

    ``assignment`` is what its status should say if the claim stands as it is.
    """

    service: Service
    foreign: Reason | None
    wish: Request = NO_WISH
    claim: Holding = NOTHING_HELD
    refusal: Judgement | None = None
    assignment: Assignment | None = None
    is_settled: bool = False

    @property
    def key(self) -> ServiceKey:
        return self.service.key


def establish(
    service: Service, namespace_labels: Mapping[str, str], settings: Settings, *, pools: PoolIndex | None = None
) -> Facts:
    """The Facts of a Service. ``pools`` is the index of ``settings.pools``, from whoever has it at hand."""
    foreign = requests.foreign(service, settings)
    if foreign:
        return Facts(service, foreign)
    wish = requests.read(service)
    holding = claim(service, pools or index(settings.pools), namespace_labels)
    mode = mode_of(wish, holding.held)
    modes = [mode] if wish.mode or holding.held else list(dict.fromkeys(p.mode for p in settings.pools)) or [mode]
    return Facts(
        service,
        None,
        wish,
        holding,
        wish.refusal or requests.ports_refusal(service, modes, settings),
        assignment(service, holding.held, mode) if holding.held else None,
        is_settled(service, holding, wish),
    )


def mode_of(wish: Request, held: tuple[Held, ...]) -> Mode:
    """One mode per Service: its own wish, else the default of the pool of its first address."""
    return wish.mode or (held[0].pool.mode if held else Mode.NAT)


def claim(service: Service, pools: PoolIndex, namespace_labels: Mapping[str, str]) -> Holding:
    """What a Service may keep as far as it alone is concerned."""
    held: dict[int, Held] = {}
    lost: list[tuple[str, Judgement]] = []
    surplus: list[str] = []
    for text in service.status_addresses:
        parsed = parse_address(text)
        if parsed is None:
            lost.append((text, Judgement(reason=Reason.OUTSIDE_POOLS, detail=text)))
            continue
        family, value = parsed
        pool = pools.find(family, value)
        if family not in service.ip_families or family in held:
            surplus.append(text)
        elif pool is None:
            lost.append((text, Judgement(reason=Reason.OUTSIDE_POOLS, detail=text)))
        elif not admits(pool, service, namespace_labels):
            detail = f"{text} is of pool {pool.name}"
            lost.append((text, Judgement(reason=Reason.POOL_SELECTOR_MISMATCH, detail=detail)))
        else:
            held[family] = Held(text, family, value, pool)
    return Holding(tuple(held[f] for f in service.ip_families if f in held), tuple(lost), tuple(surplus))


def age(service: Service) -> tuple[float, ServiceKey]:
    """Order in which Services are served: older first, equal ages by name."""
    return service.created, service.key


def is_settled(service: Service, holding: Holding, wish: Request) -> bool:
    """Has the Service all it wants? Then the allocator need not look at it."""
    if wish.address_refusal or len(holding.held) != len(service.ip_families):
        return False
    asked = all(wish.address(h.family) in ("", h.address) for h in holding.held)
    return asked and (not wish.pools or all(h.pool.name in wish.pools for h in holding.held))


def assignment(service: Service, held: tuple[Held, ...], mode: Mode) -> Assignment:
    """The status a Service shall have."""
    errors = ((p.port, p.protocol.value, requests.port_error(p, mode)) for p in service.ports)
    return Assignment(
        service=service.key,
        addresses=tuple(h.address for h in held),
        pools=tuple(h.pool.name for h in held),
        ip_mode=requests.ip_mode(mode),
        port_errors=tuple(error for error in errors if error[2]),
    )
