# SPDX-License-Identifier: Apache-2.0
import inspect
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lbagent.metrics import CATALOGUE, Kind, Metrics, Traffic, reference


def values(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a scrape by name and labels, read as Prometheus reads it."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="1.2.3", process=False)


def test_what_is_gone_from_the_kernel_is_gone_from_the_scrape(metrics: Metrics) -> None:
    first, second = "192.0.2.1:80/TCP", "192.0.2.2:80/TCP"
    metrics.vips({first: Traffic(packets=1, bytes=60), second: Traffic(packets=2, bytes=120)})
    metrics.vips({second: Traffic(packets=3, bytes=180)})
    scraped = values(metrics)
    assert ("lbagent_vip_packets_total", (("vip", first),)) not in scraped
    assert scraped["lbagent_vip_packets_total", (("vip", second),)] == 3
    assert scraped["lbagent_vip_bytes_total", (("vip", second),)] == 180


def test_what_we_count_adds_up(metrics: Metrics) -> None:
    metrics.stepped("Announce", outcome="done")
    metrics.stepped("Announce", outcome="done", count=2)
    metrics.stepped("Announce", outcome="failed")
    scraped = values(metrics)
    assert scraped["lbagent_steps_total", (("outcome", "done"), ("step", "Announce"))] == 3
    assert scraped["lbagent_steps_total", (("outcome", "failed"), ("step", "Announce"))] == 1


def test_a_histogram_counts_each_observation_in_every_bucket_above_it(metrics: Metrics) -> None:
    for took_s in (0.0005, 0.001, 0.02, 99.0):
        metrics.passed(took_s=took_s, at=1_000_000_000.0)
    scraped = values(metrics)

    def bucket(bound: str) -> float:
        return scraped["lbagent_reconcile_duration_seconds_bucket", (("le", bound),)]

    assert [bucket(b) for b in ("0.001", "0.01", "0.025", "30.0", "+Inf")] == [2, 2, 3, 3, 4]
    assert scraped["lbagent_reconcile_duration_seconds_count", ()] == 4
    assert scraped["lbagent_reconcile_duration_seconds_sum", ()] == pytest.approx(99.0215)


def test_plain_numbers_exist_at_zero_from_the_start(metrics: Metrics) -> None:
    scraped = values(metrics)
    assert scraped["lbagent_leader", ()] == 0
    assert scraped["lbagent_build_info", (("version", "1.2.3"),)] == 1


def test_the_fingerprint_survives_a_float(metrics: Metrics) -> None:
    metrics.rings(0xFFFF_FFFF_FFFF_FFFF)
    assert values(metrics)["lbagent_rings_fingerprint", ()] == 0xFFFF_FFFF_FFFF


def test_awkward_label_values_reach_the_other_side_unchanged(metrics: Metrics) -> None:
    metrics.services({'a "b"\\\n': 2})
    assert values(metrics)["lbagent_services", (("reason", 'a "b"\\\n'),)] == 2


def test_a_label_too_many_is_refused(metrics: Metrics) -> None:
    with pytest.raises(ValueError, match="has labels"):
        metrics._set("lbagent_leader", 1, "surprise")


def test_the_process_itself_is_measured() -> None:
    assert b"process_resident_memory_bytes" in Metrics(version="0").render()


ARGUMENTS: dict[str, tuple[tuple[object, ...], dict[str, object]]] = {
    "services": (({"satisfied": 1},), {}),
    "pools": ((), {"assigned": {"default": 1}, "capacity": {"default": 16}}),
    "rings": ((7,), {}),
    "passed": ((), {"took_s": 0.1, "at": 5.0}),
    "stepped": (("Program",), {"outcome": "done"}),
    "drifted": (("kernel",), {}),
    "refused": (("kernel",), {}),
    "guard": ((), {"blocked": True}),
    "converged": (("announced",), {"took_s": 0.1}),
    "leader": ((), {"is_leader": True}),
    "listed": (("services",), {}),
    "heard": (("services",), {"at": 5.0}),
    "watch_restarted": (("services",), {"cause": "gone"}),
    "unreadable": (("services",), {}),
    "published": (("status",), {"outcome": "done"}),
    "state_age": ((1.0,), {}),
    "speaker": ((), {"connected": True, "restarts": 1}),
    "peers": ((), {"up": {"tor1": True}, "flaps": {"tor1": 2}, "announced": {"tor1": 3}}),
    "attached": (({"eth0": "native"},), {}),
    "verdicts": (({"forwarded": Traffic(packets=1, bytes=2)},), {}),
    "vips": (({"192.0.2.1:80/TCP": Traffic(packets=1, bytes=2)},), {}),
    "backends": (({"10.0.2.21": Traffic(packets=1, bytes=2)},), {}),
    "programmed": ((), {"vips": 2, "proven": 1}),
    "backends_up": (({("default/web", "10.0.2.21"): True},), {}),
    "probed": (("tcp",), {"outcome": "up", "took_s": 0.001}),
    "reloaded": ((), {"outcome": "done"}),
}


def test_every_method_feeds_the_catalogue_and_every_metric_has_a_method(metrics: Metrics) -> None:
    methods = {name for name, _ in inspect.getmembers(Metrics, inspect.isfunction) if not name.startswith("_")}
    assert methods - {"render", "families"} == ARGUMENTS.keys()
    for name, (args, kwargs) in ARGUMENTS.items():
        getattr(metrics, name)(*args, **kwargs)
    fed = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name, _ in values(metrics)}
    assert fed == {spec.name for spec in CATALOGUE}


def test_nothing_is_promised_that_nobody_counts() -> None:
    rooms = Path(__file__).resolve().parent.parent / "lbagent"
    code = "\n".join(path.read_text() for path in rooms.rglob("*.py") if path.name != "metrics.py")
    assert [name for name in ARGUMENTS if not re.search(rf"metrics\.{name}\b", code)] == []


def test_names_follow_prometheus_rules() -> None:
    for spec in CATALOGUE:
        assert re.fullmatch(r"lbagent_[a-z]+(_[a-z]+)*", spec.name)
        assert spec.name.endswith("_total") == (spec.kind is Kind.COUNTER), spec.name
        assert spec.text.endswith("."), spec.name
    assert len({spec.name for spec in CATALOGUE}) == len(CATALOGUE)


def test_the_reference_names_every_metric() -> None:
    text = reference()
    for spec in CATALOGUE:
        assert f"`{spec.name}`" in text
