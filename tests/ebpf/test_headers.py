# SPDX-License-Identifier: Apache-2.0
"""The pure headers on a host: sanitizers, fuzzing, and the same numbers as their Python twins."""

import shutil
import subprocess
from pathlib import Path

import pytest

from lbagent.xdp import codec, maps
from lbagent.xdp.index import index_hash, mix
from lbagent.xdp.verdict import Verdict

HERE = Path(__file__).resolve().parent
EBPF = HERE.parents[1] / "ebpf"
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)] or ["cc"]
FLAGS = (
    "-O1 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-unused-parameter -Wno-sign-compare "
    "-Wno-address-of-packed-member -fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=all"
)


@pytest.fixture(scope="module", params=COMPILERS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("host") / request.param
    command = [request.param, *FLAGS.split(), f"-I{EBPF}", str(HERE / "host.c"), "-o", str(binary)]
    subprocess.run(command, check=True, capture_output=True)
    return binary


def answers(host: Path, *arguments: str) -> dict[str, str]:
    done = subprocess.run([host, *arguments], check=True, capture_output=True, text=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def test_known_answers(host: Path) -> None:
    assert answers(host, "check")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_packet_is_read_beyond_its_end(host: Path, seed: int) -> None:
    answers(host, "fuzz", "60000", str(seed))


def test_python_computes_the_same_hashes(host: Path) -> None:
    said = answers(host, "check")
    assert said["mix"] == f"{mix(0x0123456789ABCDEF):x}"
    assert said["index4"] == f"{index_hash('203.0.113.1', 80, 6):x}"
    assert said["index6"] == f"{index_hash('2001:db8::1', 80, 6):x}"
    assert said["hint4"] == str(codec.hint_index("203.0.113.1"))
    assert said["hint6"] == str(codec.hint_index("2001:db8::1"))


def test_python_knows_the_same_sizes(host: Path) -> None:
    said = {name: int(size) for name, _, size in (p.partition("=") for p in answers(host, "check")["sizes"].split())}
    assert said == {
        "vip": codec.VIP.size,
        "neighbour": codec.NEIGHBOUR.size,
        "hop": codec.HOP.size,
        "router_key": codec.ROUTER_KEY.size,
        "snat": codec.SNAT.size,
        "nat_bucket": codec.NAT_WAYS * codec.NAT_ENTRY.size,
        "range4": codec.RANGE4.size,
        "range6": codec.RANGE6.size,
        "client_key": codec.CLIENT_KEY_BYTES,
        "client": codec.CLIENT_BYTES,
        "fragment_key": codec.FRAGMENT_KEY_BYTES,
        "fragment": codec.FRAGMENT_BYTES,
        "limit_key": codec.LIMIT_KEY_BYTES,
        "limit": codec.LIMIT_BYTES,
        "scratch": codec.SCRATCH_BYTES,
        "counter": codec.COUNTER.size,
        "config": codec.CONFIG.size,
    }


def test_python_knows_the_same_layout(host: Path) -> None:
    words = answers(host, "check")["layout"].split()
    defaults = maps.Sizes()
    assert [int(word) for word in words[::2]] == [
        codec.LAYOUT,
        codec.ring_lines(defaults.backends + 1),
        defaults.counters,
        len(Verdict),
    ]
