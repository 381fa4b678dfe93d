# SPDX-License-Identifier: Apache-2.0
"""One LB host: a namespace in which ExaBGP and the agent run as the units would start them.

What a machine loses with its power goes with ``power_off``: processes, links, pinned maps, /run. What lies on
its disk stays: configuration, state folder, bytecode cache.
"""

import ipaddress
import json
import shutil
import signal
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from tests.lab.control_plane import Cluster
from tests.lab.fetch import fetch
from tests.lab.inventory import Inventory, Process, inhabitants
from tests.lab.netns import Namespace, run
from tests.lab.poll import Hopeless, LabError, wait_for
from tests.lab.topology import LB_ASN, POOLS, TOR_ASN, LbAddresses, Topology

BIN = Path(sys.executable).parent
HTTP = "127.0.0.1:9273"


class LbHost:
    """``power_on()`` starts everything; ``configuration`` may be changed before."""

    def __init__(self, lb: LbAddresses, *, topology: Topology, inventory: Inventory, cluster: Cluster) -> None:
        self.lb = lb
        self.topology = topology
        self.inventory = inventory
        self.cluster = cluster
        self.folder = inventory.folder / lb.name
        self.speaker: Process | None = None
        self.agent: Process | None = None

    @property
    def name(self) -> str:
        return self.lb.name

    @property
    def namespace(self) -> Namespace:
        return self.topology.namespace(self.lb.name)

    @property
    def config_file(self) -> Path:
        return self.folder / "lbagent.yaml"

    @property
    def bpffs(self) -> Path:
        return self.folder / "bpffs"

    @property
    def processes(self) -> dict[str, Process]:
        """What runs here, by what it is."""
        found = {"agent": self.agent, "ExaBGP": self.speaker}
        return {what: process for what, process in found.items() if process}

    @property
    def logs(self) -> list[Path]:
        return [self.folder / "agent.log", self.folder / "bgp.log"]

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """``lbagent.yaml`` of this host."""
        lb = self.lb
        return {
            "host": {"name": lb.name},
            "kubernetes": {
                "kubeconfig": str(self.folder / "kubeconfig"),
                "lease": {"namespace": "lbagent", "name": "lbagent", "duration_s": 6, "renew_s": 2},
            },
            "pools": [
                {"name": "default", "addresses": [POOLS[0]], "policies": ["std"]},
                {"name": "default6", "addresses": [POOLS[1]], "policies": ["std"]},
            ],
            "bgp": {
                "local_as": LB_ASN,
                "router_id": lb.uplink.ip4,
                "hold_time_s": 9,
                "peers": [
                    {"name": "tor", "address": lb.tor.ip4, "local_address": lb.uplink.ip4, "peer_as": TOR_ASN},
                    {"name": "tor6", "address": lb.tor.ip6, "local_address": lb.uplink.ip6, "peer_as": TOR_ASN},
                ],
                "policies": [{"name": "std", "communities": [f"{LB_ASN}:100"]}],
            },
            "xdp": {
                "interfaces": [lb.uplink.device, lb.inside.device],
                "attach": "native",
                "snat": {"addresses": list(lb.snat.addresses_only)},
                "modes": ["nat", "dsr-l2", "dsr-ipip"],
            },
            "http": {"listen": HTTP},
            "paths": {
                "run": str(self.folder / "run"),
                "state": str(self.folder / "state"),
                "bpf": str(self.bpffs / "lbagent"),
            },
        }

    def power_on(self) -> None:
        """From cables to running processes; also after ``power_off``."""
        self.topology.add_lb(self.lb)
        for name in ("run", "state"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.inventory.mount_bpffs(self.bpffs)
        (self.folder / "kubeconfig").write_text(json.dumps(self.cluster.api.kubeconfig(self.cluster.agent_token)))
        self.write_configuration()
        self.start_speaker()
        self.start_agent()

    def write_configuration(self) -> None:
        self.config_file.write_text(yaml.safe_dump(self.configuration, sort_keys=False))

    def start_speaker(self) -> None:
        """ExaBGP, as ``lbagent-bgp.service`` starts it."""
        # As root, not as lbagent-bgp: that user cannot read a checkout below /root.
        self.lbagent("render", "exabgp", "--config", str(self.config_file), "--out", str(self.folder), "--user", "root")
        conf, env = self.folder / "exabgp.conf", self.folder / "exabgp.env"
        argv = [str(BIN / "exabgp"), "--env-file", str(env), "server", str(conf)]
        self.speaker = self.inventory.start(
            f"{self.name}-bgp", self.namespace.command(*argv), log=self.folder / "bgp.log"
        )

    @property
    def running_agent(self) -> Process:
        if self.agent is None:
            raise LabError(f"{self.name} has no agent")
        return self.agent

    @property
    def running_speaker(self) -> Process:
        if self.speaker is None:
            raise LabError(f"{self.name} has no ExaBGP")
        return self.speaker

    @property
    def agent_command(self) -> list[str]:
        """As ``lbagent.service`` has it."""
        return [str(BIN / "lbagent"), "run", "--config", str(self.config_file)]

    def start_agent(self) -> None:
        """The agent, as ``lbagent.service`` starts it."""
        log = self.folder / "agent.log"
        self.agent = self.inventory.start(f"{self.name}-agent", self.namespace.command(*self.agent_command), log=log)

    def kill_agent(self) -> int:
        """SIGKILL; returns the pid that is gone."""
        if self.agent is None:
            raise LabError(f"{self.name} has no agent to kill")
        self.agent.kill(signal.SIGKILL)
        if not self.agent.gone(limit_s=5):
            raise LabError(f"{self.name}: pid {self.agent.pid} survived SIGKILL")
        return self.agent.pid

    def power_off(self) -> None:
        """The machine loses power: links first, because their loss is what the neighbours see first."""
        self.topology.cut_lb(self.lb)
        for process in inhabitants(self.namespace):
            process.kill(signal.SIGKILL)
        for process in self.processes.values():
            process.gone(limit_s=5)
        self.namespace.delete()
        self.inventory.unmount(self.bpffs)
        shutil.rmtree(self.folder / "run", ignore_errors=True)

    def lbagent(self, *argv: str) -> str:
        return self.namespace.run(str(BIN / "lbagent"), *argv)

    def lbctl(self, *argv: str) -> Any:
        """What a verb of lbctl answers, as JSON; exit 3 (degraded) is an answer too."""
        socket = str(self.folder / "run" / "lbagent.sock")
        return json.loads(self.namespace.run(str(BIN / "lbctl"), "--socket", socket, "-o", "json", *argv, fine=(0, 3)))

    def vips(self) -> list[dict[str, Any]]:
        """One row per VIP that is wanted or that the kernel holds."""
        rows: list[dict[str, Any]] = self.lbctl("show", "vips")
        return rows

    def wait_ready(self, *, limit_s: float = 40.0) -> dict[str, Any]:
        """Until ``lbctl status`` answers; returns what it says."""
        return wait_for(
            f"the agent of {self.name} to answer lbctl status", self._status, limit_s=limit_s, logs=self.logs
        )

    def check_alive(self) -> None:
        """Raises Hopeless when the agent that should run has ended."""
        if self.agent is not None and not self.agent.alive:
            raise Hopeless(f"the agent of {self.name} (pid {self.agent.pid}) has ended")

    def _status(self) -> dict[str, Any]:
        self.check_alive()
        status: dict[str, Any] = self.lbctl("status")
        return status

    def xdp_links(self) -> dict[str, str]:
        """Device -> how XDP is attached, as the kernel says: ``xdp`` is the driver, ``xdpgeneric`` the stack."""
        shown = json.loads(self.namespace.run("ip", "-j", "-d", "link", "show"))
        words = {1: "xdp", 2: "xdpgeneric", 3: "xdpoffload"}
        return {
            link["ifname"]: f"{words.get(link['xdp']['mode'], '?')} prog {link['xdp']['prog']['id']}"
            for link in shown
            if "xdp" in link
        }

    def kernel_records(self, address: str) -> list[str]:
        """Records of the pinned VIP map that hold this address, as bpftool dumps them, whatever the agent says."""
        wanted = ipaddress.ip_address(address).packed
        pinned = next(self.bpffs.glob("lbagent/*/lb_vips"))
        entries = json.loads(run("bpftool", "-j", "map", "dump", "pinned", str(pinned)))
        records = (bytes(int(byte, 16) for byte in entry["value"]) for entry in entries)
        return sorted(record[:36].hex(" ") for record in records if wanted in record[16:32])

    def metrics(self) -> dict[str, float]:
        """``name{labels}`` -> value, from /metrics."""
        response = fetch(self.namespace, f"http://{HTTP}/metrics")
        pairs = (line.rsplit(" ", 1) for line in response.text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}
