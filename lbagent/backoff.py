# SPDX-License-Identifier: Apache-2.0
"""How long to wait after the n-th failure in a row.

Full jitter: a random share of a bound that doubles up to a cap, so that LB hosts that lost the
same API server or the same ExaBGP do not come back in step.
"""

import random
from collections.abc import Callable

_MAX_DOUBLINGS = 62  # beyond any cap; keeps the power finite


class Backoff:
    """One per target. ``failed()`` says how long to wait, ``succeeded()`` starts again at once.

    ``first_s`` bounds the first wait, ``cap_s`` every later one. ``source`` gives numbers in
    [0, 1); tests pass their own.
    """

    def __init__(
        self, *, first_s: float = 0.5, cap_s: float = 30.0, source: Callable[[], float] = random.random
    ) -> None:
        if not 0 < first_s <= cap_s:
            raise ValueError(f"first_s={first_s} must be above 0 and at most cap_s={cap_s}")
        self.failures = 0
        self._first_s = first_s
        self._cap_s = cap_s
        self._source = source

    def failed(self) -> float:
        """Count a failure; seconds to wait before the next attempt."""
        bound_s = min(self._cap_s, self._first_s * 2.0 ** min(self.failures, _MAX_DOUBLINGS))
        self.failures += 1
        return self._source() * bound_s

    def succeeded(self) -> None:
        """Forget the failures."""
        self.failures = 0

    def __repr__(self) -> str:
        return f"Backoff(failures={self.failures}, first_s={self._first_s}, cap_s={self._cap_s})"
