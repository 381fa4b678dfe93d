# SPDX-License-Identifier: Apache-2.0
"""What we tell systemd: sd_notify(3) over the datagram socket named by ``NOTIFY_SOCKET``.

The protocol is guaranteed stable by systemd. Debian 12's systemd has no ``Type=notify-reload``,
so RELOADING is sent by ourselves with the monotonic clock, as ``Type=notify`` allows.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping


class Notifier:
    """Every method returns whether systemd was told; without a socket nothing happens.

    A message that cannot be delivered never hurts the daemon: forwarding does not depend on it.
    """

    def __init__(self, address: str = "", *, monotonic: Callable[[], float] = time.monotonic) -> None:
        # "@name" means a name in the abstract namespace, which the kernel spells with a leading NUL.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._monotonic = monotonic

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Notifier":
        """The socket systemd gave this process, if any."""
        return cls(environ.get("NOTIFY_SOCKET", ""))

    def ready(self, status: str = "") -> bool:
        """Started, or reloaded."""
        return self._send("READY=1", *_status(status))

    def reloading(self) -> bool:
        """A reload begins; ``ready()`` ends it."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={int(self._monotonic() * 1_000_000)}")

    def stopping(self) -> bool:
        """The exit begins."""
        return self._send("STOPPING=1")

    def watchdog(self) -> bool:
        """Alive. Sent after a completed pass, never by a timer: a stuck loop must lose its watchdog."""
        return self._send("WATCHDOG=1")

    def status(self, text: str) -> bool:
        """One line for ``systemctl status``."""
        return self._send(*_status(text))

    def _send(self, *assignments: str) -> bool:
        if not self._address or not assignments:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
                sock.connect(self._address)
                sock.sendall("\n".join(assignments).encode())
        except OSError:
            return False
        return True


def watchdog_s(environ: Mapping[str, str] = os.environ, *, pid: int | None = None) -> float | None:
    """Seconds within which systemd expects ``watchdog()``, None when it watches nobody or another process."""
    usec = environ.get("WATCHDOG_USEC", "")
    watched = environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0:
        return None
    if watched and watched != str(os.getpid() if pid is None else pid):
        return None
    return int(usec) / 1_000_000


def _status(text: str) -> tuple[str, ...]:
    """A newline would start the next assignment."""
    return (f"STATUS={' '.join(text.split())}",) if text else ()
