# SPDX-License-Identifier: Apache-2.0
"""The role installs a release on a machine with a real systemd, and the sandboxed units do their work there."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import yaml

from lbagent import __version__
from tests.deploy import machine
from tests.deploy.machine import CHECKOUT, Machine

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1200)]

VARIABLES = {
    "ansible_connection": "local",
    "ansible_python_interpreter": "/usr/bin/python3",
    "lbagent_version": __version__,
    "lbagent_wheelhouse": "/lbagent-wheelhouse",
    "lbagent_kubeconfig": "/lbagent-inventory/kubeconfig",
    "lbagent_pools": [{"name": "default", "addresses": ["203.0.113.0/28"]}],
    "lbagent_bgp": {
        "local_as": 65001,
        "router_id": "10.0.1.1",
        "peers": [{"name": "tor1", "address": "10.0.1.2", "local_address": "10.0.1.1", "peer_as": 65101}],
    },
    "lbagent_xdp": {"interfaces": ["eth0", "eth1"], "snat": {"ports": "20000-29999"}},
}


@dataclass(frozen=True, slots=True)
class Play:
    """How ansible-playbook ended."""

    code: int
    output: str

    @property
    def changed(self) -> int:
        return int(self.output.rpartition("changed=")[2].split()[0])


def play(host: Machine, *arguments: str) -> Play:
    done = host.run(
        "env",
        "--chdir=/lbagent-ansible",
        "NO_COLOR=1",
        "/lbagent-venv/bin/python3",
        "/lbagent-venv/bin/ansible-playbook",
        "-i",
        "/lbagent-inventory/hosts.yml",
        "site.yml",
        *arguments,
        check=False,
    )
    return Play(done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which the role has run once, with a Kubernetes API to talk to."""
    folder = tmp_path_factory.mktemp("install")
    inventory = folder / "inventory"
    inventory.mkdir()
    (inventory / "hosts.yml").write_text(yaml.safe_dump({"lb_hosts": {"vars": VARIABLES, "hosts": {"lb1": {}}}}))
    machine.wheelhouse(folder / "wheelhouse")
    shared = {
        folder / "wheelhouse": "/lbagent-wheelhouse",
        inventory: "/lbagent-inventory",
        CHECKOUT / "ansible": "/lbagent-ansible",
        CHECKOUT / ".venv-ansible": "/lbagent-venv",  # not where it is here: that may be below /tmp
    }
    with machine.booted("lb1", shared=shared) as booted:
        api = [sys.executable, "-m", "tests.fakes.apiserver", "--listen", "127.0.0.1:8001", "--token", "secret"]
        api += ["--kubeconfig", str(inventory / "kubeconfig")]
        emulator = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{booted.namespace}", *api], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert emulator.stdout is not None
            assert emulator.stdout.readline().startswith("http://")
            first = play(booted)
            assert first.code == 0, first.output + journal(booted)
            yield booted
        finally:
            emulator.terminate()
            emulator.wait()
            emulator.stdout.close()


def journal(host: Machine) -> str:
    return host.run("journalctl", "--no-pager", "-n", "60", "-u", "lbagent*", check=False).stdout


def program_ids(host: Machine) -> list[str]:
    links = json.loads(host.run("ip", "-json", "-details", "link", "show").stdout)
    return [link["xdp"]["prog"]["id"] for link in links if link["ifname"] in ("eth0", "eth1") and "xdp" in link]


def wait_until_active(host: Machine, unit: str, *, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while host.property(unit, "ActiveState") != "active":
        assert time.monotonic() < deadline, journal(host)
        time.sleep(0.2)


def test_both_units_are_up_and_say_what_they_do(host: Machine) -> None:
    for unit in ("lbagent.service", "lbagent-bgp.service"):
        assert host.property(unit, "ActiveState") == "active", journal(host)
        assert host.property(unit, "StatusText")


def test_the_sandboxed_agent_has_attached_its_program_with_three_capabilities(host: Machine) -> None:
    assert len(program_ids(host)) == 2
    held = host.run("grep", "CapEff", f"/proc/{host.property('lbagent.service', 'MainPID')}/status").stdout.split()[1]
    assert int(held, 16) == 1 << 39 | 1 << 38 | 1 << 12  # CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN


def test_a_second_run_changes_nothing(host: Machine) -> None:
    second = play(host)
    assert (second.code, second.changed) == (0, 0), second.output
    dry = play(host, "--check", "--diff")
    assert (dry.code, dry.changed) == (0, 0), dry.output


def test_the_doctor_finds_nothing_wrong(host: Machine) -> None:
    assert host.run("lbagent", "doctor", check=False).returncode == 0


def test_restarting_the_agent_keeps_program_and_speaker(host: Machine) -> None:
    before = program_ids(host), host.property("lbagent-bgp.service", "MainPID")
    agent = host.property("lbagent.service", "MainPID")
    for _ in range(3):
        host.run("systemctl", "restart", "lbagent.service")
        assert (program_ids(host), host.property("lbagent-bgp.service", "MainPID")) == before
    assert host.property("lbagent.service", "MainPID") != agent


def test_a_killed_agent_comes_back_and_finds_its_program(host: Machine) -> None:
    before = program_ids(host)
    agent = host.property("lbagent.service", "MainPID")
    host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", "lbagent.service")
    deadline = time.monotonic() + 60
    while host.property("lbagent.service", "MainPID") in (agent, "0"):
        assert time.monotonic() < deadline, journal(host)
        assert program_ids(host) == before
        time.sleep(0.1)
    wait_until_active(host, "lbagent.service")
    assert program_ids(host) == before


def test_a_configuration_that_lbagent_refuses_never_replaces_the_one_in_use(host: Machine) -> None:
    before = host.run("cat", "/etc/lbagent/lbagent.yaml").stdout, host.property("lbagent.service", "MainPID")
    broken = play(
        host,
        "--tags",
        "lbagent_configure",
        "-e",
        '{"lbagent_pools": [{"name": "default", "addresses": ["203.0.113.0/99"]}]}',
    )
    assert broken.code != 0
    assert "pools[0].addresses" in broken.output
    assert (host.run("cat", "/etc/lbagent/lbagent.yaml").stdout, host.property("lbagent.service", "MainPID")) == before


def test_only_the_services_reach_their_secrets(host: Machine) -> None:
    modes = host.run(
        "stat", "-c", "%U %G %a", "/etc/lbagent/kubeconfig", "/run/lbagent-bgp/exabgp.conf", "/sys/fs/bpf/lbagent"
    )
    assert modes.stdout.splitlines() == ["lbagent root 400", "lbagent-bgp lbagent-bgp 600", "lbagent lbagent-bgp 700"]
    outsider = host.run("runuser", "-u", "nobody", "--", "lbctl", "status", check=False)
    assert outsider.returncode == 4


def test_the_agent_that_systemd_runs_calls_itself_fine(host: Machine) -> None:
    wait_until_active(host, "lbagent.service")
    shown = host.run("lbctl", "status", check=False)
    assert shown.returncode == 0, shown.stdout + journal(host)
