# SPDX-License-Identifier: Apache-2.0
"""Network namespaces and the cables between them.

Everything here acts on names it is given and touches nothing else on the machine.
"""

import ctypes
import os
import socket
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute

from lbagent.xdp import bpf
from tests.lab.poll import LabError

NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000  # <linux/sched.h>

_libc = ctypes.CDLL(None, use_errno=True)


def run(*argv: str, text: str | None = None, fine: tuple[int, ...] = (0,)) -> str:
    """Run a command to its end and return what it printed; an exit code that is not ``fine`` says what and why."""
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode not in fine:
        raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def _setns(fd: int) -> None:
    # Python 3.11 has no os.setns. It moves the calling thread only.
    if _libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@dataclass(frozen=True)
class Namespace:
    """One machine of the lab. ``name`` carries the prefix of its lab."""

    name: str

    @property
    def path(self) -> Path:
        return NAMESPACES / self.name

    @property
    def exists(self) -> bool:
        return self.path.exists()

    def create(self) -> None:
        run("ip", "netns", "add", self.name)
        # No duplicate address detection (an address is usable at once), no autoconfiguration.
        self.sysctl(
            {
                "net/ipv6/conf/all/accept_dad": "0",
                "net/ipv6/conf/default/accept_dad": "0",
                "net/ipv6/conf/default/accept_ra": "0",
                "net/ipv4/conf/all/rp_filter": "0",
                "net/ipv4/conf/default/rp_filter": "0",
                "net/ipv4/conf/all/send_redirects": "0",
                "net/ipv4/conf/default/send_redirects": "0",
                "net/ipv4/conf/all/accept_redirects": "0",
                "net/ipv4/conf/default/accept_redirects": "0",
            }
        )
        self.ip("link set lo up")

    def delete(self) -> None:
        """Forget the name; the kernel frees the rest when the last process has left."""
        if self.exists:
            run("ip", "netns", "delete", self.name)

    def ip(self, *commands: str) -> None:
        """Perform these ``ip`` commands in one go."""
        run("ip", "-n", self.name, "-batch", "-", text="\n".join(commands) + "\n")

    def command(self, *argv: str) -> list[str]:
        """The command line that runs ``argv`` here.

        ``nsenter`` and not ``ip netns exec``: the latter remounts sysfs, which hides bpffs.
        """
        return ["nsenter", f"--net={self.path}", "--", *argv]

    def run(self, *argv: str, text: str | None = None, fine: tuple[int, ...] = (0,)) -> str:
        return run(*self.command(*argv), text=text, fine=fine)

    def sysctl(self, value_by_key: dict[str, str]) -> None:
        with self.entered():
            for key, value in value_by_key.items():
                (Path("/proc/sys") / key).write_text(value)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in this namespace inside the ``with``.

        A socket stays where it was made, so it may be used long after.
        """
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _setns(home)
        finally:
            os.close(home)


@dataclass(frozen=True)
class Port:
    """One end of a cable: a network device of a namespace."""

    namespace: Namespace
    device: str

    def up(self, *addresses: str) -> None:
        """``addresses`` as ``ip address add`` takes them, options included."""
        self.namespace.ip(
            *(f"address add {address} dev {self.device}" for address in addresses), f"link set {self.device} up"
        )

    def down(self) -> None:
        self.namespace.ip(f"link set {self.device} down")

    def offload(self, **on_by_feature: bool) -> None:
        """Switch offloads, for example ``offload(tx=False)``."""
        words = [word for feature, on in on_by_feature.items() for word in (feature, "on" if on else "off")]
        self.namespace.run("ethtool", "-K", self.device, *words)

    @property
    def mac(self) -> str:
        """Given by the name: a machine that comes back has the network cards that it had."""
        digits = f"{zlib.crc32(f'{self.namespace.name}/{self.device}'.encode()):08x}"
        return ":".join(["02", "1b", *(digits[at : at + 2] for at in range(0, 8, 2))])


def catch_reflected(port: Port) -> None:
    """Let this end receive what its peer sends by XDP_TX, by a program that passes everything.

    Attached by netlink, so it lives as long as the device and not as long as this process.
    """
    program = bpf.load_program(struct.pack("<BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0), name="lab_pass")
    try:
        with port.namespace.entered(), IPRoute() as route:
            route.link("set", index=socket.if_nametoindex(port.device), xdp_fd=program)
    finally:
        os.close(program)


def cable(left: Port, right: Port, *, mtu: int = 1500) -> None:
    """A veth pair, both ends still down.

    ``left`` is an end where XDP may run, ``right`` is its peer. XDP on veth has four traps:
    XDP_REDIRECT into a device whose peer has neither XDP nor GRO loses the frame without a trace (hence
    GRO at both ends), and so does XDP_TX unless the peer itself runs XDP (``catch_reflected``); a native
    program refuses a peer MTU above 3506; and frames that an end host sends carry only a partial
    checksum, which a redirect loses (end hosts: ``offload(tx=False)``).
    """
    left.namespace.ip(
        f"link add {left.device} mtu {mtu} address {left.mac} type veth "
        f"peer name {right.device} mtu {mtu} address {right.mac} netns {right.namespace.name}"
    )
    left.offload(gro=True)
    right.offload(gro=True)
