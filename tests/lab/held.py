# SPDX-License-Identifier: Apache-2.0
"""Connections that are opened before a fault, held through it, and used again after it."""

import contextlib
import socket
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from tests.lab.netns import Namespace

REQUEST = b"GET / HTTP/1.1\r\nHost: lab\r\n\r\n"
TIMEOUT_S = 3.0


class Held:
    """``count`` connections, each used once when it was opened. Raises OSError when one cannot be."""

    def __init__(self, namespace: Namespace, address: str, port: int, *, count: int = 10) -> None:
        self.namespace = namespace
        self.address = address
        self.port = port
        self.count = count
        self._connections: list[socket.socket] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self.namespace.entered():
            for _ in range(self.count):
                opened = socket.create_connection((self.address, self.port), timeout=TIMEOUT_S)
                self._connections.append(self._stack.enter_context(opened))
        if self.survivors() < self.count:
            self._stack.close()
            raise OSError("a connection that was just opened does not answer")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def survivors(self) -> int:
        """How many answer a request now."""
        alive = 0
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.sendall(REQUEST)
                alive += connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        return alive
