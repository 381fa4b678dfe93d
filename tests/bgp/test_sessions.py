# SPDX-License-Identifier: Apache-2.0
"""Every kind of session the configuration offers, against FRR; and what is shown when one cannot be."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from lbagent.model.route import PathPolicy, Route
from tests.bgp.rig import LB4, LB6, TOR4, TOR6, Rig, is_synced, speaking, until
from tests.lab.frr import Frr

pytestmark = pytest.mark.netns

V4, V6 = "192.0.2.1/32", "2001:db8::1/128"
EBGP4 = {"name": "tor", "address": TOR4, "local_address": LB4, "peer_as": 65101}
EBGP6 = {"name": "tor", "address": TOR6, "local_address": LB6, "peer_as": 65101}


def router(neighbor: str, *lines: str, families: tuple[str, ...] = ("ipv4",), asn: int = 65001) -> str:
    """FRR's configuration for one neighbor; ``lines`` follow ``neighbor ADDRESS``."""
    text = [
        "router bgp 65101",
        " bgp router-id 10.0.1.2",
        " no bgp ebgp-requires-policy",
        " no bgp default ipv4-unicast",
    ]
    text += [f" neighbor {neighbor} remote-as {asn}", f" neighbor {neighbor} timers connect 1"]
    text += [f" neighbor {neighbor} {line}" for line in lines]
    for family in families:
        text += [f" address-family {family} unicast", f"  neighbor {neighbor} activate", " exit-address-family"]
    return "\n".join(text) + "\n"


@dataclass(frozen=True)
class Case:
    """A session: our peer, the router's configuration, and what arrives (prefix -> next hop)."""

    title: str
    peer: dict[str, Any]
    router: str
    arrives: dict[str, str]
    bgp: dict[str, Any] = field(default_factory=dict)
    password: str = ""

    def __str__(self) -> str:
        return self.title


CASES = [
    Case("ipv4 by default", EBGP4, router(LB4), {V4: LB4}),
    Case("ipv6 by default", EBGP6, router(LB6, families=("ipv6",)), {V6: LB6}),
    Case(
        "both families over ipv4",
        {**EBGP4, "families": ["ipv4", "ipv6"], "next_hop": {"ipv6": LB6}},
        router(LB4, families=("ipv4", "ipv6")),
        {V4: LB4, V6: LB6},
    ),
    Case(
        "both families over ipv6 with extended next hop",
        {**EBGP6, "families": ["ipv4", "ipv6"]},
        router(LB6, "capability extended-nexthop", families=("ipv4", "ipv6")),
        {V4: LB6, V6: LB6},
    ),
    Case(
        "both families over ipv6 with an ipv4 next hop",
        {**EBGP6, "families": ["ipv4", "ipv6"], "next_hop": {"ipv4": LB4}},
        router(LB6, families=("ipv4", "ipv6")),
        {V4: LB4, V6: LB6},
    ),
    Case("md5", EBGP4, router(LB4, "password s3cr3t"), {V4: LB4}, password="s3cr3t"),
    Case("md5 over ipv6", EBGP6, router(LB6, "password s3cr3t", families=("ipv6",)), {V6: LB6}, password="s3cr3t"),
    Case("md5 with signs", EBGP4, router(LB4, "password a#(b)=:%$&~c,.@^*+"), {V4: LB4}, password="a#(b)=:%$&~c,.@^*+"),
    Case("gtsm", {**EBGP4, "gtsm": True}, router(LB4, "ttl-security hops 1"), {V4: LB4}),
    Case("gtsm over ipv6", {**EBGP6, "gtsm": True}, router(LB6, "ttl-security hops 1", families=("ipv6",)), {V6: LB6}),
    Case("passive", {**EBGP4, "passive": True}, router(LB4), {V4: LB4}),
    Case("passive with md5", {**EBGP4, "passive": True}, router(LB4, "password x"), {V4: LB4}, password="x"),
    Case("the router is passive", EBGP4, router(LB4, "passive"), {V4: LB4}),
    Case("without listening", EBGP4, router(LB4, "passive"), {V4: LB4}, bgp={"listen": False}),
    Case("multihop", {**EBGP4, "multihop_ttl": 5}, router(LB4, "ebgp-multihop 5"), {V4: LB4}),
    Case("another local AS", {**EBGP4, "local_as": 65099}, router(LB4, asn=65099), {V4: LB4}),
    Case("four-byte AS", EBGP4, router(LB4, asn=4200000001), {V4: LB4}, bgp={"local_as": 4200000001}),
    Case("hold time 3", {**EBGP4, "hold_time_s": 3}, router(LB4), {V4: LB4}),
    Case("add-path", {**EBGP4, "add_path": True}, router(LB4), {V4: LB4}),
    Case("iBGP", {**EBGP4, "peer_as": 65001}, router(LB4).replace("router bgp 65101", "router bgp 65001"), {V4: LB4}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_session_of_this_kind_carries_routes_there_and_back(case: Case, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    peer = dict(case.peer)
    if case.password:
        secret = rig.paths.run / "password"
        secret.write_text(case.password + "\n")
        secret.chmod(0o600)
        peer["password_file"] = secret
    rig.bgp = rig.bgp_section(peers=(peer,), **case.bgp)
    rig.start_exabgp()
    wanted = frozenset(Route(prefix=prefix) for prefix in (V4, V6))
    with Frr(rig.tor.name, case.router) as frr:

        def arrived() -> dict[str, set[str]]:
            found = {**frr.bgp_routes(4), **frr.bgp_routes(6)}
            # FRR lists the link-local address that it learned beside a global IPv6 next hop.
            return {
                prefix: {hop["ip"] for path in paths for hop in path["nexthops"] if hop.get("scope") != "link-local"}
                for prefix, paths in found.items()
            }

        async with speaking(rig) as speaker:
            speaker.want(wanted)
            expected = {prefix: {hop} for prefix, hop in case.arrives.items()}
            await until("arrived", arrived, expected, limit_s=20, log=rig.log)
            await until("synced", is_synced(speaker))
            expected_hold_s = peer.get("hold_time_s", rig.bgp.hold_time_s)
            assert speaker.observed().peers["tor"].hold_time_s == expected_hold_s
            speaker.want(frozenset())
            await until("gone", arrived, {})
            await until("synced", is_synced(speaker))
            assert speaker.observed().mended == 0


async def test_an_ibgp_router_sees_preference_and_an_empty_path(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(peers=({**EBGP4, "peer_as": 65001},))
    rig.start_exabgp()
    policies = {
        "192.0.2.1/32": PathPolicy(local_preference=200, med=7),
        "192.0.2.2/32": PathPolicy(),
        "192.0.2.3/32": PathPolicy(prepend=2),  # a router refuses its own AS in the path of an iBGP peer
    }
    with Frr(rig.tor.name, router(LB4).replace("router bgp 65101", "router bgp 65001")) as frr:
        async with speaking(rig) as speaker:
            speaker.want(frozenset(Route(prefix=prefix, policy=policy) for prefix, policy in policies.items()))
            await until("arrived", lambda: len(frr.bgp_routes()), 3, log=rig.log)
            path_by_prefix = {prefix: frr.bgp_paths(prefix)[0] for prefix in policies}
    assert [path["locPrf"] for path in path_by_prefix.values()] == [200, 100, 100]
    assert [path["aspath"]["string"] for path in path_by_prefix.values()] == ["Local", "Local", "Local"]
    assert path_by_prefix["192.0.2.1/32"]["metric"] == 7


async def test_an_adopted_route_is_the_route_that_was_wanted(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(peers=(EBGP4, {**EBGP6, "name": "internal", "peer_as": 65001}))
    rig.start_exabgp()
    wanted = frozenset(
        {
            Route(prefix="192.0.2.1/32", policy=PathPolicy(communities=("65001:1", "65001:1:2", "graceful-shutdown"))),
            Route(prefix="192.0.2.2/32", policy=PathPolicy(prepend=2, med=0)),
            Route(prefix="192.0.2.3/32", next_hop="10.0.1.99"),
            Route(prefix="2001:db8::1/128", policy=PathPolicy(local_preference=0, med=7)),
            Route(prefix="2001:db8::2/128"),
        }
    )
    async with speaking(rig) as speaker:
        speaker.want(wanted)
        await until("accepted", lambda: speaker.observed().synced, log=rig.log)
    async with speaking(rig) as speaker:
        await until("adopted", lambda: speaker.observed().adopted)
        assert speaker.observed().routes == wanted


async def test_draining_routes_are_the_last_choice_of_the_router(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.start_exabgp()
    drained = Route(prefix=V4, policy=PathPolicy(communities=("graceful-shutdown",), prepend=3))
    with Frr(rig.tor.name, router(LB4)) as frr:
        async with speaking(rig) as speaker:
            speaker.want(frozenset({Route(prefix=V4)}))
            await until("arrived", lambda: len(frr.bgp_paths(V4)), 1, log=rig.log)
            speaker.want(frozenset({drained}))
            await until("drained", lambda: frr.bgp_paths(V4)[0].get("locPrf"), 0)
            assert frr.bgp_paths(V4)[0]["aspath"]["string"] == "65001 65001 65001 65001"
            speaker.want(frozenset({Route(prefix=V4)}))
            await until("undrained", lambda: frr.bgp_paths(V4)[0]["aspath"]["string"], "65001")
            await until("synced", is_synced(speaker))
            assert speaker.observed().peers["tor"].flaps == 0


async def test_graceful_restart_keeps_routes_and_then_forgets_the_stale_ones(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(peers=({**EBGP4, "graceful_restart_s": 20},))
    rig.start_exabgp()
    both = frozenset({Route(prefix=V4), Route(prefix="192.0.2.2/32")})
    with Frr(rig.tor.name, router(LB4)) as frr:
        async with speaking(rig) as speaker:
            speaker.want(both)
            await until("arrived", lambda: len(frr.bgp_routes()), 2, log=rig.log)
            await until("synced", is_synced(speaker))
            seen: list[set[str]] = []
            rig.exabgp.kill()  # type: ignore[union-attr]
            rig.exabgp.wait()  # type: ignore[union-attr]
            seen.append(set(frr.bgp_routes()))
            rig.start_exabgp()
            speaker.want(frozenset({Route(prefix=V4)}))
            await until("another epoch", lambda: speaker.observed().restarts, 1)
            seen.append(set(frr.bgp_routes()))  # the stale one may be forgotten by now, the wanted one never
            await until("stale one forgotten", lambda: sorted(frr.bgp_routes()), [V4], limit_s=20, log=rig.log)
            await until("synced", is_synced(speaker))
    assert seen[0] == {V4, "192.0.2.2/32"}
    assert V4 in seen[1]


FAILURES = [
    Case("wrong AS", EBGP4, router(LB4, asn=64999), {}),
    Case("wrong AS on our side", {**EBGP4, "peer_as": 64999}, router(LB4), {}),
    Case("too many routes", EBGP4, router(LB4).replace("activate", f"activate\n  neighbor {LB4} maximum-prefix 2"), {}),
    Case("shut down by its operator", EBGP4, router(LB4), {}),
]
CAUSES = {
    "wrong AS": "wrong AS number",
    "wrong AS on our side": "wrong AS number",
    "too many routes": "maximum number of prefixes reached",
    "shut down by its operator": 'administrative shutdown (NOTIFICATION 6/2) Shutdown Communication: "maintenance"',
}


@pytest.mark.parametrize("case", FAILURES, ids=str)
async def test_a_session_that_fails_says_why_and_leaves_the_others_alone(
    case: Case, make_rig: Callable[..., Rig]
) -> None:
    rig = make_rig()
    rig.bgp = rig.bgp_section(peers=(case.peer, {**EBGP6, "name": "good"}))
    rig.start_exabgp()
    # Passive: two connections that meet would end one of them, and count as a flap of their own.
    good = f" neighbor {LB6} remote-as 65001\n neighbor {LB6} passive\n"
    good += f" address-family ipv6 unicast\n  neighbor {LB6} activate\n"
    with Frr(rig.tor.name, case.router + good) as frr:
        async with speaking(rig) as speaker:
            wanted = frozenset(Route(prefix=p) for p in (V4, V6, "192.0.2.2/32", "192.0.2.3/32"))
            speaker.want(wanted)
            await until("the good one", lambda: sorted(frr.bgp_routes(6)), [V6], log=rig.log)
            await until("the good one is up", lambda: speaker.observed().peers["good"].session, "up")
            if case.title.startswith("shut"):
                await until("up", lambda: speaker.observed().peers["tor"].session, "up")
                frr.configure(f"router bgp 65101\nneighbor {LB4} shutdown message maintenance")
            if case.title.startswith("too many"):  # FRR counts once per UPDATE: it takes a second one
                await until("one too many", lambda: len(frr.bgp_routes(4)), 3)
                speaker.want(wanted | {Route(prefix="192.0.2.4/32")})
            await until("cause", lambda: CAUSES[case.title] in speaker.observed().peers["tor"].last_error, log=rig.log)
            await until("down", lambda: speaker.observed().peers["tor"].session, "down")
            assert speaker.observed().peers["good"].session == "up"
            assert speaker.observed().peers["good"].flaps == 0


async def test_never_more_routes_than_the_peer_may_get(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(peers=({**EBGP4, "max_routes": 2},))
    rig.start_exabgp()
    with Frr(rig.tor.name, FAILURES[2].router) as frr:
        async with speaking(rig) as speaker:
            speaker.want(frozenset(Route(prefix=f"192.0.2.{n}/32") for n in range(1, 6)))
            await until("two of them", lambda: sorted(frr.bgp_routes()), [V4, "192.0.2.2/32"], log=rig.log)
            await until("synced", is_synced(speaker))
            speaker.want(frozenset(Route(prefix=f"192.0.2.{n}/32") for n in range(2, 6)))
            await until("two others", lambda: sorted(frr.bgp_routes()), ["192.0.2.2/32", "192.0.2.3/32"])
            assert speaker.observed().peers["tor"].flaps == 0


async def test_a_router_with_another_password_is_shown_as_down(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    secret = rig.paths.run / "password"
    secret.write_text("ours")
    secret.chmod(0o600)
    rig.bgp = rig.bgp_section(peers=({**EBGP4, "password_file": secret}, {**EBGP6, "name": "good"}))
    rig.start_exabgp()
    good = f" neighbor {LB6} remote-as 65001\n address-family ipv6 unicast\n  neighbor {LB6} activate\n"
    with Frr(rig.tor.name, router(LB4, "password theirs") + good) as frr:
        async with speaking(rig) as speaker:
            speaker.want(frozenset({Route(prefix=V4), Route(prefix=V6)}))
            await until("the good one", lambda: sorted(frr.bgp_routes(6)), [V6], log=rig.log)
            assert speaker.observed().peers["tor"].session == "down"
            assert frr.bgp_routes(4) == {}
            assert "ours" not in rig.log.read_text()
