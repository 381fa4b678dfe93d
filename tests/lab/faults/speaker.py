# SPDX-License-Identifier: Apache-2.0
"""ExaBGP, the relay inside it, and the sessions."""

import signal
import time
from pathlib import Path

from tests.lab.inventory import Process, inhabitants
from tests.lab.scene import Scene


def kill_speaker(scene: Scene) -> None:
    host = scene.host
    speaker = host.running_speaker
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
    speaker, seconds = scene.host.running_speaker, 15
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


def reset_session(scene: Scene) -> None:
    """By the router's side, as its engineer would."""
    lb = scene.host.lb
    scene.inject_now()
    for address in lb.uplink.addresses_only:
        scene.lab.tor.frr.vtysh(f"clear bgp {address}")
    scene.lab.wait_routes(scene.address, (scene.other.name,))
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
