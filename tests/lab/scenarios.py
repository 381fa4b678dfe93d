# SPDX-License-Identifier: Apache-2.0
"""What is promised of every fault, and what it may cost.

What may be lost follows from the design and not from a run: a probed node is out of use after ``FALL_S``; a
connection that is under way when the ToR changes its next hops may move to an LB host that does not know it.
"""

from tests.lab.faults import agent, api, kernel, links, speaker
from tests.lab.scene import FALL_S, LEASE_S, PASS_S, READY_S, UNDER_WAY, Expect, Scenario

SCENARIOS = (
    Scenario(
        name="the agent is killed (SIGKILL)",
        promise="nothing lost, no BGP message; it takes over what the kernel and ExaBGP hold",
        inject=agent.kill_agent,
        expect=Expect(within_s=READY_S),
        in_ci=True,
    ),
    Scenario(
        name="the agent is frozen (SIGSTOP)",
        promise="forwarding and routes stay",
        inject=agent.freeze_agent,
        expect=Expect(within_s=READY_S),
        in_ci=True,
    ),
    Scenario(
        name="ExaBGP is killed (SIGKILL)",
        promise="its routes leave at once, the other host carries, all routes are announced again; "
        "only requests under way at a change of the route may break",
        inject=speaker.kill_speaker,
        expect=Expect(failed=2 * UNDER_WAY, lost_for_s=30.0, messages=None, within_s=20.0),
        in_ci=True,
    ),
    Scenario(
        name="the relay is killed",
        promise="nothing leaves: another worker, the session is not touched",
        inject=speaker.kill_relay,
        expect=Expect(within_s=15.0),
        in_ci=True,
    ),
    Scenario(
        name="the relay and its keeper are killed",
        promise="nothing leaves: ExaBGP starts them again",
        inject=speaker.kill_relay_and_keeper,
        expect=Expect(within_s=15.0),
    ),
    Scenario(
        name="ExaBGP is frozen (SIGSTOP, 15 s)",
        promise="the router takes its routes out after the hold time of 9 s; until then the host forwards",
        inject=speaker.freeze_speaker,
        expect=Expect(failed=2 * UNDER_WAY, lost_for_s=30.0, messages=None, within_s=20.0),
    ),
    Scenario(
        name="the router resets the sessions of a host",
        promise="the other host carries until they are up again; only requests under way may break",
        inject=speaker.reset_session,
        expect=Expect(failed=2 * UNDER_WAY, lost_for_s=30.0, messages=None, within_s=20.0),
    ),
    Scenario(
        name="the API server is frozen (SIGSTOP)",
        promise="fail static, then it converges",
        inject=api.freeze_api,
        expect=Expect(within_s=30.0),
    ),
    Scenario(
        name="the API server is black-holed (packets dropped)",
        promise="fail static, then it converges",
        inject=api.black_hole_api,
        expect=Expect(within_s=30.0),
        in_ci=True,
    ),
    Scenario(
        name="the API server is killed",
        promise="fail static, then it converges",
        inject=api.kill_api,
        expect=Expect(within_s=60.0),
        kube="real",
    ),
    Scenario(
        name="the holder of the lease dies",
        promise="another host gives a new Service its address once the lease has run out",
        inject=agent.lose_leader,
        expect=Expect(within_s=LEASE_S),
    ),
    Scenario(
        name="the holder of the lease is paused and wakes up",
        promise="another host leads meanwhile; never two that write",
        inject=agent.pause_leader,
        expect=Expect(within_s=LEASE_S),
    ),
    Scenario(
        name="the state folder is read-only",
        promise="goes on, and says so",
        inject=agent.forbid_writing,
        expect=Expect(within_s=READY_S + 20.0),
    ),
    Scenario(
        name="the disk is full, the cache of bytecode lost",
        promise="goes on, and says so",
        inject=agent.fill_disk,
        expect=Expect(within_s=READY_S + 40.0),
    ),
    Scenario(
        name="a broken configuration is loaded (SIGHUP)",
        promise="refused; the last good one stays",
        inject=agent.break_configuration,
        expect=Expect(within_s=5.0),
        in_ci=True,
    ),
    Scenario(
        name="a second agent is started on the host",
        promise="it is refused, the first does not notice",
        inject=agent.start_second_agent,
        expect=Expect(within_s=READY_S),
        in_ci=True,
    ),
    Scenario(
        name="the uplink of a host loses carrier and comes back",
        promise="the other host carries at once; only requests under way at a change of the route may break",
        inject=links.cut_uplink,
        expect=Expect(failed=2 * UNDER_WAY, lost_for_s=30.0, messages=None, within_s=30.0),
    ),
    Scenario(
        name="a node falls silent",
        promise=f"its probes take it out: no request fails that is sent {FALL_S:g} s later",
        inject=links.freeze_node,
        expect=Expect(failed=None, lost_for_s=FALL_S, within_s=FALL_S),
        in_ci=True,
    ),
    Scenario(
        name="a node changes its MAC address without a word",
        promise=f"no request fails that is sent {FALL_S:g} s later; the node is used again once the kernel has asked",
        inject=links.change_mac,
        expect=Expect(failed=None, lost_for_s=FALL_S, within_s=60.0),
    ),
    Scenario(
        name="a host boots while the API is away",
        promise="it serves from its last snapshot",
        inject=api.boot_without_api,
        expect=Expect(failed=2 * UNDER_WAY, lost_for_s=40.0, messages=None, within_s=40.0),
    ),
    Scenario(
        name="a VIP in the kernel is overwritten by hand",
        promise=f"repaired within {PASS_S:g} s and counted; until then this host loses that VIP's requests",
        inject=kernel.spoil_vip,
        expect=Expect(failed=None, lost_for_s=PASS_S, messages=None, within_s=PASS_S),
    ),
    Scenario(
        name="all backends in the kernel are overwritten by hand",
        promise=f"repaired within {PASS_S:g} s and counted; until then this host loses its requests",
        inject=kernel.spoil_backends,
        expect=Expect(failed=None, lost_for_s=PASS_S, messages=None, within_s=PASS_S),
    ),
    Scenario(
        name="all pins are removed by hand, then the agent is killed",
        promise=f"nothing lost: the running agent pins again within {PASS_S:g} s",
        inject=kernel.remove_pins,
        expect=Expect(within_s=PASS_S),
    ),
)
"""In the order in which they are run."""
