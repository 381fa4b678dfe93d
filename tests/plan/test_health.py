# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from lbagent.model.state import Pulse
from lbagent.model.vip import BackendState
from lbagent.plan.health import RULES, Sign, Slices, Source, disagreement, fuse, reference, sign, worst

ACTIVE, DRAINING, DOWN = BackendState.ACTIVE, BackendState.DRAINING, BackendState.DOWN
PAGE = Path(__file__).resolve().parents[2] / "docs/reference/health.md"

Case = tuple[Any, ...]
"""Next hop, EndpointSlices, node port, kube-proxy."""


NODE_PORT_SIGNS = (Sign.UP, Sign.SILENT, Sign.DOWN)  # a TCP connect knows no closing
KUBE_PROXY_SIGNS = (Sign.UP, Sign.SILENT, Sign.CLOSING, Sign.DOWN)


def cases() -> list[Case]:
    return list(product((True, False), Slices, NODE_PORT_SIGNS, KUBE_PROXY_SIGNS))


def state(case: Case) -> BackendState:
    hop, slices, node_port, kube_proxy = case
    return fuse(hop=hop, slices=slices, node_port=node_port, kube_proxy=kube_proxy).state


@pytest.mark.parametrize(
    ("slices", "node_port", "kube_proxy", "expected", "source"),
    [
        # kube-proxy runs, everything is well; one probe of the two, or none, may have no opinion
        (Slices.READY, Sign.UP, Sign.UP, ACTIVE, Source.NODE_PORT),
        (Slices.READY, Sign.UP, Sign.SILENT, ACTIVE, Source.NODE_PORT),
        (Slices.READY, Sign.SILENT, Sign.UP, ACTIVE, Source.KUBE_PROXY),
        (Slices.READY, Sign.SILENT, Sign.SILENT, ACTIVE, Source.SLICES),
        # healthCheckNodePort 503 while only terminating endpoints serve (KEP-1669)
        (Slices.CLOSING, Sign.UP, Sign.CLOSING, DRAINING, Source.SLICES),
        (Slices.CLOSING, Sign.SILENT, Sign.CLOSING, DRAINING, Source.SLICES),
        # the same before the probes have seen it, and when they never do
        (Slices.CLOSING, Sign.UP, Sign.UP, DRAINING, Source.SLICES),
        (Slices.CLOSING, Sign.SILENT, Sign.SILENT, DRAINING, Source.SLICES),
        # the last pod ended: kube-proxy drops, whatever a probe last saw
        (Slices.NONE, Sign.UP, Sign.UP, DOWN, Source.SLICES),
        # ToBeDeletedByClusterAutoscaler: 10256 says 503 while all is served (KEP-3836)
        (Slices.READY, Sign.UP, Sign.CLOSING, DRAINING, Source.KUBE_PROXY),
        (Slices.READY, Sign.SILENT, Sign.CLOSING, DRAINING, Source.KUBE_PROXY),
        # kube-proxy hangs, its rules forward
        (Slices.READY, Sign.UP, Sign.DOWN, DRAINING, Source.KUBE_PROXY),
        # the node is gone, and the API does not know yet
        (Slices.READY, Sign.DOWN, Sign.DOWN, DOWN, Source.NODE_PORT),
        (Slices.READY, Sign.SILENT, Sign.DOWN, DOWN, Source.KUBE_PROXY),
        (Slices.CLOSING, Sign.SILENT, Sign.DOWN, DOWN, Source.KUBE_PROXY),
        # the node port is blocked, while kube-proxy believes that all is well
        (Slices.READY, Sign.DOWN, Sign.UP, DOWN, Source.NODE_PORT),
        (Slices.CLOSING, Sign.DOWN, Sign.CLOSING, DOWN, Source.NODE_PORT),
    ],
)
def test_the_signs_give_the_state_and_name_who_decided(
    slices: Slices, node_port: Sign, kube_proxy: Sign, expected: BackendState, source: Source
) -> None:
    rule = fuse(hop=True, slices=slices, node_port=node_port, kube_proxy=kube_proxy)
    assert (rule.state, rule.source) == (expected, source)
    assert rule.why


def test_without_a_next_hop_every_node_is_down() -> None:
    for case in cases():
        if not case[0]:
            rule = fuse(hop=False, slices=case[1], node_port=case[2], kube_proxy=case[3])
            assert (rule.state, rule.source) == (DOWN, Source.NEXT_HOP)


def worse_cases(case: Case) -> Iterator[Case]:
    """The same case with one sign made worse."""
    orders = ((True, False), tuple(Slices), NODE_PORT_SIGNS, KUBE_PROXY_SIGNS)
    for place, order in enumerate(orders):
        for worse in order[order.index(case[place]) + 1 :]:
            yield (*case[:place], worse, *case[place + 1 :])


def test_no_sign_that_becomes_worse_makes_a_backend_better() -> None:
    rank = {ACTIVE: 2, DRAINING: 1, DOWN: 0}
    for case in cases():
        for worse in worse_cases(case):
            assert rank[state(worse)] <= rank[state(case)], (case, worse)


def test_every_rule_decides_something() -> None:
    deciding = {fuse(hop=h, slices=s, node_port=n, kube_proxy=k) for h, s, n, k in cases()}
    assert deciding == set(RULES)


def test_a_probe_that_has_no_opinion_is_as_if_it_were_not_there() -> None:
    refused = Pulse(up=False, since=0.0, offered=False, detail="connection refused")
    assert sign(refused) is sign(None) is Sign.SILENT


@pytest.mark.parametrize(
    ("pulse", "expected"),
    [
        (Pulse(up=True, since=0.0), Sign.UP),
        (Pulse(up=False, since=0.0), Sign.DOWN),
        (Pulse(up=False, since=0.0, closing=True), Sign.CLOSING),
    ],
)
def test_a_pulse_is_a_sign(pulse: Pulse, expected: Sign) -> None:
    assert sign(pulse) is expected


def test_the_worst_of_kube_proxys_two_answers_counts_and_silence_does_not() -> None:
    assert worst([Sign.UP, Sign.CLOSING]) is Sign.CLOSING
    assert worst([Sign.DOWN, Sign.CLOSING]) is Sign.DOWN
    assert worst([Sign.SILENT, Sign.UP]) is Sign.UP
    assert worst([Sign.SILENT, Sign.SILENT]) is worst([]) is Sign.SILENT


def test_a_node_that_counts_other_endpoints_than_the_api_is_named() -> None:
    assert disagreement(5, Pulse(up=True, since=0.0, weight=3)) == (
        "the node reports 3 ready endpoints, the EndpointSlices 5"
    )


@pytest.mark.parametrize(
    "pulse",
    [None, Pulse(up=True, since=0.0), Pulse(up=True, since=0.0, weight=5), Pulse(up=False, since=0.0, weight=0)],
)
def test_a_node_that_reports_no_count_or_the_same_is_not_named(pulse: Pulse | None) -> None:
    assert disagreement(5, pulse) == ""


def test_the_page_in_the_docs_is_the_table() -> None:
    title, _, rest = reference().partition("\n")
    text = PAGE.read_text()
    assert text.startswith(title)
    assert text.endswith(rest)
