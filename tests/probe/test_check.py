# SPDX-License-Identifier: Apache-2.0
"""The other end is played by hand on real sockets of loopback: accept, read, send, close."""

import errno
import re
import select
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbagent.errors import ProbeError
from lbagent.model.state import ProbeTarget
from lbagent.probe import check
from lbagent.probe.check import MAX_ANSWER, MAX_WEIGHT, Answer, Attempt, Outcome, question, read

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
PATIENCE_S = 5.0


def answer(status: str, *headers: str, body: str = "") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", body]).encode()


def up(weight: int | None = None) -> Outcome:
    return Outcome(answer=Answer.UP, weight=weight, detail="HTTP 200")


def closing(detail: str) -> Outcome:
    return Outcome(answer=Answer.CLOSING, detail=detail)


def local(body: str = "", *, status: str = "200 OK", weight: str | None = None) -> bytes:
    return answer(status, *([] if weight is None else [f"X-Load-Balancing-Endpoint-Weight: {weight}"]), body=body)


# -- what an answer says


@pytest.mark.parametrize(
    ("kind", "received", "expected"),
    [
        ("local", local(weight="3"), up(3)),
        ("local", local(weight="0"), up(0)),
        # kube-proxies before the header: the body
        ("local", local('{"localEndpoints":12,'), up(12)),
        ("local", local('{"localEndpoints": 12}'), up(12)),
        # both: the header
        ("local", local('{"localEndpoints":9}', weight="3"), up(3)),
        ("local", local("hello"), Outcome(answer=Answer.UP, detail="HTTP 200, no weight")),
        (
            "local",
            local('{"localEndpoints":0,"serviceProxyHealthy":true}', status="503 Service Unavailable", weight="0"),
            closing("HTTP 503, no ready endpoint on the node"),
        ),
        (
            "local",
            local('{"localEndpoints": 2, "serviceProxyHealthy": false}', status="503 Service Unavailable"),
            closing("HTTP 503, its rules lag behind"),
        ),
        ("proxy", answer("200 OK"), up()),
        (
            "proxy",
            answer("503 Service Unavailable", body='{"currentTime": "", "nodeEligible": false}'),
            closing("HTTP 503, the node is about to go"),
        ),
        ("proxy", answer("404 Not Found"), Outcome(answer=Answer.NOT_OFFERED, detail="HTTP 404")),
        ("local", answer("404 Not Found"), closing("HTTP 404")),
        ("proxy", answer("500 Oops"), closing("HTTP 500")),
        (
            "proxy",
            answer("302 Found", "Location: http://192.0.2.1/"),
            closing("HTTP 302, redirect not followed: 'http://192.0.2.1/'"),
        ),
        ("proxy", answer("301 Moved"), closing("HTTP 301, redirect not followed")),
        ("proxy", b"", closing("closed without an answer")),
        ("proxy", b"HTTP/1.1 200 OK\r\n", closing("closed within the head of the answer")),
        ("proxy", b"SSH-2.0-x\r\n", closing(r"not HTTP: 'SSH-2.0-x\r\n'")),
        ("proxy", b"HTTP/1.1 99", closing("not HTTP: 'HTTP/1.1 99'")),
        ("proxy", b"HTTP/1.1 2000 OK\r\n\r\n", closing(r"not HTTP: 'HTTP/1.1 2000 OK\r\n\r\n'")),
        ("proxy", b"HTTP/1.0 200 OK\r\n\r\n", up()),
        ("proxy", b"HTTP/1.1 200 OK\n\n", closing("closed within the head of the answer")),
    ],
)
def test_a_whole_answer_is_read_as(kind: str, received: bytes, expected: Outcome) -> None:
    assert read(received, kind=kind, complete=True) == expected


BAD_WEIGHTS = ["-3", "1000000000", str(MAX_WEIGHT + 1), "3.5", "0x10", "many", "²", "٣"]


@pytest.mark.parametrize(
    "received",
    [
        *(local(weight=weight) for weight in [*BAD_WEIGHTS, "", "1 2"]),
        *(local(f'{{"localEndpoints":{weight},"x":1}}') for weight in BAD_WEIGHTS),
    ],
)
def test_a_weight_that_cannot_be_is_named_and_not_taken(received: bytes) -> None:
    outcome = read(received, kind="local", complete=True)
    assert outcome
    assert outcome.answer is Answer.UP
    assert outcome.weight is None
    assert re.fullmatch(rf"HTTP 200, weight '.*' is no number from 0 to {MAX_WEIGHT}", outcome.detail)


def test_the_header_is_found_in_any_case_and_only_in_the_head() -> None:
    name = b"x-LOAD-balancing-endpoint-WEIGHT"
    assert read(b"HTTP/1.1 200 OK\r\n%b:4\r\n\r\n" % name, kind="local", complete=False) == up(4)
    outcome = read(b"HTTP/1.1 200 OK\r\n\r\nx\r\n%b: 4\r\n" % name, kind="local", complete=True)
    assert outcome
    assert outcome.weight is None


def test_no_answer_is_given_before_enough_is_there() -> None:
    """The same Outcome for every way in which the network may cut the answer."""
    for whole in (local(weight="12"), local('{"localEndpoints":12}'), answer("503 No"), answer("404 No")):
        end = read(whole, kind="local", complete=True)
        for length in range(len(whole)):
            early = read(whole[:length], kind="local", complete=False)
            assert early in (None, end), whole[:length]
        assert read(whole, kind="local", complete=False) == end


def test_the_weight_is_enough_and_the_rest_of_the_body_is_not_waited_for() -> None:
    assert read(local(weight="3"), kind="local", complete=False)
    assert read(answer("200 OK", "Content-Length: 99999"), kind="proxy", complete=False)


@given(received=st.binary(max_size=300), kind=st.sampled_from(["local", "proxy"]))
def test_garbage_is_an_outcome_with_a_printable_detail(received: bytes, kind: str) -> None:
    outcome = read(received, kind=kind, complete=True)
    assert outcome
    assert outcome.detail.isprintable()
    assert len(outcome.detail) < 200


@given(tail=st.binary(max_size=300), status=st.sampled_from([200, 204, 302, 404, 503]))
def test_garbage_after_a_status_line_is_an_outcome_with_a_printable_detail(tail: bytes, status: int) -> None:
    outcome = read(b"HTTP/1.1 %d x\r\n" % status + tail + b"\r\n\r\n" + tail, kind="local", complete=True)
    assert outcome
    assert outcome.detail.isprintable()
    assert len(outcome.detail) < 260


# -- what can be asked


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (ProbeTarget("node1.example", "tcp", 80), "'node1.example' is not an IP address"),
        (ProbeTarget("", "tcp", 80), "'' is not an IP address"),
        (ProbeTarget("192.0.2.1\0", "tcp", 80), r"'192.0.2.1\x00' is not an IP address"),
        (ProbeTarget("192.0.2.1", "tcp", 0), "0 is not a port"),
        (ProbeTarget("192.0.2.1", "tcp", 65536), "65536 is not a port"),
        (ProbeTarget("192.0.2.1", "icmp", 80), "'icmp' is not a kind of probe"),
    ],
)
def test_a_target_that_cannot_be_probed_is_named(target: ProbeTarget, named: str) -> None:
    with pytest.raises(ProbeError, match=re.escape(named)) as raised:
        question(target)
    assert raised.value.hint


# -- over the wire


class Node:
    """The other end. ``begin`` starts an attempt at it, ``finish`` plays the attempt to its end."""

    def __init__(self, family: socket.AddressFamily = socket.AF_INET) -> None:
        self.listener = socket.create_server((LOOPBACK[family], 0), family=family)
        self.listener.settimeout(PATIENCE_S)
        self.address, self.port = self.listener.getsockname()[:2]
        self.peer: socket.socket | None = None

    def begin(self, kind: str) -> Attempt:
        target = ProbeTarget(self.address, kind, self.port)
        attempt = Attempt(question(target), began=10.0, deadline=10.4)
        assert attempt.begin() is None
        return attempt

    def accept(self, attempt: Attempt) -> socket.socket:
        """Accept, let the attempt ask, and return the peer with the request read."""
        self.peer, _ = self.listener.accept()
        self.peer.settimeout(PATIENCE_S)
        wait(attempt, select.POLLOUT)
        assert attempt.advance() is None
        self.request = self.peer.recv(4096)
        return self.peer

    def close(self) -> None:
        self.listener.close()
        if self.peer:
            self.peer.close()


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.close()


def wait(attempt: Attempt, events: int) -> None:
    poll = select.poll()
    poll.register(attempt.fd, events)
    assert poll.poll(PATIENCE_S * 1000), "the socket did not become ready"


def finish(attempt: Attempt) -> Outcome:
    """What the attempt makes of all that arrives."""
    while not attempt.is_over:
        wait(attempt, select.POLLIN)
        outcome = attempt.advance()
        if outcome:
            return outcome
    raise AssertionError("it ended without an Outcome")


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_health_port_is_asked_and_understood(family: socket.AddressFamily) -> None:
    node = Node(family)
    try:
        attempt = node.begin("local")
        peer = node.accept(attempt)
        host = "127.0.0.1" if family is socket.AF_INET else "[::1]"
        assert node.request.startswith(b"GET / HTTP/1.1\r\n")
        assert f"\r\nHost: {host}:{node.port}\r\n".encode() in node.request
        assert node.request.endswith(b"\r\n\r\n")
        peer.sendall(local('{"localEndpoints":2}', weight="2"))
        assert finish(attempt) == up(2)
    finally:
        node.close()


def test_kube_proxy_is_asked_for_healthz(node: Node) -> None:
    attempt = node.begin("proxy")
    node.accept(attempt).sendall(answer("200 OK"))
    assert node.request.startswith(b"GET /healthz HTTP/1.1\r\n")
    assert finish(attempt).answer is Answer.UP


def test_a_tcp_probe_connects_and_says_nothing(node: Node) -> None:
    attempt = node.begin("tcp")
    wait(attempt, select.POLLOUT)
    assert attempt.advance() == Outcome(answer=Answer.UP)
    peer, _ = node.listener.accept()
    with peer, pytest.raises(ConnectionResetError):
        peer.recv(1)


@pytest.mark.parametrize("kind", ["local", "proxy", "tcp"])
def test_an_attempt_ends_with_a_reset_so_that_nobody_keeps_a_time_wait(node: Node, kind: str) -> None:
    attempt = node.begin(kind)
    if kind == "tcp":
        wait(attempt, select.POLLOUT)
        assert attempt.advance()
        peer, _ = node.listener.accept()
    else:
        peer = node.accept(attempt)
        peer.sendall(local(weight="1"))
        finish(attempt)
    with peer, pytest.raises(ConnectionResetError):
        peer.recv(1)
    assert attempt.is_over


def test_an_answer_in_drops_is_put_together(node: Node) -> None:
    attempt = node.begin("local")
    peer = node.accept(attempt)
    whole = local('{"localEndpoints":17}')
    for place in range(len(whole) - 1):
        peer.sendall(whole[place : place + 1])
        wait(attempt, select.POLLIN)
        assert attempt.advance() is None, whole[: place + 1]
    peer.sendall(whole[-1:])
    assert finish(attempt).weight == 17


def test_a_server_that_talks_first_is_heard(node: Node) -> None:
    """Its banner is already there when the request goes out, and no second readiness follows."""
    attempt = node.begin("proxy")
    node.peer, _ = node.listener.accept()
    node.peer.sendall(b"220 mail.example ESMTP\r\n")
    wait(attempt, select.POLLIN)
    outcome = attempt.advance()
    assert outcome == closing(r"not HTTP: '220 mail.example ESMTP\r\n'")


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000, id="head"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000_000, id="body"),
        pytest.param(b"\0" * 1_000_000, id="garbage"),
    ],
)
def test_a_huge_answer_is_read_up_to_4_kib(node: Node, flood: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def spy(received: bytes, *, kind: str, complete: bool) -> Outcome | None:
        lengths.append(len(received))
        return read(received, kind=kind, complete=complete)

    monkeypatch.setattr(check, "read", spy)
    attempt = node.begin("local")
    peer = node.accept(attempt)
    peer.setblocking(False)
    assert peer.send(flood) > MAX_ANSWER
    outcome = finish(attempt)
    assert max(lengths) <= MAX_ANSWER
    expected = {
        b"H": (Answer.CLOSING, f"the head of the answer is longer than {MAX_ANSWER} bytes"),
        b"\0": (Answer.CLOSING, f"not HTTP: {check.quoted(flood)}"),
    }
    if b"\r\n\r\n" in flood:
        assert outcome == Outcome(answer=Answer.UP, detail="HTTP 200, no weight")
    else:
        assert (outcome.answer, outcome.detail) == expected[flood[:1]]


def test_a_node_that_closes_or_resets_instead_of_answering_is_alive_but_does_not_vouch(node: Node) -> None:
    attempt = node.begin("local")
    node.accept(attempt).close()
    assert finish(attempt) == closing("closed without an answer")

    attempt = node.begin("local")
    peer = node.accept(attempt)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    assert finish(attempt) == closing("connection reset by peer")


@pytest.mark.parametrize(
    ("kind", "expected"), [("tcp", Answer.DOWN), ("local", Answer.CLOSING), ("proxy", Answer.NOT_OFFERED)]
)
def test_a_refusal_means_something_else_to_each_kind(node: Node, kind: str, expected: Answer) -> None:
    node.listener.close()
    target = ProbeTarget(node.address, kind, node.port)
    attempt = Attempt(question(target), began=0.0, deadline=1.0)
    outcome = attempt.begin()
    if outcome is None:
        wait(attempt, select.POLLOUT)
        outcome = attempt.advance()
    assert outcome == Outcome(answer=expected, detail="connection refused")
    assert attempt.is_over


@pytest.mark.parametrize(
    ("steps", "detail"),
    [
        (0, "no connection within 0.4 s"),
        (1, "no answer within 0.4 s"),
        (2, "the answer did not end within 0.4 s"),
    ],
)
def test_an_attempt_that_expires_says_how_far_it_came(node: Node, steps: int, detail: str) -> None:
    attempt = node.begin("local")
    if steps:
        peer = node.accept(attempt)
        if steps == 2:
            peer.sendall(b"HTTP/1.1 200 OK\r\n")
            wait(attempt, select.POLLIN)
            assert attempt.advance() is None
    assert attempt.expire() == Outcome(answer=Answer.DOWN, detail=detail)
    assert attempt.is_over


@pytest.mark.parametrize("kind", ["tcp", "local", "proxy"])
@pytest.mark.parametrize("error", [errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT])
def test_a_node_that_the_network_cannot_reach_is_down(kind: str, error: int) -> None:
    attempt = Attempt(question(ProbeTarget("192.0.2.1", kind, 80)), began=0.0, deadline=1.0)
    assert attempt.fail(error).answer is Answer.DOWN


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.EPERM])
def test_what_this_host_cannot_do_is_not_held_against_the_node(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(error, "no")

    monkeypatch.setattr(socket, "socket", refuse)
    attempt = Attempt(question(ProbeTarget("192.0.2.1", "tcp", 80)), began=0.0, deadline=1.0)
    outcome = attempt.begin()
    assert outcome
    assert outcome.answer is Answer.UNTRIED
    assert outcome.detail.startswith("this host could not probe: ")
    assert attempt.is_over


def test_news_for_an_attempt_that_is_over_changes_nothing(node: Node) -> None:
    attempt = node.begin("tcp")
    attempt.expire()
    assert attempt.advance() is None
