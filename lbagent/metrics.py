# SPDX-License-Identifier: Apache-2.0
"""Every number we publish on ``/metrics``, from one documented list.

``CATALOGUE`` is the list: docs/reference/metrics.md is made from it, and ``Metrics`` refuses a name
or a label that is not in it. No label is unbounded: client addresses never appear. Values that
others own (the kernel's counters, ExaBGP's sessions) are *set whole*, so that what is gone from
there is gone from here; what we count ourselves is added up. Only this module knows
prometheus_client.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import (
    Metric as Family,
)
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Kind(StrEnum):
    """Prometheus' type of a metric."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One metric. ``text`` ends up in ``# HELP`` and in the reference."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()


def _gauge(name: str, text: str, *labels: str) -> Spec:
    return Spec(name=name, kind=Kind.GAUGE, text=text, labels=labels)


def _counter(name: str, text: str, *labels: str) -> Spec:
    return Spec(name=name, kind=Kind.COUNTER, text=text, labels=labels)


def _histogram(name: str, text: str, *labels: str) -> Spec:
    return Spec(name=name, kind=Kind.HISTOGRAM, text=text, labels=labels)


CATALOGUE: tuple[Spec, ...] = (
    _gauge("lbagent_build_info", "Always 1; which version runs.", "version"),
    # what was decided
    _gauge("lbagent_services", "Services by the Reason for where they are.", "reason"),
    _gauge("lbagent_assignments", "Addresses given from a pool.", "pool"),
    _gauge("lbagent_pool_addresses", "Addresses a pool may give.", "pool"),
    _gauge("lbagent_rings_fingerprint", "First 48 bits of the fingerprint of all rings; equal on every LB host."),
    # the loop
    _histogram("lbagent_reconcile_duration_seconds", "One pass: snapshot, plan, apply."),
    _gauge("lbagent_reconcile_last_timestamp_seconds", "When the last pass was completed."),
    _counter("lbagent_steps_total", "Steps performed.", "step", "outcome"),
    _counter("lbagent_drift_total", "Passes that found a target differing from what was applied.", "target"),
    _counter("lbagent_target_errors_total", "Steps a target refused.", "target"),
    _gauge("lbagent_guard_blocked", "1 while the blast-radius guard holds changes back."),
    _histogram(
        "lbagent_convergence_seconds",
        "From the event that caused a change until it was made: programmed, announced (told to ExaBGP).",
        "stage",
    ),
    # the cluster
    _gauge("lbagent_leader", "1 while this host holds the lease."),
    _gauge("lbagent_watch_listed", "1 once the first complete list has arrived.", "resource"),
    _gauge("lbagent_watch_last_event_timestamp_seconds", "When the API server last said something.", "resource"),
    _counter("lbagent_watch_restarts_total", "Watches begun again.", "resource", "cause"),
    _counter("lbagent_unreadable_objects_total", "Objects of the API that could not be read.", "resource"),
    _counter("lbagent_publish_total", "Status patches and Events sent.", "kind", "outcome"),
    _gauge("lbagent_state_age_seconds", "Age of the cluster facts that decisions rest on."),
    # BGP
    _gauge("lbagent_speaker_connected", "1 while the relay inside ExaBGP answers."),
    _counter("lbagent_speaker_restarts_total", "Times the relay came back."),
    _gauge("lbagent_bgp_peer_up", "1 while the session is established.", "peer"),
    _counter("lbagent_bgp_peer_flaps_total", "Times the session went down.", "peer"),
    _gauge("lbagent_routes_announced", "Routes told to ExaBGP for the peer.", "peer"),
    # the kernel
    _gauge("lbagent_xdp_attached", "1 while our program is attached.", "interface", "mode"),
    _counter("lbagent_packets_total", "Packets by what happened to them.", "verdict"),
    _counter("lbagent_bytes_total", "Bytes by what happened to them.", "verdict"),
    _counter("lbagent_vip_packets_total", "Packets from clients to a VIP.", "vip"),
    _counter("lbagent_vip_bytes_total", "Bytes from clients to a VIP.", "vip"),
    _counter("lbagent_backend_packets_total", "Packets sent to a backend.", "backend"),
    _counter("lbagent_backend_bytes_total", "Bytes sent to a backend.", "backend"),
    _gauge("lbagent_vips_programmed", "VIPs the kernel serves."),
    _gauge("lbagent_vips_proven", "VIPs whose synthetic packet reached a backend."),
    # backends
    _gauge("lbagent_backend_up", "1 while the backend may get new flows.", "service", "backend"),
    _counter("lbagent_probes_total", "Probes made.", "kind", "outcome"),
    _histogram("lbagent_probe_duration_seconds", "How long a probe took.", "kind"),
    # configuration
    _counter("lbagent_config_reloads_total", "Times the configuration was read again.", "outcome"),
)

_SPEC_BY_NAME = {spec.name: spec for spec in CATALOGUE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Packets and bytes since the counters were made."""

    packets: int
    bytes: int


@dataclass(slots=True)
class _Histogram:
    """Counts per bucket (not cumulated), the last one for what is above all bounds."""

    counts: list[int]
    total: float = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(_SECONDS, value)] += 1
        self.total += value

    def cumulated(self) -> list[tuple[str, float]]:
        bounds = [*(str(bound) for bound in _SECONDS), "+Inf"]
        seen = 0
        rows: list[tuple[str, float]] = []
        for bound, count in zip(bounds, self.counts, strict=True):
            seen += count
            rows.append((bound, seen))
        return rows


class Metrics:
    """The daemon's numbers. One object, passed to whoever has something to count.

    Methods in the plural replace a whole family; verbs in the past tense add to one. Times are
    seconds, timestamps seconds since the epoch.
    """

    def __init__(self, *, version: str, process: bool = True) -> None:
        self._value_by_labels: dict[str, dict[tuple[str, ...], float]] = {
            spec.name: {} for spec in CATALOGUE if spec.kind is not Kind.HISTOGRAM
        }
        self._histogram_by_labels: dict[str, dict[tuple[str, ...], _Histogram]] = {
            spec.name: {} for spec in CATALOGUE if spec.kind is Kind.HISTOGRAM
        }
        for spec in CATALOGUE:  # an unlabelled counter or gauge exists, at zero, from the start
            if not spec.labels and spec.kind is not Kind.HISTOGRAM:
                self._value_by_labels[spec.name][()] = 0.0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Families(self))
        if process:
            ProcessCollector(registry=self._registry)
        self._set("lbagent_build_info", 1, version)

    def render(self) -> bytes:
        """The text exposition format (``CONTENT_TYPE``)."""
        return generate_latest(self._registry)

    # -- what was decided

    def services(self, count_by_reason: Mapping[str, int]) -> None:
        """Services by Reason."""
        self._replace("lbagent_services", _one_label(count_by_reason))

    def pools(self, *, assigned: Mapping[str, int], capacity: Mapping[str, int]) -> None:
        """Addresses given and addresses to give, by pool."""
        self._replace("lbagent_assignments", _one_label(assigned))
        self._replace("lbagent_pool_addresses", _one_label(capacity))

    def rings(self, fingerprint: int) -> None:
        """A number made of all rings; only its first 48 bits are kept (a float holds 53)."""
        self._set("lbagent_rings_fingerprint", fingerprint & (1 << 48) - 1)

    # -- the loop

    def passed(self, *, took_s: float, at: float) -> None:
        """A pass was completed at ``at``."""
        self._observe("lbagent_reconcile_duration_seconds", took_s)
        self._set("lbagent_reconcile_last_timestamp_seconds", at)

    def stepped(self, step: str, *, outcome: str, count: int = 1) -> None:
        """A Step was performed; ``outcome`` is ``done``, ``failed`` or ``held``."""
        self._add("lbagent_steps_total", count, step, outcome)

    def drifted(self, target: str) -> None:
        """A target did not hold what was applied to it."""
        self._add("lbagent_drift_total", 1, target)

    def refused(self, target: str) -> None:
        """A target raised an LbagentError."""
        self._add("lbagent_target_errors_total", 1, target)

    def guard(self, *, blocked: bool) -> None:
        """Whether the blast-radius guard holds changes back."""
        self._set("lbagent_guard_blocked", blocked)

    def converged(self, stage: str, *, took_s: float) -> None:
        """From event to ``stage``: ``programmed`` or ``announced``."""
        self._observe("lbagent_convergence_seconds", took_s, stage)

    # -- the cluster

    def leader(self, *, is_leader: bool) -> None:
        """Whether this host holds the lease."""
        self._set("lbagent_leader", is_leader)

    def listed(self, resource: str, *, is_listed: bool = True) -> None:
        """Whether the first complete list of ``resource`` has arrived."""
        self._set("lbagent_watch_listed", is_listed, resource)

    def heard(self, resource: str, *, at: float) -> None:
        """The API server said something about ``resource``."""
        self._set("lbagent_watch_last_event_timestamp_seconds", at, resource)

    def watch_restarted(self, resource: str, *, cause: str) -> None:
        """``cause`` is ``expired``, ``gone``, ``silent`` or ``error``."""
        self._add("lbagent_watch_restarts_total", 1, resource, cause)

    def unreadable(self, resource: str) -> None:
        """An object of the API was skipped."""
        self._add("lbagent_unreadable_objects_total", 1, resource)

    def published(self, kind: str, *, outcome: str) -> None:
        """``kind`` is ``status`` or ``event``; ``outcome`` is ``done`` or ``failed``."""
        self._add("lbagent_publish_total", 1, kind, outcome)

    def state_age(self, age_s: float) -> None:
        """Age of the cluster facts that decisions rest on."""
        self._set("lbagent_state_age_seconds", age_s)

    # -- BGP

    def speaker(self, *, connected: bool, restarts: int) -> None:
        """The relay inside ExaBGP."""
        self._set("lbagent_speaker_connected", connected)
        self._set("lbagent_speaker_restarts_total", restarts)

    def peers(self, *, up: Mapping[str, bool], flaps: Mapping[str, int], announced: Mapping[str, int]) -> None:
        """Sessions by peer name."""
        self._replace("lbagent_bgp_peer_up", _one_label(up))
        self._replace("lbagent_bgp_peer_flaps_total", _one_label(flaps))
        self._replace("lbagent_routes_announced", _one_label(announced))

    # -- the kernel

    def attached(self, mode_by_interface: Mapping[str, str]) -> None:
        """Interfaces that carry our program, each with its mode."""
        self._replace("lbagent_xdp_attached", dict.fromkeys(mode_by_interface.items(), 1.0))

    def verdicts(self, traffic_by_verdict: Mapping[str, Traffic]) -> None:
        """Packets and bytes by Verdict."""
        self._replace_traffic("lbagent_packets_total", "lbagent_bytes_total", traffic_by_verdict)

    def vips(self, traffic_by_vip: Mapping[str, Traffic]) -> None:
        """Packets and bytes from clients, by VIP."""
        self._replace_traffic("lbagent_vip_packets_total", "lbagent_vip_bytes_total", traffic_by_vip)

    def backends(self, traffic_by_backend: Mapping[str, Traffic]) -> None:
        """Packets and bytes sent, by backend address."""
        self._replace_traffic("lbagent_backend_packets_total", "lbagent_backend_bytes_total", traffic_by_backend)

    def programmed(self, *, vips: int, proven: int) -> None:
        """VIPs the kernel serves, and how many of them were tried."""
        self._set("lbagent_vips_programmed", vips)
        self._set("lbagent_vips_proven", proven)

    # -- backends

    def backends_up(self, up: Mapping[tuple[str, str], bool]) -> None:
        """By (service, backend): may it get new flows?"""
        self._replace("lbagent_backend_up", {pair: float(is_up) for pair, is_up in up.items()})

    def probed(self, kind: str, *, outcome: str, took_s: float) -> None:
        """A probe was made; ``outcome`` is ``up`` or ``down``."""
        self._add("lbagent_probes_total", 1, kind, outcome)
        self._observe("lbagent_probe_duration_seconds", took_s, kind)

    # -- configuration

    def reloaded(self, *, outcome: str) -> None:
        """The configuration was read again; ``outcome`` is ``done`` or ``failed``."""
        self._add("lbagent_config_reloads_total", 1, outcome)

    # -- storing

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._value_by_labels[name][_checked(name, labels)] = float(value)

    def _add(self, name: str, amount: float, *labels: str) -> None:
        values = self._value_by_labels[name]
        key = _checked(name, labels)
        values[key] = values.get(key, 0.0) + amount

    def _replace(self, name: str, value_by_labels: Mapping[tuple[str, ...], float]) -> None:
        self._value_by_labels[name] = {_checked(name, key): value for key, value in value_by_labels.items()}

    def _replace_traffic(self, packets: str, octets: str, traffic_by_label: Mapping[str, Traffic]) -> None:
        self._replace(packets, {(label,): float(t.packets) for label, t in traffic_by_label.items()})
        self._replace(octets, {(label,): float(t.bytes) for label, t in traffic_by_label.items()})

    def _observe(self, name: str, value: float, *labels: str) -> None:
        histograms = self._histogram_by_labels[name]
        key = _checked(name, labels)
        if key not in histograms:
            histograms[key] = _Histogram([0] * (len(_SECONDS) + 1))
        histograms[key].observe(value)

    def families(self) -> Iterator[Family]:
        """What prometheus_client prints, in the order of the catalogue."""
        for spec in CATALOGUE:
            if spec.kind is Kind.HISTOGRAM:
                yield _histogram_family(spec, self._histogram_by_labels[spec.name].items())
            else:
                yield _plain_family(spec, sorted(self._value_by_labels[spec.name].items()))


class _Families(Collector):
    """The door to prometheus_client's registry."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Family]:
        return self._metrics.families()


def reference() -> str:
    """docs/reference/metrics.md, made from the catalogue."""
    rows = [
        f"| `{spec.name}` | {spec.kind} | {', '.join(f'`{label}`' for label in spec.labels) or '-'} | {spec.text} |"
        for spec in CATALOGUE
    ]
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows]) + "\n"


def _one_label(value_by_label: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(label,): float(value) for label, value in value_by_label.items()}


def _checked(name: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    expected = _SPEC_BY_NAME[name].labels
    if len(labels) != len(expected):
        raise ValueError(f"{name} has labels {expected}, got {labels}")
    return labels


def _plain_family(spec: Spec, rows: Sequence[tuple[tuple[str, ...], float]]) -> Family:
    make = CounterMetricFamily if spec.kind is Kind.COUNTER else GaugeMetricFamily
    family = make(spec.name, spec.text, labels=spec.labels)
    for labels, value in rows:
        family.add_metric(labels, value)
    return family


def _histogram_family(spec: Spec, rows: Iterable[tuple[tuple[str, ...], _Histogram]]) -> Family:
    family = HistogramMetricFamily(spec.name, spec.text, labels=spec.labels)
    for labels, histogram in rows:
        family.add_metric(labels, histogram.cumulated(), histogram.total)
    return family
