# SPDX-License-Identifier: Apache-2.0
"""The books against an ExaBGP with all its bad habits, at any speed, through any fault."""

import math
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lbagent.bgp import command
from lbagent.bgp.command import Neighbor
from lbagent.bgp.ledger import CONFIRM_S, MEND_S, QUIET_S
from lbagent.bgp.speaker import WINDOW, Speaker
from lbagent.config import Bgp, Paths
from lbagent.model.route import PathPolicy, Route
from tests.fakes.exabgp import FakeExabgp

PEERS = {"one": "10.0.1.2", "two": "10.0.2.2"}
PREFIXES = ["192.0.2.1/32", "192.0.2.2/32", "2001:db8::1/128"]
POLICIES = [
    PathPolicy(),
    PathPolicy(med=1),
    PathPolicy(med=2, communities=("65001:1", "65001:1:2")),
    PathPolicy(prepend=1, peers=("one",)),
]
BGP = Bgp.model_validate(
    {
        "local_as": 65001,
        "router_id": "10.0.1.1",
        "peers": [
            {"name": name, "address": address, "local_address": address[:-1] + "1", "peer_as": 65101}
            | {"families": ["ipv4", "ipv6"], "next_hop": {"ipv6": "fd00::1"}}
            for name, address in PEERS.items()
        ],
    }
)
wishes = st.dictionaries(st.sampled_from(PREFIXES), st.sampled_from(POLICIES)).map(
    lambda policy_by_prefix: frozenset(Route(prefix=p, policy=policy) for p, policy in policy_by_prefix.items())
)


class _Writer:
    """Stands where the speaker's connection would be."""

    def __init__(self, exabgp: FakeExabgp) -> None:
        self.write = exabgp.send

    def close(self) -> None: ...


class Announcing(RuleBasedStateMachine):
    """Any order of wishes, ExaBGP's steps, pipe delays, session flaps, relay deaths and restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.exabgp = FakeExabgp(list(PEERS.values()))
        self.speaker = self.new_speaker()
        self.wanted: frozenset[Route] | None = None
        self.held_until: dict[str, float] = {}

    def new_speaker(self) -> Speaker:
        return Speaker(BGP, Paths(run=Path("/nowhere")), clock=lambda: self.now)

    @initialize(wanted=wishes, are_up=st.booleans(), is_settled=st.booleans())
    def begin(self, wanted: frozenset[Route], are_up: bool, is_settled: bool) -> None:
        self.connect()
        if are_up:
            for address in PEERS.values():
                self.exabgp.session_up(address)
        self.want(wanted)
        if is_settled:
            self.run_dry(steps=8)

    @rule(wanted=wishes)
    def want_and_let_it_settle(self, wanted: frozenset[Route]) -> None:
        self.want(wanted)
        self.run_dry(steps=8)

    @rule(wanted=wishes)
    def want_as_fast_as_exabgp_accepts(self, wanted: frozenset[Route]) -> None:
        """Everybody is quick except ExaBGP's writing."""
        self.want(wanted)
        for _ in range(3):
            self.exabgp.accept()
            while self.hear():
                pass

    def connect(self) -> None:
        self.speaker._writer = _Writer(self.exabgp)  # type: ignore[assignment]
        self.exabgp.connect()
        self.speaker._send({"control": True})

    def hear(self) -> bool:
        is_told = bool(self.exabgp.lines)
        if is_told:
            self.speaker._hear(self.exabgp.lines.popleft())
        else:
            self.speaker._tick()
        self.speaker._pump()
        return is_told

    @rule(wanted=wishes)
    def want(self, wanted: frozenset[Route]) -> None:
        self.wanted = wanted
        self.speaker.want(wanted)

    @rule(count=st.integers(1, 5))
    def exabgp_accepts(self, count: int) -> None:
        for _ in range(count):
            self.exabgp.accept()

    @rule(address=st.sampled_from(list(PEERS.values())), count=st.integers(1, 4))
    def exabgp_writes(self, address: str, count: int) -> None:
        for _ in range(count):
            self.exabgp.write(address)

    @rule(count=st.integers(1, 8))
    def agent_hears(self, count: int) -> None:
        for _ in range(count):
            self.hear()

    @rule(seconds=st.sampled_from([0.01, QUIET_S, CONFIRM_S, MEND_S + 1, 61.0]))
    def time_passes(self, seconds: float) -> None:
        if seconds >= QUIET_S:  # ExaBGP is never idle while it has something to do
            self.exabgp_works()
        self.now += seconds
        self.exabgp.heartbeat()

    def exabgp_works(self) -> None:
        for _ in range(WINDOW):
            self.exabgp.accept()
        for address in PEERS.values():
            for _ in range(2 * len(PREFIXES)):
                self.exabgp.write(address)

    @rule(address=st.sampled_from(list(PEERS.values())))
    def session_comes_up(self, address: str) -> None:
        self.exabgp.session_up(address)

    @rule(address=st.sampled_from(list(PEERS.values())))
    def session_goes_down(self, address: str) -> None:
        self.let_go(address)
        self.exabgp.session_down(address)

    @rule(remembers=st.booleans())
    def connection_to_the_relay_breaks(self, remembers: bool) -> None:
        """An agent and a relay that both know nothing, in the second in which a session starts, are beyond us."""
        agent_knows = self.speaker.observed().adopted
        self.speaker._lost()
        self.exabgp.lose_relay(remembers=remembers or not agent_knows)
        self.connect()

    @rule()
    def agent_restarts(self) -> None:
        self.exabgp.lose_relay(remembers=True)
        self.speaker = self.new_speaker()
        self.wanted = None
        self.connect()

    @rule()
    def exabgp_restarts(self) -> None:
        for address in PEERS.values():
            self.let_go(address)
        self.speaker._lost()
        self.exabgp.restart()
        self.connect()

    @precondition(lambda self: self.wanted is None)
    @rule(address=st.sampled_from(list(PEERS.values())))
    def routes_are_cleared_while_no_agent_has_spoken(self, address: str) -> None:
        self.exabgp.clear(address)

    def let_go(self, address: str) -> None:
        """A router keeps using what a dead session brought for as long as its hold timer runs."""
        for prefix in self.exabgp.peers[address].router:
            self.held_until[prefix] = self.now + 9

    @invariant()
    def never_more_unanswered_than_the_window(self) -> None:
        assert self.exabgp.most_waiting <= WINDOW

    @invariant()
    def what_a_router_may_use_is_known_to_attract(self) -> None:
        if not self.speaker.observed().adopted:
            return
        attracting = self.speaker.observed().attracting
        for peer in self.exabgp.peers.values():
            for prefix in peer.router:
                address = prefix.partition("/")[0]
                # What was taken off the wire a moment ago, and what we have not heard yet, is not certain.
                if not self.exabgp.lines and not self.speaker._orders:
                    assert attracting.get(address) == math.inf, (prefix, attracting)

    def teardown(self) -> None:
        """Left alone with its sessions up, it ends where it should, and then keeps still."""
        for address in PEERS.values():
            self.exabgp.session_up(address)
        if self.wanted is None:
            self.want(frozenset({Route(prefix=PREFIXES[0])}))
        self.run_dry(steps=400)
        for peer, neighbor in zip(self.exabgp.peers.values(), BGP.peers, strict=True):
            expected = command.paths(self.wanted or (), Neighbor.of(BGP, neighbor))
            assert peer.router == expected
            assert peer.held == expected
        state = self.speaker.observed()
        assert state.synced
        assert state.mended == 0  # the order of changes was right; nothing had to be sent again
        assert {a for a, until in state.attracting.items() if until == math.inf} == {
            route.address for route in self.wanted or ()
        }
        updates = [peer.updates for peer in self.exabgp.peers.values()]
        self.now += 61
        self.run_dry(steps=20)
        assert [peer.updates for peer in self.exabgp.peers.values()] == updates

    def run_dry(self, *, steps: int) -> None:
        for _ in range(steps):
            self.exabgp_works()
            while self.hear():
                pass
            self.now += 0.25


TestAnnouncing = Announcing.TestCase
TestAnnouncing.settings = settings(stateful_step_count=30)
