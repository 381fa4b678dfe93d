# SPDX-License-Identifier: Apache-2.0
"""Rigs for tests against real routers."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bgp.rig import FRR, Rig
from tests.lab.frr import Frr


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    """Rigs that are cleared at the end, whatever happened. ExaBGP is not started."""
    rigs: list[Rig] = []

    def make(**bgp: Any) -> Rig:
        tag = f"{os.getpid() % 100000}{secrets.token_hex(1)}"
        rig = Rig(tag, Path(tempfile.mkdtemp(prefix="lbagent-bgp-")), **bgp)
        rigs.append(rig)
        rig.build()
        return rig

    yield make
    for rig in rigs:
        rig.clear()
        shutil.rmtree(rig.paths.run, ignore_errors=True)


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    """One IPv4 session, ExaBGP running."""
    rig = make_rig()
    rig.start_exabgp()
    return rig


@pytest.fixture
def frr(rig: Rig) -> Iterator[Frr]:
    """FRR at the other end of ``rig``."""
    with Frr(rig.tor.name, FRR) as frr:
        yield frr
