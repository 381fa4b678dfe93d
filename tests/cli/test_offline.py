# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from lbagent.agent import state
from lbagent.cli.document import PlanDocument
from lbagent.cli.offline import plan
from tests.builders import make_service, make_snapshot

GOLDEN = Path(__file__).resolve().parent.parent / "golden/plan"

CASES: dict[str, tuple[str, ...]] = {
    "backends": ("--objects", "nodes.yaml", "--objects", "backends.yaml"),
    "addresses": ("--objects", "nodes.yaml", "--objects", "addresses.yaml"),
    "backends-health": ("--objects", "nodes.yaml", "--objects", "backends.yaml", "--health", "health.yaml"),
}


def run(*arguments: str, config: str | Path = GOLDEN / "lbagent.yaml", stdin: str | None = None) -> Result:
    """The command, with file names relative to the golden folder."""
    resolved = [str(GOLDEN / a) if a.endswith(".yaml") and not a.startswith("/") else a for a in arguments]
    return CliRunner().invoke(plan, ["--config", str(config), *resolved], input=stdin)


def planned(*arguments: str, **fields: Any) -> dict[str, Any]:
    result = run(*arguments, "-o", "json", **fields)
    assert result.exit_code in (0, 3), result.output + result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("form", ["json", "table"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_the_plan_is_as_it_was_reviewed(case: str, form: str, update_golden: bool) -> None:
    result = run(*CASES[case], "-o", form)
    assert result.exit_code == 3  # each case holds Services that cannot be served
    golden = GOLDEN / f"{case}.{'json' if form == 'json' else 'txt'}"
    if update_golden:
        golden.write_text(result.stdout)
    assert result.stdout == golden.read_text()


def test_planning_again_with_the_statuses_written_changes_nothing(tmp_path: Path) -> None:
    first = run(*CASES["backends"], "-o", "json")
    previous = tmp_path / "plan.json"
    previous.write_text(first.stdout)
    again = planned(*CASES["backends"], "--previous", str(previous))
    assert again["renumbered"] == []
    assert all(address["held"] for service in again["services"] for address in service["addresses"])


def test_a_config_that_takes_addresses_away_lists_who_would_be_renumbered(tmp_path: Path) -> None:
    config = tmp_path / "lbagent.yaml"
    config.write_text((GOLDEN / "lbagent.yaml").read_text().replace("203.0.113.0/29", "203.0.113.16/29"))
    found = planned(*CASES["backends"], config=config)
    assert [(r["service"], r["before"], r["after"]) for r in found["renumbered"]] == [
        ("shop/cluster", ["203.0.113.3"], ["203.0.113.16"])
    ]


def test_everything_served_is_exit_code_0(tmp_path: Path) -> None:
    objects = tmp_path / "objects.json"
    objects.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "List",
                "items": [
                    {
                        "kind": "Service",
                        "metadata": {"name": "web"},
                        "spec": {"type": "LoadBalancer", "ports": [{"port": 80, "nodePort": 30080}]},
                    },
                    {
                        "kind": "Node",
                        "metadata": {"name": "n1"},
                        "status": {"addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]},
                    },
                    {
                        "kind": "EndpointSlice",
                        "metadata": {"name": "x", "labels": {"kubernetes.io/service-name": "web"}},
                        "addressType": "IPv4",
                        "endpoints": [{"addresses": ["10.244.0.1"], "nodeName": "n1"}],
                    },
                ],
            }
        )
    )
    result = run("--objects", str(objects))
    assert result.exit_code == 0, result.output
    assert "default/web" in result.stdout
    assert run("--objects", "-", stdin=objects.read_text()).stdout == result.stdout


def test_a_folder_is_read_whole() -> None:
    result = CliRunner().invoke(
        plan, ["--config", str(GOLDEN / "lbagent.yaml"), "--objects", str(GOLDEN), "-o", "json"]
    )
    assert {s["service"] for s in json.loads(result.stdout)["services"]} >= {"shop/cluster", "shop/a-old"}


def test_the_order_of_the_files_changes_nothing() -> None:
    one = run("--objects", "nodes.yaml", "--objects", "addresses.yaml", "-o", "json")
    other = run("--objects", "addresses.yaml", "nodes.yaml", "-o", "json")
    assert one.stdout == other.stdout


def test_a_snapshot_of_a_running_agent_is_a_cluster(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot.json"
    snapshot.write_text(state.dump(make_snapshot([make_service("web", status=["203.0.113.1"])])))
    found = planned("--objects", str(snapshot))
    assert [(s["service"], s["reason"]) for s in found["services"]] == [("default/web", "satisfied")]


def test_yaml_and_json_say_the_same() -> None:
    assert yaml.safe_load(run(*CASES["backends"], "-o", "yaml").stdout) == planned(*CASES["backends"])


def test_the_node_name_is_the_host_the_plan_is_for() -> None:
    assert planned(*CASES["backends"])["host"] == "lb1"
    assert planned(*CASES["backends"], "--node-name", "lb7")["host"] == "lb7"


def test_the_document_keeps_to_its_schema() -> None:
    for case in CASES.values():
        PlanDocument.model_validate_json(run(*case, "-o", "json").stdout, strict=True)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("objects.yaml", "a: [", "neither YAML nor JSON"),
        ("objects.json", '{"a"', "neither YAML nor JSON"),
    ],
)
def test_what_is_no_yaml_is_unusable(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    result = CliRunner().invoke(plan, ["--config", str(GOLDEN / "lbagent.yaml"), "--objects", str(path)])
    assert result.exit_code == 1
    assert said in result.stderr
    assert str(path) in result.stderr


def test_a_missing_file_and_a_broken_config_are_unusable(tmp_path: Path) -> None:
    assert run("--objects", str(tmp_path / "none")).exit_code == 1
    config = tmp_path / "lbagent.yaml"
    config.write_text("pools: 7\n")
    result = run(*CASES["backends"], config=config)
    assert result.exit_code == 1
    assert f"{config}:1: pools" in result.stderr


@pytest.mark.parametrize("text", ["[]", "probes: [{address: 10.0.0.1}]", "probes: 7"])
def test_a_health_file_that_is_none_is_unusable(tmp_path: Path, text: str) -> None:
    path = tmp_path / "health"
    path.write_text(text)
    result = run(*CASES["backends"], "--health", str(path))
    assert result.exit_code == 1
    assert "not a health file" in result.stderr


def test_a_previous_plan_that_is_none_is_unusable(tmp_path: Path) -> None:
    path = tmp_path / "previous"
    path.write_text("services: 7")
    assert run(*CASES["backends"], "--previous", str(path)).exit_code == 1
