# SPDX-License-Identifier: Apache-2.0
"""ExaBGP's language, word by word; the samples were recorded from ExaBGP 5.0.15."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbagent.bgp import command, relay
from lbagent.bgp.command import Attributes, Down, EndOfRib, Negotiated, Neighbor, Notified, Sent, Up
from lbagent.model.route import PathPolicy, Route
from tests.fakes import exabgp

TOR = Neighbor(
    name="tor",
    address="10.0.1.2",
    local_as=65001,
    peer_as=65101,
    next_hop_by_family={4: "10.0.1.1", 6: "fd00::1"},
    hold_time_s=9,
)
INTERNAL = Neighbor(
    name="internal",
    address="10.0.1.3",
    local_as=65001,
    peer_as=65001,
    next_hop_by_family={4: "10.0.1.1"},
    hold_time_s=9,
)
EBGP = Attributes(next_hop="10.0.1.1", as_path=(65001,))

parts = st.integers(0, 65535)
communities = st.one_of(
    st.tuples(parts, parts).map(lambda pair: f"{pair[0]}:{pair[1]}"),
    st.tuples(st.integers(0, 2**32 - 1), parts, parts).map(lambda three: ":".join(map(str, three))),
)
attributes = st.builds(
    Attributes,
    next_hop=st.sampled_from(["10.0.1.1", "fd00::1"]),
    as_path=st.lists(st.integers(1, 2**32 - 1), max_size=4).map(tuple),
    communities=st.sets(communities, max_size=5).map(lambda found: tuple(sorted(found))),
    local_preference=st.none() | st.integers(0, 2**32 - 1),
    med=st.none() | st.integers(0, 2**32 - 1),
)
policies = st.builds(
    PathPolicy,
    communities=st.sets(communities | st.sampled_from(sorted(command.NUMBER_BY_WORD)), max_size=4).map(
        lambda found: tuple(sorted(found - set(command.NUMBER_BY_WORD.values())))
    ),
    med=st.none() | st.integers(0, 100),
    prepend=st.integers(0, 3),
    peers=st.sampled_from([(), ("tor",)]),
)


def route(prefix: str, **policy: object) -> Route:
    return Route(prefix=prefix, policy=PathPolicy(**policy))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, EBGP),
        ({"prepend": 2}, Attributes(next_hop="10.0.1.1", as_path=(65001, 65001, 65001))),
        ({"local_preference": 200}, EBGP),
        ({"med": 0}, Attributes(next_hop="10.0.1.1", as_path=(65001,), med=0)),
        (
            {"communities": ("no-export", "65001:1", "65001:1:2", "graceful-shutdown")},
            Attributes(
                next_hop="10.0.1.1",
                as_path=(65001,),
                communities=("65001:1", "65001:1:2", "65535:0", "65535:65281"),
            ),
        ),
    ],
)
def test_what_an_ebgp_peer_should_hold(policy: dict[str, object], expected: Attributes) -> None:
    assert command.paths([route("192.0.2.1/32", **policy)], TOR) == {"192.0.2.1/32": expected}


def test_an_ibgp_peer_gets_a_preference_and_never_our_own_as() -> None:
    wanted = [route("192.0.2.1/32", prepend=3), route("192.0.2.2/32", local_preference=7)]
    assert command.paths(wanted, INTERNAL) == {
        "192.0.2.1/32": Attributes(next_hop="10.0.1.1", local_preference=100),
        "192.0.2.2/32": Attributes(next_hop="10.0.1.1", local_preference=7),
    }


def test_a_peer_gets_only_its_families_and_what_is_meant_for_it() -> None:
    wanted = [route("192.0.2.1/32", peers=("other",)), route("2001:db8::1/128"), route("192.0.2.2/32")]
    assert list(command.paths(wanted, INTERNAL)) == ["192.0.2.2/32"]
    assert list(command.paths(wanted, TOR)) == ["192.0.2.2/32", "2001:db8::1/128"]


def test_an_explicit_next_hop_wins() -> None:
    (attributes,) = command.paths([Route(prefix="192.0.2.1/32", next_hop="10.0.9.9")], TOR).values()
    assert attributes.next_hop == "10.0.9.9"


@given(attributes)
def test_attributes_survive_adj_rib_out(attributes: Attributes) -> None:
    fake = exabgp.FakeExabgp(["10.0.1.2"])
    fake.peers["10.0.1.2"].held["192.0.2.1/32"] = attributes
    fake.send(b'{"id": 1, "command": "show adj-rib out 10.0.1.2 extensive"}')
    fake.accept()
    lines = json.loads(fake.lines.pop())["lines"]
    assert command.read_adj_rib_out(lines, "10.0.1.2") == {"192.0.2.1/32": attributes}


@given(attributes)
def test_attributes_survive_the_wire(attributes: Attributes) -> None:
    assert command._sent_attributes(exabgp._json(attributes), attributes.next_hop) == attributes


@given(attributes, st.lists(st.sampled_from([f"2001:db8:1111:2222:3333:4444:5555:{n:x}/128" for n in range(45)])))
def test_every_line_is_one_the_relay_lets_through(attributes: Attributes, prefixes: list[str]) -> None:
    prefixes = prefixes or ["192.0.2.1/32"]
    address = "2001:db8:1111:2222:3333:4444:5555:6666"
    lines = [
        command.announce(address, attributes, prefixes),
        command.withdraw(address, prefixes),
        command.flush(address),
        command.end_of_rib(address, 6),
        command.show_adj_rib_out(address),
    ]
    for line in lines:
        assert relay.ALLOWED.fullmatch(line)
        assert len(line) < relay.LINE_LIMIT


@given(st.dictionaries(st.sampled_from(["192.0.2.1/32", "192.0.2.2/32", "2001:db8::1/128"]), policies))
def test_adopted_routes_are_those_that_were_wanted(policy_by_prefix: dict[str, PathPolicy]) -> None:
    wanted = frozenset(Route(prefix=prefix, policy=policy) for prefix, policy in policy_by_prefix.items())
    other = Neighbor(
        name="other", address="x", local_as=65001, peer_as=65102, next_hop_by_family={4: "10.0.2.1"}, hold_time_s=9
    )
    adopted = command.routes((neighbor, command.paths(wanted, neighbor)) for neighbor in (TOR, other))
    # For IPv6 there is only one peer that could carry it, so "only tor" and "all peers" are the same.
    assert {(r.prefix, r.policy, r.next_hop) for r in adopted if r.family == 4} == {
        (r.prefix, r.policy, r.next_hop) for r in wanted if r.family == 4
    }
    assert {r.prefix for r in adopted} == {r.prefix for r in wanted}


def test_adj_rib_out_of_a_peer_whose_address_begins_the_same_is_left_out() -> None:
    line = "neighbor 10.0.1.20 local-ip 10.0.1.1 in-open ipv4 unicast 192.0.2.1/32 next-hop 10.0.1.1 origin igp"
    assert command.read_adj_rib_out([line], "10.0.1.2") == {}


HEAD = '"exabgp": "5.0.0", "time": 1.5, "host" : "vm", "pid" : 1, "ppid" : 1, "counter": 4, '
NEIGHBOR = '"address": { "local": "10.0.1.1", "peer": "10.0.1.2" }, "asn": { "local": 65001, "peer": 65101 }'
RECORDED = [
    (f'{{ {HEAD} "type": "state", "neighbor": {{ {NEIGHBOR} , "state": "up" }} }}', [Up(peer="10.0.1.2")]),
    (f'{{ {HEAD} "type": "state", "neighbor": {{ {NEIGHBOR} , "state": "connected" }} }}', []),
    (
        f'{{ {HEAD} "type": "state", "neighbor": {{ {NEIGHBOR} , "state": "down", "reason": "closing connection" }} }}',
        [Down(peer="10.0.1.2", reason="closing connection")],
    ),
    (
        f'{{ {HEAD} "type": "negotiated", "neighbor": {{ {NEIGHBOR} , "negotiated": {{ "message_size": 65535, '
        '"hold_time": 9, "families": ["ipv4 unicast", "ipv6 unicast"], "nexthop": ["ipv4 unicast ipv6"] }  } }',
        [Negotiated(peer="10.0.1.2", families=(4, 6), hold_time_s=9)],
    ),
    (
        f'{{ {HEAD} "type": "update", "neighbor": {{ {NEIGHBOR} , "direction": "send", "message": '
        '{ "eor": { "afi" : "ipv6", "safi" : "unicast" } } } }',
        [EndOfRib(peer="10.0.1.2", family=6)],
    ),
    (
        f'{{ {HEAD} "type": "update", "neighbor": {{ {NEIGHBOR} , "direction": "send", "message": {{ "update": '
        '{ "attribute": { "origin": "igp", "as-path": {"0": {"element": "as-sequence", "value": [65001, 65001]}}, '
        '"med": 50, "community": [ [ 65001, 100 ], [ 65535, 0 ] ], "large-community": [ [ 65001, 1 , 2 ] ] }, '
        '"announce": { "ipv4 unicast": { "10.0.1.1": [ { "nlri": "192.0.2.1/32" }, { "nlri": "192.0.2.2/32" } ] } } '
        "} } } }",
        [
            Sent(
                peer="10.0.1.2",
                announced=dict.fromkeys(
                    ["192.0.2.1/32", "192.0.2.2/32"],
                    Attributes(
                        next_hop="10.0.1.1",
                        as_path=(65001, 65001),
                        communities=("65001:100", "65001:1:2", "65535:0"),
                        med=50,
                    ),
                ),
                withdrawn=(),
            )
        ],
    ),
    (
        f'{{ {HEAD} "type": "update", "neighbor": {{ {NEIGHBOR} , "direction": "send", "message": {{ "update": '
        '{ "withdraw": { "ipv4 unicast": [ { "nlri": "192.0.2.1/32" } ] } } } } }',
        [Sent(peer="10.0.1.2", announced={}, withdrawn=("192.0.2.1/32",))],
    ),
    (
        f'{{ {HEAD} "type": "notification", "neighbor": {{ {NEIGHBOR} , "direction": "receive", "notification": '
        '{ "code": 6, "subcode": 1, "data": "", "message": "" }  } }',
        [Notified(peer="10.0.1.2", text="maximum number of prefixes reached (NOTIFICATION 6/1)")],
    ),
    (f'{{ {HEAD} "type": "notification", "notification": "shutdown" }}', []),
]


@pytest.mark.parametrize(("line", "expected"), RECORDED)
def test_what_exabgp_said_is_understood(line: str, expected: list[command.Event]) -> None:
    assert list(command.read_event(json.loads(line))) == expected


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("notification sent (4,0)", "we closed: hold timer expired (NOTIFICATION 4/0)"),
        ("notification received (6,2)", "the peer closed: administrative shutdown (NOTIFICATION 6/2)"),
        ("notification received (9,9)", "the peer closed: unknown cause (NOTIFICATION 9/9)"),
        ("closing connection", "closing connection"),
    ],
)
def test_why_a_session_ended_is_said_in_words(reason: str, words: str) -> None:
    neighbor = {"address": {"peer": "10.0.1.2"}, "state": "down", "reason": reason}
    assert list(command.read_event({"type": "state", "neighbor": neighbor})) == [Down(peer="10.0.1.2", reason=words)]
