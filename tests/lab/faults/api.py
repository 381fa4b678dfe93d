# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes API: frozen, unreachable, killed, absent at boot."""

import signal
import time

from tests.lab.control_plane import Real, answers
from tests.lab.scene import Scene


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
    service = scene.another_service()
    time.sleep(max(0.0, began + scene.rounds(20, short=8) - time.monotonic()))
    scene.stop_counting()
    place.run("nft", "delete", "table", "inet", "chaos")
    _converge(scene, service)


def kill_api(scene: Scene) -> None:
    assert isinstance(scene.lab.cluster, Real)
    plane = scene.lab.cluster.plane
    plane.kill_apiserver()
    time.sleep(scene.rounds(20, short=8))
    scene.stop_counting()
    plane.start_apiserver()
    scene.wait("kube-apiserver to be ready", lambda: answers(scene.lab.api, "/readyz"), limit_s=90)
    _converge(scene)


def _converge(scene: Scene, made_meanwhile: str = "") -> None:
    """The API is back: until a Service that was made meanwhile, or else is made now, is announced by every host."""
    scene.inject_now()
    service = made_meanwhile or scene.another_service()
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
