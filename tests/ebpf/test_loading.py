# SPDX-License-Identifier: Apache-2.0
"""The verifier takes the program at every size that the configuration allows."""

import os
from contextlib import ExitStack

import pytest

from lbagent.xdp import bpf, maps
from lbagent.xdp import compile as compiler
from lbagent.xdp.maps import Sizes
from tests.ebpf.world import EBPF

pytestmark = pytest.mark.bpf


@pytest.mark.parametrize(
    ("sizes", "hz"),
    [
        (Sizes(vips=16, backends=16, rings=4, flows=1024, snat_ports=4), 100),
        (Sizes(vips=65_535, backends=65_535, rings=8, flows=1 << 21, snat_addresses=4), 1000),
    ],
    ids=["smallest", "largest ids"],
)
def test_the_program_loads(sizes: Sizes, hz: int) -> None:
    with ExitStack() as stack:
        held = {spec.name: stack.enter_context(bpf.Map.create(spec)) for spec in maps.specs(sizes)}
        code = compiler.build(EBPF, constants=maps.constants(sizes, hz=hz), maps=list(held))
        program = bpf.load_program(code.bound({name: m.fd for name, m in held.items()}), name="lb_sizes")
        stack.callback(os.close, program)
        assert {held[name].id for name in held} == set(bpf.program_info(program).map_ids)
