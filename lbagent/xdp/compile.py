# SPDX-License-Identifier: Apache-2.0
"""C to bytecode by BCC, in a child process that ends: the daemon never maps LLVM (142 MB, measured).

The daemon starts this very module as a program, hands it an order as JSON on stdin and gets the
instructions back on stdout. Maps are created by the daemon, so the C source names them by number:
``-DFD_<map>=<n>``, n counting from 1 in the order of ``maps``. Those numbers stand in the ld_imm64
instructions with source register 1 until ``Bytecode.bound`` writes the real descriptors there; so
the bytecode can lie in a cache on disk, and BCC and headers are needed at build time only.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lbagent import log
from lbagent.errors import ProgramRejected, XdpError

_LOG = log.get("xdp")
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_INSTRUCTION_BYTES = 8
_LOAD_IMMEDIATE_64 = 0x18
_PSEUDO_MAP_FD = 1
_TIMEOUT_S = 120
_CACHED_PROGRAMS = 8
_ERROR_LINES = 15
_NO_BCC, _NOT_BCC = 3, 4  # exit codes of the child
_BCC_HINT = "install python3-bpfcc, and run lbagent on the system interpreter with --system-site-packages"


@dataclass(frozen=True, slots=True)
class Bytecode:
    """Instructions whose map references are still numbers, and the names those numbers stand for."""

    instructions: bytes
    maps: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Twelve hex digits of the content; part of the name the program has in the kernel."""
        return hashlib.sha256(self.instructions + "\0".join(self.maps).encode()).hexdigest()[:12]

    def bound(self, fd_by_map: Mapping[str, int]) -> bytes:
        """The same instructions with the maps' descriptors in place."""
        code = bytearray(self.instructions)
        for at in range(0, len(code), _INSTRUCTION_BYTES):
            if code[at] == _LOAD_IMMEDIATE_64 and code[at + 1] >> 4 == _PSEUDO_MAP_FD:
                number = int.from_bytes(code[at + 4 : at + 8], "little")
                if not 1 <= number <= len(self.maps):
                    raise ProgramRejected(f"instruction {at // _INSTRUCTION_BYTES} names unknown map {number}")
                code[at + 4 : at + 8] = fd_by_map[self.maps[number - 1]].to_bytes(4, "little")
        return bytes(code)


def build(
    folder: Path,
    *,
    main: str = "lb.c",
    function: str = "lb",
    constants: Mapping[str, int],
    maps: Sequence[str],
    cache: Path | None = None,
) -> Bytecode:
    """Compile ``folder/main`` with ``-D`` constants, or take the result of an earlier time from ``cache``.

    Blocks for about half a second when it compiles. Raises ProgramRejected with the compiler's
    last lines, XdpError when BCC or the kernel's headers are missing.
    """
    digest = _order_digest(folder, main, function, constants, maps)
    if cache is not None and (found := _read_cached(cache / digest)) is not None:
        return Bytecode(found, tuple(maps))
    defines = [f"-D{name}={value}" for name, value in sorted(constants.items())]
    defines += [f"-DFD_{name}={number}" for number, name in enumerate(maps, 1)]
    instructions = _compile(folder, main, function, defines)
    if cache is not None:
        _write_cached(cache / digest, instructions)
    return Bytecode(instructions, tuple(maps))


def bcc_version() -> str:
    """Version of the installed ``bcc`` distribution, '' when there is none (imports nothing)."""
    try:
        return importlib.metadata.version("bcc")
    except importlib.metadata.PackageNotFoundError:
        return ""


# --- kernel headers ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """Installed kernel headers. ``source`` differs from ``build`` where a distribution splits them."""

    release: str
    build: Path
    source: Path


def find_headers(release: str, modules: Path = Path("/lib/modules")) -> Headers | None:
    """Headers of this kernel, else the newest installed ones: XDP uses nothing but stable interfaces."""
    releases = sorted((p.parent.name for p in modules.glob("*/build")), key=_version_of, reverse=True)
    for name in [release, *releases]:
        build = modules / name / "build"
        source = modules / name / "source"
        source = source if source.is_dir() else build
        if (source / "include/linux/kconfig.h").is_file() and (build / "include/generated/autoconf.h").is_file():
            return Headers(release=name, build=build.resolve(), source=source.resolve())
    return None


def _version_of(release: str) -> list[int]:
    return [int(part) for part in release.replace("-", ".").split(".") if part.isdigit()]


def _merged(headers: Headers, into: Path) -> Path:
    """One tree of links: BCC knows split headers only at the running kernel's own place."""
    arch = {"x86_64": "x86", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    for part in ("include", f"arch/{arch}/include"):
        (into / part).mkdir(parents=True)
        for tree in dict.fromkeys((headers.source, headers.build)):
            for entry in (tree / part).iterdir():
                with contextlib.suppress(FileExistsError):
                    (into / part / entry.name).symlink_to(entry)
    return into


# --- parent ------------------------------------------------------------------------------------


def _order_digest(folder: Path, main: str, function: str, constants: Mapping[str, int], maps: Sequence[str]) -> str:
    """Names everything that can change the outcome."""
    digest = hashlib.sha256()
    order = [main, function, sorted(constants.items()), list(maps), bcc_version(), platform.release()]
    digest.update(json.dumps([*order, platform.machine()]).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".c", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _compile(folder: Path, main: str, function: str, defines: Sequence[str]) -> bytes:
    release = platform.release()
    headers = find_headers(release)
    if headers is None:
        raise XdpError("no kernel headers to compile with", hint=f"install linux-headers-{release}")
    if headers.release != release:
        _LOG.info("headers of another kernel used", headers=headers.release, kernel=release)
    order = {"text": str(folder / main), "function": function, "flags": [f"-I{folder}", *defines]}
    environment = {**os.environ, "PYTHONPATH": str(_PACKAGE_ROOT)}
    with tempfile.TemporaryDirectory(prefix="lbagent-headers-") as scratch:
        if headers.release != release:
            environment["BCC_KERNEL_SOURCE"] = str(_merged(headers, Path(scratch)))
        try:
            child = subprocess.run(
                [sys.executable, "-P", "-m", "lbagent.xdp.compile"],
                input=json.dumps(order).encode(),
                capture_output=True,
                timeout=_TIMEOUT_S,
                env=environment,
                cwd="/",
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise XdpError(f"the compiler did not end within {_TIMEOUT_S} s") from error
    if child.returncode == _NO_BCC:
        raise XdpError("BCC is not installed", hint=_BCC_HINT)
    if child.returncode == _NOT_BCC:
        raise XdpError("the installed Python package bcc is an unrelated library", hint=f"uninstall it; {_BCC_HINT}")
    if child.returncode or not child.stdout or len(child.stdout) % _INSTRUCTION_BYTES:
        said = child.stderr.decode("utf-8", "replace").rstrip().splitlines()[-_ERROR_LINES:]
        raise ProgramRejected("\n  ".join([f"{main} does not compile (exit {child.returncode})", *said]))
    return child.stdout


def _read_cached(path: Path) -> bytes | None:
    """A cached program, None when there is none or it is not whole (its first 32 bytes are its hash)."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    whole = len(content) > 32 and hashlib.sha256(content[32:]).digest() == content[:32]
    return content[32:] if whole else None


def _write_cached(path: Path, instructions: bytes) -> None:
    """Keep it, and the few newest others. A cache that cannot be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(hashlib.sha256(instructions).digest() + instructions)
        fresh.rename(path)
        by_age = sorted((p for p in path.parent.iterdir() if p.is_file()), key=lambda p: p.stat().st_mtime)
        for old in by_age[:-_CACHED_PROGRAMS]:
            old.unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning("bytecode not cached", path=str(path), error=str(error))


# --- child -------------------------------------------------------------------------------------


def _child(order_file: BinaryIO, result_file: BinaryIO) -> int:
    """Obey one order. BCC and clang write what they have to say to stderr."""
    order = json.load(order_file)
    try:
        import bcc
    except ImportError:
        return _NO_BCC
    if not hasattr(bcc, "BPF"):
        return _NOT_BCC
    source = Path(order["text"]).read_text(encoding="utf-8")
    text = f'#line 1 "{order["text"]}"\n{source}'  # so that errors name the file
    try:
        module = bcc.BPF(text=text.encode(), cflags=order["flags"])
        instructions = module.dump_func(order["function"].encode())
    except Exception as error:  # bcc raises nothing more specific
        sys.stderr.write(f"{error}\n")
        return 1
    result_file.write(instructions)
    result_file.flush()
    return 0


def _main() -> int:
    """Run as the child: stdout is for the bytecode alone, whatever the libraries print."""
    result = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return _child(sys.stdin.buffer, result)


if __name__ == "__main__":
    sys.exit(_main())
