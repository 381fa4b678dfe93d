# SPDX-License-Identifier: Apache-2.0
"""The roles, as far as they can be judged without a host to run them on."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from lbagent.config import load

CHECKOUT = Path(__file__).resolve().parent.parent.parent
ANSIBLE = CHECKOUT / "ansible"

pytestmark = pytest.mark.deploy


def run(tmp_path: Path, *command: str) -> str:
    environ = dict(
        os.environ,
        PATH=f"{CHECKOUT / '.venv-ansible/bin'}:{os.environ['PATH']}",
        ANSIBLE_HOME=str(tmp_path / "ansible"),
        ANSIBLE_LOCAL_TEMP=str(tmp_path / "local"),
        NO_COLOR="1",
    )
    done = subprocess.run(command, cwd=ANSIBLE, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_playbooks_are_understood(tmp_path: Path) -> None:
    playbooks = sorted(ANSIBLE.glob("*.yml"))
    assert playbooks
    run(tmp_path, "ansible-playbook", "--syntax-check", *map(str, playbooks))


def test_ansible_lint_finds_nothing_in_its_strictest_profile(tmp_path: Path) -> None:
    run(tmp_path, "ansible-lint", "--offline", "--strict")


@pytest.mark.parametrize("host", ["lb1", "lb2"])
def test_the_example_inventory_gives_a_configuration_that_lbagent_accepts(tmp_path: Path, host: str) -> None:
    template = ANSIBLE / "roles/lbagent/templates/lbagent.yaml.j2"
    play = [
        {
            "hosts": host,
            "gather_facts": False,
            "connection": "local",
            "vars": {"ansible_python_interpreter": "/usr/bin/python3"},
            "vars_files": [str(ANSIBLE / "roles/lbagent/defaults/main.yml")],
            "tasks": [
                {"ansible.builtin.template": {"src": str(template), "dest": str(tmp_path / "out.yaml"), "mode": "0600"}}
            ],
        }
    ]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(play))
    run(tmp_path, "ansible-playbook", str(tmp_path / "play.yml"))
    config = load(tmp_path / "out.yaml")
    assert [peer.name for peer in config.bgp.peers] == ["tor1", "tor2"]
    assert config.kubernetes.kubeconfig == Path("/etc/lbagent/kubeconfig")


@pytest.mark.parametrize("role", ["lb_host", "lbagent"])
def test_every_variable_of_a_role_is_documented_with_the_default_it_has(role: str) -> None:
    folder = ANSIBLE / "roles" / role
    options = yaml.safe_load((folder / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    defaults = yaml.safe_load((folder / "defaults/main.yml").read_text())
    files = [*folder.glob("tasks/*.yml"), *folder.glob("handlers/*.yml"), *folder.glob("templates/*")]
    text = "\n".join(file.read_text() for file in files)
    registered = set(re.findall(r"register: (\w+)", text))
    tags = set(re.findall(r"tags: \[(\w+)\]", text))
    used = set(re.findall(rf"\b{role}_[a-z_]+\b", text)) - registered - tags
    assert used <= options.keys()
    assert defaults.keys() <= options.keys()
    for name, option in options.items():
        if "default" in option:
            assert defaults[name] == option["default"], name
        assert option.get("required", False) == (name not in defaults), name


def test_the_units_are_where_the_role_links_them_from() -> None:
    tasks = yaml.safe_load((ANSIBLE / "roles/lbagent/tasks/install.yml").read_text())
    (linked,) = [t["loop"] for t in tasks if "loop" in t]
    wheel = (CHECKOUT / "pyproject.toml").read_text()
    for entry in linked:
        name = Path(entry["from"]).name
        assert f'= "{entry["from"]}"' in wheel or f"\n{name} = " in wheel, entry
