# SPDX-License-Identifier: Apache-2.0
"""bpf(2): every call against the running kernel, because nothing else can say whether a layout is right."""

import errno
import struct
from pathlib import Path

import pytest

from lbagent.errors import ProgramRejected, TableFull
from lbagent.xdp import bpf
from lbagent.xdp.bpf import KernelRefused, Map, MapFlag, MapSpec, MapType, Update

pytestmark = pytest.mark.bpf

PASS, DROP = 2, 1


def key(number: int) -> bytes:
    return struct.pack("<Q", number)


def spec(kind: MapType, *, entries: int = 64, key_bytes: int = 8, flags: MapFlag = MapFlag.NONE) -> MapSpec:
    return MapSpec(name="lb_test", type=kind, key_bytes=key_bytes, value_bytes=8, entries=entries, flags=flags)


def returning(action: int) -> bytes:
    """Bytecode of ``return action``."""
    return struct.pack("<BBhi", 0xB7, 0, 0, action) + struct.pack("<BBhi", 0x95, 0, 0, 0)


def test_a_map_describes_itself_as_it_was_ordered():
    with Map.create(spec(MapType.HASH)) as table:
        assert table.spec == spec(MapType.HASH)
        assert table.id > 0


def test_an_entry_is_found_replaced_and_deleted_once():
    with Map.create(spec(MapType.HASH)) as table:
        assert table.lookup(key(1)) is None
        table.update(key(1), key(10))
        table.update(key(1), key(11))
        assert table.lookup(key(1)) == key(11)
        assert table.delete(key(1))
        assert not table.delete(key(1))


def test_an_update_that_must_create_refuses_an_existing_key():
    with Map.create(spec(MapType.HASH)) as table:
        table.update(key(1), key(10), how=Update.CREATE)
        with pytest.raises(KernelRefused) as refused:
            table.update(key(1), key(11), how=Update.CREATE)
        assert refused.value.errno == errno.EEXIST


@pytest.mark.parametrize("count", [0, 1, 4096, 10_000])
def test_many_entries_are_written_and_read_in_batches(count: int):
    with Map.create(spec(MapType.HASH, entries=max(count, 1))) as table:
        table.update_all(b"".join(map(key, range(count))), b"".join(key(2 * n) for n in range(count)))
        assert dict(table.items()) == {key(n): key(2 * n) for n in range(count)}


def test_deleting_many_passes_over_keys_that_are_not_there():
    with Map.create(spec(MapType.HASH, entries=1000)) as table:
        table.update_all(b"".join(map(key, range(0, 1000, 2))), b"".join(map(key, range(500))))
        table.delete_all(b"".join(map(key, range(900))))
        assert set(dict(table.items())) == {key(n) for n in range(900, 1000, 2)}


def test_a_full_map_names_its_limit():
    with Map.create(spec(MapType.HASH, entries=16)) as table:
        table.update_all(b"".join(map(key, range(16))), bytes(8 * 16))
        with pytest.raises(TableFull, match="lb_test holds 16 entries"):
            table.update(key(16), key(0))
        with pytest.raises(TableFull):
            table.update_all(b"".join(map(key, range(100, 164))), bytes(8 * 64))


def test_prefixes_are_read_in_batches_too():
    trie = spec(MapType.LPM_TRIE, flags=MapFlag.NO_PREALLOC, entries=5000)
    with Map.create(trie) as table:
        prefixes = [struct.pack("<IBBBB", 24, 10, n >> 8, n & 255, 0) for n in range(5000)]
        table.update_all(b"".join(prefixes), bytes(8 * 5000))
        assert set(dict(table.items())) == set(prefixes)


def test_shared_memory_and_the_syscall_see_the_same_array():
    with Map.create(spec(MapType.ARRAY, key_bytes=4, flags=MapFlag.MMAPABLE)) as table:
        memory = table.map_memory()
        memory[3 * table.stride : 3 * table.stride + 8] = key(77)
        assert table.lookup(struct.pack("<I", 3)) == key(77)
        assert [value for _, value in table.items()].count(key(77)) == 1
        memory.close()


def test_a_map_that_cannot_be_shared_says_so():
    with (
        Map.create(spec(MapType.HASH)) as table,
        pytest.raises(KernelRefused, match="cannot map lb_test into memory"),
    ):
        table.map_memory()


def test_a_per_cpu_map_has_one_value_per_possible_cpu():
    with Map.create(spec(MapType.PERCPU_ARRAY, key_bytes=4)) as table:
        value = table.lookup(bytes(4))
        assert value is not None
        assert len(value) == 8 * bpf.possible_cpus()


def test_bytes_of_the_wrong_size_never_reach_the_kernel():
    with Map.create(spec(MapType.HASH)) as table, pytest.raises(ValueError, match="key of 4 bytes"):
        table.update(bytes(4), bytes(8))


def test_a_program_has_the_name_and_the_verdict_it_was_given():
    fd = bpf.load_program(returning(DROP), name="lb_drop")
    assert bpf.program_info(fd).name == "lb_drop"
    run = bpf.run_packet(fd, bytes(range(64)))
    assert (run.verdict, run.packet) == (DROP, bytes(range(64)))


def test_a_program_names_the_maps_it_uses():
    with Map.create(spec(MapType.ARRAY, key_bytes=4)) as table:
        load_map = struct.pack("<BBhiBBhi", 0x18, 0x11, 0, table.fd, 0, 0, 0, 0)
        fd = bpf.load_program(load_map + returning(PASS), name="lb_map")
        assert bpf.program_info(fd).map_ids == (table.id,)


def test_a_rejected_program_shows_the_verifiers_last_lines():
    without_a_result = returning(PASS)[8:]
    with pytest.raises(ProgramRejected, match="R0 !read_ok"):
        bpf.load_program(without_a_result, name="lb_bad")


def test_what_is_pinned_is_opened_again(pins: Path):
    with Map.create(spec(MapType.HASH)) as table:
        bpf.pin(table.fd, str(pins / "table"))
        with Map.open(str(pins / "table")) as again:
            assert again.id == table.id


def test_an_empty_pin_is_told_by_its_errno(pins: Path):
    with pytest.raises(KernelRefused) as refused:
        bpf.open_pin(str(pins / "nothing"))
    assert refused.value.errno == errno.ENOENT


def test_pinning_outside_bpffs_says_what_to_mount(tmp_path: Path):
    with Map.create(spec(MapType.HASH)) as table, pytest.raises(KernelRefused, match="mount -t bpf"):
        bpf.pin(table.fd, str(tmp_path / "table"))
