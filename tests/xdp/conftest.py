# SPDX-License-Identifier: Apache-2.0
"""A corner of bpffs for one test."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def pins() -> Iterator[Path]:
    """An empty folder on bpffs that is gone after the test, with all that was pinned in it."""
    folder = Path(f"/sys/fs/bpf/lbagent-test-{os.getpid()}-{os.urandom(3).hex()}")
    folder.mkdir(mode=0o700)
    yield folder
    shutil.rmtree(folder)
