# SPDX-License-Identifier: Apache-2.0
"""One change, as a value. The list is closed: match it with ``assert_never``."""

from dataclasses import dataclass, field

from lbagent.model.pool import Assignment
from lbagent.model.reason import Judgement
from lbagent.model.route import Route
from lbagent.model.service import ServiceKey
from lbagent.model.vip import Forward, Ring, Vip


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Make the kernel serve these Vips, each with its ring (by fingerprint in ``rings``)."""

    forwards: tuple[Forward, ...]
    rings: tuple[Ring, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """Tell the peers. ``needs``: Vips that must be proven in the kernel when this is performed."""

    route: Route
    needs: frozenset[Vip]


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    """Take the route back from every peer."""

    route: Route


@dataclass(frozen=True, slots=True, kw_only=True)
class Unprogram:
    """Make the kernel forget these Vips. Only when their address attracts no traffic any more."""

    vips: tuple[Vip, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assign:
    """Write addresses into a Service's status (lease holder only)."""

    assignment: Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Clear the addresses we wrote from a Service's status (lease holder only)."""

    service: ServiceKey
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Tell the cluster why a Service is where it is (Event and condition, deduplicated)."""

    service: ServiceKey
    judgement: Judgement


Step = Program | Announce | Withdraw | Unprogram | Assign | Release | Report
