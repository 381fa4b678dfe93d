# SPDX-License-Identifier: Apache-2.0
"""bpf(2) by ctypes: the commands this project needs, with no libbpf and no bcc behind them.

A Map is an open map; programs and links are plain file descriptors, because nothing is asked of
them but to be loaded, pinned and exchanged. Every refusal is a KernelRefused (an XdpError) that
keeps the errno and says what to do; a map without room raises TableFull.
Layouts: include/uapi/linux/bpf.h, ``union bpf_attr``.
"""

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from types import TracebackType
from typing import Self, TypeAlias

from lbagent.errors import ProgramRejected, TableFull, XdpError

_BPF_SYSCALL_BY_MACHINE = {"x86_64": 321, "aarch64": 280}
_ATTR_BYTES = 144  # the kernel accepts a longer attr than it knows when the rest is zero
_BATCH_ENTRIES = 4096
_ATTEMPTS = 5  # a signal, or a verifier that was interrupted
_LOG_BYTES = 4 << 20
_LOG_LINES = 12
_libc = ctypes.CDLL(None, use_errno=True)
_Buffer: TypeAlias = ctypes.Array[ctypes.c_char]


class _Command(IntEnum):
    MAP_CREATE = 0
    MAP_LOOKUP = 1
    MAP_UPDATE = 2
    MAP_DELETE = 3
    PROG_LOAD = 5
    OBJ_PIN = 6
    OBJ_GET = 7
    PROG_TEST_RUN = 10
    INFO_BY_FD = 15
    BATCH_LOOKUP = 24
    BATCH_UPDATE = 26
    BATCH_DELETE = 27
    LINK_CREATE = 28
    LINK_UPDATE = 29
    LINK_DETACH = 34


class MapType(IntEnum):
    """``enum bpf_map_type``."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    LPM_TRIE = 11
    DEVMAP = 14
    DEVMAP_HASH = 25
    RINGBUF = 27


class MapFlag(IntFlag):
    """``BPF_F_*`` of map creation."""

    NONE = 0
    NO_PREALLOC = 1 << 0
    NO_COMMON_LRU = 1 << 1
    RDONLY_PROG = 1 << 7
    MMAPABLE = 1 << 10


class Update(IntEnum):
    """``any`` creates or replaces, ``create`` refuses an existing key, ``replace`` a missing one."""

    ANY = 0
    CREATE = 1
    REPLACE = 2


class Attach(IntFlag):
    """``XDP_FLAGS_*``: generic works on any interface and is slow, driver is the native mode."""

    GENERIC = 1 << 1
    DRIVER = 1 << 2


class ProgramFlag(IntFlag):
    """``BPF_F_*`` of program load. FRAGS: takes packets in several buffers (MTU above 3506)."""

    NONE = 0
    FRAGS = 1 << 5


class RunFlag(IntFlag):
    """``BPF_F_TEST_*``. LIVE_FRAMES really executes the verdict."""

    NONE = 0
    ON_CPU = 1 << 0
    LIVE_FRAMES = 1 << 1


_PROG_TYPE_XDP = 6
_ATTACH_TYPE_XDP = 37
_LINK_REPLACE = 1 << 2
_PER_CPU = {MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH}


class KernelRefused(XdpError):
    """bpf(2) said no. ``errno`` is the kernel's number."""

    def __init__(self, message: str, *, hint: str = "", errno: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


_HINT_BY_ERRNO = {
    errno.EPERM: "grant CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or run as root",
    errno.EACCES: "grant CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, or run as root",
    errno.ENOSYS: "this kernel has no bpf(2): CONFIG_BPF_SYSCALL=y is needed",
    errno.ENOMEM: "lower xdp.limits, or give the host more memory",
}


def _bpf(command: _Command, attr: bytes, doing: str) -> tuple[int, bytes]:
    """One bpf(2) call -> (its result, the attr as the kernel left it)."""
    machine = platform.machine()
    if machine not in _BPF_SYSCALL_BY_MACHINE:
        raise XdpError(f"bpf(2) has no known number on {machine}", hint="lbagent runs on x86_64 and aarch64")
    buffer = ctypes.create_string_buffer(attr, _ATTR_BYTES)
    for _ in range(_ATTEMPTS):
        result = _libc.syscall(_BPF_SYSCALL_BY_MACHINE[machine], int(command), buffer, _ATTR_BYTES)
        if result >= 0:
            return result, buffer.raw
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            break
    hint = _HINT_BY_ERRNO.get(code, "")
    raise KernelRefused(f"cannot {doing}: {os.strerror(code)}", hint=hint, errno=code) from _Failed(buffer.raw)


class _Failed(Exception):
    """What a failed call left in its attr: batch commands report how far they came."""

    def __init__(self, left: bytes) -> None:
        super().__init__("bpf(2)")
        self.left = left


def _address(buffer: _Buffer | None) -> int:
    return ctypes.addressof(buffer) if buffer is not None else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSpec:
    """What a map is made of. Sizes in bytes; ``name`` at most 15 characters."""

    name: str
    type: MapType
    key_bytes: int
    value_bytes: int
    entries: int
    flags: MapFlag = MapFlag.NONE


def possible_cpus() -> int:
    """How many values a per-CPU map holds per key (/sys/devices/system/cpu/possible: ``0-3,8``)."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        last = file.read().strip().rpartition(",")[2].rpartition("-")[2]
    return int(last) + 1


class Map:
    """An open map. Keys and values are bytes of exactly the sizes in ``spec``.

    Values of a per-CPU map are the CPUs' values in a row, each padded to 8 bytes.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        info = _info(fd, 80, "read a map's description")
        kind, self.id, key_bytes, value_bytes, entries, flags = struct.unpack_from("<6I", info)
        name = info[24:40].split(b"\0")[0].decode("ascii", "replace")
        self.spec = MapSpec(
            name=name,
            type=MapType(kind),
            key_bytes=key_bytes,
            value_bytes=value_bytes,
            entries=entries,
            flags=MapFlag(flags),
        )
        self.stride = -(-value_bytes // 8) * 8  # arrays and per-CPU values are padded to 8 bytes
        self._value_bytes = self.stride * possible_cpus() if self.spec.type in _PER_CPU else value_bytes

    @classmethod
    def create(cls, spec: MapSpec) -> Self:
        attr = struct.pack(
            "<7I16s",
            spec.type,
            spec.key_bytes,
            spec.value_bytes,
            spec.entries,
            spec.flags,
            0,
            0,
            spec.name.encode("ascii")[:15],
        )
        return cls(_bpf(_Command.MAP_CREATE, attr, f"create map {spec.name}")[0])

    @classmethod
    def open(cls, path: str) -> Self:
        """The map pinned at ``path``."""
        return cls(open_pin(path))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Map {self.spec.name} {self.spec.type.name} {self.spec.entries} entries, fd {self.fd}>"

    def lookup(self, key: bytes) -> bytes | None:
        """The value, None when there is none."""
        value = ctypes.create_string_buffer(self._value_bytes)
        try:
            self._element(_Command.MAP_LOOKUP, key, value)
        except KernelRefused as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return value.raw

    def update(self, key: bytes, value: bytes, *, how: Update = Update.ANY) -> None:
        """Raises TableFull when a new key finds no room."""
        self._check(value, 1, self._value_bytes, "value")
        buffer = ctypes.create_string_buffer(value, len(value))
        try:
            self._element(_Command.MAP_UPDATE, key, buffer, how)
        except KernelRefused as error:
            raise self._full(error) from error

    def delete(self, key: bytes) -> bool:
        """False when it was not there."""
        try:
            self._element(_Command.MAP_DELETE, key, None)
        except KernelRefused as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries, in batches; those written meanwhile may or may not be among them."""
        key_bytes, value_bytes = self.spec.key_bytes, self._value_bytes
        room = min(_BATCH_ENTRIES, max(self.spec.entries, 16))
        token = ctypes.create_string_buffer(max(key_bytes, 8))
        started = False
        while True:
            keys = ctypes.create_string_buffer(room * key_bytes)
            values = ctypes.create_string_buffer(room * value_bytes)
            attr = self._batch_attr(keys, values, room, token if started else None, token)
            more = True
            try:
                left = _bpf(_Command.BATCH_LOOKUP, attr, f"read map {self.spec.name}")[1]
            except KernelRefused as error:
                if error.errno == errno.ENOSPC:  # one hash bucket holds more than the room we gave
                    room *= 2
                    continue
                if error.errno != errno.ENOENT or not isinstance(error.__cause__, _Failed):
                    raise
                left, more = error.__cause__.left, False  # ENOENT ends the walk; the last entries are in it
            (count,) = struct.unpack_from("<I", left, 32)
            read_keys, read_values = keys.raw, values.raw
            for i in range(count):
                yield (
                    read_keys[i * key_bytes : (i + 1) * key_bytes],
                    read_values[i * value_bytes : (i + 1) * value_bytes],
                )
            if not more:
                return
            started = True

    def update_all(self, keys: bytes, values: bytes) -> None:
        """Write many: ``keys`` and ``values`` are the entries' bytes one after the other."""
        count = len(keys) // self.spec.key_bytes
        self._check(keys, count, self.spec.key_bytes, "keys")
        self._check(values, count, self._value_bytes, "values")
        if not count:
            return
        key_buffer = ctypes.create_string_buffer(keys, len(keys))
        value_buffer = ctypes.create_string_buffer(values, len(values))
        attr = self._batch_attr(key_buffer, value_buffer, count, None, None)
        try:
            _bpf(_Command.BATCH_UPDATE, attr, f"write map {self.spec.name}")
        except KernelRefused as error:
            raise self._full(error) from error

    def delete_all(self, keys: bytes) -> None:
        """Delete many; a key that is not there is not an error."""
        size = self.spec.key_bytes
        self._check(keys, len(keys) // size, size, "keys")
        while keys:
            buffer = ctypes.create_string_buffer(keys, len(keys))
            attr = self._batch_attr(buffer, None, len(keys) // size, None, None)
            try:
                _bpf(_Command.BATCH_DELETE, attr, f"delete from map {self.spec.name}")
                return
            except KernelRefused as error:
                if error.errno != errno.ENOENT or not isinstance(error.__cause__, _Failed):
                    raise
                (done,) = struct.unpack_from("<I", error.__cause__.left, 32)
                keys = keys[(done + 1) * size :]  # the one after the last deleted is the missing one

    def map_memory(self) -> mmap.mmap:
        """The values of an MMAPABLE array, shared with the kernel: element i starts at i * ``stride``."""
        length = -(-self.stride * self.spec.entries // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            return mmap.mmap(self.fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise KernelRefused(
                f"cannot map {self.spec.name} into memory: {error.strerror}", errno=error.errno or 0
            ) from error

    def _element(self, command: _Command, key: bytes, value: _Buffer | None, flags: int = 0) -> None:
        self._check(key, 1, self.spec.key_bytes, "key")
        key_buffer = ctypes.create_string_buffer(key, len(key))
        attr = struct.pack("<IIQQQ", self.fd, 0, _address(key_buffer), _address(value), flags)
        _bpf(command, attr, f"{command.name.removeprefix('MAP_').lower()} in map {self.spec.name}")

    def _batch_attr(
        self,
        keys: _Buffer,
        values: _Buffer | None,
        count: int,
        start: _Buffer | None,
        end: _Buffer | None,
    ) -> bytes:
        return struct.pack(
            "<QQQQIIQQ", _address(start), _address(end), _address(keys), _address(values), count, self.fd, 0, 0
        )

    def _check(self, data: bytes, count: int, size: int, what: str) -> None:
        if len(data) != count * size:
            raise ValueError(f"map {self.spec.name}: {what} of {len(data)} bytes, {count} × {size} expected")

    def _full(self, error: KernelRefused) -> XdpError:
        if error.errno not in (errno.E2BIG, errno.ENOSPC):
            return error
        return TableFull(f"map {self.spec.name} holds {self.spec.entries} entries and is full", hint="raise xdp.limits")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInfo:
    """A loaded program: its kernel id, its name, the ids of the maps it uses, its load time."""

    id: int
    name: str
    map_ids: tuple[int, ...]
    loaded_ns: int  # since boot


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkInfo:
    """An XDP link. ``ifindex`` 0: its interface is gone."""

    id: int
    program_id: int
    ifindex: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a test run gave. ``verdict`` is the XDP action, ``context`` the xdp_md afterwards."""

    verdict: int
    packet: bytes
    context: bytes
    duration_ns: int


def _info(fd: int, size: int, doing: str, head: bytes = b"") -> bytes:
    buffer = ctypes.create_string_buffer(head, size)
    _bpf(_Command.INFO_BY_FD, struct.pack("<IIQ", fd, size, _address(buffer)), doing)
    return buffer.raw


def program_info(fd: int) -> ProgramInfo:
    """Describe a loaded program."""
    ids = ctypes.create_string_buffer(4 * 64)
    head = struct.pack("<52xIQ", 64, _address(ids))
    info = _info(fd, 128, "read a program's description", head)
    (ident,) = struct.unpack_from("<I", info, 4)
    loaded_ns, _, map_count = struct.unpack_from("<QII", info, 40)
    return ProgramInfo(
        id=ident,
        name=info[64:80].split(b"\0")[0].decode("ascii", "replace"),
        map_ids=struct.unpack_from(f"<{min(map_count, 64)}I", ids.raw),
        loaded_ns=loaded_ns,
    )


def link_info(fd: int) -> LinkInfo:
    """Describe an XDP link."""
    info = _info(fd, 64, "read a link's description")
    _, ident, program_id = struct.unpack_from("<III", info)
    (ifindex,) = struct.unpack_from("<I", info, 16)
    return LinkInfo(id=ident, program_id=program_id, ifindex=ifindex)


def load_program(instructions: bytes, *, name: str, flags: ProgramFlag = ProgramFlag.NONE) -> int:
    """Verify and load an XDP program -> its file descriptor.

    ``name`` at most 15 characters. Raises ProgramRejected with the verifier's last lines.
    """
    try:
        return _load(instructions, name, flags, None)
    except KernelRefused as error:
        if error.errno == errno.EPERM:
            raise
    log = ctypes.create_string_buffer(_LOG_BYTES)  # only a refusal pays for the verifier's log
    try:
        return _load(instructions, name, flags, log)
    except KernelRefused as error:
        lines = log.value.decode("utf-8", "replace").rstrip().splitlines()
        hint = "report it with uname -r and the lines above"
        if any("CAP_PERFMON" in line or ("pointer arithmetic" in line and "prohibited" in line) for line in lines):
            hint = "grant CAP_PERFMON as well: without it packet lengths cannot be computed"
        said = "\n  ".join(["", *lines[-_LOG_LINES:]]) if lines else ""
        raise ProgramRejected(
            f"the verifier refuses program {name}: {os.strerror(error.errno)}{said}", hint=hint
        ) from error


def _load(instructions: bytes, name: str, flags: ProgramFlag, log: _Buffer | None) -> int:
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "<IIQQIIQII16sII",
        _PROG_TYPE_XDP,
        len(instructions) // 8,
        _address(code),
        _address(licence),
        1 if log is not None else 0,
        len(log) if log is not None else 0,
        _address(log),
        0,
        flags,
        name.encode("ascii")[:15],
        0,
        _ATTACH_TYPE_XDP,
    )
    return _bpf(_Command.PROG_LOAD, attr, f"load program {name}")[0]


def pin(fd: int, path: str) -> None:
    """Keep a map, program or link alive under ``path`` on bpffs."""
    buffer = ctypes.create_string_buffer(path.encode())
    try:
        _bpf(_Command.OBJ_PIN, struct.pack("<QII", _address(buffer), fd, 0), f"pin {path}")
    except KernelRefused as error:
        hint = error.hint
        if error.errno in (errno.EPERM, errno.EINVAL):
            hint = "is bpffs mounted there and writable? mount -t bpf bpf /sys/fs/bpf"
        raise KernelRefused(error.message, hint=hint, errno=error.errno) from error


def open_pin(path: str) -> int:
    """A file descriptor of what is pinned at ``path``; KernelRefused with ENOENT when nothing is."""
    buffer = ctypes.create_string_buffer(path.encode())
    return _bpf(_Command.OBJ_GET, struct.pack("<QII", _address(buffer), 0, 0), f"open {path}")[0]


def create_link(program_fd: int, ifindex: int, flags: Attach) -> int:
    """Attach the program to the interface -> link fd. It ends with the fd unless it is pinned."""
    attr = struct.pack("<IIII", program_fd, ifindex, _ATTACH_TYPE_XDP, flags)
    return _bpf(_Command.LINK_CREATE, attr, f"attach to interface {ifindex}")[0]


def replace_program(link_fd: int, new_fd: int, old_fd: int | None) -> None:
    """Exchange the link's program without a gap, only if it still runs ``old_fd`` (else EPERM).

    ``old_fd`` None: whatever it runs. Waits for a grace period: 16 ms measured.
    """
    swap = (0, 0) if old_fd is None else (_LINK_REPLACE, old_fd)
    attr = struct.pack("<IIII", link_fd, new_fd, *swap)
    _bpf(_Command.LINK_UPDATE, attr, "replace the attached program")


def detach_link(link_fd: int) -> None:
    """Detach now, whoever else holds the link."""
    _bpf(_Command.LINK_DETACH, struct.pack("<I", link_fd), "detach")


def run_packet(
    program_fd: int,
    packet: bytes,
    *,
    context: bytes = b"",
    repeat: int = 1,
    room: int = 2048,
    flags: RunFlag = RunFlag.NONE,
    batch: int = 0,
) -> Run:
    """BPF_PROG_TEST_RUN: one packet through a loaded program.

    ``context`` is a struct xdp_md (data 0, data_end len(packet), ingress_ifindex ...). ``room``:
    bytes for the packet that comes out. ``repeat`` does not reset the packet between runs.
    """
    live = bool(flags & RunFlag.LIVE_FRAMES)
    given = ctypes.create_string_buffer(packet, len(packet))
    taken = None if live else ctypes.create_string_buffer(room)
    context_in = ctypes.create_string_buffer(context, len(context)) if context else None
    context_out = ctypes.create_string_buffer(len(context)) if context and not live else None
    attr = struct.pack(
        "<IIIIQQIIIIQQIII",
        program_fd,
        0,
        len(packet),
        0 if live else room,
        _address(given),
        _address(taken),
        repeat,
        0,
        len(context),
        len(context) if context_out is not None else 0,
        _address(context_in),
        _address(context_out),
        flags,
        0,
        batch,
    )
    left = _bpf(_Command.PROG_TEST_RUN, attr, "run a test packet")[1]
    verdict, _, length = struct.unpack_from("<III", left, 4)
    (duration_ns,) = struct.unpack_from("<I", left, 36)
    return Run(
        verdict=verdict,
        packet=taken.raw[:length] if taken is not None else b"",
        context=context_out.raw if context_out is not None else b"",
        duration_ns=duration_ns,
    )
