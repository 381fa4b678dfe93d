# SPDX-License-Identifier: Apache-2.0
import pytest

from lbagent.xdp import codec, maps
from lbagent.xdp.bpf import Map, possible_cpus
from lbagent.xdp.counters import Count, Counters
from lbagent.xdp.verdict import Verdict

SIZES = maps.Sizes(vips=16, backends=8, rings=4, flows=1024, snat_ports=1024)
pytestmark = pytest.mark.bpf


@pytest.fixture
def held():
    made = {spec.name: Map.create(spec) for spec in maps.specs(SIZES)}
    yield made
    for table in made.values():
        table.close()


@pytest.fixture
def counters(held):
    counters = Counters(held, sizes=SIZES)
    yield counters
    counters.close()


def put(held: dict[str, Map], line: int, *values: int, cpu: int = 0) -> None:
    key = (cpu * SIZES.counters + line).to_bytes(4, "little")
    held["lb_counters"].update(key, codec.COUNTER.pack(*values, *[0] * (8 - len(values))))


def test_cpus_are_added_up(held: dict[str, Map], counters: Counters) -> None:
    cpus = possible_cpus()
    for cpu in range(cpus):
        put(held, int(Verdict.NAT_FORWARD), 10, 1000, cpu=cpu)
    assert counters.verdicts()[Verdict.NAT_FORWARD] == Count(10 * cpus, 1000 * cpus)


def test_every_verdict_has_a_count(counters: Counters) -> None:
    assert counters.verdicts() == dict.fromkeys(Verdict, Count())


def test_vips_and_backends_do_not_meet(held: dict[str, Map], counters: Counters) -> None:
    put(held, 64 + 16, 1, 2, 3, 4, 5, 6)
    put(held, 64 + 17 + 8, 9)
    assert counters.vips([1, 16]) == {1: Count(), 16: Count(1, 2, 3, 4, 5, 6)}
    assert counters.backends([1, 8]) == {1: Count(), 8: Count(9)}


def test_flows_are_counted_by_backend(held: dict[str, Map], counters: Counters) -> None:
    assert counters.dsr_flows() == counters.nat_flows() == {}
    line = b"".join(word.to_bytes(8, "little") for word in (3, 3 | 1 << 40, 0, 5, 0, 0, 0, 5 | 7 << 30))
    held["lb_flows"].update((7).to_bytes(4, "little"), line)
    assert counters.dsr_flows() == {3: 2, 5: 2}
    entry = codec.NAT_ENTRY.pack(1, 2, 6 << 32 | 1 << 48, 4)
    free = codec.NAT_ENTRY.pack(1, 2, 6 << 32, 0)
    held["lb_nat"].update((9).to_bytes(4, "little"), entry + free + entry + free)
    assert counters.nat_flows() == {6: 2}
