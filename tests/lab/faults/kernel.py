# SPDX-License-Identifier: Apache-2.0
"""What somebody does by hand to maps and pins."""

import ipaddress
import json
import time
from collections.abc import Callable

from tests.lab.lbhost import LbHost
from tests.lab.netns import run
from tests.lab.poll import Waited
from tests.lab.scene import PASS_S, Scene


def spoil_vip(scene: Scene) -> None:
    """The VIP map is an array: its entry is overwritten with zeros by bpftool."""
    _spoil(scene, "lb_vips", lambda value: ipaddress.ip_address(scene.address).packed in value)


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
