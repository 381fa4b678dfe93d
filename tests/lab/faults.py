# SPDX-License-Identifier: Apache-2.0
"""The faults, in order of value: each with what is promised and what it may cost.

What may be lost follows from the design and not from a run: one probed node is out of use after ``FALL_S``; a
connection that is under way when the ToR changes its next hops may move to an LB host that does not know it.
"""

import contextlib
import ipaddress
import itertools
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.lab import stages
from tests.lab.control_plane import Real
from tests.lab.inventory import Process, inhabitants
from tests.lab.lbhost import LbHost
from tests.lab.netns import Port, run
from tests.lab.poll import Waited
from tests.lab.scene import Expect, Scenario, Scene

UNDER_WAY = 3
"""Requests that may be under way at one moment: an answer takes some milliseconds, every 20 ms one begins."""
FALL_S = 3.0
"""docs/reference/health.md: three probes 0.5 s apart, 0.4 s for each to time out; here with room for a busy machine."""
READY_S = 20.0
"""A start of the agent on a busy machine with two cores."""
LEASE_S = 6.0 + 2.0 + 4.0
"""The lab's lease.duration_s, one lease.renew_s, and the time to write and read a status."""
PASS_S = 35.0
"""Without an event a pass, and a look at what the maps hold, comes every 30 s."""


# --- the agent --------------------------------------------------------------------------------------------------


def kill_agent(scene: Scene) -> None:
    """Also while it starts: when it takes over maps, compares, adopts the routes."""
    moments = random.Random(9)
    times = scene.rounds(20, short=5)
    for _ in range(times):
        scene.host.kill_agent()
        scene.inject_now()
        scene.host.start_agent()
        time.sleep(moments.uniform(0.3, 4.0))
    scene.host.wait_ready()
    scene.repaired()
    scene.say(f"killed {times} times, 0.3 to 4 s after each start")


def freeze_agent(scene: Scene) -> None:
    agent, seconds = _agent(scene.host), scene.rounds(20, short=6)
    scene.undo.callback(agent.kill, signal.SIGCONT)
    agent.kill(signal.SIGSTOP)
    began = time.monotonic()
    time.sleep(seconds)
    carried = scene.carried(scene.host, since_s=began)
    agent.kill(signal.SIGCONT)
    scene.inject_now()
    scene.host.wait_ready()
    scene.repaired()
    scene.say(f"{carried} requests went by its host in {seconds} s")
    scene.require(carried, "its host carried nothing meanwhile")


def lose_leader(scene: Scene) -> None:
    holder = stages.lease_holder(scene.lab)
    leader = scene.lab.hosts[holder.partition("_")[0]]  # the rest tells one life of the agent from the next
    (follower,) = (host for host in scene.lab.hosts.values() if host is not leader)
    leader.kill_agent()
    scene.stop_counting()
    scene.inject_now()
    address = scene.lab.address_of(_another_service(scene))
    scene.repaired()
    scene.lab.wait_routes(address, (follower.name,))
    scene.say(f"{follower.name} gave a new Service its address and announces it alone")
    leader.start_agent()
    scene.lab.wait_routes(address, tuple(scene.lab.hosts))


def start_second_agent(scene: Scene) -> None:
    host = scene.host
    first = _agent(host)
    argv = host.namespace.command(*host.agent_command)
    second = scene.lab.inventory.start(f"{host.name}-second", argv, log=host.folder / "second.log")
    scene.undo.callback(second.stop)
    scene.wait("the second agent to give up", lambda: not second.alive, limit_s=READY_S)
    scene.repaired()
    words = (host.folder / "second.log").read_text()
    scene.require("another lbagent" in words, f"it does not say why: {words[-300:]}")
    scene.require(first.alive, "the first agent has ended")
    said = [line for line in words.splitlines() if "another lbagent" in line]
    scene.say(f"it says: {said[0].strip()[:120]}" if said else "it says nothing")


def break_configuration(scene: Scene) -> None:
    host = scene.host
    good = host.config_file.read_text()
    scene.undo.callback(host.config_file.write_text, good)
    refused = 'lbagent_config_reloads_total{outcome="failed"}'
    for count, text in enumerate(("pools: [", good.replace("local_as", "locale_as"), ""), start=1):
        host.config_file.write_text(text)
        _agent(host).kill(signal.SIGHUP)
        scene.wait("the configuration to be refused", lambda n=count: host.metrics().get(refused, 0.0) >= n, limit_s=10)
    host.config_file.write_text(good)
    scene.inject_now()
    done = 'lbagent_config_reloads_total{outcome="done"}'
    _agent(host).kill(signal.SIGHUP)
    scene.wait("the good configuration to be taken", lambda: host.metrics().get(done, 0.0) >= 1, limit_s=10)
    scene.repaired()
    scene.say("half a YAML file, an unknown key and an empty file refused; the good one taken")


# --- its disk ---------------------------------------------------------------------------------------------------


def forbid_writing(scene: Scene) -> None:
    """A file system of its own with the same content, read-only."""
    state = scene.host.folder / "state"
    aside = Path(shutil.copytree(state, scene.host.folder / "aside"))
    scene.undo.callback(shutil.rmtree, aside)
    _mount_over(scene, state, "size=16m")
    shutil.copytree(aside, state, dirs_exist_ok=True)
    run("mount", "-o", "remount,ro", str(state))
    _live_without_disk(scene)


def fill_disk(scene: Scene) -> None:
    """Also the compiler's cache is hidden by it, so the next agent must compile."""
    state = scene.host.folder / "state"
    _mount_over(scene, state, "size=64k")
    with contextlib.suppress(OSError):
        (state / "filled").write_bytes(bytes(1 << 20))
    _live_without_disk(scene)


def _live_without_disk(scene: Scene) -> None:
    """A change is served, and an agent that is killed comes back."""
    host = scene.host
    scene.stop_counting()
    scene.inject_now()
    scene.lab.wait_routes(scene.lab.address_of(_another_service(scene)), tuple(scene.lab.hosts))
    log = host.folder / "agent.log"
    scene.wait("the agent to say so", lambda: "snapshot not saved" in log.read_text(), limit_s=15)
    host.kill_agent()
    host.start_agent()
    host.wait_ready()
    scene.repaired()
    scene.say("it says `snapshot not saved`, serves a new Service all the same, and starts again when killed")


def _mount_over(scene: Scene, place: Path, options: str) -> None:
    inventory = scene.lab.inventory
    inventory.mounts.append(str(place))
    inventory.save()
    scene.undo.callback(inventory.unmount, place)
    run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place))


# --- BGP --------------------------------------------------------------------------------------------------------


def kill_speaker(scene: Scene) -> None:
    host = scene.host
    speaker = _speaker(host)
    scene.inject_now()
    speaker.kill(signal.SIGKILL)
    speaker.gone(limit_s=5)
    scene.lab.wait_routes(scene.address, (scene.other.name,))
    scene.say(f"its route left after {time.monotonic() - scene.injected_s:.1f} s")
    time.sleep(max(0.0, scene.injected_s + 1.0 - time.monotonic()))  # RestartSec of lbagent-bgp.service
    host.start_speaker()
    scene.lab.wait_routes(scene.address, tuple(scene.lab.hosts), limit_s=60)
    scene.repaired()
    scene.require(host.metrics().get("lbagent_speaker_restarts_total", 0.0) >= 1, "the restart is not counted")


def freeze_speaker(scene: Scene) -> None:
    speaker, seconds = _speaker(scene.host), 15
    scene.undo.callback(speaker.kill, signal.SIGCONT)
    speaker.kill(signal.SIGSTOP)
    began = time.monotonic()
    scene.inject_now()
    scene.lab.wait_routes(scene.address, (scene.other.name,), limit_s=seconds)
    scene.say(f"its route left after {time.monotonic() - began:.1f} s, when the hold time of 9 s was over")
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    speaker.kill(signal.SIGCONT)
    scene.inject_now()
    scene.lab.wait_routes(scene.address, tuple(scene.lab.hosts), limit_s=60)
    scene.repaired()


def kill_relay(scene: Scene) -> None:
    for _ in range(3):
        _kill_relay(scene, keeper=False)
    scene.repaired()


def kill_relay_and_keeper(scene: Scene) -> None:
    _kill_relay(scene, keeper=True)
    scene.repaired()


def _kill_relay(scene: Scene, *, keeper: bool) -> None:
    """The worker speaks with the agent; the keeper, its parent, starts it again."""
    host = scene.host
    relays = [one for one in inhabitants(host.namespace) if "relay" in _command_line(one)]
    parents = {_parent(one) for one in relays}
    victims = [one for one in relays if keeper or one.pid not in parents]
    scene.require(victims, "no relay was found")
    known = {one.pid for one in relays}
    scene.inject_now()
    for one in victims:
        one.kill(signal.SIGKILL)
    scene.wait(
        "another relay",
        lambda: [x for x in inhabitants(host.namespace) if "relay" in _command_line(x) and x.pid not in known],
        limit_s=15,
    )
    scene.wait(
        "the agent to speak with it",
        lambda: host.metrics().get("lbagent_speaker_connected") == 1.0,
        limit_s=20,
    )


# --- the API ----------------------------------------------------------------------------------------------------


def freeze_api(scene: Scene) -> None:
    server = scene.lab.cluster.server
    scene.undo.callback(server.kill, signal.SIGCONT)
    server.kill(signal.SIGSTOP)
    time.sleep(scene.rounds(20, short=8))
    scene.stop_counting()
    server.kill(signal.SIGCONT)
    _converge(scene)


def black_hole_api(scene: Scene) -> None:
    """No RST, no answer: what a broken switch does. The cluster itself goes on."""
    place = scene.lab.cluster.api.namespace
    hosts = [host.lb.inside for host in scene.lab.hosts.values()]
    rules = [
        f"{family} {side} {{ {', '.join(addresses)} }} drop"
        for family, addresses in (("ip", [h.ip4 for h in hosts]), ("ip6", [h.ip6 for h in hosts]))
        for side in ("saddr", "daddr")
    ]
    chains = "".join(
        f"chain {hook} {{ type filter hook {hook} priority 0; policy accept; {'; '.join(rules)}; }}\n"
        for hook in ("input", "output")
    )
    place.run("nft", "-f", "-", text=f"table inet chaos {{\n{chains}}}\n")
    scene.undo.callback(place.run, "nft", "destroy", "table", "inet", "chaos", fine=(0, 1))
    began = time.monotonic()
    service = _another_service(scene)
    time.sleep(max(0.0, began + scene.rounds(20, short=8) - time.monotonic()))
    scene.stop_counting()
    place.run("nft", "delete", "table", "inet", "chaos")
    _converge(scene, service)


def kill_api(scene: Scene) -> None:
    assert isinstance(scene.lab.cluster, Real)
    plane = scene.lab.cluster.plane
    scene.undo.callback(plane.restart_apiserver)
    plane.kill_apiserver()
    time.sleep(scene.rounds(20, short=8))
    scene.stop_counting()
    plane.restart_apiserver()
    _converge(scene)


def _converge(scene: Scene, made_meanwhile: str = "") -> None:
    """The API is back: until a Service that was made meanwhile, or else is made now, is announced by every host."""
    scene.inject_now()
    service = made_meanwhile or _another_service(scene)
    scene.lab.wait_routes(scene.lab.addresses_of(service, limit_s=60)[0], tuple(scene.lab.hosts), limit_s=60)
    scene.repaired()
    scene.say(f"a Service made {'meanwhile' if made_meanwhile else 'at its return'} is announced by both hosts")


def boot_without_api(scene: Scene) -> None:
    host, memory = scene.host, scene.host.folder / "state" / "snapshot.json"
    scene.wait("the host to write down what it knows", lambda: scene.address in memory.read_text(), limit_s=20)
    server = scene.lab.cluster.server
    scene.undo.callback(server.kill, signal.SIGCONT)
    server.kill(signal.SIGSTOP)
    scene.inject_now()
    host.power_off()
    scene.lab.wait_routes(scene.address, (scene.other.name,))
    scene.inject_now()
    host.power_on()
    scene.lab.wait_routes(scene.address, tuple(scene.lab.hosts), limit_s=60)
    scene.repaired()
    back = time.monotonic()
    status = host.wait_ready()
    scene.require(status["from_memory"] is True, "it does not say that it serves from memory")
    time.sleep(3.0)
    carried = scene.carried(host, since_s=back)
    scene.require(carried, "it is announced, but carried nothing")
    scene.say(f"it announced from the last snapshot and carried {carried} requests in 3 s")


# --- links and nodes --------------------------------------------------------------------------------------------


def cut_uplink(scene: Scene) -> None:
    """The ToR's end goes down, so that the LB host loses carrier, as when a cable is pulled.

    Without kernel next-hop groups: FRR 8.4 does not put back the member that the kernel took out of one with the link,
    while bgpd and zebra show both paths. What is judged here is the LB host.
    """
    lb, tor = scene.host.lb, scene.lab.topology.tor
    scene.lab.tor.frr.configure("no zebra nexthop kernel enable")
    scene.undo.callback(scene.lab.tor.frr.configure, "zebra nexthop kernel enable")
    port = Port(tor, lb.tor.device)
    tor.sysctl({f"net/ipv6/conf/{lb.tor.device}/keep_addr_on_down": "1"})
    scene.undo.callback(tor.ip, f"link set {lb.tor.device} up")
    scene.inject_now()
    port.down()
    scene.lab.wait_routes(scene.address, (scene.other.name,))
    scene.say(f"the other host alone after {time.monotonic() - scene.injected_s:.1f} s")
    time.sleep(12.0)  # longer than the hold time
    lost = [one for one in scene.load.ledger.failures if one.sent_s > scene.injected_s + 1.0]
    scene.require(not lost, f"{len(lost)} requests failed while the other host carried all")
    tor.ip(f"link set {lb.tor.device} up")
    scene.inject_now()
    scene.lab.wait_routes(scene.address, tuple(scene.lab.hosts), limit_s=60)
    scene.repaired()
    back = time.monotonic()
    time.sleep(3.0)
    carried = scene.carried(scene.host, since_s=back)
    scene.require(carried, "its route is back, but it carried nothing")
    scene.say(f"it carried {carried} requests in the 3 s after it was back")


def freeze_node(scene: Scene) -> None:
    """Its cable is dead and nobody says so: no carrier lost at the LB hosts, no word from the API.

    It runs no pod of the Service: what the other nodes' kube-proxy sends to a dead pod, no load balancer can save.
    """
    switch, node = scene.lab.topology.namespace("switch"), scene.empty_node
    scene.undo.callback(switch.ip, f"link set {node.name} up")
    scene.inject_now()
    switch.ip(f"link set {node.name} down")
    time.sleep(FALL_S + 5.0)
    failures = scene.load.ledger.failures
    last_s = max((one.sent_s - scene.injected_s for one in failures), default=0.0)
    scene.repair_s = last_s
    scene.stop_counting()
    scene.say(f"taken out by its probes: the last request that failed was sent {last_s:.1f} s after")
    switch.ip(f"link set {node.name} up")
    back = time.monotonic()
    for host in scene.lab.hosts.values():
        scene.wait(f"{host.name} to use {node.name} again", lambda h=host: not _down(h), limit_s=20)
    scene.say(f"in use again {time.monotonic() - back:.1f} s after its return")


def change_mac(scene: Scene) -> None:
    """To another and back. The node does not announce it."""
    node = scene.lab.topology.namespace(scene.empty_node.name)
    first = json.loads(node.run("ip", "-j", "link", "show", "dev", "eth0"))[0]["address"]
    scene.undo.callback(node.ip, f"link set dev eth0 address {first}")
    for mac in ("02:1b:00:00:be:ef", first):
        scene.inject_now()
        node.ip(f"link set dev eth0 address {mac}")
        for host in scene.lab.hosts.values():
            _wait_neighbour(scene, host, mac)
        scene.repaired()
        learned = time.monotonic()
        time.sleep(FALL_S + 3.0)
        by_source = scene.load.ledger.between(learned).by_source
        carried = by_source.get(scene.empty_node.segment.ip4, 0)
        scene.say(
            f"known after {learned - scene.injected_s:.1f} s; {carried} requests went by the node in the next 6 s"
        )
        scene.require(carried, "the node is not used again")


def _wait_neighbour(scene: Scene, host: LbHost, mac: str) -> None:
    address = scene.empty_node.segment.ip4
    scene.wait(
        f"{host.name} to know {address} as {mac}",
        lambda: mac in host.namespace.run("ip", "-4", "neigh", "show", address, "dev", "eth1").lower(),
        limit_s=60,
    )


def _down(host: LbHost) -> list[str]:
    """Targets that the host's probes have judged down."""
    return [name for name, up in host.metrics().items() if name.startswith("lbagent_backend_up") and not up]


# --- the kernel, by hand ----------------------------------------------------------------------------------------


def spoil_vip(scene: Scene) -> None:
    """The VIP map is an array: its entry is overwritten with zeros by bpftool."""
    _spoil(scene, "lb_vips", lambda value: _packed(scene.address) in value)


def spoil_backends(scene: Scene) -> None:
    """All of them: every packet of this host has nowhere to go."""
    _spoil(scene, "lb_backends", any)


def _spoil(scene: Scene, name: str, chosen: Callable[[bytes], bool]) -> None:
    host = scene.host
    pinned = str(next(host.bpffs.glob(f"lbagent/v*/{name}")))
    entries = [
        (entry["key"], bytes(int(byte, 16) for byte in entry["value"]))
        for entry in json.loads(run("bpftool", "-j", "map", "dump", "pinned", pinned))
    ]
    victims = {tuple(key): value for key, value in entries if chosen(value)}
    scene.require(victims, f"{name} holds nothing to spoil")
    drift = _drift(host)
    scene.inject_now()
    for key, value in victims.items():
        zeros = ["0"] * len(value)
        run("bpftool", "map", "update", "pinned", pinned, "key", "hex", *(k[2:] for k in key), "value", "hex", *zeros)

    def repaired() -> bool:
        dump = json.loads(run("bpftool", "-j", "map", "dump", "pinned", pinned))
        now = [bytes(int(byte, 16) for byte in entry["value"]) for entry in dump]
        return sum(map(chosen, now)) >= len(victims)

    scene.wait(f"{name} to hold its entries again", repaired, limit_s=PASS_S + 30)
    scene.repaired()
    lost = scene.load.ledger.between(scene.injected_s)
    scene.say(f"{len(victims)} entries overwritten; {len(lost.failures)} requests failed until they were back")
    try:
        scene.wait("the repair to be counted", lambda: _drift(host) > drift, limit_s=10)
        scene.say("counted in lbagent_drift_total")
    except Waited:
        scene.require(False, "the repair is not counted in lbagent_drift_total")


def _drift(host: LbHost) -> float:
    return sum(value for name, value in host.metrics().items() if name.startswith("lbagent_drift_total"))


def remove_pins(scene: Scene) -> None:
    """Links, program and maps lose their names; then the agent dies, whose descriptors held them."""
    root = scene.host.bpffs / "lbagent"
    pins = [path for path in root.rglob("*") if path.is_file()]
    for pin in pins:
        pin.unlink()
    scene.inject_now()
    try:
        scene.wait("the agent to pin again", lambda: all(pin.exists() for pin in pins), limit_s=PASS_S)
        scene.say(f"{len(pins)} pins made again after {time.monotonic() - scene.injected_s:.1f} s")
    except Waited:
        missing = sorted(str(pin.relative_to(root)) for pin in pins if not pin.exists())
        scene.require(False, f"{len(missing)} of {len(pins)} pins are not made again: {', '.join(missing[:3])} ...")
    scene.repaired()
    scene.host.kill_agent()
    time.sleep(2.0)
    scene.host.start_agent()
    scene.host.wait_ready()


# --- small things -----------------------------------------------------------------------------------------------


def _another_service(scene: Scene) -> str:
    """With one pod; it goes with the scene. No two have one name: an earlier one may still be leaving."""
    name = f"late-{next(_numbers)}"
    scene.undo.callback(scene.lab.undeploy, name)
    scene.lab.deploy(name, pods=1)
    return name


_numbers = itertools.count(1)


def _agent(host: LbHost) -> Process:
    assert host.agent is not None
    return host.agent


def _speaker(host: LbHost) -> Process:
    assert host.speaker is not None
    return host.speaker


def _command_line(process: Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _parent(process: Process) -> int:
    try:
        return int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


SCENARIOS = (
    Scenario(
        name="the agent is killed (SIGKILL)",
        promise="nothing lost, no BGP message; it takes over what the kernel and ExaBGP hold",
        inject=kill_agent,
        expect=Expect(within_s=READY_S),
        in_ci=True,
    ),
    Scenario(
        name="the agent is frozen (SIGSTOP)",
        promise="forwarding and routes stay",
        inject=freeze_agent,
        expect=Expect(within_s=READY_S),
        in_ci=True,
    ),
    Scenario(
        name="ExaBGP is killed (SIGKILL)",
        promise="its routes leave at once, the other host carries, all routes are announced again; "
        "only requests under way at a change of the route may break",
        inject=kill_speaker,
        expect=Expect(failed=2 * UNDER_WAY, lost_for_s=30.0, messages=None, within_s=20.0),
        in_ci=True,
    ),
    Scenario(
        name="the relay is killed",
        promise="nothing leaves: another worker, the session is not touched",
        inject=kill_relay,
        expect=Expect(within_s=15.0),
        in_ci=True,
    ),
    Scenario(
        name="the relay and its keeper are killed",
        promise="nothing leaves: ExaBGP starts them again",
        inject=kill_relay_and_keeper,
        expect=Expect(within_s=15.0),
    ),
    Scenario(
        name="ExaBGP is frozen (SIGSTOP, 15 s)",
        promise="the router takes its routes out after the hold time of 9 s; until then the host forwards",
        inject=freeze_speaker,
        expect=Expect(failed=2 * UNDER_WAY, lost_for_s=30.0, messages=None, within_s=20.0),
    ),
    Scenario(
        name="the API server is frozen (SIGSTOP)",
        promise="fail static, then it converges",
        inject=freeze_api,
        expect=Expect(within_s=30.0),
    ),
    Scenario(
        name="the API server is black-holed (packets dropped)",
        promise="fail static, then it converges",
        inject=black_hole_api,
        expect=Expect(within_s=30.0),
        in_ci=True,
    ),
    Scenario(
        name="the API server is killed",
        promise="fail static, then it converges",
        inject=kill_api,
        expect=Expect(within_s=60.0),
        kube="real",
    ),
    Scenario(
        name="the holder of the lease dies",
        promise="another host gives a new Service its address once the lease has run out",
        inject=lose_leader,
        expect=Expect(within_s=LEASE_S),
    ),
    Scenario(
        name="the state folder is read-only",
        promise="goes on, and says so",
        inject=forbid_writing,
        expect=Expect(within_s=READY_S + 20.0),
    ),
    Scenario(
        name="the disk is full, the cache of bytecode lost",
        promise="goes on, and says so",
        inject=fill_disk,
        expect=Expect(within_s=READY_S + 40.0),
    ),
    Scenario(
        name="a broken configuration is loaded (SIGHUP)",
        promise="refused; the last good one stays",
        inject=break_configuration,
        expect=Expect(within_s=5.0),
        in_ci=True,
    ),
    Scenario(
        name="a second agent is started on the host",
        promise="it is refused, the first does not notice",
        inject=start_second_agent,
        expect=Expect(within_s=READY_S),
        in_ci=True,
    ),
    Scenario(
        name="the uplink of a host loses carrier and comes back",
        promise="the other host carries at once; only requests under way at a change of the route may break",
        inject=cut_uplink,
        expect=Expect(failed=2 * UNDER_WAY, lost_for_s=30.0, messages=None, within_s=30.0),
    ),
    Scenario(
        name="a node falls silent",
        promise=f"its probes take it out: no request fails that is sent {FALL_S:g} s later",
        inject=freeze_node,
        expect=Expect(failed=None, lost_for_s=FALL_S, within_s=FALL_S),
        in_ci=True,
    ),
    Scenario(
        name="a node changes its MAC address without a word",
        promise=f"no request fails that is sent {FALL_S:g} s later; the node is used again once the kernel has asked",
        inject=change_mac,
        expect=Expect(failed=None, lost_for_s=FALL_S, within_s=60.0),
    ),
    Scenario(
        name="a host boots while the API is away",
        promise="it serves from its last snapshot",
        inject=boot_without_api,
        expect=Expect(failed=2 * UNDER_WAY, lost_for_s=40.0, messages=None, within_s=40.0),
    ),
    Scenario(
        name="a VIP in the kernel is overwritten by hand",
        promise=f"repaired within {PASS_S:g} s and counted; until then this host loses that VIP's requests",
        inject=spoil_vip,
        expect=Expect(failed=None, lost_for_s=PASS_S, messages=None, within_s=PASS_S),
    ),
    Scenario(
        name="all backends in the kernel are overwritten by hand",
        promise=f"repaired within {PASS_S:g} s and counted; until then this host loses its requests",
        inject=spoil_backends,
        expect=Expect(failed=None, lost_for_s=PASS_S, messages=None, within_s=PASS_S),
    ),
    Scenario(
        name="all pins are removed by hand, then the agent is killed",
        promise=f"nothing lost: the running agent pins again within {PASS_S:g} s",
        inject=remove_pins,
        expect=Expect(within_s=PASS_S),
    ),
)
"""In the order in which they are run."""
