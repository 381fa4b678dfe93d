# SPDX-License-Identifier: Apache-2.0
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbagent.notify import Notifier, watchdog_s


@pytest.fixture(params=["file", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A socket as systemd opens it, and the NOTIFY_SOCKET that names it."""
    address = str(tmp_path / "notify") if request.param == "file" else f"@lbagent-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        sock.settimeout(5)
        yield sock, address


def test_every_message_arrives_as_systemd_spells_it(systemd: tuple[socket.socket, str]) -> None:
    sock, address = systemd
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
    for send, expected in (
        (notifier.ready, "READY=1"),
        (lambda: notifier.ready("3 VIPs"), "READY=1\nSTATUS=3 VIPs"),
        (notifier.stopping, "STOPPING=1"),
        (notifier.watchdog, "WATCHDOG=1"),
        (lambda: notifier.status("12 VIPs"), "STATUS=12 VIPs"),
    ):
        assert send()
        assert sock.recv(4096).decode() == expected


def test_a_reload_carries_the_monotonic_clock(systemd: tuple[socket.socket, str]) -> None:
    sock, address = systemd
    assert Notifier(address, monotonic=lambda: 12.5).reloading()
    assert sock.recv(4096).decode() == "RELOADING=1\nMONOTONIC_USEC=12500000"


def test_a_status_cannot_smuggle_in_another_assignment(systemd: tuple[socket.socket, str]) -> None:
    sock, address = systemd
    Notifier(address).status("bad\nREADY=1")
    assert sock.recv(4096).decode() == "STATUS=bad READY=1"


def test_an_empty_status_is_not_sent() -> None:
    assert not Notifier("/nowhere").status("")


def test_without_systemd_nothing_happens() -> None:
    assert not Notifier.from_environment({}).ready()


def test_a_dead_socket_does_not_hurt_the_daemon(tmp_path: Path) -> None:
    assert not Notifier(str(tmp_path / "gone")).watchdog()


def test_a_full_socket_does_not_stall_the_daemon(systemd: tuple[socket.socket, str]) -> None:
    _, address = systemd
    notifier = Notifier(address)
    assert False in {notifier.watchdog() for _ in range(5000)}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_ours_only_when_it_names_us(environ: dict[str, str], expected: float | None) -> None:
    assert watchdog_s(environ, pid=7) == expected
