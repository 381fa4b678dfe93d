# SPDX-License-Identifier: Apache-2.0
"""What the control socket answers: the last Pass as plain JSON types. Pure, one function per verb."""

import ipaddress
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lbagent.agent.loop import Pass
from lbagent.errors import ControlError
from lbagent.model.route import PeerState
from lbagent.model.service import ServiceKey
from lbagent.model.step import Announce, Assign, Program, Release, Report, Step, Unprogram, Withdraw
from lbagent.model.vip import BackendState, Forward, Ring

Row = dict[str, Any]


def services(last: Pass) -> list[Row]:
    """One row per Service of type LoadBalancer, with its Reason."""
    forwards_by_service = _forwards_by_service(last)
    rows = []
    for key, judgement in sorted(last.desired.judgements.items()):
        service = last.snapshot.services.get(key)
        mine = forwards_by_service.get(key, [])
        rows.append(
            {
                "service": str(key),
                "addresses": list(service.status_addresses) if service else [],
                "mode": str(mine[0].mode) if mine else "",
                "vips": len(mine),
                "backends": len(_active(last, mine[0])) if mine else 0,
                "reason": judgement.reason.value,
                "detail": judgement.detail,
            }
        )
    return rows


def _forwards_by_service(last: Pass) -> dict[ServiceKey, list[Forward]]:
    found: dict[ServiceKey, list[Forward]] = {}
    for forward in last.desired.forwards.values():
        found.setdefault(forward.service, []).append(forward)
    return found


def vips(last: Pass) -> list[Row]:
    """One row per Vip: wanted, held by the kernel, proven."""
    rows = []
    for vip in sorted(last.desired.forwards.keys() | last.kernel.forwards.keys()):
        forward = last.desired.forwards.get(vip) or last.kernel.forwards[vip]
        rows.append(
            {
                "vip": str(vip),
                "service": str(last.desired.forwards[vip].service) if vip in last.desired.forwards else "",
                "mode": str(forward.mode),
                "node_port": forward.node_port,
                "ring": forward.ring,
                "backends": len(_active(last, forward)),
                "wanted": vip in last.desired.forwards,
                "programmed": vip in last.kernel.forwards,
                "proven": vip in last.observed.proven,
                "problem": last.snapshot.unproven.get(vip, ""),
            }
        )
    return rows


def backends(last: Pass) -> list[Row]:
    """One row per node address and ring."""
    rows = []
    for ring in sorted(last.desired.rings.values(), key=lambda ring: ring.fingerprint):
        share = Counter(ring.slots)
        for index, backend in enumerate(ring.backends, start=1):
            rows.append(
                {
                    "ring": ring.fingerprint,
                    "node": backend.node,
                    "address": backend.address,
                    "weight": backend.weight,
                    "state": str(backend.state),
                    "reachable": backend.address not in last.snapshot.unreachable,
                    "share": round(share[index] / len(ring.slots), 4),
                }
            )
    return rows


def rings(last: Pass) -> list[Row]:
    """One row per ring: who uses it, how many backends."""
    users = Counter(forward.ring for forward in last.desired.forwards.values())
    return [
        {
            "ring": ring.fingerprint,
            "backends": len(ring.backends),
            "active": sum(b.state is BackendState.ACTIVE for b in ring.backends),
            "vips": users[ring.fingerprint],
            "programmed": ring.fingerprint in last.observed.rings,
        }
        for ring in sorted(last.desired.rings.values(), key=lambda ring: ring.fingerprint)
    ]


def routes(last: Pass) -> list[Row]:
    """One row per prefix: wanted, told to the speaker."""
    wanted = set(last.desired.routes)
    return [
        {
            "prefix": route.prefix,
            "policy": route.policy.name,
            "communities": list(route.policy.communities),
            "peers": list(route.policy.peers) or sorted(last.observed.peers),
            "wanted": route in wanted,
            "announced": route in last.observed.routes,
            "waits_for": sorted(str(v) for v in last.desired.routes.get(route, ()) if v not in last.observed.proven),
        }
        for route in sorted(wanted | last.observed.routes, key=lambda route: route.prefix)
    ]


def peers(states: Mapping[str, PeerState], now: float) -> list[Row]:
    """One row per BGP session."""
    return [
        {
            "peer": peer.name,
            "address": peer.address,
            "session": str(peer.session),
            "for_s": round(max(0.0, now - peer.since), 1) if peer.since else None,
            "flaps": peer.flaps,
            "hold_time_s": peer.hold_time_s,
            "sent": peer.sent,
            "acknowledged": peer.acknowledged,
            "last_error": peer.last_error,
        }
        for _, peer in sorted(states.items())
    ]


def pools(last: Pass) -> list[Row]:
    """One row per pool: size and use."""
    used = Counter(_pool_of(last, address) for s in last.snapshot.services.values() for address in s.status_addresses)
    return [
        {
            "pool": pool.name,
            "addresses": sum(r.last - r.first + 1 for r in pool.ranges),
            "assigned": used[pool.name],
            "auto_assign": pool.auto_assign,
            "disabled": pool.disabled,
            "mode": str(pool.mode),
        }
        for pool in last.snapshot.settings.pools
    ]


def counts(last: Pass) -> dict[str, int]:
    """Services by Reason."""
    return dict(sorted(Counter(j.reason.value for j in last.desired.judgements.values()).items()))


def diff(last: Pass) -> list[str]:
    """What the last pass had to change, in words; empty when all is as it should be."""
    return [line for step in last.steps for line in _words(step)] + [f"held back: {line}" for line in held(last)]


def held(last: Pass) -> list[str]:
    """What the guard did not let the last pass do."""
    return [line for step in last.held for line in _words(step)]


def _words(step: Step) -> list[str]:
    match step:
        case Program():
            return [f"program {forward.vip} (ring {forward.ring})" for forward in step.forwards]
        case Unprogram():
            return [f"unprogram {vip}" for vip in step.vips]
        case Announce():
            return [f"announce {step.route.prefix}"]
        case Withdraw():
            return [f"withdraw {step.route.prefix}"]
        case Assign():
            return [f"assign {', '.join(step.assignment.addresses)} to {step.assignment.service}"]
        case Release():
            return [f"release {', '.join(step.addresses)} from {step.service}"]
        case Report():
            return []  # said every pass, sent only when it is news


def last_pass(last: Pass, now: float) -> Row:
    """How the loop is doing."""
    return {
        "number": last.number,
        "age_s": round(now - last.snapshot.now, 1),
        "took_ms": round(last.took_s * 1e3, 1),
    }


def around(last: Pass, layers: list[dict[str, str | int]], backend: str) -> Row:
    """What this host knows about a traced packet: VIP, Service, ring, node, route."""
    network = next((x for x in layers if x["layer"] in ("IP", "IP6")), None)
    transport = next((x for x in layers if x["layer"] in ("TCP", "UDP")), None)
    if network is None:
        return {}
    address = str(network["destination"])
    route = next((r for r in last.observed.routes if r.address == address), None)
    row: Row = {"announced": route.prefix if route else "", "vip": "", "service": "", "ring": "", "node": ""}
    row["node"] = next((b["node"] for b in backends(last) if b["address"] == backend), "")
    if transport is not None:
        port, protocol = int(transport["destination"]), str(transport["layer"])
        found = next(
            (v for v in last.kernel.forwards if (v.address, v.port, v.protocol) == (address, port, protocol)), None
        )
        if found is not None:
            row["vip"] = str(found)
            row["ring"] = last.kernel.forwards[found].ring
            wanted = last.desired.forwards.get(found)
            row["service"] = str(wanted.service) if wanted else ""
    return row


def explain(last: Pass, key: ServiceKey) -> Row:
    """Everything about one Service, from its object to the routes of its addresses."""
    found = last.snapshot.services[key]
    judgement = last.desired.judgements.get(key)
    mine = sorted((f for f in last.desired.forwards.values() if f.service == key), key=lambda f: f.vip)
    return {
        "service": str(key),
        "type": found.type,
        "class": found.load_balancer_class,
        "policy": str(found.external_traffic_policy),
        "addresses": list(found.status_addresses),
        "reason": judgement.reason.value if judgement else "",
        "sentence": judgement.reason.sentence if judgement else "is not of type LoadBalancer",
        "detail": judgement.detail if judgement else "",
        "hint": judgement.reason.hint if judgement else "",
        "vips": [_explain_vip(last, forward) for forward in mine],
        "routes": [row for row in routes(last) if row["prefix"].partition("/")[0] in found.status_addresses],
        "about": [str(key), *(str(f.vip) for f in mine), *_prefixes(found.status_addresses)],
    }


def _prefixes(addresses: tuple[str, ...]) -> list[str]:
    return [f"{address}/{128 if ':' in address else 32}" for address in addresses]


def _explain_vip(last: Pass, forward: Forward) -> Row:
    ring = last.desired.rings[forward.ring]
    share = Counter(ring.slots)
    return {
        "vip": str(forward.vip),
        "mode": str(forward.mode),
        "node_port": forward.node_port,
        "ring": forward.ring,
        "programmed": forward.vip in last.kernel.forwards,
        "proven": forward.vip in last.observed.proven,
        "problem": last.snapshot.unproven.get(forward.vip, ""),
        "backends": [
            {
                "node": b.node,
                "address": b.address,
                "weight": b.weight,
                "state": str(b.state),
                "share": round(share[index] / len(ring.slots), 4),
            }
            for index, b in enumerate(ring.backends, start=1)
        ],
    }


def find(last: Pass, name: str) -> ServiceKey:
    """NAMESPACE/NAME, a name in namespace default, or an address. Raises ControlError."""
    namespace, slash, service = name.partition("/")
    key = ServiceKey(namespace, service) if slash else ServiceKey("default", namespace)
    if key in last.snapshot.services:
        return key
    by_address = {a: k for k, s in last.snapshot.services.items() for a in s.status_addresses}
    if name in by_address:
        return by_address[name]
    raise ControlError(f"no Service {name}", hint="NAMESPACE/NAME or an address; see lbctl show services")


def _active(last: Pass, forward: Forward) -> list[str]:
    ring: Ring | None = last.desired.rings.get(forward.ring)
    return [b.address for b in ring.backends if b.state is BackendState.ACTIVE] if ring else []


def _pool_of(last: Pass, address: str) -> str:
    ip = ipaddress.ip_address(address)
    for pool in last.snapshot.settings.pools:
        if any(r.family == ip.version and r.first <= int(ip) <= r.last for r in pool.ranges):
            return pool.name
    return ""
