# SPDX-License-Identifier: Apache-2.0
"""Requests from a namespace, each one written down.

One request is one TCP connection, one GET, one answer; nothing is retried by us. What the kernel had to
retransmit is written down as well, because a retransmitted SYN is a packet that somebody lost.
"""

import asyncio
import json
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from tests.lab.netns import Namespace
from tests.lab.poll import LabError

TCP_INFO_TOTAL_RETRANS = 100  # offset of tcpi_total_retrans in struct tcp_info, <linux/tcp.h>


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. ``sent_s`` is monotonic; ``error`` is empty when the whole answer came.

    ``client`` is our own address and port.
    """

    sent_s: float
    duration_s: float
    error: str = ""
    answer: dict[str, Any] = field(default_factory=dict)
    client: tuple[str, int] = ("", 0)
    retransmits: int = 0

    @property
    def ok(self) -> bool:
        return not self.error


@dataclass(frozen=True)
class Ledger:
    """What was sent and what came of it."""

    requests: tuple[Request, ...]

    @property
    def sent(self) -> int:
        return len(self.requests)

    @property
    def failures(self) -> tuple[Request, ...]:
        return tuple(one for one in self.requests if not one.ok)

    @property
    def retransmits(self) -> int:
        return sum(one.retransmits for one in self.requests)

    @property
    def by_pod(self) -> dict[str, int]:
        return _counted(one.answer.get("pod", "?") for one in self.requests if one.ok)

    @property
    def by_error(self) -> dict[str, int]:
        return _counted(one.error for one in self.failures)

    @property
    def by_source(self) -> dict[str, int]:
        """By the source address that the pods saw."""
        return _counted(one.answer.get("source", "?") for one in self.requests if one.ok)

    @property
    def longest_ms(self) -> float:
        return max((one.duration_s * 1000 for one in self.requests), default=0.0)

    @property
    def median_ms(self) -> float:
        durations = sorted(one.duration_s * 1000 for one in self.requests if one.ok)
        return durations[len(durations) // 2] if durations else 0.0

    def between(self, first_s: float, last_s: float = float("inf")) -> "Ledger":
        """Requests sent in this stretch of monotonic time."""
        return Ledger(tuple(one for one in self.requests if first_s <= one.sent_s < last_s))

    def summary(self) -> dict[str, Any]:
        """For demo.json."""
        return {
            "sent": self.sent,
            "failed": len(self.failures),
            "errors": self.by_error,
            "retransmitted_segments": self.retransmits,
            "by_pod": self.by_pod,
            "median_ms": round(self.median_ms, 2),
            "longest_ms": round(self.longest_ms, 2),
        }


def _counted(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items()))


async def get(address: str, port: int, *, timeout_s: float = 2.0, path: str = "/") -> Request:
    """One request of the calling thread's namespace."""
    sent_s = time.monotonic()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    loop = asyncio.get_running_loop()
    error, answer = "", {}
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            async with asyncio.timeout(timeout_s):
                await loop.sock_connect(sock, (address, port))
                await loop.sock_sendall(sock, f"GET {path} HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n".encode())
                answer = json.loads(await _body(loop, sock))
        except TimeoutError:
            error = f"no answer in {timeout_s:g} s"
        except OSError as problem:
            error = os.strerror(problem.errno) if problem.errno else repr(problem)  # asyncio words it differently
        except ValueError as problem:
            error = f"not an answer: {problem}"
        client = sock.getsockname()[:2]
        numbers = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_TOTAL_RETRANS + 4)
        (retransmits,) = struct.unpack_from("=I", numbers, TCP_INFO_TOTAL_RETRANS)
    return Request(
        sent_s=sent_s,
        duration_s=time.monotonic() - sent_s,
        error=error,
        answer=answer,
        client=client,
        retransmits=retransmits,
    )


async def _body(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    """The body of an answer that ends with the connection."""
    received = b""
    while part := await loop.sock_recv(sock, 65536):
        received += part
    head, end, body = received.partition(b"\r\n\r\n")
    if not end or not head.startswith(b"HTTP/1.1 200 "):
        raise ValueError(repr(received[:60]))
    return body


class Load:
    """A steady stream of requests for as long as the ``with`` lasts.

    ``rate`` is requests begun per second; a slow answer delays nobody. Ends by itself after ``limit_s``.
    """

    def __init__(
        self,
        namespace: Namespace,
        address: str,
        port: int,
        *,
        rate: float,
        timeout_s: float = 2.0,
        limit_s: float = 120.0,
    ) -> None:
        self.namespace = namespace
        self.address = address
        self.port = port
        self.rate = rate
        self.timeout_s = timeout_s
        self.limit_s = limit_s
        self.count: int | None = None
        self._requests: list[Request] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._crash: BaseException | None = None

    @property
    def ledger(self) -> Ledger:
        """What is finished so far."""
        return Ledger(tuple(sorted(self._requests, key=lambda one: one.sent_s)))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        self._thread.join(self.limit_s + self.timeout_s)
        if self._crash:
            raise LabError(f"the request generator broke: {self._crash!r}") from self._crash

    def _run(self) -> None:
        try:
            with self.namespace.entered():
                asyncio.run(self._stream())
        except BaseException as error:
            self._crash = error

    async def _stream(self) -> None:
        begun = time.monotonic()
        number = 0
        async with asyncio.TaskGroup() as group:
            while not self._stop.is_set() and (self.count is None or number < self.count):
                due = begun + number / self.rate
                if due - begun > self.limit_s:
                    return
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                group.create_task(self._one())
                number += 1

    async def _one(self) -> None:
        self._requests.append(await get(self.address, self.port, timeout_s=self.timeout_s))


def burst(
    namespace: Namespace, address: str, port: int, *, count: int, rate: float = 200.0, timeout_s: float = 2.0
) -> Ledger:
    """``count`` requests at a bounded rate, to their ends."""
    load = Load(namespace, address, port, rate=rate, timeout_s=timeout_s)
    load.count = count
    load._thread.start()
    load.join()
    return load.ledger


def ask_udp(namespace: Namespace, address: str, port: int, text: str, *, timeout_s: float = 1.0) -> dict[str, Any]:
    """One datagram and its answer. Raises OSError (TimeoutError when nothing comes)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with namespace.entered():
        sock = socket.socket(family, socket.SOCK_DGRAM)
    with sock:
        sock.settimeout(timeout_s)
        sock.connect((address, port))
        sock.send(text.encode())
        answer: dict[str, Any] = json.loads(sock.recv(65536))
        return answer
