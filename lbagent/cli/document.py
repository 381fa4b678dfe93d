# SPDX-License-Identifier: Apache-2.0
"""The plan as a document: a versioned schema that other programs may read.

``docs/reference/plan.schema.json`` is made from these classes. Within ``lbagent.io/plan/v1`` keys
are only ever added.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Said(_Part):
    """A Reason in words."""

    reason: str = Field(description="Machine word, from docs/reference/reasons.md")
    sentence: str = Field(description="The Reason in words")
    detail: str = Field(description="What it is about; may be empty")
    hint: str = Field(description="What to do next; may be empty")


class Address(_Part):
    """An address of a Service."""

    address: str
    family: Literal[4, 6]
    pool: str = Field(description="The pool it is of")
    held: bool = Field(description="True: the status says it already. False: it is about to be written")


class Target(_Part):
    """A node as a backend of one Vip."""

    node: str
    address: str
    port: int = Field(description="Where packets are sent: the node port in nat mode, the Service port in dsr modes")
    weight: int = Field(description="Share of new connections, relative to the others")
    state: Literal["active", "draining", "down"]
    source: str = Field(description="Which source of health decided")
    why: str = Field(description="The decision in words")


class PortPlan(_Part):
    """One port of one address: a Vip, or why there is none."""

    vip: str = Field(description="address:port/protocol")
    address: str
    protocol: str
    port: int
    node_port: int
    error: str = Field(description="Why the port is not forwarded, as in the status; empty when it is")
    ring: str = Field(description="Fingerprint of the consistent-hash ring; empty when nothing is forwarded")
    backends: tuple[Target, ...]
    source_ranges: tuple[str, ...] = Field(description="Clients admitted; empty: all")
    affinity_timeout_s: int = Field(description="Client affinity; 0: none")


class ServicePlan(Said):
    """One Service of type LoadBalancer."""

    service: str = Field(description="namespace/name")
    served: bool = Field(description="All of it is forwarded and announced")
    notice: Said | None = Field(description="What the Service is told before the new status is written")
    addresses: tuple[Address, ...]
    mode: str = Field(description="nat, dsr-l2 or dsr-ipip; empty when it has no address")
    ip_mode: str = Field(description="Proxy or VIP; empty when it has no address")
    ports: tuple[PortPlan, ...]
    status_patch: dict[str, Any] | None = Field(
        description="The strategic merge patch of the status subresource that would be sent; null: none"
    )


class RingBackend(_Part):
    """A backend of a ring with its share of the slots."""

    node: str
    address: str
    weight: int
    state: Literal["active", "draining", "down"]
    share: float = Field(description="Share of the 65,537 slots")


class RingPlan(_Part):
    """A consistent-hash ring; Services with the same backends share one."""

    fingerprint: str
    vips: int = Field(description="How many Vips use it")
    backends: tuple[RingBackend, ...]


class Path(_Part):
    """A route as one peer gets it."""

    peer: str
    next_hop: str
    as_path: tuple[int, ...]
    communities: tuple[str, ...]
    local_preference: int | None = Field(description="null on eBGP sessions, where it does not travel")
    med: int | None


class RoutePlan(_Part):
    """An announcement."""

    prefix: str
    policy: str = Field(description="Names of the bgp.policies laid together")
    needs: tuple[str, ...] = Field(description="Vips that must be proven before it is announced")
    paths: tuple[Path, ...]


class Renumbered(_Part):
    """A Service that would lose addresses."""

    service: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    why: str


class Problem(_Part):
    """An object that could not be read."""

    object: str
    problem: str


class PlanDocument(_Part):
    """What lbagent would do with a cluster: assignments, backends, rings, routes, Reasons."""

    format: Literal["lbagent.io/plan/v1"] = "lbagent.io/plan/v1"
    host: str = Field(description="The LB host the plan is for")
    services: tuple[ServicePlan, ...] = Field(description="Ours, by name; others are left out")
    rings: tuple[RingPlan, ...]
    routes: tuple[RoutePlan, ...]
    renumbered: tuple[Renumbered, ...]
    problems: tuple[Problem, ...]


def schema() -> str:
    """docs/reference/plan.schema.json."""
    body = PlanDocument.model_json_schema(mode="serialization")
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lbagent plan -o json",
    }
    return json.dumps(head | {key: value for key, value in body.items() if key != "title"}, indent=2) + "\n"
