# SPDX-License-Identifier: Apache-2.0
"""Everything that may break between the agent and the router, broken on purpose."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lbagent.bgp import launch
from lbagent.model.route import PathPolicy, Route
from tests.bgp.rig import FRR, Rig, is_synced, received, speaking, until
from tests.lab.frr import Frr

pytestmark = pytest.mark.netns

A, B, V6 = "192.0.2.1/32", "192.0.2.2/32", "2001:db8::1/128"


def route(prefix: str, *, med: int | None = None) -> Route:
    return Route(prefix=prefix, policy=PathPolicy(med=med))


def table(frr: Frr) -> Callable[[], dict[str, int]]:
    """Prefix -> MED, as the router holds it."""
    return lambda: {prefix: paths[0].get("metric", 0) for prefix, paths in frr.bgp_routes().items()}


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ([{A: 0, B: 0}, {B: 0}], {B: 0}),
        ([{A: 0}, {A: 0, B: 0}, {B: 0}, {A: 0, B: 0}], {A: 0, B: 0}),
        ([{A: 1}, {A: 2}, {A: 1}], {A: 1}),
        ([{A: 0, B: 0}, {A: 0}, {A: 5}, {}], {}),
        ([{A: 0}, {}, {A: 0}], {A: 0}),
    ],
    ids=["announce-withdraw", "flip-with-other", "med-there-and-back", "change-then-withdraw", "withdraw-announce"],
)
async def test_wishes_that_change_faster_than_the_wire_end_in_the_last_one(
    rig: Rig, frr: Frr, wishes: list[dict[str, int]], expected: dict[str, int]
) -> None:
    """Written to ExaBGP in one go, the middle three leave the router in the opposite state."""
    async with speaking(rig) as speaker:
        await until("up", lambda: speaker.observed().peers["tor"].session, "up", log=rig.log)
        for _ in range(3):
            for wish in wishes:
                speaker.want(frozenset(route(prefix, med=med) for prefix, med in wish.items()))
                await asyncio.sleep(0)
            await until("synced", is_synced(speaker))
            await until("last wish", table(frr), expected)
            assert speaker.observed().mended == 0


async def test_flips_during_a_long_resync_end_in_the_last_wish(rig: Rig, frr: Frr) -> None:
    many = frozenset(route(f"10.{n // 62500}.{n // 250 % 250}.{n % 250 + 1}/32", med=n % 50) for n in range(5000))
    async with speaking(rig) as speaker:
        speaker.want(many | {route(A, med=1)})
        await until("synced", is_synced(speaker), limit_s=60, log=rig.log)
        await asyncio.to_thread(frr.vtysh, "clear bgp *")
        await until("down", lambda: speaker.observed().peers["tor"].session, "down")
        await until("up", lambda: speaker.observed().peers["tor"].session, "up")
        for med in (2, 3, 1, 2, 1):
            speaker.want(many | {route(A, med=med), route(B, med=med)})
            speaker.want(many)
        speaker.want(many | {route(B, med=7)})
        await until("synced", is_synced(speaker), limit_s=60)
        found = await until("as many", lambda: len(frr.bgp_routes()), 5001)
        assert found == 5001
        assert table(frr)()[B] == 7


async def test_a_relay_killed_nine_times_costs_neither_a_route_nor_exabgp(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(frozenset({route(A)}))
        await until("synced", is_synced(speaker), log=rig.log)
        before = received(frr)
        for _ in range(9):
            _, worker = await asyncio.to_thread(rig.relay_pids)
            rig.kill(worker)
            await until("another worker", partial(_is_replaced, rig, worker))
            await until("adopted again", lambda: speaker.observed().adopted, log=rig.log)
        assert received(frr) == before
        speaker.want(frozenset({route(B)}))
        await until("still obeyed", table(frr), {B: 0}, log=rig.log)
        await until("synced", is_synced(speaker))


def _is_replaced(rig: Rig, *dead: int) -> bool:
    try:
        return not set(dead) & set(rig.relay_pids())
    except (IndexError, ValueError, OSError):
        return False


async def test_a_relay_killed_with_its_keeper_is_started_again_by_exabgp(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(frozenset({route(A)}))
        await until("synced", is_synced(speaker), log=rig.log)
        before = received(frr)
        keeper, worker = rig.relay_pids()
        rig.kill(keeper)
        await until("another relay", partial(_is_replaced, rig, keeper, worker))
        await until("adopted again", lambda: speaker.observed().adopted, log=rig.log)
        assert received(frr) == before
        speaker.want(frozenset({route(B)}))
        await until("still obeyed", table(frr), {B: 0}, log=rig.log)


async def test_killing_the_relay_in_the_middle_of_a_change_loses_nothing(rig: Rig, frr: Frr) -> None:
    many = [route(f"10.1.{n // 250}.{n % 250 + 1}/32") for n in range(2000)]
    async with speaking(rig) as speaker:
        speaker.want(frozenset({route(A)}))
        await until("synced", is_synced(speaker), log=rig.log)
        speaker.want(frozenset(many))
        await asyncio.sleep(0.05)
        rig.kill(rig.relay_pids()[1])
        await until("all there", lambda: len(frr.bgp_routes()), 2000, limit_s=30, log=rig.log)
        await until("synced", is_synced(speaker))
        assert A not in frr.bgp_routes()


async def test_a_client_that_never_reads_is_dropped_and_harms_nobody(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(frozenset({route(A)}))
        await until("synced", is_synced(speaker), log=rig.log)
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(str(rig.paths.run / "bgp.sock"))
            many = frozenset(route(f"10.1.{n // 250}.{n % 250 + 1}/32") for n in range(3000))
            speaker.want(many)
            await until("all there", lambda: len(frr.bgp_routes()), 3000, limit_s=30, log=rig.log)
        assert speaker.observed().peers["tor"].flaps == 0


async def test_half_lines_and_nonsense_from_a_client_harm_nobody(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(frozenset({route(A)}))
        await until("synced", is_synced(speaker), log=rig.log)
        before = received(frr)
        for text in (b"{", b"\xff\n", b"[]\n", b'{"id": 1}\n', b"x" * 20000, b'{"command": "shutdown"}\n{"comm'):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(rig.paths.run / "bgp.sock"))
                client.sendall(text)
        await until("synced", is_synced(speaker))
        assert received(frr) == before


async def test_a_second_agent_takes_over_and_the_first_keeps_quiet(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as first:
        first.want(frozenset({route(A)}))
        await until("synced", is_synced(first), log=rig.log)
        async with speaking(rig) as second:
            second.want(frozenset({route(B)}))
            await until("second rules", table(frr), {B: 0})
            first.want(frozenset({route(A)}))
            await until("synced", is_synced(second))
            assert table(frr)() == {B: 0}


async def test_an_agent_away_longer_than_its_grace_has_its_routes_withdrawn(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(agent_grace_s=1.0)
    rig.start_exabgp()
    with Frr(rig.tor.name, FRR) as frr:
        async with speaking(rig) as speaker:
            speaker.want(frozenset({route(A)}))
            await until("announced", table(frr), {A: 0}, log=rig.log)
            await asyncio.sleep(1.5)
            assert table(frr)() == {A: 0}
        await until("withdrawn", table(frr), {}, log=rig.log)
        async with speaking(rig) as speaker:
            speaker.want(frozenset({route(A)}))
            await until("announced again", table(frr), {A: 0}, log=rig.log)


async def test_an_exabgp_that_stands_still_loses_no_change(rig: Rig, frr: Frr) -> None:
    async with speaking(rig) as speaker:
        speaker.want(frozenset({route(A)}))
        await until("synced", is_synced(speaker), log=rig.log)
        assert rig.exabgp
        rig.exabgp.send_signal(signal.SIGSTOP)
        for n in range(100):
            speaker.want(frozenset({route(B, med=n)}))
        await asyncio.sleep(1)
        rig.exabgp.send_signal(signal.SIGCONT)
        await until("caught up", table(frr), {B: 99}, log=rig.log)
        assert speaker.observed().peers["tor"].flaps == 0


async def test_a_reload_with_one_peer_more_and_one_peer_less_touches_no_other(make_rig: Callable[..., Rig]) -> None:
    one = {"name": "tor", "address": "10.0.1.2", "local_address": "10.0.1.1", "peer_as": 65101}
    six = {"name": "tor6", "address": "fd00:1::2", "local_address": "fd00:1::1", "peer_as": 65101}
    rig = make_rig(peers=(one,))
    rig.start_exabgp()
    neighbor6 = (
        " neighbor fd00:1::1 remote-as external\n neighbor fd00:1::1 timers connect 1\n"
        " address-family ipv6 unicast\n  neighbor fd00:1::1 activate\n exit-address-family\n"
    )
    wanted = frozenset({route(A), route(V6)})
    with Frr(rig.tor.name, FRR + neighbor6) as frr:
        async with speaking(rig) as speaker:
            speaker.want(wanted)
            await until("synced", is_synced(speaker), log=rig.log)
            before = received(frr)
            assert rig.exabgp
            for peers, expected6 in (
                ((one, six), ["2001:db8::1/128"]),
                ((one,), []),
                ((one, six), ["2001:db8::1/128"]),
            ):
                await asyncio.sleep(1.1)
                rig.bgp = rig.bgp_section(peers=peers)
                launch.install(rig.bgp, rig.paths, rig.paths.run)
                launch.reload(launch.pid_of(speaker.observed().epoch))
                speaker.reconfigure(rig.bgp)
                await until("peer", lambda: sorted(frr.bgp_routes(6)), expected6, log=rig.log)
                await until("synced", is_synced(speaker), limit_s=20)
            assert received(frr) == before
            assert speaker.observed().peers["tor"].flaps == 0


async def test_systemd_is_told_when_exabgp_answers_and_not_when_it_is_stuck(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()
    path = rig.paths.run / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        rig.start_exabgp()
        assert b"READY=1\nWATCHDOG=1" in await asyncio.to_thread(systemd.recv, 4096)
        assert (await asyncio.to_thread(systemd.recv, 4096)).startswith(b"WATCHDOG=1")
        assert rig.exabgp
        rig.exabgp.send_signal(signal.SIGSTOP)
        systemd.settimeout(7)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(systemd.recv, 4096)
        rig.exabgp.send_signal(signal.SIGCONT)


async def test_commands_that_would_overtake_or_stop_exabgp_are_refused(rig: Rig) -> None:
    await until("socket", (rig.paths.run / "bgp.sock").exists)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(rig.paths.run / "bgp.sock"))
        client.settimeout(10)
        answers = client.makefile("rw")

        def ask(**message: object) -> dict[str, object]:
            answers.write(json.dumps(message) + "\n")
            answers.flush()
            while True:
                answer: dict[str, object] = json.loads(answers.readline())
                if "result" in answer or "control" in answer:
                    return answer

        early = ask(id=1, command="neighbor 10.0.1.2 flush adj-rib out")
        assert early == {"id": 1, "result": "refused", "lines": ["not the controller"]}
        assert ask(control=True) == {"control": True}
        bad = [
            "shutdown",
            "version",
            "reload",
            "neighbor 10.0.1.2 teardown 2",
            "announce route 192.0.2.1/32 next-hop self",
        ]
        bad += ["neighbor 10.0.1.2 announce route 1.2.3.4/32 next-hop 1.1.1.1\nshutdown", "show neighbor", "# x", ""]
        bad += ["neighbor 10.0.1.2 announce route \u00e9", "neighbor 10.0.1.2 announce route " + "1" * 5000]
        for number, line in enumerate(bad):
            answer = ask(id=number, command=line)
            assert (answer["id"], answer["result"]) == (number, "refused"), line


def test_the_socket_is_for_its_owner_and_group_only(rig: Rig) -> None:
    path = rig.paths.run / "bgp.sock"
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert os.stat(path).st_mode & 0o777 == 0o660


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("want"), st.dictionaries(st.sampled_from([A, B, V6]), st.integers(0, 2))),
        st.tuples(
            st.sampled_from(["agent dies", "relay dies", "exabgp dies", "session resets", "router dies", "nothing"]),
            st.just({}),
        ),
    ),
    min_size=3,
    max_size=8,
)


@pytest.mark.timeout(600)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], phases=[Phase.generate])
@given(operations=OPERATIONS, pause_s=st.sampled_from([0.0, 0.02, 0.3]))
def test_after_any_faults_the_router_holds_what_is_wanted(
    make_rig: Callable[..., Rig], operations: list[tuple[str, dict[str, int]]], pause_s: float
) -> None:
    peer = {"name": "tor", "address": "10.0.1.2", "local_address": "10.0.1.1", "peer_as": 65101}
    rig = make_rig(peers=({**peer, "families": ["ipv4", "ipv6"], "next_hop": {"ipv6": "fd00:1::1"}},))
    rig.start_exabgp()
    text = FRR + " address-family ipv6 unicast\n  neighbor 10.0.1.1 activate\n exit-address-family\n"
    with Frr(rig.tor.name, text) as frr:
        asyncio.run(_suffer(rig, frr, operations, pause_s))
    rig.clear()


async def _suffer(rig: Rig, frr: Frr, operations: list[tuple[str, dict[str, int]]], pause_s: float) -> None:
    wanted = {A: 0}
    async with AsyncExitStack() as agents:
        agent = AsyncExitStack()
        await agents.enter_async_context(agent)
        speaker = await agent.enter_async_context(speaking(rig))
        for operation, wish in operations:
            match operation:
                case "want":
                    wanted = wish
                case "agent dies":
                    await agent.aclose()
                    speaker = await agent.enter_async_context(speaking(rig))
                case "relay dies":
                    with suppress(IndexError, ValueError, OSError):
                        rig.kill(rig.relay_pids()[1])
                case "exabgp dies":
                    rig.stop_exabgp(signal.SIGKILL)
                    rig.start_exabgp()
                case "session resets":
                    frr.vtysh("clear bgp *")
                case "router dies":
                    frr.kill()
                    frr.start()
            speaker.want(frozenset(route(prefix, med=med) for prefix, med in wanted.items()))
            await asyncio.sleep(pause_s)

        def held() -> dict[str, int]:
            paths_by_prefix = {**frr.bgp_routes(4), **frr.bgp_routes(6)}
            return {prefix: paths[0].get("metric", 0) for prefix, paths in paths_by_prefix.items()}

        await until("synced", is_synced(speaker), limit_s=40, log=rig.log)
        await until("held as wanted", held, wanted, limit_s=10, log=rig.log)
