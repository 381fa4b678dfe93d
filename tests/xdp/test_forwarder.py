# SPDX-License-Identifier: Apache-2.0
"""The forwarder with real packets: traffic through VIPs, a daemon that is killed, drift, limits, lost links."""

import asyncio
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from lbagent.config import Attach, Limits, Snat
from lbagent.errors import TableFull
from lbagent.model.service import Protocol
from lbagent.model.vip import Vip
from lbagent.xdp import bpf, testrun
from lbagent.xdp.bpf import Map
from lbagent.xdp.forwarder import Forwarder, Held, compile_for, uninstall
from tests.lab.netns import Port
from tests.xdp.lane import (
    INTERFACES,
    NODES,
    NODES6,
    TCP_VIP,
    TCP_VIP6,
    UDP_VIP,
    UDP_VIP6,
    Lane,
    OneArm,
    forward_to,
    ring_over,
)

pytestmark = pytest.mark.netns

BOTH = ring_over(*NODES)


@pytest.fixture(scope="session")
def bytecode_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bytecode")


@pytest.fixture
def lane(tmp_path: Path, bytecode_cache: Path, request: pytest.FixtureRequest) -> Iterator[Lane]:
    """The street; another MTU by indirect parameter."""
    made = Lane(tmp_path, mtu=getattr(request, "param", 1500))
    made.paths.state.mkdir()
    (made.paths.state / "cache").symlink_to(bytecode_cache)
    try:
        made.build()
        with made.lb.entered():
            yield made
    finally:
        made.clear()


@asynccontextmanager
async def one_arm(tmp_path: Path, bytecode_cache: Path) -> AsyncIterator[Lane]:
    made = OneArm(tmp_path)
    made.paths.state.mkdir()
    (made.paths.state / "cache").symlink_to(bytecode_cache)
    try:
        made.build()
        with made.lb.entered():
            yield made
    finally:
        made.clear()


@asynccontextmanager
async def running(lane: Lane, **changes: object) -> AsyncIterator[Forwarder]:
    """A daemon in this process; it lets go at the end and leaves everything pinned."""
    forwarder = lane.forwarder(**changes)
    await forwarder.open()
    forwarder.track(frozenset(NODES))
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(forwarder.run(lambda: None))
            yield forwarder
            task.cancel()
    finally:
        forwarder.close()


@asynccontextmanager
async def serving(lane: Lane, **changes: object) -> AsyncIterator[Forwarder]:
    """As ``running``, with both VIPs programmed over both nodes."""
    async with running(lane, **changes) as forwarder:
        await soon(lambda: forwarder.reachable == set(NODES))
        assert forwarder.program([forward_to(BOTH, vip) for vip in (TCP_VIP, UDP_VIP)], [BOTH]) == {}
        yield forwarder


async def soon(claim: Callable[[], object], *, limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not claim():
            await asyncio.sleep(0.01)


async def answers(lane: Lane, count: int = 20) -> set[str]:
    """Who answered ``count`` connections; the event loop goes on meanwhile."""
    return {await asyncio.to_thread(lane.ask) for _ in range(count)}


class Stream:
    """Datagrams to the UDP VIP with a window always full; what does not come back is lost."""

    WINDOW = 32

    def __init__(self, lane: Lane) -> None:
        self.sent = self.received = 0
        self._stopped = threading.Event()
        self._client = lane.datagrams()
        self._client.settimeout(1.0)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stopped.is_set() or self.received < self.sent:
            while self.sent - self.received < self.WINDOW and not self._stopped.is_set():
                self._client.send(self.sent.to_bytes(8, "big"))
                self.sent += 1
            try:
                self._client.recv(16)
                self.received += 1
            except TimeoutError:
                return  # nothing more comes back

    def __enter__(self) -> "Stream":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._client.close()


def attachments(held: Held) -> set[tuple[str, Attach]]:
    return set(held.attached.items())


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every observation looks for drift."""
    monkeypatch.setattr("lbagent.xdp.forwarder._REPAIR_S", 0.0)


# --- forwarding ----------------------------------------------------------------------------------


async def test_tcp_and_udp_reach_both_nodes_and_come_back(lane: Lane):
    async with serving(lane):
        assert await answers(lane, 40) == {"node1", "node2"}
        with lane.datagrams() as client:
            client.send(b"ping")
            assert client.recv(10) == b"ping"


async def test_ipv6_vips_are_served_beside_ipv4_ones(lane: Lane):
    ring = ring_over(*NODES6)
    async with serving(lane) as forwarder:
        forwarder.track(frozenset(NODES + NODES6))
        await soon(lambda: forwarder.reachable == {*NODES, *NODES6})
        forwarder.program([forward_to(ring, vip) for vip in (TCP_VIP6, UDP_VIP6)], [ring])
        assert forwarder.observed().proven == {TCP_VIP, UDP_VIP, TCP_VIP6, UDP_VIP6}
        assert {await asyncio.to_thread(lane.ask, TCP_VIP6) for _ in range(40)} == {"node1", "node2"}
        with lane.datagrams(UDP_VIP6) as client:
            client.send(b"ping")
            assert client.recv(10) == b"ping"
        assert await answers(lane) == {"node1", "node2"}


async def test_one_interface_is_enough(tmp_path: Path, bytecode_cache: Path):
    async with one_arm(tmp_path, bytecode_cache) as lane:
        nodes = frozenset(OneArm.nodes_v4)
        ring = ring_over(*nodes)
        forwarder = lane.forwarder(interfaces=("wan",))
        await forwarder.open()
        forwarder.track(nodes)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(forwarder.run(lambda: None))
            await soon(lambda: forwarder.reachable == nodes)
            forwarder.program([forward_to(ring)], [ring])
            assert forwarder.observed().proven == {TCP_VIP}
            assert await answers(lane, 40) == {"node1", "node2"}
            task.cancel()
        forwarder.close()


async def test_dedicated_addresses_are_used_one_and_all(lane: Lane):
    addresses = ("10.0.9.1", "10.0.9.2")  # the nodes' default route leads them back
    async with serving(lane, snat=Snat(addresses=addresses)):

        def source() -> str:
            connection, _, seen = lane.connect()
            connection.close()
            return seen

        assert {await asyncio.to_thread(source) for _ in range(40)} == set(addresses)


async def test_a_node_sees_the_lb_hosts_own_address_and_a_reserved_port(lane: Lane):
    async with serving(lane):
        connection, _, source = await asyncio.to_thread(lane.connect)
        connection.close()
        assert source == "10.0.2.1"
        reserved = Path("/proc/sys/net/ipv4/ip_local_reserved_ports").read_text()
        assert reserved.strip() == "20000-29999"


async def test_what_was_programmed_is_read_back_equal_and_proven(lane: Lane):
    async with serving(lane) as forwarder:
        held = forwarder.observed()
        assert held.forwards == {vip: forward_to(BOTH, vip) for vip in (TCP_VIP, UDP_VIP)}
        assert held.rings == {BOTH.fingerprint}
        assert held.proven == {TCP_VIP, UDP_VIP}
        assert attachments(held) == {(name, Attach.NATIVE) for name in INTERFACES}


def exchange(lane: Lane, sent: bytes) -> bytes:
    """Send it all through the VIP -> what the node echoed."""
    connection, _, _ = lane.connect()
    with connection:
        threading.Thread(target=connection.sendall, args=(sent,), daemon=True).start()
        received = bytearray()
        while len(received) < len(sent):
            received += connection.recv(1 << 16) or b"closed"
        return bytes(received)


async def test_megabytes_cross_unharmed_in_both_directions(lane: Lane):
    async with serving(lane):
        sent = os.urandom(4 << 20)
        assert await asyncio.to_thread(exchange, lane, sent) == sent


@pytest.mark.parametrize("lane", [9000], indirect=True)
async def test_jumbo_frames_cross_as_well(lane: Lane):
    async with serving(lane) as forwarder:
        sent = os.urandom(4 << 20)
        assert await asyncio.to_thread(exchange, lane, sent) == sent
        forwarded = forwarder.counters().vips[TCP_VIP]
        assert forwarded.bytes / forwarded.packets > 3506


async def test_an_unprogrammed_vip_is_left_to_the_kernel(lane: Lane):
    async with serving(lane) as forwarder:
        forwarder.unprogram([TCP_VIP])
        assert forwarder.observed().forwards.keys() == {UDP_VIP}
        with pytest.raises(OSError, match=r"timed out|refused|unreachable"):
            await asyncio.to_thread(lane.connect, 0.3)


async def test_counters_know_vips_and_backends_by_name(lane: Lane):
    async with serving(lane) as forwarder:
        await answers(lane, 10)
        tally = forwarder.counters()
        assert tally.vips[TCP_VIP].flows == 10
        assert tally.vips[UDP_VIP].packets == 0
        assert sum(count.flows for count in tally.backends.values()) == 10
        assert tally.backends.keys() == set(NODES)


async def test_generic_mode_forwards_as_well_and_says_so(lane: Lane):
    async with serving(lane, attach=Attach.GENERIC) as forwarder:
        assert set(forwarder.observed().attached.values()) == {Attach.GENERIC}
        assert await answers(lane, 20) == {"node1", "node2"}


# --- a daemon that dies --------------------------------------------------------------------------


def ready(line: str) -> dict[str, str]:
    word, *facts = line.split()
    assert word == "ready"
    return dict(fact.split("=") for fact in facts)


@contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Whatever happens, the process is killed at the end."""
    with process:
        try:
            yield process
        finally:
            process.kill()


async def test_traffic_does_not_notice_that_the_daemon_is_killed_and_started_again(lane: Lane):
    first = lane.daemon()
    with ending(first):
        assert first.stdout is not None
        assert ready(first.stdout.readline()) == {"held": "0", "unproven": "0"}
        long_lived, _, _ = lane.connect()
    for _ in range(50):  # nobody is there
        lane.ask()
    second = lane.daemon()
    with ending(second):
        assert second.stdout is not None
        while not select_readable(second.stdout.fileno()):  # as long as it starts
            lane.ask()
            long_lived.sendall(b"still there?")
            assert long_lived.recv(100) == b"still there?"
        assert ready(second.stdout.readline()) == {"held": "2", "unproven": "0"}
        long_lived.sendall(b"and now?")
        assert long_lived.recv(100) == b"and now?"
    long_lived.close()


def select_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def resident_kib(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


async def test_at_whatever_moment_a_starting_daemon_is_killed_nothing_is_lost(lane: Lane):
    """Each one finds other limits than its predecessor, so it moves the maps and exchanges the program."""
    for vips in (64, 128):
        with ending(lane.daemon(vips=vips)) as first:
            assert first.stdout is not None
            assert ready(first.stdout.readline())
    long_lived, _, _ = lane.connect()
    with Stream(lane) as stream:
        for turn in range(8):
            with ending(lane.daemon(vips=(64, 128)[turn % 2])):
                await asyncio.sleep(0.4 + 0.2 * turn)  # there is nothing to wait for: any moment will do
    long_lived.sendall(b"still there?")
    assert long_lived.recv(100) == b"still there?"
    long_lived.close()
    assert stream.received == stream.sent > 0


async def test_a_daemon_maps_no_compiler_and_little_memory(lane: Lane):
    without_xdp = "import asyncio, ssl, lbagent.config, lbagent.log; print('ready', flush=True); input()"
    bare = subprocess.Popen(
        [sys.executable, "-c", without_xdp], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    daemon = lane.daemon()
    with ending(daemon), ending(bare):
        assert bare.stdout is not None
        assert daemon.stdout is not None
        bare.stdout.readline()
        daemon.stdout.readline()
        mapped = Path(f"/proc/{daemon.pid}/maps").read_text()
        assert "libc.so" in mapped
        assert "libbcc" not in mapped
        assert "LLVM" not in mapped
        assert resident_kib(daemon) - resident_kib(bare) < 40 * 1024


async def test_the_next_daemon_takes_everything_over_as_it_is(lane: Lane):
    def seen() -> tuple[set[int], set[int]]:
        links = {bpf.link_info(bpf.open_pin(str(path))).id for path in (lane.pins / "links/native").iterdir()}
        programs = {bpf.program_info(bpf.open_pin(str(path))).id for path in (lane.pins / "programs").iterdir()}
        return links, programs

    async with serving(lane) as first:
        before = first.observed()
        kernel_before = seen()
    async with running(lane) as second:
        held = second.observed()
        assert held.forwards == before.forwards
        assert held.proven == before.proven
        assert seen() == kernel_before


async def test_an_interface_that_is_not_configured_any_more_is_let_go(lane: Lane):
    async with serving(lane):
        pass
    async with running(lane, interfaces=("wan", "lan1")) as forwarder:
        assert forwarder.observed().attached.keys() == {"wan", "lan1"}
        assert "prog/xdp" not in lane.lb.run("ip", "-details", "link", "show", "dev", "lan2")


async def test_an_interface_that_is_missing_at_the_start_is_attached_when_it_comes(lane: Lane):
    lane.lb.ip("link delete lan1")
    async with running(lane) as forwarder:
        assert "there is no interface lan1" in forwarder.observed().obstacles["lan1"]
        lane.connect_node(1)
        await soon(lambda: forwarder.reachable == set(NODES))
        assert attachments(forwarder.observed()) == {(name, Attach.NATIVE) for name in INTERFACES}


async def test_right_after_a_start_nodes_are_as_reachable_as_the_kernel_has_them(lane: Lane):
    async with serving(lane):
        pass
    forwarder = lane.forwarder()
    await forwarder.open()
    forwarder.track(frozenset({*NODES, "10.0.2.77"}))
    assert forwarder.reachable == set(NODES)
    forwarder.close()


async def test_a_node_that_died_while_no_daemon_looked_is_found_out(lane: Lane):
    async with serving(lane):
        pass
    Port(lane.nodes[0], "n0").down()
    async with running(lane) as forwarder:
        await soon(lambda: forwarder.reachable == {NODES[1]})
        assert "lan1 is down" in forwarder.obstacle(NODES[0])


async def test_the_program_is_exchanged_a_hundred_times_without_a_lost_packet(lane: Lane):
    async with serving(lane) as forwarder:
        with Stream(lane) as stream:
            for turn in range(100):
                program = forwarder._programs.load(forwarder._bytecode, forwarder._maps, frags=turn % 2 == 0)
                for interface in INTERFACES:
                    forwarder._links.attach(interface, program, Attach.NATIVE)
                assert {a.program_id for a in forwarder._links.attached().values()} == {program.id}
        assert stream.sent > 5000
        assert stream.received == stream.sent


# --- what others do to the kernel ----------------------------------------------------------------


def pinned(lane: Lane, name: str) -> Map:
    (folder,) = lane.pins.glob("v*-*")
    return Map.open(str(folder / name))


async def test_a_vip_that_somebody_deleted_is_missed_and_programmed_again(lane: Lane):
    async with serving(lane) as forwarder:
        with pinned(lane, "lb_index") as index, index.map_memory() as memory:
            memory[:] = bytes(len(memory))
        assert forwarder.observed().forwards == {}
        forwarder.program([forward_to(BOTH), forward_to(BOTH, UDP_VIP)], [BOTH])
        assert forwarder.observed().proven == {TCP_VIP, UDP_VIP}
        assert await answers(lane) == {"node1", "node2"}


async def test_a_vip_that_somebody_changed_is_told_from_what_was_wanted(lane: Lane):
    async with serving(lane) as forwarder:
        with pinned(lane, "lb_vips") as vips, vips.map_memory() as memory:
            (number,) = [n for vip, n in forwarder._tables._id_by_vip.items() if vip == TCP_VIP]
            at = number * vips.stride + 2  # the node port in `target`
            memory[at : at + 2] = (9).to_bytes(2, "big")
        held = forwarder.observed()
        assert held.forwards[TCP_VIP].node_port == 9
        forwarder.program([forward_to(BOTH)], [BOTH])
        assert forwarder.observed().forwards[TCP_VIP] == forward_to(BOTH)
        assert await answers(lane, 4)


async def test_a_way_that_somebody_spoilt_is_written_again_and_counted(lane: Lane, no_wait: None):
    async with serving(lane) as forwarder:
        assert forwarder.observed().repairs == 0
        with pinned(lane, "lb_backends") as backends, backends.map_memory() as memory:
            for number in forwarder._tables.backend_ids().values():
                memory[number * 64 + 24 : number * 64 + 64] = bytes(40)  # both hops: interface and MACs
        held = forwarder.observed()
        assert (held.repairs, held.proven) == (1, {TCP_VIP, UDP_VIP})
        assert await answers(lane) == {"node1", "node2"}


@pytest.mark.parametrize("name", ["lb_config", "lb_filter", "lb_snats"])
async def test_settings_that_somebody_spoilt_are_written_again(lane: Lane, no_wait: None, name: str):
    async with serving(lane) as forwarder:
        with pinned(lane, name) as table, table.map_memory() as memory:
            memory[:] = bytes(len(memory[:]))
        held = forwarder.observed()
        assert (held.repairs, held.proven) == (1, {TCP_VIP, UDP_VIP})
        assert await answers(lane) == {"node1", "node2"}


async def test_pins_that_somebody_removed_are_made_again_before_the_daemon_dies(lane: Lane, no_wait: None):
    async with serving(lane) as forwarder:
        pins = {path for path in lane.pins.rglob("*") if path.is_file()}
        shutil.rmtree(lane.pins)
        repairs = forwarder.observed().repairs
        assert {path for path in lane.pins.rglob("*") if path.is_file()} == pins
        assert repairs == len(pins)
    assert await answers(lane) == {"node1", "node2"}  # nobody holds a descriptor any more
    async with running(lane) as successor:
        assert successor.observed().forwards.keys() == {TCP_VIP, UDP_VIP}


@pytest.mark.parametrize("name", ["lb_rings", "lb_backends"])
async def test_a_ring_that_somebody_spoilt_is_missed_and_given_again(lane: Lane, no_wait: None, name: str):
    async with serving(lane) as forwarder:
        assert forwarder.observed().rings == {BOTH.fingerprint}
        with pinned(lane, name) as table, table.map_memory() as memory:
            begin = 0 if name == "lb_backends" else 150_000  # behind the head of the first ring
            memory[begin:] = bytes(len(memory[begin:]))
        held = forwarder.observed()
        assert held.repairs >= 1
        assert {forward.ring for forward in held.forwards.values()} == {""}
        forwarder.program([forward_to(BOTH), forward_to(BOTH, UDP_VIP)], [BOTH])
        assert forwarder.observed().proven == {TCP_VIP, UDP_VIP}
        assert await answers(lane) == {"node1", "node2"}


async def test_what_we_change_ourselves_is_no_drift(lane: Lane, no_wait: None):
    async with serving(lane) as forwarder:
        for down in ([], [NODES[0]], NODES, []):
            ring = ring_over(*NODES, down=down)
            forwarder.program([forward_to(ring, vip) for vip in (TCP_VIP, UDP_VIP)], [ring])
            assert forwarder.observed().repairs == 0
        forwarder.unprogram([TCP_VIP])
        assert forwarder.observed().repairs == 0


async def test_an_interface_with_a_foreign_program_is_named_and_nothing_is_proven(lane: Lane):
    async with serving(lane) as forwarder:
        forwarder._links.detach("wan")
        lane.lb.run("ip", "link", "set", "dev", "wan", "xdpgeneric", "pinned", str(next(lane.pins.glob("programs/*"))))
        held = forwarder.observed()
        assert held.attached.keys() == {"lan1", "lan2"}
        assert "not ours" in held.obstacles["wan"]
        assert held.proven == frozenset()
        assert "wan" in held.unproven[TCP_VIP]
        lane.lb.run("ip", "link", "set", "dev", "wan", "xdpgeneric", "off")
        assert forwarder.observed().proven == {TCP_VIP, UDP_VIP}


# --- limits --------------------------------------------------------------------------------------


async def test_too_many_vips_are_refused_one_by_one_and_the_others_are_served(lane: Lane):
    async with running(lane, limits=Limits(vips=16)) as forwarder:
        await soon(lambda: forwarder.reachable == set(NODES))
        vips = [Vip(address="203.0.113.9", protocol=Protocol.TCP, port=port) for port in range(1, 21)]
        failed = forwarder.program([forward_to(BOTH, vip) for vip in vips], [BOTH])
        assert failed.keys() == set(vips[16:])
        assert {type(error) for error in failed.values()} == {TableFull}
        assert "xdp.limits" in str(failed[vips[16]])
        held = forwarder.observed()
        assert held.proven == set(vips[:16])


async def test_larger_limits_move_the_vips_without_a_gap(lane: Lane):
    async with serving(lane, limits=Limits(vips=64, backends=64, rings=8, flows=4096)):
        connection, _, _ = await asyncio.to_thread(lane.connect)
    larger = Limits(vips=128, backends=1024, rings=16, flows=8192)
    await compile_for(lane.xdp(limits=larger), lane.paths, hz=testrun.kernel_hz())  # before the load, not under it
    with Stream(lane) as stream:
        async with running(lane, limits=larger) as forwarder:
            held = forwarder.observed()
            assert held.forwards.keys() == held.proven == {TCP_VIP, UDP_VIP}
            assert held.rings == {BOTH.fingerprint}
            connection.sendall(b"still there?")
            assert connection.recv(100) == b"still there?"
            assert await answers(lane) == {"node1", "node2"}
    connection.close()
    assert stream.received == stream.sent > 0
    assert len(list(lane.pins.glob("v*-*"))) == 1


# --- links, neighbours, routes -------------------------------------------------------------------


async def test_a_lost_link_takes_its_node_away_and_brings_it_back(lane: Lane):
    async with serving(lane) as forwarder:
        Port(lane.nodes[0], "n0").down()
        await soon(lambda: forwarder.reachable == {NODES[1]})
        survivor = ring_over(*NODES, down=[NODES[0]])
        forwarder.program([forward_to(survivor)], [survivor])
        assert await answers(lane) == {"node2"}
        lane.nodes[0].ip("link set n0 up", "route add default via 10.0.2.1")
        await soon(lambda: forwarder.reachable == set(NODES))
        forwarder.program([forward_to(BOTH)], [BOTH])
        assert await answers(lane, 40) == {"node1", "node2"}


async def test_flows_of_a_node_that_is_down_move_at_once(lane: Lane):
    async with serving(lane) as forwarder:
        with ExitStack() as clients:
            sockets = [clients.enter_context(lane.datagrams()) for _ in range(16)]
            for client in sockets:
                client.send(b"to somebody")
                assert client.recv(20) == b"to somebody"
            survivor = ring_over(*NODES, down=[NODES[0]])
            forwarder.program([forward_to(survivor, UDP_VIP)], [survivor])
            Port(lane.nodes[0], "n0").down()
            for client in sockets:
                client.send(b"again")
                assert client.recv(20) == b"again"


async def test_a_node_with_a_new_mac_is_followed(lane: Lane):
    async with serving(lane) as forwarder:
        lane.nodes[0].ip("link set n0 address 02:00:00:00:00:99")
        with lane.nodes[0].entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaker:
            speaker.sendto(b"", ("10.0.2.1", 9))  # its question who has 10.0.2.1 tells the new MAC
        await soon(lambda: forwarder._known[NODES[0]].destination_mac == bytes.fromhex("020000000099"))
        assert await answers(lane, 40) == {"node1", "node2"}
        assert forwarder.observed().proven == {TCP_VIP, UDP_VIP}


async def test_an_interface_made_anew_is_attached_and_forwards_again(lane: Lane):
    async with serving(lane) as forwarder:
        lane.lb.ip("link delete lan1")
        await soon(lambda: forwarder.reachable == {NODES[1]})
        assert "lan1" in forwarder.observed().obstacles
        lane.connect_node(1)
        await soon(lambda: forwarder.reachable == set(NODES))
        held = forwarder.observed()
        assert attachments(held) == {(name, Attach.NATIVE) for name in INTERFACES}
        assert held.proven == {TCP_VIP, UDP_VIP}
        assert await answers(lane, 40) == {"node1", "node2"}


async def test_a_vip_without_an_active_backend_is_not_proven(lane: Lane):
    async with serving(lane) as forwarder:
        nobody = ring_over(*NODES, down=NODES)
        forwarder.program([forward_to(nobody)], [nobody])
        assert "no active backend" in forwarder.observed().unproven[TCP_VIP]
        assert forwarder.prove([TCP_VIP, UDP_VIP])[UDP_VIP] == ""


async def test_a_vip_that_the_kernel_does_not_hold_is_not_proven(lane: Lane):
    stranger = Vip(address="203.0.113.99", protocol=Protocol.TCP, port=80)
    async with serving(lane) as forwarder:
        assert forwarder.prove([stranger]) == {stranger: "the kernel does not hold it"}


async def test_a_client_outside_the_source_ranges_gets_nothing_and_the_proof_still_holds(lane: Lane):
    async with serving(lane) as forwarder:
        forwarder.program([forward_to(BOTH, source_ranges=("198.51.100.0/24",))], [BOTH])
        assert TCP_VIP in forwarder.observed().proven
        with pytest.raises(OSError, match="timed out"):
            await asyncio.to_thread(lane.connect, 0.3)


# --- the end -------------------------------------------------------------------------------------


async def test_uninstalling_leaves_no_program_and_no_pin(lane: Lane):
    async with serving(lane):
        pass
    uninstall(lane.paths)
    assert not lane.pins.exists()
    assert "xdp" not in lane.lb.run("ip", "link", "show", "dev", "wan")
