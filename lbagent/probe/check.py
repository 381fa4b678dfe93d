# SPDX-License-Identifier: Apache-2.0
"""One attempt at one target, and what came of it.

``Attempt`` is a small machine around one non-blocking socket: ``begin``, then ``advance`` whenever
the socket is ready, ``expire`` when time is up. Exactly one of these calls ends it and returns an
Outcome. It never waits, never reads more than 4 KiB, never follows a redirect and never raises.

Written by hand because of its price. CPU time of one HTTP probe on loopback, 2,000 a second (bench/probe.py):
aiohttp 350 us, asyncio streams 290 us, asyncio.Protocol 250 us; one epoll around these attempts 70 us,
judging and counting included (docs/benchmarks.md).

Every attempt ends with a RST (SO_LINGER 0): neither this host nor the node keeps a TIME_WAIT, and
the node's conntrack forgets the connection after 10 s instead of 120 s.
"""

import errno
import os
import re
import socket
import struct
from dataclasses import dataclass
from enum import StrEnum

from lbagent.errors import ProbeError
from lbagent.model.state import ProbeTarget

MAX_ANSWER = 4096
"""Bytes that are read of an answer; kube-proxy's is about 300."""

MAX_WEIGHT = 4096
"""Largest believable number of endpoints on one node (kubelet's default limit is 110 pods)."""

_NEVER_TIME_WAIT = struct.pack("ii", 1, 0)
_ALIVE = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE})
_SILENT = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN})
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})(?!\d)")
_LOCAL_ENDPOINTS = re.compile(rb'"localEndpoints"\s*:\s*([^\s,}]+)')
_PROXY_UNHEALTHY = re.compile(rb'"serviceProxyHealthy"\s*:\s*false')
_NODE_INELIGIBLE = re.compile(rb'"nodeEligible"\s*:\s*false')


class Answer(StrEnum):
    """What one attempt says of its target.

    ``up``: it vouches for itself. ``not_offered``: nobody offers this source there, so it has no
    opinion. ``closing``: it is alive, for it answered, but does not vouch: no new connections.
    ``down``: it does not answer. ``untried``: this host could not try, which says nothing about it.
    """

    UP = "up"
    NOT_OFFERED = "not_offered"
    CLOSING = "closing"
    DOWN = "down"
    UNTRIED = "untried"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of an attempt. ``weight`` as the node reports it; ``detail`` says in words what was seen."""

    answer: Answer
    weight: int | None = None
    detail: str = ""


CONNECTED = Outcome(answer=Answer.UP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of a target again and again. ``request`` is empty for a TCP probe."""

    target: ProbeTarget
    family: socket.AddressFamily
    request: bytes


def question(target: ProbeTarget) -> Question:
    """Prepare a target. Raises ProbeError when it cannot be probed."""
    family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
    try:
        socket.inet_pton(family, target.address)  # a name would be looked up, and block
    except (OSError, ValueError) as error:
        raise ProbeError(f"{target.address!r} is not an IP address", hint="check the node's addresses") from error
    if not 0 < target.port < 65536:
        raise ProbeError(f"{target.port} is not a port", hint="check the Service's node ports")
    path = {"tcp": "", "local": "/", "proxy": "/healthz"}.get(target.kind)
    if path is None:
        raise ProbeError(f"{target.kind!r} is not a kind of probe", hint="tcp, local or proxy")
    host = f"[{target.address}]" if family is socket.AF_INET6 else target.address
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{target.port}\r\nUser-Agent: lbagent\r\nConnection: close\r\n\r\n"
    return Question(target=target, family=family, request=request.encode() if path else b"")


class Attempt:
    """One attempt under way. ``began`` and ``deadline`` are on the caller's clock; it does not read them.

    ``fd`` is to be waited for, readable and writable; it stays known after the end, -1 before ``begin``.
    """

    __slots__ = ("_is_asked", "_received", "_socket", "began", "deadline", "fd", "question")

    def __init__(self, question: Question, *, began: float, deadline: float) -> None:
        self.question = question
        self.began = began
        self.deadline = deadline
        self.fd = -1
        self._socket: socket.socket | None = None
        self._is_asked = False
        self._received = b""

    @property
    def is_over(self) -> bool:
        """Has it not begun, or ended?"""
        return self._socket is None

    def begin(self) -> Outcome | None:
        """Start to connect. An Outcome when it is already over."""
        target = self.question.target
        try:
            self._socket = socket.socket(self.question.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self.fd = self._socket.fileno()
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NEVER_TIME_WAIT)
            error = self._socket.connect_ex((target.address, target.port))
        except OSError as refused:
            return self.fail(refused.errno or 0)
        return self.fail(error) if error not in (0, errno.EINPROGRESS) else None

    def advance(self) -> Outcome | None:
        """The socket is ready: go as far as it goes. An Outcome when that was the end."""
        if self._socket is None:
            return None
        try:
            if not self.question.request:
                error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                return self.fail(error) if error else self._end(CONNECTED)
            if not self._is_asked:
                self._socket.send(self.question.request)  # some 100 bytes into an empty buffer: all or an error
                self._is_asked = True
            while len(self._received) < MAX_ANSWER:
                chunk = self._socket.recv(MAX_ANSWER - len(self._received))
                self._received += chunk
                outcome = read(self._received, kind=self.question.target.kind, complete=not chunk)
                if outcome:
                    return self._end(outcome)
        except BlockingIOError:
            return None
        except OSError as error:
            return self.fail(error.errno or 0)
        return self._end(read(self._received, kind=self.question.target.kind, complete=True) or _ENDLESS_HEAD)

    def expire(self) -> Outcome:
        """Time is up."""
        allowed_s = self.deadline - self.began
        what = "the answer did not end" if self._received else "no answer" if self._is_asked else "no connection"
        return self._end(Outcome(answer=Answer.DOWN, detail=f"{what} within {allowed_s:g} s"))

    def excuse(self) -> Outcome:
        """Time is up, but this host did not look in time: no word about the target."""
        return self._end(Outcome(answer=Answer.UNTRIED, detail="this host was too busy to listen"))

    def fail(self, error: int) -> Outcome:
        """The kernel answered with an errno."""
        return self._end(_failure(error, kind=self.question.target.kind))

    def close(self) -> None:
        """Give the attempt up without an Outcome."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _end(self, outcome: Outcome) -> Outcome:
        self.close()
        return outcome


def _failure(error: int, *, kind: str) -> Outcome:
    """Errors that are about this host (no descriptor, no port, a firewall) say nothing about the target.

    A refusal proves that the node lives. kube-proxy's health ports close with it while its rules go on
    forwarding (measured): without 10256 there is no opinion, and without the health check port of a
    Service nobody vouches for the node any longer, but its connections live.
    """
    detail = os.strerror(error).lower()
    if error not in _ALIVE | _SILENT:
        return Outcome(answer=Answer.UNTRIED, detail=f"this host could not probe: {detail}")
    if kind == "tcp" or error in _SILENT:
        return Outcome(answer=Answer.DOWN, detail=detail)
    if kind == "proxy" and error == errno.ECONNREFUSED:
        return Outcome(answer=Answer.NOT_OFFERED, detail=detail)
    return Outcome(answer=Answer.CLOSING, detail=detail)


_ENDLESS_HEAD = Outcome(answer=Answer.CLOSING, detail=f"the head of the answer is longer than {MAX_ANSWER} bytes")


def read(received: bytes, *, kind: str, complete: bool) -> Outcome | None:
    """What an HTTP answer says, as soon as enough of it is there; None: more is needed.

    ``local`` and ``proxy`` as kube-proxy speaks (KEP-1669, KEP-3836): 200 vouches, 503 does not. Any
    other answer does not vouch either, but 404 on kube-proxy's port means that somebody else lives there.
    """
    status = _STATUS.match(received)
    if status is None:
        if complete and not received:
            return Outcome(answer=Answer.CLOSING, detail="closed without an answer")
        if complete or len(received) >= 13:  # "HTTP/1.1 200 " would have matched
            return Outcome(answer=Answer.CLOSING, detail=f"not HTTP: {quoted(received)}")
        return None
    end = received.find(b"\r\n\r\n")
    if end < 0:
        if complete and len(received) < MAX_ANSWER:
            return Outcome(answer=Answer.CLOSING, detail="closed within the head of the answer")
        return None
    code = int(status[1])
    if code == 200:
        return _vouched(received[:end], received[end:], complete=complete) if kind == "local" else _OK
    if code == 404 and kind == "proxy":
        return Outcome(answer=Answer.NOT_OFFERED, detail="HTTP 404")
    return Outcome(answer=Answer.CLOSING, detail=_why_not(code, received[:end], received[end:]))


_OK = Outcome(answer=Answer.UP, detail="HTTP 200")


def _vouched(head: bytes, body: bytes, *, complete: bool) -> Outcome | None:
    """The weight stands in a header, and in the body for kube-proxies that do not send the header."""
    text = _header(head, b"x-load-balancing-endpoint-weight")
    if text is None:
        found = _LOCAL_ENDPOINTS.search(body)
        if found is None:
            return Outcome(answer=Answer.UP, detail="HTTP 200, no weight") if complete else None
        if found.end() == len(body) and not complete:
            return None  # the number may go on
        text = found[1]
    if text.isdigit() and len(text) < 10 and int(text) <= MAX_WEIGHT:
        return Outcome(answer=Answer.UP, weight=int(text), detail="HTTP 200")
    return Outcome(answer=Answer.UP, detail=f"HTTP 200, weight {quoted(text)} is no number from 0 to {MAX_WEIGHT}")


def _header(head: bytes, name: bytes) -> bytes | None:
    """The first header of that name; ``head`` is without the empty line. (A regular expression costs 15 us more.)"""
    start = head.lower().find(b"\r\n" + name + b":")
    if start < 0:
        return None
    start += len(name) + 3
    end = head.find(b"\r\n", start)
    return head[start : end if end >= 0 else None].strip()


def _why_not(code: int, head: bytes, body: bytes) -> str:
    if 300 <= code < 400:
        location = _header(head, b"location")
        return f"HTTP {code}, redirect not followed" + (f": {quoted(location)}" if location else "")
    words = [f"HTTP {code}"]
    endpoints = _LOCAL_ENDPOINTS.search(body)
    if endpoints and endpoints[1] == b"0":
        words.append("no ready endpoint on the node")
    if _PROXY_UNHEALTHY.search(body):
        words.append("its rules lag behind")
    if _NODE_INELIGIBLE.search(body):
        words.append("the node is about to go")
    return ", ".join(words)


def quoted(foreign: bytes) -> str:
    """Foreign bytes for logs and terminals: printable ASCII, at most 40 of them."""
    text = repr(foreign[:40])[1:]
    return f"{text}…" if len(foreign) > 40 else text
