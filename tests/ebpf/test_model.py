# SPDX-License-Identifier: Apache-2.0
"""The forwarder against a Python model of itself: random packets and random changes of the maps.

The model is written from the rules, not from the C: who keeps a flow, who gets a new one (with the
ring's hash computed a second time), what a connection's state becomes, who is told what.
"""

import dataclasses
import os
import struct

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from lbagent.model.service import Protocol
from lbagent.model.vip import RING_SLOTS, Backend, BackendState, Forward, Mode
from lbagent.xdp.codec import address_bytes
from lbagent.xdp.index import mix, mix_address
from tests.ebpf.scene import TCP, UDP, Ether, Scene, Verdict, w
from tests.ebpf.world import World

pytestmark = pytest.mark.bpf

NODES = (1, 2, 3)
PROTOCOLS = {TCP: Protocol.TCP, UDP: Protocol.UDP}
NUMBER = {TCP: 6, UDP: 17}
SEED = w.Settings().seed


def ring_place(source: str, sport: int, vip: str, port: int, protocol: int) -> int:
    """Slot of a flow: the ring's hash once more, from its description in lb.c."""
    client, server = (struct.unpack("<4I", address_bytes(a)) for a in (source, vip))
    wire = [int.from_bytes(p.to_bytes(2, "big"), "little") for p in (sport, port)]
    x = SEED ^ (wire[1] << 32 | protocol << 16) ^ wire[0]
    if ":" in vip:
        hashed = mix(mix_address(client, mix_address(server, x)))
    else:
        hashed = mix(mix(x ^ server[0] << 16) ^ client[0])
    return (hashed >> 32) * RING_SLOTS >> 32


@dataclasses.dataclass
class Flow:
    """A NAT flow as the model remembers it."""

    node: int
    state: str
    ends: tuple[str, int] = ("", 0)


AFTER_CLIENT = {
    ("syn_ack", "A"): "established",
    ("syn", "F"): "fin_client", ("syn_ack", "F"): "fin_client", ("established", "F"): "fin_client",
    ("fin_client", "F"): "fin_client", ("fin_backend", "F"): "closed", ("closed", "F"): "closed",
}  # fmt: skip
AFTER_NODE = {
    ("syn", "SA"): "syn_ack",
    ("syn", "F"): "fin_backend", ("syn_ack", "F"): "fin_backend", ("established", "F"): "fin_backend",
    ("fin_backend", "F"): "fin_backend", ("fin_client", "F"): "closed", ("closed", "F"): "closed",
    ("udp", ""): "udp_stream", ("udp_stream", ""): "udp_stream",
}  # fmt: skip


class Forwarder(RuleBasedStateMachine):
    """One VIP of each mode, protocol and family; up to forty clients."""

    world: World
    fingerprint = 1000

    def __init__(self) -> None:
        super().__init__()
        self.world.reset()
        self.state_by_node = dict.fromkeys(NODES, BackendState.ACTIVE)
        self.nat: dict[tuple[object, ...], Flow] = {}
        self.dsr: dict[tuple[object, ...], int] = {}
        self.served = {(v6, port, proto) for v6 in (False, True) for port in (90, 91) for proto in PROTOCOLS}
        self.install()

    # --- the model ---------------------------------------------------------------------------

    def active(self) -> list[int]:
        return [n for n in NODES if self.state_by_node[n] is BackendState.ACTIVE]

    def allowed(self, node: int) -> bool:
        return self.state_by_node[node] is not BackendState.DOWN

    def by_ring(self, scene: Scene, port: int, proto: type, sport: int) -> int | None:
        active = self.active()
        if not active:
            return None
        return active[ring_place(scene.client, sport, scene.vip, port, NUMBER[proto]) % len(active)]

    def forwards(self) -> list[Forward]:
        return [f for f in w.served()[0] if f.vip.port in (90, 91)]

    def install(self) -> None:
        """A new ring for every change, as the planner makes them."""
        rings = {}
        for family, addresses in ((4, w.NODE4), (6, w.NODE6)):
            Forwarder.fingerprint += 1
            backends = tuple(Backend(address=addresses[n], state=self.state_by_node[n]) for n in NODES)
            rings[family] = w.ring(Forwarder.fingerprint, *backends)
        wanted = [
            dataclasses.replace(f, ring=rings[f.vip.family].fingerprint)
            for f in self.forwards()
            if (f.vip.family == 6, f.vip.port, TCP if f.vip.protocol is Protocol.TCP else UDP) in self.served
        ]
        assert self.world.tables.program(wanted, {r.fingerprint: r for r in rings.values()}) == {}
        self.rings = {ring.fingerprint for ring in rings.values()}

    # --- what happens ------------------------------------------------------------------------

    @rule(v6=st.booleans(), proto=st.sampled_from([TCP, UDP]), client=st.integers(0, 39),
          flags=st.sampled_from(["S", "A", "A", "PA", "F", "R"]))  # fmt: skip
    def client_to_nat(self, v6: bool, proto: type, client: int, flags: str) -> None:
        scene, sport, key = Scene(self.world, v6), 5000 + client, (v6, proto, client)
        outcome = scene.send(scene.to_vip(90, proto=proto, flags=flags, sport=sport))
        if (v6, 90, proto) not in self.served:
            assert outcome.verdict is (Verdict.NO_PORT if proto is TCP and "R" in flags else Verdict.PORT_REFUSED)
            return
        flow = self.nat.get(key)
        reopened = proto is TCP and flags == "S" and flow is not None and flow.state == "closed"
        if flow is None or reopened or not self.allowed(flow.node):
            if flow is None and proto is TCP and flags != "S":
                assert outcome.verdict is (Verdict.NO_FLOW if "R" in flags else Verdict.NO_FLOW_RESET)
                return
            node = self.by_ring(scene, 90, proto, sport)
            if node is None:
                assert outcome.verdict is Verdict.NO_BACKEND
                return
            ends = flow.ends if flow else ("", 0)
            flow = self.nat[key] = Flow(node, "syn" if proto is TCP else "udp", ends)
        elif proto is TCP:
            flow.state = "closed" if "R" in flags else AFTER_CLIENT.get((flow.state, flags[-1]), flow.state)
        assert outcome.verdict is Verdict.NAT_FORWARD
        scene.learn(outcome)
        assert scene.node == flow.node
        assert flow.ends in (("", 0), (scene.snat, scene.slot)), "a flow keeps its SNAT port"
        flow.ends = scene.snat, scene.slot
        assert scene.nat_state() == flow.state

    @precondition(lambda self: self.nat)
    @rule(data=st.data(), flags=st.sampled_from(["SA", "A", "PA", "F", "R"]))
    def node_to_client(self, data: st.DataObject, flags: str) -> None:
        v6, proto, client = key = data.draw(st.sampled_from(sorted(self.nat, key=str)))
        flow = self.nat[key]
        scene = Scene(self.world, v6, *flow.ends, flow.node)
        outcome = scene.send(scene.reply(90, proto=proto, flags=flags), w.NODES)
        if (v6, 90, proto) not in self.served:
            assert outcome.verdict is Verdict.NO_SLOT
            return
        assert outcome.verdict is Verdict.NAT_REPLY
        assert outcome.packet == bytes(scene.to_client(90, proto=proto, flags=flags, sport=5000 + client))
        if proto is UDP:
            flow.state = "udp_stream"
        else:
            step = (flow.state, "SA" if flags == "SA" else flags[-1])
            flow.state = "closed" if "R" in flags else AFTER_NODE.get(step, flow.state)
        assert scene.nat_state() == flow.state

    @rule(v6=st.booleans(), proto=st.sampled_from([TCP, UDP]), client=st.integers(0, 39),
          flags=st.sampled_from(["S", "A", "F"]))  # fmt: skip
    def client_to_dsr(self, v6: bool, proto: type, client: int, flags: str) -> None:
        scene, sport, key = Scene(self.world, v6), 5000 + client, (v6, proto, client)
        outcome = scene.send(scene.to_vip(91, proto=proto, flags=flags, sport=sport))
        if (v6, 91, proto) not in self.served:
            assert outcome.verdict is Verdict.PORT_REFUSED
            return
        is_syn = proto is TCP and flags == "S"
        node = None if is_syn else self.dsr.get(key)
        if node is None or not self.allowed(node):
            node = self.by_ring(scene, 91, proto, sport)
            if node is None:
                assert outcome.verdict is Verdict.NO_BACKEND
                return
        if not is_syn:
            self.dsr[key] = node
        assert outcome.verdict is Verdict.DSR_L2
        assert Ether(outcome.packet).dst == w.NODE[node]

    @rule(node=st.sampled_from(NODES), state=st.sampled_from(BackendState))
    def node_changes(self, node: int, state: BackendState) -> None:
        self.state_by_node[node] = state
        self.install()

    @rule(v6=st.booleans(), port=st.sampled_from([90, 91]), proto=st.sampled_from([TCP, UDP]))
    def vip_goes_or_comes(self, v6: bool, port: int, proto: type) -> None:
        key = (v6, port, proto)
        if key in self.served:
            self.served.discard(key)
            vips = [f.vip for f in self.forwards() if f.vip.port == port and (f.vip.family == 6) == v6]
            self.world.tables.unprogram([v for v in vips if v.protocol is PROTOCOLS[proto]])
            for table in (self.nat, self.dsr):
                mode = Mode.NAT if table is self.nat else Mode.DSR_L2
                if (port == 90) == (mode is Mode.NAT):
                    for flow in [k for k in table if k[:2] == (v6, proto)]:
                        del table[flow]
        else:
            self.served.add(key)
            self.install()

    @invariant()
    def two_flows_never_share_a_port(self) -> None:
        ends = [flow.ends for flow in self.nat.values()]
        assert len(set(ends)) == len(ends)

    @invariant()
    def what_is_read_back_is_what_was_programmed(self) -> None:
        held = {f.vip: f for f in self.world.tables.read().values() if f.vip.port in (90, 91)}
        assert {(v.family == 6, v.port, TCP if v.protocol is Protocol.TCP else UDP) for v in held} == self.served
        assert {f.ring for f in held.values()} <= self.rings


def test_the_forwarder_does_what_the_model_says(loaded: World) -> None:
    Forwarder.world = loaded
    try:
        run_state_machine_as_test(
            Forwarder,
            settings=settings(
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                max_examples=100 if os.environ.get("CI") == "true" else 25,
            ),
        )
    finally:
        loaded.reset()
        w.populate(loaded)
