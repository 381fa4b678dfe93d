# SPDX-License-Identifier: Apache-2.0
"""Never two holders, whatever processes, networks and servers do. Time is the loop's (looptime)."""

import asyncio
import contextlib
import copy
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from lbagent.config import LeaseConfig
from lbagent.errors import KubeError, KubeRejected, KubeUnavailable
from lbagent.kube.lease import Decision, Lease, Record, decide, quiet_s

Json = dict[str, Any]

D = 3.0
CONFIG = LeaseConfig(duration_s=D, renew_s=0.5)
LATE_S = D * 2 / 3
"""The longest that a write lives on after its sender gave it up; client.py sees to it."""


def record(holder: str, *, since: float = 0.0) -> Record:
    return Record(version="1", holder=holder, duration_s=15, transitions=0, since=since)


@pytest.mark.parametrize(
    ("known", "now", "decision"),
    [
        (None, 0, Decision.CREATE),
        (record("me"), 0, Decision.RENEW),
        (record("me"), 1000, Decision.RENEW),
        (record(""), 0, Decision.TAKE),
        (record("other"), 14.9, Decision.WAIT),
        (record("other", since=10), 24.9, Decision.WAIT),
        (record("other", since=10), 25, Decision.TAKE),
    ],
)
def test_what_to_do_follows_from_the_lease_as_last_read(known: Record | None, now: float, decision: Decision) -> None:
    assert decide(known, me="me", now=now) is decision


class Server:
    """One Lease object with resourceVersions; every request takes its time, both ways."""

    def __init__(self, *, exists: bool = True) -> None:
        self.version = 1
        self.lease: Json | None = {"metadata": {"resourceVersion": "1"}, "spec": {}} if exists else None

    def put(self, body: Json, *, create: bool) -> Json:
        known = self.lease["metadata"]["resourceVersion"] if self.lease else None
        if create and self.lease is not None:
            raise KubeRejected("exists", status=409)
        if not create and self.lease is None:
            raise KubeRejected("none", status=404)
        if not create and body["metadata"].get("resourceVersion") != known:
            raise KubeRejected("conflict", status=409)
        self.version += 1
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return copy.deepcopy(self.lease)


@dataclass
class Line:
    """A host's way to the server: how long each half takes, and when nothing passes or the host is frozen."""

    server: Server
    rng: random.Random
    slow_s: float = 0.05
    cut_until: float = 0.0
    frozen_until: float = 0.0

    async def get(self, path: str, **_: object) -> Json:
        await self._travel(1.0)
        if self.server.lease is None:
            raise KubeRejected("none", status=404)
        answer = copy.deepcopy(self.server.lease)
        await self._travel(1.0)
        return answer

    async def send(self, method: str, path: str, body: Json, *, timeout_s: float) -> Json:
        await self._thaw()
        now = asyncio.get_running_loop().time()
        late_s = self.rng.uniform(0, 2 * self.slow_s)
        if self.cut_until > now:  # it may have left just before, and arrive after we gave it up
            if self.rng.random() < 0.5:
                asyncio.get_running_loop().call_later(self.rng.uniform(0, LATE_S), self._arrive_late, method, body)
            await asyncio.sleep(timeout_s)
            await self._thaw()
            raise KubeUnavailable("cut")
        if late_s > timeout_s:
            await asyncio.sleep(timeout_s)
            raise KubeUnavailable("slow")
        await asyncio.sleep(late_s)
        answer = self.server.put(body, create=method == "POST")
        await self._travel(timeout_s)
        return answer

    def _arrive_late(self, method: str, body: Json) -> None:
        with contextlib.suppress(KubeError):
            self.server.put(body, create=method == "POST")

    async def _travel(self, limit_s: float) -> None:
        await asyncio.sleep(min(limit_s, self.rng.uniform(0, self.slow_s)))
        await self._thaw()
        if self.cut_until > asyncio.get_running_loop().time():
            await asyncio.sleep(limit_s)
            raise KubeUnavailable("cut")

    async def _thaw(self) -> None:
        while (left_s := self.frozen_until - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(left_s)


@dataclass
class Host:
    """A contender. Its monotonic clock started at another time than everybody else's; its wall clock jumps."""

    name: str
    line: Line
    offset_s: float = 0.0
    attempts: int = 0
    lease: Lease = field(init=False)

    def __post_init__(self) -> None:
        self.lease = Lease(CONFIG, client=self.line, identity=self.name, clocks=self)  # type: ignore[arg-type]

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() + self.offset_s

    def wall(self) -> float:
        return self.line.rng.uniform(0, 2e9)

    @property
    def holds(self) -> bool:
        return self.lease.holds(self.monotonic())

    async def run(self) -> None:
        await self.lease.run(self._attempted)

    def _attempted(self) -> None:
        self.attempts += 1


def make_host(server: Server, name: str = "a", *, seed: int = 0, offset_s: float = 0.0, slow_s: float = 0.0) -> Host:
    return Host(name, Line(server, random.Random(seed), slow_s=slow_s), offset_s=offset_s)


def now() -> float:
    return asyncio.get_running_loop().time()


# --- one host -----------------------------------------------------------------------------------


@pytest.mark.looptime
async def test_a_free_lease_is_held_at_once() -> None:
    host = make_host(Server())
    await host.lease.attempt()
    assert host.holds
    assert host.lease.holder == "a"


@pytest.mark.looptime
async def test_a_missing_lease_is_made_but_its_maker_waits() -> None:
    host = make_host(Server(exists=False))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(host.run())
        await asyncio.sleep(2 * quiet_s(CONFIG) - 0.1)
        assert host.lease.holder == "a"
        assert not host.holds
        await asyncio.sleep(0.7)
        assert host.holds
        running.cancel()


@pytest.mark.looptime
async def test_a_holder_stops_on_its_own_before_the_lease_can_be_taken() -> None:
    host = make_host(Server())
    await host.lease.attempt()
    await asyncio.sleep(D * 2 / 3 - 0.01)
    assert host.holds
    assert 0 < host.lease.remaining_s(host.monotonic()) < 0.02
    await asyncio.sleep(0.02)
    assert not host.holds
    assert host.lease.remaining_s(host.monotonic()) == 0


@pytest.mark.looptime
async def test_the_deadline_counts_from_before_a_slow_renewal_was_sent() -> None:
    host = make_host(Server())
    await host.lease.attempt()
    host.line.rng = random.Random(1)
    host.line.slow_s = 0.4
    sent_at = now()
    await host.lease.attempt()
    assert now() > sent_at
    assert host.lease.remaining_s(host.monotonic()) == pytest.approx(D * 2 / 3 - (now() - sent_at))


@pytest.mark.looptime
async def test_a_holder_that_was_frozen_does_not_hold_when_it_wakes() -> None:
    server = Server()
    one, two = make_host(server, "one"), make_host(server, "two", offset_s=500)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(host.run()) for host in (one, two)]
        await asyncio.sleep(1)
        assert one.holds
        assert not two.holds
        one.line.frozen_until = now() + 30
        await asyncio.sleep(29.9)
        assert not one.holds
        assert two.holds
        await asyncio.sleep(2)
        assert not one.holds
        assert two.holds
        assert one.lease.holder == "two"
        for task in tasks:
            task.cancel()


@pytest.mark.looptime
async def test_a_hiatus_in_which_nobody_else_held_ends_at_once() -> None:
    host = make_host(Server())
    async with asyncio.TaskGroup() as group:
        running = group.create_task(host.run())
        await asyncio.sleep(1)
        host.line.cut_until = now() + 20
        await asyncio.sleep(10)
        assert not host.holds
        await asyncio.sleep(10 + 2)
        assert host.holds
        running.cancel()


@pytest.mark.looptime
async def test_an_orderly_stop_frees_the_lease_for_the_next_without_a_wait() -> None:
    server = Server()
    one, two = make_host(server, "one"), make_host(server, "two")
    await one.lease.attempt()
    await two.lease.attempt()
    assert not two.holds
    await one.lease.release()
    assert not one.holds
    await two.lease.attempt()
    assert two.holds


@pytest.mark.looptime
async def test_who_does_not_hold_the_lease_does_not_release_it() -> None:
    server = Server()
    one, two = make_host(server, "one"), make_host(server, "two")
    await one.lease.attempt()
    await two.lease.attempt()
    await two.lease.release()
    assert server.lease is not None
    assert server.lease["spec"]["holderIdentity"] == "one"


@pytest.mark.looptime
async def test_a_lease_deleted_under_its_holder_is_not_held_by_two() -> None:
    server = Server()
    one, two = make_host(server, "one"), make_host(server, "two")
    await one.lease.attempt()
    server.lease = None
    await two.lease.attempt()
    assert two.lease.holder == "two"
    assert one.holds
    assert not two.holds


@pytest.mark.looptime
async def test_a_lease_edited_by_hand_is_left_at_the_next_look() -> None:
    server = Server()
    host = make_host(server)
    await host.lease.attempt()
    assert server.lease is not None
    server.lease["spec"]["holderIdentity"] = "operator"
    server.version += 1
    server.lease["metadata"]["resourceVersion"] = str(server.version)
    await host.lease.attempt()
    await host.lease.attempt()
    assert not host.holds


@pytest.mark.looptime
@pytest.mark.parametrize("spec", [{"leaseDurationSeconds": "x"}, {"holderIdentity": 5}, []])
async def test_a_lease_that_cannot_be_read_is_not_held(spec: object) -> None:
    server = Server()
    server.lease = {"metadata": {"resourceVersion": "1"}, "spec": spec}
    host = make_host(server)
    await host.lease.attempt()
    assert not host.holds


@pytest.mark.looptime
async def test_the_lease_says_how_long_others_must_wait_and_who_holds_it() -> None:
    server = Server()
    host = make_host(server, "lb1_x")
    await host.lease.attempt()
    assert server.lease is not None
    spec = server.lease["spec"]
    assert spec["holderIdentity"] == "lb1_x"
    assert spec["leaseDurationSeconds"] == 3
    assert spec["renewTime"].endswith("Z")
    assert len(spec["renewTime"]) == len("2026-01-01T00:00:00.000000Z")


# --- several hosts, and everything goes wrong ---------------------------------------------------


@pytest.mark.looptime(noop_cycles=4)
@pytest.mark.parametrize("seed", range(8))
async def test_never_two_hold_and_no_late_write_meets_the_next_holder(seed: int) -> None:
    """Two hundred seconds of cuts, freezes, slow requests, late arrivals, deletions of the Lease."""
    rng = random.Random(seed)
    server = Server(exists=rng.random() < 0.5)
    hosts = [make_host(server, f"h{i}", seed=rng.random(), offset_s=rng.uniform(0, 1e6)) for i in range(3)]
    last_write: tuple[str, float] = ("", -1e9)
    tenures = set()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(host.run()) for host in hosts]
        while now() < 200:
            await asyncio.sleep(rng.uniform(0.02, 0.2))
            awake = [host for host in hosts if host.line.frozen_until <= now()]
            holding = [host for host in awake if host.holds]
            assert len(holding) <= 1
            for host in holding:  # it writes at every opportunity
                previous, alive_until = last_write
                assert previous == host.name or now() >= alive_until, "a late write of the holder before"
                # The client gives up by the deadline; what is under way then may live on for a while.
                limit = now() + host.lease.remaining_s(host.monotonic())
                last_write = (host.name, min(limit, now() + D / 3) + LATE_S)
                tenures.add(host.name)
            victim = rng.choice(hosts)
            match rng.random():
                case x if x < 0.02:
                    victim.line.cut_until = now() + rng.uniform(0, 4 * D)
                case x if x < 0.04:
                    victim.line.frozen_until = now() + rng.uniform(0, 4 * D)
                case x if x < 0.06:
                    victim.line.slow_s = rng.uniform(0, D / 3)
                case x if x < 0.062:
                    server.lease = None
        for task in tasks:
            task.cancel()
    assert len(tenures) > 1  # it did change hands, or nothing was tested
    assert all(host.attempts > 20 for host in hosts)
