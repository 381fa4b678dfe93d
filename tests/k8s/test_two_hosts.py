# SPDX-License-Identifier: Apache-2.0
"""Two agents on two hosts under paused processes, cut links and a hanging API: never both write.

The judge is the API server itself: etcd numbers every write, to the Lease and to the Service alike,
so each write of an address is either inside its author's tenure, or it is not.
"""

import http.client
import json
import random
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.k8s.contender import DURATION_S, LEASE
from tests.k8s.controlplane import ADMIN_TOKEN, ControlPlane, kubeconfig
from tests.lab.kube import Api
from tests.lab.netns import Namespace, Port, cable
from tests.lab.poll import wait_for

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(240)]

API_ADDRESS = "10.91.0.1"
HOSTS = ("one", "two")
LEASES = "/apis/coordination.k8s.io/v1/namespaces/duel/leases"
CUT = """table inet cut {
    chain out { type filter hook output priority 0; policy drop; }
    chain in { type filter hook input priority 0; policy drop; }
}"""


@dataclass
class Site:
    """The control plane in one namespace, a host in each of two others, a cable to each."""

    folder: Path
    plane: ControlPlane
    api: Api
    place: dict[str, Namespace]
    process: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start(self, name: str, kube_namespace: str) -> None:
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(kubeconfig(self.plane.url, token=ADMIN_TOKEN, ca_file=self.plane.ca_file)))
        argv = [sys.executable, "-m", "tests.k8s.contender", str(file), kube_namespace, name, str(HOSTS.index(name))]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.process[name] = subprocess.Popen(
                self.place[name].command(*argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def cut(self, name: str) -> None:
        """Nothing passes; nobody is told."""
        self.place[name].run("nft", "-f", "-", text=CUT)

    def mend(self, name: str) -> None:
        self.place[name].run("nft", "delete", "table", "inet", "cut")

    def down(self) -> None:
        for process in self.process.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(timeout=10)
        self.plane.signal_apiserver(signal.SIGCONT)
        self.plane.stop()
        for namespace in self.place.values():
            namespace.delete()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    prefix = f"c{secrets.token_hex(3)}-"
    place = {name: Namespace(prefix + name) for name in ("cp", *HOSTS)}
    for namespace in place.values():
        namespace.create()
    place["cp"].ip(f"address add {API_ADDRESS}/32 dev lo")
    for number, name in enumerate(HOSTS, 1):
        near, far = Port(place[name], "up0"), Port(place["cp"], name)
        cable(near, far)
        near.up(f"10.91.{number}.2/24")
        far.up(f"10.91.{number}.1/24")
        place[name].ip(f"route add {API_ADDRESS}/32 via 10.91.{number}.1")
    plane = ControlPlane(tmp_path / "plane", address=API_ADDRESS, port=6443, enter=place["cp"].command())
    api = Api(url=plane.url, token=ADMIN_TOKEN, ca_file=plane.ca_file, namespace=place["cp"])
    made = Site(tmp_path, plane, api, place)
    try:
        plane.start()
        wait_for("the API", lambda: api.call("GET", "/api/v1/namespaces/default"), limit_s=60)
        yield made
    finally:
        made.down()


@dataclass
class Judge:
    """Reads every version of the Lease and of the Service, as the API server numbers them."""

    tenures: list[tuple[int, str]] = field(default_factory=list)
    writes: list[tuple[int, str]] = field(default_factory=list)
    failure: str = ""

    def follow(self, site: Site, path: str, name: str) -> None:
        """Read on in a thread until the control plane is taken down."""
        address, port = site.plane.address, site.plane.port
        connection = http.client.HTTPConnection(address, port)
        with site.place["cp"].entered():
            plain = socket.create_connection((address, port), timeout=60)
        context = ssl.create_default_context(cafile=str(site.plane.ca_file))
        connection.sock = context.wrap_socket(plain, server_hostname=address)
        query = f"watch=1&fieldSelector=metadata.name={name}&timeoutSeconds=200"
        connection.request("GET", f"{path}?{query}", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
        threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: http.client.HTTPConnection) -> None:
        try:
            for line in connection.getresponse():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    self.failure = str(event)
                    return
                self._note(event["object"])
        except (OSError, http.client.HTTPException):
            return  # the control plane has gone
        finally:
            connection.close()

    def _note(self, obj: dict[str, object]) -> None:
        meta, spec, status = obj["metadata"], obj["spec"], obj.get("status", {})
        assert isinstance(meta, dict)
        assert isinstance(spec, dict)
        assert isinstance(status, dict)
        version = int(meta["resourceVersion"])
        if meta["name"] == LEASE:
            holder = (spec.get("holderIdentity") or "").partition("_")[0]
            if not self.tenures or self.tenures[-1][1] != holder:
                self.tenures.append((version, holder))
            return
        for entry in status.get("loadBalancer", {}).get("ingress", []):
            author = HOSTS[int(entry["ip"].split(".")[2])]
            self.writes.append((version, author))

    def holder_at(self, version: int) -> str:
        return [holder for since, holder in self.tenures if since < version][-1]


def test_every_address_is_written_inside_its_authors_tenure(site: Site) -> None:
    rng = random.Random(4)
    site.api.call("POST", "/api/v1/namespaces", {"metadata": {"name": "duel"}})
    site.api.call("POST", LEASES, {"metadata": {"name": LEASE}, "spec": {}})
    site.api.create_service("turn", namespace="duel")
    judge = Judge()
    judge.follow(site, LEASES, LEASE)
    judge.follow(site, "/api/v1/namespaces/duel/services", "turn")
    for name in HOSTS:
        site.start(name, "duel")
    logs = [site.folder / f"{name}.log" for name in HOSTS]
    wait_for("the first write", lambda: judge.writes, limit_s=20, logs=logs)

    def holder() -> str:
        return judge.tenures[-1][1]

    for fault in ("pause", "cut", "hang", "pause", "cut", "hang", "pause"):
        victim = holder() or rng.choice(HOSTS)
        long_s = rng.uniform(2.2, 3.0) * DURATION_S  # long enough for the other to take over and write
        count = len(judge.tenures)
        match fault:
            case "pause":
                site.process[victim].send_signal(signal.SIGSTOP)
                time.sleep(long_s)
                site.process[victim].send_signal(signal.SIGCONT)
            case "cut":
                site.cut(victim)
                time.sleep(long_s)
                site.mend(victim)
            case "hang":
                site.plane.signal_apiserver(signal.SIGSTOP)
                time.sleep(long_s / 2)
                site.plane.signal_apiserver(signal.SIGCONT)
        if fault != "hang":
            wait_for("the other to take over", lambda: len(judge.tenures) > count, limit_s=20, logs=logs)  # noqa: B023
        written = len(judge.writes)
        wait_for("writes to go on", lambda: len(judge.writes) > written + 5, limit_s=30, logs=logs)  # noqa: B023
    assert not judge.failure
    astray = [(version, author) for version, author in judge.writes if judge.holder_at(version) != author]
    assert astray == []
    assert len(judge.writes) > 100
    assert {author for _, author in judge.writes} == set(HOSTS)
    assert len(judge.tenures) >= 5
