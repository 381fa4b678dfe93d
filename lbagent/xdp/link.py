# SPDX-License-Identifier: Apache-2.0
"""The program in the kernel and on the interfaces: loaded once, pinned, exchanged without a gap.

    <bpf>/programs/lb_<digest>            the program, named by its bytecode; two only during an exchange
    <bpf>/links/<native|generic>/<name>   the attachment to the interface of that name, a bpf_link

Both outlive the daemon. Only who holds the pin can take a bpf_link away, ``ip link ... xdp off``
cannot; it is exchanged by compare-and-swap against the program it runs (facts: no packet lost).
Native mode is demanded, never fallen back from: a silent generic mode would cost 10 × in speed.
"""

import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lbagent import log
from lbagent.config import Attach
from lbagent.errors import XdpError
from lbagent.xdp import bpf
from lbagent.xdp.bpf import KernelRefused
from lbagent.xdp.compile import Bytecode
from lbagent.xdp.pins import make_folder

_LOG = log.get("xdp")
_FLAG_BY_MODE = {Attach.NATIVE: bpf.Attach.DRIVER, Attach.GENERIC: bpf.Attach.GENERIC}


@dataclass(frozen=True, slots=True)
class Program:
    """A loaded program. ``fd`` stays open as long as the daemon lives."""

    fd: int
    id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """What an interface runs, read back from the kernel. ``program_id`` is the kernel's."""

    interface: str
    ifindex: int
    mode: Attach
    program_id: int


def program_name(bytecode: Bytecode, *, frags: bool) -> str:
    """``lb_<digest>``, ``lbf<digest>`` with multi-buffer packets: at most 15 characters."""
    return f"{'lbf' if frags else 'lb_'}{bytecode.digest}"


def interface_index(name: str) -> int:
    """Index of the interface here and now, 0 when there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


class Programs:
    """Programs pinned in a folder. ``open`` takes over what an earlier daemon left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program_by_name: dict[str, Program] = {}

    def open(self) -> None:
        """Open every pin."""
        make_folder(self._folder)
        for path in self._folder.iterdir():
            fd = bpf.open_pin(str(path))
            self._program_by_name[path.name] = Program(fd, bpf.program_info(fd).id, path.name)

    def load(self, bytecode: Bytecode, map_by_name: Mapping[str, bpf.Map], *, frags: bool) -> Program:
        """The program of this bytecode over these maps: the pinned one when it is the same."""
        name = program_name(bytecode, frags=frags)
        known = self._program_by_name.get(name)
        map_ids = {m.id for m in map_by_name.values()}
        if known is not None and set(bpf.program_info(known.fd).map_ids) <= map_ids:
            return known
        instructions = bytecode.bound({m: map_by_name[m].fd for m in bytecode.maps})
        fd = bpf.load_program(instructions, name=name, flags=bpf.ProgramFlag.FRAGS if frags else bpf.ProgramFlag.NONE)
        if known is not None:  # same code over maps that are gone: keep it open, attached links still run it
            self._program_by_name[f"{name} before"] = known
            (self._folder / name).unlink(missing_ok=True)
        program = Program(fd, bpf.program_info(fd).id, name)
        bpf.pin(fd, str(self._folder / name))
        self._program_by_name[name] = program
        _LOG.info("program loaded", program=name, instructions=len(instructions) // 8)
        return program

    def pin_again(self) -> tuple[str, ...]:
        """Make the pins that somebody removed -> their names."""
        make_folder(self._folder)
        missing = [(key, p) for key, p in self._program_by_name.items() if key == p.name]
        missing = [(key, p) for key, p in missing if not (self._folder / key).exists()]
        for key, program in missing:
            bpf.pin(program.fd, str(self._folder / key))
        return tuple(key for key, _ in missing)

    def find(self, program_id: int) -> Program | None:
        """A program of ours by its kernel id."""
        return next((p for p in self._program_by_name.values() if p.id == program_id), None)

    def forget_all_but(self, program: Program) -> None:
        """Unpin what no link runs any more."""
        for key, other in list(self._program_by_name.items()):
            if other.id != program.id:
                if key == other.name:
                    (self._folder / key).unlink(missing_ok=True)
                os.close(other.fd)
                del self._program_by_name[key]

    def close(self) -> None:
        """Let go of the descriptors; the pins keep everything alive."""
        for program in self._program_by_name.values():
            os.close(program.fd)
        self._program_by_name.clear()


@dataclass(frozen=True, slots=True)
class _Link:
    fd: int
    mode: Attach
    path: Path


class Links:
    """Our attachments, one pinned bpf_link per interface."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        self._folder = folder
        self._programs = programs
        self._link_by_interface: dict[str, _Link] = {}

    def open(self) -> None:
        """Take over the links that an earlier daemon pinned and whose interface is still there."""
        for mode in Attach:
            folder = self._folder / mode
            make_folder(folder)
            for path in folder.iterdir():
                fd = bpf.open_pin(str(path))
                self._link_by_interface[_interface_of(path.name)] = _Link(fd, mode, path)
        self.drop_dead()

    def attach(self, interface: str, program: Program, mode: Attach) -> bool:
        """Make the interface run the program -> whether anything was changed.

        Raises XdpError: no such interface, a driver without native XDP, an MTU the program cannot
        take, somebody else's program.
        """
        ifindex = interface_index(interface)
        if not ifindex:
            raise XdpError(f"there is no interface {interface}", hint="correct xdp.interfaces, or create it")
        self.drop_dead()
        link = self._link_by_interface.get(interface)
        if link is not None and link.mode is not mode:  # the kernel has no exchange of modes: packets pass by us now
            self.detach(interface)
            link = None
        if link is None:
            self._create(interface, ifindex, program, mode)
            return True
        running = bpf.link_info(link.fd).program_id
        if running == program.id:
            return False
        before = self._programs.find(running)
        try:
            bpf.replace_program(link.fd, program.fd, before.fd if before is not None else None)
        except KernelRefused as error:
            raise self._refusal(interface, error) from error
        _LOG.info("program replaced", interface=interface, program=program.name, before=before.name if before else "?")
        return True

    def pin_again(self) -> tuple[str, ...]:
        """Make the pins that somebody removed -> their interfaces. Without one a link ends with the daemon."""
        missing = [(name, link) for name, link in self._link_by_interface.items() if not link.path.exists()]
        for _, link in missing:
            make_folder(link.path.parent)
            bpf.pin(link.fd, str(link.path))
        return tuple(name for name, _ in missing)

    def attached(self) -> dict[str, Attachment]:
        """What the kernel really runs, by interface name."""
        found = {}
        for interface, link in self._link_by_interface.items():
            info = bpf.link_info(link.fd)
            if info.ifindex and info.ifindex == interface_index(interface):
                found[interface] = Attachment(
                    interface=interface, ifindex=info.ifindex, mode=link.mode, program_id=info.program_id
                )
        return found

    def detach(self, interface: str) -> None:
        """Take our program off the interface."""
        link = self._link_by_interface.get(interface)
        if link is not None:
            bpf.detach_link(link.fd)
            self._drop(interface)
            _LOG.info("program detached", interface=interface)

    def interfaces(self) -> frozenset[str]:
        """Names of the interfaces we hold a link for."""
        return frozenset(self._link_by_interface)

    def drop_dead(self) -> None:
        """Forget links whose interface was deleted, or bears another name now."""
        for interface, link in list(self._link_by_interface.items()):
            ifindex = bpf.link_info(link.fd).ifindex
            if not ifindex or ifindex != interface_index(interface):
                _LOG.warning("attachment lost with its interface", interface=interface)
                self._drop(interface)

    def close(self) -> None:
        """Let go of the descriptors; the pins keep the program attached."""
        for link in self._link_by_interface.values():
            os.close(link.fd)
        self._link_by_interface.clear()

    def _create(self, interface: str, ifindex: int, program: Program, mode: Attach) -> None:
        try:
            fd = bpf.create_link(program.fd, ifindex, _FLAG_BY_MODE[mode])
        except KernelRefused as error:
            raise self._refusal(interface, error) from error
        path = self._folder / mode / _pin_of(interface)
        bpf.pin(fd, str(path))
        self._link_by_interface[interface] = _Link(fd, mode, path)
        _LOG.info("program attached", interface=interface, program=program.name, mode=mode)

    def _drop(self, interface: str) -> None:
        link = self._link_by_interface.pop(interface)
        os.close(link.fd)
        link.path.unlink(missing_ok=True)

    def _refusal(self, interface: str, error: KernelRefused) -> XdpError:
        message, hint = error.message, error.hint
        match error.errno:
            case errno.EBUSY | errno.EEXIST:
                message = f"interface {interface} runs an XDP program that is not ours"
                hint = f"look with: ip -d link show dev {interface}; remove it, then restart lbagent"
            case errno.EOPNOTSUPP:
                message = f"the driver of {interface} has no native XDP"
                hint = "use a NIC whose driver has it, or set xdp.attach: generic (10 times slower)"
            case errno.ERANGE | errno.EINVAL:
                message = f"the driver of {interface} refuses XDP: {os.strerror(error.errno)}"
                hint = "lower the MTU (3506 at most where the program takes no fragments), switch LRO off; see dmesg"
            case errno.EPERM:
                message = f"somebody else replaced the program on {interface}"
                hint = "only one lbagent may run on a host"
        return KernelRefused(message, hint=hint, errno=error.errno)


def _pin_of(interface: str) -> str:
    # bpffs keeps names with a dot for itself.
    return interface.replace("%", "%25").replace(".", "%2E")


def _interface_of(pin: str) -> str:
    return pin.replace("%2E", ".").replace("%25", "%")
