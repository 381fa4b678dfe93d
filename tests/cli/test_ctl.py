# SPDX-License-Identifier: Apache-2.0
"""lbctl against a daemon that answers from a script: screens, formats, exit codes, start-up cost."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lbagent.cli.ctl import main

STATUS = {
    "host": "lb1",
    "version": "0.1.0",
    "ok": True,
    "problems": {},
    "lease": "held by this host",
    "api_age_s": 0.4,
    "from_memory": False,
    "drain": {"phase": "in", "for_s": 3.0},
    "xdp": {"eth0": "native", "eth1": "native"},
    "peers": [
        {"peer": "tor1", "address": "10.0.1.2", "session": "up", "for_s": 12.5, "flaps": 0, "hold_time_s": 9, "sent": 1,
         "acknowledged": 1, "last_error": ""}
    ],
    "services": {"no_pool": 1, "satisfied": 2},
    "vips": {"wanted": 3, "programmed": 3, "proven": 3},
    "routes": {"wanted": 2, "announced": 2},
    "pass": {"number": 7, "age_s": 1.0, "took_ms": 2.5},
}  # fmt: skip

SCREEN = """\
host       lb1 (lbagent 0.1.0)
state      fine
lease      held by this host
api        answered 0.4 s ago
drain      phase=in for_s=3
xdp        eth0=native eth1=native
services   no_pool=1 satisfied=2
vips       wanted=3 programmed=3 proven=3
routes     wanted=2 announced=2
last pass  number=7 age_s=1 took_ms=2.5

PEER  ADDRESS   SESSION  FOR-S  FLAPS  HOLD-TIME-S  SENT  ACKNOWLEDGED  LAST-ERROR
tor1  10.0.1.2  up       12.5   0      9            1     1             -
"""


class Daemon:
    """Answers each request with what the script has for its verb, and keeps the requests."""

    def __init__(self, path: Path, reply_by_verb: dict[str, Any]) -> None:
        self.requests: list[dict[str, Any]] = []
        self._replies = reply_by_verb
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rwb") as stream:
                request = json.loads(stream.readline())
                self.requests.append(request)
                stream.write(json.dumps(self._replies[request["verb"]]).encode() + b"\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lbagent.sock"


@pytest.fixture
def daemon(path: Path) -> Iterator[Daemon]:
    served = Daemon(
        path,
        {
            "status": {"ok": True, "result": STATUS},
            "show routes": {"ok": True, "result": [{"prefix": "192.0.2.1/32", "peers": ["tor1"], "wanted": True}]},
            "show pools": {"ok": True, "result": []},
            "explain": {"ok": False, "error": "no Service default/x", "hint": "see lbctl show services"},
        },
    )
    yield served
    served.close()


def lbctl(path: Path, *arguments: str) -> Any:
    return CliRunner().invoke(main, ["--socket", str(path), *arguments])


@pytest.mark.usefixtures("daemon")
def test_status_is_one_screen(path: Path) -> None:
    result = lbctl(path, "status")
    assert result.output == SCREEN
    assert result.exit_code == 0


def test_a_degraded_host_exits_3(path: Path) -> None:
    daemon = Daemon(
        path, {"status": {"ok": True, "result": STATUS | {"ok": False, "problems": {"xdp": "not attached"}}}}
    )
    result = lbctl(path, "status")
    daemon.close()
    assert "xdp: not attached" in result.output
    assert result.exit_code == 3


@pytest.mark.usefixtures("daemon")
def test_json_is_the_whole_answer(path: Path) -> None:
    assert json.loads(lbctl(path, "-o", "json", "status").output) == STATUS


def test_unique_prefixes_are_enough(path: Path, daemon: Daemon) -> None:
    result = lbctl(path, "sh", "ro")
    assert result.output == "PREFIX        PEERS  WANTED\n192.0.2.1/32  tor1   yes\n"
    assert daemon.requests == [{"verb": "show routes", "args": {}}]


@pytest.mark.usefixtures("daemon")
def test_an_ambiguous_prefix_names_the_choices(path: Path) -> None:
    result = lbctl(path, "s")
    assert result.exit_code == 2
    assert "show" in result.output
    assert "status" in result.output


@pytest.mark.usefixtures("daemon")
def test_nothing_to_show_says_so(path: Path) -> None:
    assert lbctl(path, "show", "pools").output == "(none)\n"


@pytest.mark.usefixtures("daemon")
def test_a_refusal_is_an_error_with_its_hint(path: Path) -> None:
    result = lbctl(path, "explain", "x")
    assert result.exit_code == 1
    assert "no Service default/x (see lbctl show services)" in result.output


@pytest.mark.usefixtures("daemon")
def test_a_refusal_in_json_is_json(path: Path) -> None:
    result = lbctl(path, "-o", "json", "explain", "x")
    assert json.loads(result.output) == {"error": "no Service default/x", "hint": "see lbctl show services"}


def test_no_daemon_exits_4(path: Path) -> None:
    result = lbctl(path, "status")
    assert result.exit_code == 4
    assert "is lbagent running?" in result.output


def test_starting_imports_nothing_heavy() -> None:
    """What costs start-up time is imports; they are counted instead of timed."""
    code = "import sys, lbagent.cli.ctl; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {
        "asyncio",
        "aiohttp",
        "kubernetes",
        "pydantic",
        "bcc",
        "pyroute2",
        "yaml",
        "structlog",
        "prometheus_client",
    }
    assert not heavy & set(loaded)


TRACE = {
    "before": "IP 192.0.2.9 > 203.0.113.1 | TCP 40000 > 80 flags SYN",
    "verdict": "nat_forward",
    "backend": "10.1.0.21",
}


def test_trace_makes_the_packet_of_two_endpoints(path: Path) -> None:
    daemon = Daemon(path, {"trace": {"ok": True, "result": TRACE}})
    result = lbctl(path, "trace", "192.0.2.9", "203.0.113.1:80/udp")
    lbctl(path, "trace", "[2001:db8::9]:4711", "[2001:db8:1::1]:53")
    daemon.close()
    assert "verdict  nat_forward" in result.output
    assert daemon.requests[0]["args"] == {
        "source": "192.0.2.9", "source_port": "40000",
        "destination": "203.0.113.1", "destination_port": "80", "protocol": "udp",
    }  # fmt: skip
    assert daemon.requests[1]["args"]["destination"] == "2001:db8:1::1"
    assert daemon.requests[1]["args"]["source_port"] == "4711"


def test_trace_without_a_packet_is_a_usage_error(path: Path) -> None:
    assert lbctl(path, "trace").exit_code == 2


def test_top_shows_rates_busiest_first(path: Path) -> None:
    counts = {"packets": 10, "bytes": 640}
    daemon = Daemon(
        path,
        {"counters": {"ok": True, "result": {"at_s": 1.0, "vips": {"a:80/TCP": counts}, "backends": {"b": counts}}}},
    )
    result = lbctl(path, "top", "--count", "1", "--every", "0.1")
    daemon.close()
    assert result.output.splitlines()[:2] == ["VIP       PACKETS-PER-S  BITS-PER-S", "a:80/TCP  0              0"]
