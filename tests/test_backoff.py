# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbagent.backoff import Backoff


def test_the_bound_doubles_with_each_failure_up_to_the_cap() -> None:
    backoff = Backoff(first_s=1, cap_s=10, source=lambda: 1.0)
    assert [backoff.failed() for _ in range(6)] == [1, 2, 4, 8, 10, 10]


def test_success_starts_again_at_once() -> None:
    backoff = Backoff(first_s=1, cap_s=10, source=lambda: 1.0)
    for _ in range(5):
        backoff.failed()
    backoff.succeeded()
    assert backoff.failures == 0
    assert backoff.failed() == 1


def test_the_wait_is_a_random_share_of_the_bound() -> None:
    shares = iter([0.0, 0.25, 0.5])
    backoff = Backoff(first_s=1, cap_s=10, source=lambda: next(shares))
    assert [backoff.failed() for _ in range(3)] == [0.0, 0.5, 2.0]


@given(failures=st.integers(0, 2000), share=st.floats(0, 1, exclude_max=True), cap_s=st.floats(0.5, 1e6))
def test_no_number_of_failures_waits_longer_than_the_cap(failures: int, share: float, cap_s: float) -> None:
    backoff = Backoff(first_s=0.5, cap_s=cap_s, source=lambda: share)
    backoff.failures = failures
    assert 0 <= backoff.failed() <= cap_s


@pytest.mark.parametrize(("first_s", "cap_s"), [(0, 1), (-1, 1), (2, 1)])
def test_bounds_that_make_no_sense_are_refused(first_s: float, cap_s: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Backoff(first_s=first_s, cap_s=cap_s)
