# SPDX-License-Identifier: Apache-2.0
"""From C to bytecode: what the daemon gets, what it keeps, and what it says when there is none."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lbagent.errors import ProgramRejected, XdpError
from lbagent.xdp import bpf
from lbagent.xdp import compile as compiler
from lbagent.xdp.bpf import Map, MapSpec, MapType
from lbagent.xdp.compile import Bytecode

COUNTING = """
#include <uapi/linux/bpf.h>
#include "step.h"
int lb(struct xdp_md *ctx)
{
    __u32 zero = 0;
    __u64 *hits = bpf_map_lookup_elem_(bpf_pseudo_fd(1, FD_lb_hits), &zero);
    if (hits)
        __sync_fetch_and_add(hits, STEP);
    return XDP_DROP;
}
"""
MAPS = ("lb_other", "lb_hits")
HITS = MapSpec(name="lb_hits", type=MapType.ARRAY, key_bytes=4, value_bytes=8, entries=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "ebpf"
    folder.mkdir()
    (folder / "lb.c").write_text(COUNTING)
    (folder / "step.h").write_text("#define STEP LB_STEP\n")
    return folder


def load_map(number: int) -> bytes:
    return struct.pack("<BBhiBBhi", 0x18, 0x11, 0, number, 0, 0, 0, 0)


# --- thought -------------------------------------------------------------------------------------


def test_map_numbers_become_descriptors():
    code = Bytecode(load_map(2) + load_map(1), ("lb_a", "lb_b"))
    assert code.bound({"lb_a": 7, "lb_b": 9}) == load_map(9) + load_map(7)


def test_a_constant_that_looks_like_a_map_number_is_left_alone():
    constant = struct.pack("<BBhiBBhi", 0x18, 0x01, 0, 1, 0, 0, 0, 0)  # source register 0: a plain number
    assert Bytecode(constant, ("lb_a",)).bound({"lb_a": 7}) == constant


def test_a_number_without_a_name_is_refused():
    with pytest.raises(ProgramRejected, match="unknown map 3"):
        Bytecode(load_map(3), ("lb_a", "lb_b")).bound({"lb_a": 7, "lb_b": 9})


def test_the_digest_changes_with_the_code_and_with_the_names():
    digests = {
        Bytecode(code, names).digest
        for code in (load_map(1), load_map(2))
        for names in (("lb_a", "lb_b"), ("lb_b", "lb_a"))
    }
    assert len(digests) == 4


def headers_tree(root: Path, release: str, *, split: bool = False) -> None:
    build = root / release / "build"
    source = root / release / "source" if split else build
    (build / "include/generated").mkdir(parents=True)
    (source / "include/linux").mkdir(parents=True)
    (build / "include/generated/autoconf.h").touch()
    (source / "include/linux/kconfig.h").touch()


def test_headers_of_the_running_kernel_come_first(tmp_path: Path):
    headers_tree(tmp_path, "6.1.0-1")
    headers_tree(tmp_path, "6.12.0-1")
    found = compiler.find_headers("6.1.0-1", tmp_path)
    assert found is not None
    assert found.release == "6.1.0-1"


def test_without_own_headers_the_newest_are_taken(tmp_path: Path):
    headers_tree(tmp_path, "6.9.0-1", split=True)
    headers_tree(tmp_path, "6.12.0-1", split=True)
    found = compiler.find_headers("7.0.0", tmp_path)
    assert found is not None
    assert found.release == "6.12.0-1"
    assert found.source == tmp_path / "6.12.0-1/source"


def test_a_folder_without_headers_does_not_count(tmp_path: Path):
    (tmp_path / "6.1.0-1/build").mkdir(parents=True)
    assert compiler.find_headers("6.1.0-1", tmp_path) is None


# --- rooms: the child is replaced by a script ----------------------------------------------------


@pytest.fixture
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = compiler.Headers(release=os.uname().release, build=tmp_path, source=tmp_path)
    monkeypatch.setattr(compiler, "find_headers", lambda release: tree)


def compiler_is(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = folder / "python"
    fake.write_text(f"#!/bin/sh\ncat > {folder}/order\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


@pytest.mark.parametrize(
    ("exit_code", "said"), [(3, "install python3-bpfcc"), (4, "unrelated library"), (1, "does not compile")]
)
def test_every_way_to_have_no_compiler_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: None, exit_code: int, said: str
):
    compiler_is(f"echo nonsense >&2; exit {exit_code}", tmp_path, monkeypatch)
    with pytest.raises(XdpError, match=said):
        compiler.build(source, constants={}, maps=MAPS)


@pytest.mark.parametrize(("installed", "code"), [(None, 3), (ModuleType("bcc"), 4)])
def test_the_child_tells_no_bcc_from_the_library_of_the_same_name(
    monkeypatch: pytest.MonkeyPatch, installed: ModuleType | None, code: int
):
    monkeypatch.setitem(sys.modules, "bcc", installed)
    answer = io.BytesIO()
    assert compiler._child(io.BytesIO(b"{}"), answer) == code
    assert answer.getvalue() == b""


def test_the_compilers_last_lines_are_shown(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: None
):
    compiler_is("seq 100 >&2; exit 1", tmp_path, monkeypatch)
    with pytest.raises(ProgramRejected, match=r"\n  99\n  100$"):
        compiler.build(source, constants={}, maps=MAPS)


def test_half_an_instruction_is_no_program(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: None
):
    compiler_is("printf 1234567", tmp_path, monkeypatch)
    with pytest.raises(ProgramRejected):
        compiler.build(source, constants={}, maps=MAPS)


def test_missing_headers_are_named_before_anything_is_started(source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiler, "find_headers", lambda release: None)
    with pytest.raises(XdpError, match="install linux-headers-"):
        compiler.build(source, constants={}, maps=MAPS)


def test_the_second_build_needs_no_compiler(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: None
):
    cache = tmp_path / "cache"
    compiler_is("printf 12345678", tmp_path, monkeypatch)
    first = compiler.build(source, constants={"LB_STEP": 1}, maps=MAPS, cache=cache)
    compiler_is("exit 1", tmp_path, monkeypatch)
    assert compiler.build(source, constants={"LB_STEP": 1}, maps=MAPS, cache=cache) == first


def test_a_change_in_a_header_or_a_constant_misses_the_cache(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: None
):
    cache = tmp_path / "cache"
    compiler_is("printf 12345678", tmp_path, monkeypatch)
    compiler.build(source, constants={"LB_STEP": 1}, maps=MAPS, cache=cache)
    compiler.build(source, constants={"LB_STEP": 2}, maps=MAPS, cache=cache)
    (source / "step.h").write_text("#define STEP (LB_STEP + 1)\n")
    compiler.build(source, constants={"LB_STEP": 1}, maps=MAPS, cache=cache)
    assert len(list(cache.iterdir())) == 3


def test_a_damaged_cache_entry_is_compiled_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: None
):
    cache = tmp_path / "cache"
    compiler_is("printf 12345678", tmp_path, monkeypatch)
    first = compiler.build(source, constants={}, maps=MAPS, cache=cache)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    assert compiler.build(source, constants={}, maps=MAPS, cache=cache) == first


def test_the_cache_keeps_the_newest_few(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: None):
    cache = tmp_path / "cache"
    compiler_is("printf 12345678", tmp_path, monkeypatch)
    for step in range(12):
        compiler.build(source, constants={"LB_STEP": step}, maps=MAPS, cache=cache)
    assert len(list(cache.iterdir())) == 8


def test_a_cache_that_cannot_be_written_stops_nobody(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: None
):
    compiler_is("printf 12345678", tmp_path, monkeypatch)
    occupied = tmp_path / "file"
    occupied.touch()
    assert compiler.build(source, constants={}, maps=MAPS, cache=occupied).instructions == b"12345678"


# --- bpf: the real compiler ----------------------------------------------------------------------


@pytest.mark.bpf
def test_compiled_c_counts_in_a_map_of_ours(source: Path):
    code = compiler.build(source, constants={"LB_STEP": 3}, maps=MAPS)
    with Map.create(HITS) as hits:
        fd = bpf.load_program(code.bound({"lb_other": -1, "lb_hits": hits.fd}), name=f"lb_{code.digest}")
        assert bpf.run_packet(fd, bytes(64), repeat=5).verdict == 1
        os.close(fd)
        assert hits.lookup(bytes(4)) == struct.pack("<Q", 15)


@pytest.mark.bpf
def test_headers_of_another_kernel_serve_as_well(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = compiler.find_headers(os.uname().release)
    assert found is not None
    foreign = compiler.Headers(release="another", build=found.build, source=found.source)
    monkeypatch.setattr(compiler, "find_headers", lambda release: foreign)
    assert compiler.build(source, constants={"LB_STEP": 3}, maps=MAPS).instructions


@pytest.mark.bpf
def test_a_mistake_in_the_c_is_shown_with_file_and_line(source: Path):
    (source / "lb.c").write_text("#include <uapi/linux/bpf.h>\n\nint lb(struct xdp_md *ctx) { return nothing; }\n")
    with pytest.raises(ProgramRejected, match=r"lb\.c:3:\d+: error: use of undeclared identifier 'nothing'"):
        compiler.build(source, constants={}, maps=MAPS)


@pytest.mark.bpf
def test_a_function_that_is_not_there_is_named(source: Path):
    with pytest.raises(ProgramRejected, match="Unknown program"):
        compiler.build(source, function="nobody", constants={"LB_STEP": 1}, maps=MAPS)


@pytest.mark.bpf
def test_who_builds_never_maps_the_compiler(source: Path):
    script = f"""
from pathlib import Path
from lbagent.xdp import compile
compile.build(Path({str(source)!r}), constants={{"LB_STEP": 1}}, maps={MAPS!r})
print(Path("/proc/self/maps").read_text())
"""
    mapped = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in mapped
    assert "libbcc" not in mapped
    assert "LLVM" not in mapped
