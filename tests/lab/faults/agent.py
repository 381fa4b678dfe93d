# SPDX-License-Identifier: Apache-2.0
"""The agent and its disk."""

import contextlib
import random
import shutil
import signal
import time
from pathlib import Path

from tests.lab import stages
from tests.lab.lbhost import LbHost
from tests.lab.netns import run
from tests.lab.scene import LEASE_S, READY_S, Scene


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
    agent, seconds = scene.host.running_agent, scene.rounds(20, short=6)
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
    address = scene.lab.address_of(scene.another_service())
    scene.repaired()
    scene.lab.wait_routes(address, (follower.name,))
    scene.say(f"{follower.name} gave a new Service its address and announces it alone")
    leader.start_agent()
    scene.lab.wait_routes(address, tuple(scene.lab.hosts))


def pause_leader(scene: Scene) -> None:
    """Longer than its lease: another host leads when it wakes up, still believing that it does."""
    holder = stages.lease_holder(scene.lab)
    leader = scene.lab.hosts[holder.partition("_")[0]]
    (follower,) = (host for host in scene.lab.hosts.values() if host is not leader)
    agent = leader.running_agent
    scene.undo.callback(agent.kill, signal.SIGCONT)
    scene.stop_counting()
    agent.kill(signal.SIGSTOP)
    scene.inject_now()
    service = scene.another_service()
    address = scene.lab.address_of(service)
    scene.repaired()
    agent.kill(signal.SIGCONT)
    scene.lab.wait_routes(address, tuple(scene.lab.hosts))
    time.sleep(LEASE_S)
    scene.require(scene.lab.addresses_of(service) == (address,), "the address was written again")
    now = stages.lease_holder(scene.lab)
    scene.require(now.startswith(follower.name), f"the lease went back to {now}")
    scene.say(f"{follower.name} gave an address meanwhile; {leader.name} woke up, followed, and wrote nothing")


def start_second_agent(scene: Scene) -> None:
    host = scene.host
    first = host.running_agent
    argv = host.namespace.command(*host.agent_command)
    second = scene.lab.inventory.start(f"{host.name}-second", argv, log=host.folder / "second.log")
    scene.undo.callback(second.stop)
    scene.wait("the second agent to give up", lambda: not second.alive, limit_s=READY_S)
    scene.repaired()
    words = (host.folder / "second.log").read_text()
    scene.require("another lbagent" in words, f"it does not say why: {words[-300:]}")
    scene.require(first.alive, "the first agent has ended")
    scene.stop_counting()
    scene.lab.wait_routes(scene.lab.address_of(scene.another_service()), tuple(scene.lab.hosts))
    said = [line for line in words.splitlines() if "another lbagent" in line]
    scene.say(f"it says: {said[0].strip()[:120]}" if said else "it says nothing")
    scene.say("the first goes on to announce new Services")


def break_configuration(scene: Scene) -> None:
    host = scene.host
    good = host.config_file.read_text()
    scene.undo.callback(host.config_file.write_text, good)
    for text in ("pools: [", good.replace("local_as", "locale_as"), ""):
        _reload(scene, text, outcome="failed")
    scene.inject_now()
    _reload(scene, good, outcome="done")
    scene.repaired()
    scene.say("half a YAML file, an unknown key and an empty file refused; the good one taken")


def _reload(scene: Scene, text: str, *, outcome: str) -> None:
    def count() -> float:
        return host.metrics().get(f'lbagent_config_reloads_total{{outcome="{outcome}"}}', 0.0)

    host = scene.host
    before = count()
    host.config_file.write_text(text)
    host.running_agent.kill(signal.SIGHUP)
    scene.wait(f"the reload to be {outcome}", lambda: count() > before, limit_s=10)


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
    scene.lab.wait_routes(scene.lab.address_of(scene.another_service()), tuple(scene.lab.hosts))
    scene.wait("lbctl status to say so", lambda: "cannot keep" in _problems(host).get("memory", ""), limit_s=15)
    host.kill_agent()
    host.start_agent()
    host.wait_ready()
    scene.repaired()
    scene.say("lbctl status says so; it serves a new Service all the same, and starts again when killed")


def _problems(host: LbHost) -> dict[str, str]:
    problems: dict[str, str] = host.lbctl("status")["problems"]
    return problems


def _mount_over(scene: Scene, place: Path, options: str) -> None:
    inventory = scene.lab.inventory
    inventory.mounts.append(str(place))
    inventory.save()
    scene.undo.callback(inventory.unmount, place)
    run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place))
