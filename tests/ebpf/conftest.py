# SPDX-License-Identifier: Apache-2.0
"""The world of the packet tables: compiled and loaded once, forgotten between rows."""

from collections.abc import Iterator

import pytest

from tests.ebpf.world import World, populate


@pytest.fixture(scope="session")
def loaded(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(cache=request.config.cache.mkdir("bytecode"))
    populate(world)
    yield world
    world.close()


@pytest.fixture
def world(loaded: World) -> World:
    loaded.reset()
    return loaded
