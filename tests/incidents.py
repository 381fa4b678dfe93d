# SPDX-License-Identifier: Apache-2.0
"""The incidents of docs/how-to: what lbctl prints about them, made by the agent itself over fakes.

``python -m tests.incidents`` writes the screens into the page; tests/test_docs.py compares. Only what
the kernel decides about a packet is told to the fake here; tests/ebpf holds the program to it.
"""

import asyncio
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from click.testing import CliRunner

from lbagent import __version__
from lbagent.agent.answers import Answers
from lbagent.agent.control import Control
from lbagent.agent.drain import Drain
from lbagent.agent.reload import compare
from lbagent.cli import ctl
from lbagent.config import DrainConfig, parse
from lbagent.model.route import PeerState, SessionState
from lbagent.model.service import Endpoint, Node, NodeAddress, Port, Protocol, Service, ServiceKey
from lbagent.model.state import ProbeTarget, Pulse
from lbagent.model.vip import Vip
from lbagent.xdp.testrun import Trial, packet_to
from lbagent.xdp.verdict import Verdict
from tests.agent.machine import Machine
from tests.fakes.targets import FakeCluster, FakeCount, FakeTally

PAGE = Path(__file__).resolve().parent.parent / "docs" / "how-to" / "debug-a-service.md"
SCREEN = re.compile(
    r"(?P<head><!-- screen: (?P<name>[\w-]+) -->\n+ *```text\n *\$ )(?P<body>.*?)(?P<tail>\n *```)", re.S
)

WEB = ServiceKey("shop", "web")
VIP = Vip(address="203.0.113.1", protocol=Protocol.TCP, port=80)
CONFIG = """\
host: {name: lb1}
pools:
  - {name: default, addresses: [203.0.113.1-203.0.113.14], policies: [std]}
  - {name: partners, addresses: 198.51.100.64/29, auto_assign: false, namespaces: [edge]}
bgp:
  local_as: 65001
  router_id: 10.0.1.1
  peers:
    - {name: tor1, address: 10.0.1.2, local_address: 10.0.1.1, peer_as: 65101}
    - {name: tor2, address: 10.0.3.2, local_address: 10.0.3.1, peer_as: 65102}
  policies:
    - {name: std, communities: ["65001:100"]}
xdp: {interfaces: [eth0, eth1]}
"""
HOUR_S = 3600.0


class Incident:
    """One Service on three nodes, served by one host; ``lbctl`` asks it."""

    def __init__(self, **service: Any) -> None:
        cluster = FakeCluster()
        port = Port(name="http", protocol=Protocol.TCP, port=80, node_port=30080)
        cluster.services[WEB] = Service(key=WEB, uid="u1", ports=(port,), **service)
        cluster.endpoints[WEB] = tuple(
            Endpoint(address=f"10.244.{i}.2", node=f"node{i}", family=4) for i in range(1, 4)
        )
        for i in range(1, 4):
            cluster.nodes[f"node{i}"] = Node(name=f"node{i}", addresses=(NodeAddress("InternalIP", f"10.1.0.2{i}"),))
        self.machine = Machine(cluster)
        self.machine.world.settings = parse(CONFIG).settings()
        self.machine.kernel.attached = {"eth0": "native", "eth1": "native"}
        self.peer("tor1", "10.0.1.2", session=SessionState.UP, sent=1, acknowledged=1)
        self.peer("tor2", "10.0.3.2", session=SessionState.UP, sent=1, acknowledged=1)
        self.problems: dict[str, str] = {}

    def peer(self, name: str, address: str, **state: Any) -> None:
        """How a session looks."""
        speaker = self.machine.speaker
        new = PeerState(name=name, address=address, since=self.machine.now - HOUR_S, hold_time_s=9, **state)
        speaker.state = replace(speaker.state, peers={**speaker.state.peers, name: new})

    def drops(self, **packets: int) -> None:
        """What the kernel has counted."""
        verdicts: Mapping[Any, FakeCount] = {
            Verdict[word.upper()]: FakeCount(packets=n, bytes=60 * n) for word, n in packets.items()
        }
        self.machine.kernel.counters = lambda: FakeTally(verdicts=verdicts)  # type: ignore[method-assign]

    def decides(self, verdict: Verdict, action: str, *, node: str = "", packet: bytes = b"") -> None:
        """What the kernel would do with the packet that is traced."""
        trial = Trial(action=action, verdict=verdict, backend_id=bool(node), packet=packet)
        self.machine.kernel.trace = lambda _packet: trial  # type: ignore[method-assign]
        self.machine.kernel.backend_address = lambda _number: node  # type: ignore[method-assign]

    def lbctl(self, *arguments: str) -> str:
        """The screen, prompt included."""
        with tempfile.TemporaryDirectory() as folder:
            if self.machine.loop.last is None:
                asyncio.run(self.machine.settle())
                self.machine.now += 42.0
            reply = _Replies(self._answers(Path(folder)))
            with mock.patch.object(ctl, "ask", reply):
                result = CliRunner().invoke(ctl.main, list(arguments))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        screen = f"lbctl {' '.join(arguments)}\n{result.output.rstrip()}".replace(
            f"lbagent {__version__}", "lbagent 0.1.0"
        )
        return screen + (f"\n$ echo $?\n{result.exit_code}" if result.exit_code else "")

    def _answers(self, folder: Path) -> Answers:
        machine = self.machine
        return Answers(
            world=machine.world,
            loop=machine.loop,
            kernel=machine.kernel,
            speaker=machine.speaker,
            cluster=machine.cluster,
            drain=Drain(folder / "drain.json", DrainConfig(), now=machine.now - HOUR_S),
            journal=machine.done,
            settings=lambda: parse(CONFIG),
            problems=lambda: self.problems,
            phase_changed=lambda: None,
            reload=lambda only_look: compare(parse(CONFIG), parse(CONFIG), None),
        )


@dataclass(frozen=True)
class _Replies:
    """In place of the socket: the daemon's own answer to a request, as JSON would carry it."""

    answers: Answers

    def __call__(self, _path: Path, verb: str, arguments: Mapping[str, Any]) -> Any:
        control = Control(path=Path("unused"), verbs=self.answers.verbs())
        request = json.dumps({"verb": verb, "args": dict(arguments)}).encode()
        reply = json.loads(json.dumps(asyncio.run(control.answer(request, uid=0))))
        assert reply["ok"], reply
        return reply["result"]


def screens() -> dict[str, str]:
    """Every screen of the page by its name."""
    found: dict[str, str] = {}

    wanting = Incident(annotations={"lbagent.io/address-pool": "partners"})
    found["no-address"] = wanting.lbctl("explain", "shop/web")
    found["pools"] = wanting.lbctl("show", "pools")

    fine = Incident()
    fine.decides(
        Verdict.NAT_FORWARD,
        "redirect",
        node="10.1.0.22",
        packet=packet_to(Vip(address="10.1.0.22", protocol=Protocol.TCP, port=30080), source="10.1.0.111"),
    )
    fine.drops(no_nexthop=3, malformed=12)
    found["routes"] = fine.lbctl("show", "routes")
    found["trace-forward"] = fine.lbctl("trace", "198.51.100.10:40000", "203.0.113.1:80/tcp")
    found["drops"] = fine.lbctl("show", "drops")

    missing = Incident()
    missing.machine.kernel.attached = {"eth0": "native"}
    missing.machine.kernel.broken = {VIP: "eth1: interface eth1 runs an XDP program that is not ours"}
    for name, address in (("tor1", "10.0.1.2"), ("tor2", "10.0.3.2")):
        missing.peer(name, address, session=SessionState.UP)
    missing.problems = {"xdp": "not attached to eth1"}
    found["missing-host"] = missing.lbctl("status")
    found["missing-vips"] = missing.lbctl("show", "vips")
    silent = Incident()
    silent.peer("tor2", "10.0.3.2", session=SessionState.DOWN, flaps=1, last_error="hold timer expired")
    found["missing-peer"] = silent.lbctl("show", "peers")

    refusing = Incident()
    refusing.machine.world.health = {
        ProbeTarget(f"10.1.0.2{i}", "tcp", 30080): Pulse(
            up=i != 2, since=0.0, detail="connection refused" if i == 2 else "up"
        )
        for i in range(1, 4)
    }
    found["one-backend"] = refusing.lbctl("explain", "shop/web")

    tight = Incident(source_ranges=("192.0.2.0/24",))
    tight.decides(Verdict.SOURCE_DENIED, "drop")
    tight.drops(source_denied=1742)
    found["source-drops"] = tight.lbctl("show", "drops")
    found["source-trace"] = tight.lbctl("trace", "198.51.100.10", "203.0.113.1:80/tcp")
    return found


def rewritten(page: str) -> str:
    """The page with every screen as it is now."""
    now = screens()

    def place(match: re.Match[str]) -> str:
        indent = re.search(r"\n( *)\$ $", match["head"])
        assert indent
        return match["head"] + now[match["name"]].replace("\n", f"\n{indent[1]}") + match["tail"]

    return SCREEN.sub(place, page)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
