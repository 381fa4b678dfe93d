# SPDX-License-Identifier: Apache-2.0
"""How a host leaves and comes back."""

from pathlib import Path

import pytest

from lbagent.agent.drain import QUIET_S, Drain, Phase
from lbagent.config import DrainConfig
from lbagent.errors import ControlError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "drain.json"


def drain(path: Path, wait_s: float = 30.0) -> Drain:
    return Drain(path, DrainConfig(wait_s=wait_s), now=0.0)


def test_a_new_host_is_in(path: Path) -> None:
    assert drain(path).phase is Phase.IN


def test_a_quiet_host_is_out_soon(path: Path) -> None:
    host = drain(path)
    host.advance(now=99.0, packets=5)
    host.begin(100.0)
    assert host.phase is Phase.SOFTENING
    assert not host.advance(now=100.0 + QUIET_S - 0.1, packets=5)
    assert host.advance(now=100.0 + QUIET_S, packets=5)
    assert host.phase is Phase.OUT


def test_a_busy_host_is_out_after_its_waiting_time(path: Path) -> None:
    host = drain(path, wait_s=10.0)
    host.begin(100.0)
    assert not any(host.advance(now=100.0 + s, packets=s) for s in range(10))
    assert host.advance(now=110.0, packets=10)


def test_a_host_that_comes_back_is_in_at_once(path: Path) -> None:
    host = drain(path)
    host.begin(1.0)
    host.end(2.0)
    assert host.phase is Phase.IN
    assert not host.advance(now=99.0, packets=0)


def test_a_drained_host_stays_out_over_a_restart(path: Path) -> None:
    host = drain(path)
    host.begin(1.0)
    assert drain(path).phase is Phase.OUT  # it died on its way out
    host.end(2.0)
    assert drain(path).phase is Phase.IN


@pytest.mark.parametrize("text", ["", "{", '{"phase":"sideways"}', "[]"])
def test_an_unreadable_file_is_a_host_that_is_in(path: Path, text: str) -> None:
    path.write_text(text)
    assert drain(path).phase is Phase.IN


def test_a_phase_that_cannot_be_kept_is_not_entered(tmp_path: Path) -> None:
    host = drain(tmp_path / "nosuch" / "drain.json")
    with pytest.raises(ControlError):
        host.begin(1.0)
    assert host.phase is Phase.IN


def test_the_policy_says_graceful_shutdown(path: Path) -> None:
    policy = drain(path).policy
    assert policy.communities == ("graceful-shutdown",)
    assert policy.local_preference == 0
