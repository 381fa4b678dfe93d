# SPDX-License-Identifier: Apache-2.0
"""The monitoring kit speaks of metrics that exist, and every alert has its runbook and its test."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lbagent.metrics import CATALOGUE, Kind
from lbagent.xdp.verdict import Verdict

KIT = Path(__file__).parents[1] / "docs" / "monitoring"
ALERTS = yaml.safe_load((KIT / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS = json.loads((KIT / "dashboard.json").read_text())["panels"]
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + [t["expr"] for panel in PANELS for t in panel["targets"]]


def known_names() -> set[str]:
    names = {spec.name for spec in CATALOGUE}
    histograms = {spec.name for spec in CATALOGUE if spec.kind is Kind.HISTOGRAM}
    return names | {f"{name}{suffix}" for name in histograms for suffix in ("_bucket", "_sum", "_count")}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_metrics_that_exist(expression: str) -> None:
    used = set(re.findall(r"\blbagent_[a-z0-9_]+", expression))
    assert used <= known_names()
    assert used or expression.startswith("up{")


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_verdicts_that_exist(expression: str) -> None:
    words = {v.word for v in Verdict}
    for matched in re.findall(r'verdict=~?"([^"]*)"', expression):
        assert set(matched.split("|")) <= words


def test_the_dashboard_shows_every_drop() -> None:
    drops = next(panel for panel in PANELS if panel["title"] == "Drops by verdict")
    shown = re.search(r'verdict=~"([^"]*)"', drops["targets"][0]["expr"])
    assert shown
    assert set(shown[1].split("|")) == {v.word for v in Verdict if v.is_drop}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_every_alert_has_a_severity_words_a_runbook_and_a_test(rule: dict[str, Any]) -> None:
    name = rule["alert"]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    assert f"## {name}\n" in (KIT / "runbooks.md").read_text()
    assert rule["annotations"]["runbook"].endswith(f"#{name.lower()}")
    assert f"- name: {name}\n" in (KIT / "alerts_test.yml").read_text()


def test_the_alerts_fire_on_what_they_are_about() -> None:
    promtool = shutil.which("promtool")
    assert promtool, "scripts/setup installs the distribution's prometheus package"
    done = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yml"], cwd=KIT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
