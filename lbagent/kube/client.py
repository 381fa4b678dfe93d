# SPDX-License-Identifier: Apache-2.0
"""The door to the API server: credentials, TLS, time limits, errors. The only importer of kubernetes.

kubernetes.aio reads the kubeconfig and makes the TLS session; bodies stay raw JSON, because its
models refuse fields they do not know. Every call has a limit on this side, and every write one on
the server's side too (``timeout=``), so that nothing we sent is carried out long after we gave it
up: lease.py counts on that.

Credentials are read again every minute (token files and certificates rotate) and after a 401.
"""

import asyncio
import contextlib
import datetime
import json
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import load_kube_config

from lbagent.errors import KubeGone, KubeRejected, KubeUnavailable

Json = dict[str, Any]

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"

CREDENTIALS_AGE_S = 60.0
DEAD_PEER_S = 5
"""The kernel gives a connection up when what was sent is not acknowledged for this long: a cut link is
noticed on an idle watch within 15 s (measured: 12). It also ends the second life of a write whose
sender has gone: bytes that wait in the send queue."""

_HINT_BY_STATUS = {
    401: "the credentials in the kubeconfig are not valid (any more)",
    403: "grant the verbs of lbagent's ClusterRole and Role (ansible/files/rbac.yaml)",
}


class KubeSilent(KubeUnavailable):
    """A watch on which nothing arrived for too long."""


@dataclass(frozen=True, slots=True)
class _Session:
    """Credentials as read, and the connections made with them."""

    url: str
    token: str
    fingerprint: tuple[object, ...]
    rest: RESTClientObject


class _Rest(RESTClientObject):
    """The library's session with sockets that notice a dead peer."""

    def _create_connector(self) -> aiohttp.TCPConnector:
        return aiohttp.TCPConnector(ssl=self.ssl_context, limit=0, socket_factory=_open_socket)


def _open_socket(address: tuple[Any, ...]) -> socket.socket:
    family, type_, protocol = address[:3]
    opened = socket.socket(family, type_, protocol)
    opened.setblocking(False)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_PEER_S)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_S * 1000)
    return opened


class Client:
    """One API server, as one user. ``timeout_s`` limits every call but a watch.

    Raises KubeUnavailable (no answer, 429, 5xx, an unusable kubeconfig: it may be mended),
    KubeGone (410), KubeRejected (any other no, with its status). ``clock`` in seconds.
    """

    def __init__(self, kubeconfig: Path, *, timeout_s: float, clock: Callable[[], float]) -> None:
        self._kubeconfig = kubeconfig
        self._timeout_s = timeout_s
        self._clock = clock
        self._session: _Session | None = None
        self._read_at = 0.0
        self._retired: list[RESTClientObject] = []

    async def get(self, path: str, **query: str | int) -> Json:
        """An object or a list."""
        return await self._call("GET", path, query, timeout_s=self._timeout_s)

    async def send(
        self,
        method: str,
        path: str,
        body: Json,
        *,
        content_type: str = JSON,
        timeout_s: float | None = None,
    ) -> Json:
        """Write ``body``: POST, PUT or PATCH. Neither side works on it for longer than ``timeout_s``."""
        limit_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        query: dict[str, str | int] = {"timeout": f"{max(1, int(limit_s * 1000))}ms"}
        return await self._call(method, path, query, timeout_s=limit_s, body=body, content_type=content_type)

    @contextlib.asynccontextmanager
    async def watch(
        self, path: str, query: Mapping[str, str | int], *, silence_s: float
    ) -> AsyncIterator[AsyncIterator[Json]]:
        """Events as they come, until the server ends the watch. KubeSilent after ``silence_s`` without one."""
        limits = aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s, sock_read=silence_s)
        with _translated(path, f"no answer within {self._timeout_s:g}s"):
            async with asyncio.timeout(self._timeout_s):  # the server answers at once, events come later
                response = await self._request("GET", path, query, limits)
        try:
            yield _lines(response, silence_s)
        finally:
            response.close()  # not release(): the rest of the stream is of no interest

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            self._retired.append(self._session.rest)
            self._session = None
        while self._retired:
            await self._retired.pop().close()

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int],
        *,
        timeout_s: float,
        body: Json | None = None,
        content_type: str = JSON,
    ) -> Json:
        limits = aiohttp.ClientTimeout(total=timeout_s)
        with _translated(path, f"no answer within {timeout_s:g}s"):
            async with asyncio.timeout(timeout_s):
                response = await self._request(method, path, query, limits, body=body, content_type=content_type)
                return _decoded(await response.read())

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int],
        limits: aiohttp.ClientTimeout,
        *,
        body: Json | None = None,
        content_type: str = JSON,
    ) -> aiohttp.ClientResponse:
        """The response with a 2xx status, body unread. After a 401, once more with fresh credentials."""
        for is_last in (False, True):
            session = await self._credentials()
            headers = {"Accept": JSON, "Content-Type": content_type}
            if session.token:
                headers["Authorization"] = session.token
            url = f"{session.url}{path}?{urlencode(query)}" if query else session.url + path
            answer = await session.rest.request(  # type: ignore[no-untyped-call]
                method, url, headers=headers, body=body, _request_timeout=limits
            )
            response: aiohttp.ClientResponse = answer.response
            if response.status < 300:
                return response
            text = await response.read()
            if response.status != 401 or is_last:
                raise refusal(path, response.status, text)
            self._read_at = float("-inf")
        raise AssertionError("unreachable")

    async def _credentials(self) -> _Session:
        """The session; a new one when the kubeconfig or a file it names says something else now."""
        old = self._session
        if old is not None and self._clock() - self._read_at < CREDENTIALS_AGE_S:
            return old
        configuration = Configuration()
        try:
            await load_kube_config(  # type: ignore[no-untyped-call]
                str(self._kubeconfig), client_configuration=configuration, persist_config=False
            )
            fingerprint = _fingerprint(configuration)
            same = old is not None and old.fingerprint == fingerprint
            rest = old.rest if old is not None and same else _Rest(configuration)
        except Exception as error:  # whatever its YAML reader, base64, ssl or open() raise
            raise KubeUnavailable(
                f"the kubeconfig {self._kubeconfig} cannot be used: {error}", hint="correct it, or write one there"
            ) from error
        if old is not None and not same:
            self._retired.append(old.rest)  # its watches may end in peace ...
            if len(self._retired) > 1:  # ... until the next rotation
                await self._retired.pop(0).close()
        # A token file ends in a newline, which a header must not.
        token = str(configuration.api_key.get("BearerToken", "")).strip()
        self._session = _Session(str(configuration.host), token, fingerprint, rest)
        self._read_at = self._clock()
        return self._session


def _fingerprint(configuration: Configuration) -> tuple[object, ...]:
    """All that a TLS session depends on; the token is sent with each request instead."""
    files = [configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file]
    return (
        configuration.host,
        configuration.verify_ssl,
        configuration.tls_server_name,
        configuration.proxy,
        *(Path(file).read_bytes() if file else b"" for file in files),
    )


async def _lines(response: aiohttp.ClientResponse, silence_s: float) -> AsyncIterator[Json]:
    """Whole lines of a stream as JSON. A line cut off by the end of the connection is dropped."""
    rest = b""
    with _translated(response.url.path, f"{silence_s:g}s of silence", silent=True):
        async for chunk in response.content.iter_any():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line:
                    yield _decoded(line)


@contextlib.contextmanager
def _translated(path: str, waited: str, *, silent: bool = False) -> Any:
    """Foreign exceptions become ours. TimeoutError is an OSError: it must come first."""
    try:
        yield
    except TimeoutError as error:
        raise (KubeSilent if silent else KubeUnavailable)(f"{path}: {waited}") from error
    except (aiohttp.ClientError, OSError) as error:
        why = error.__cause__ if isinstance(error, aiohttp.ClientPayloadError) and error.__cause__ else error
        raise KubeUnavailable(f"{path}: {str(why) or type(why).__name__}") from error


def _decoded(text: bytes) -> Json:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise KubeUnavailable(f"the answer is not JSON: {text[:60]!r}", hint="is the server an API server?") from error
    if not isinstance(value, dict):
        raise KubeUnavailable(f"the answer is not an object: {text[:60]!r}")
    return value


def rfc3339(wall: float) -> str:
    """Seconds since the epoch as the API writes a time."""
    return datetime.datetime.fromtimestamp(wall, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def refusal(path: str, status: int, text: bytes | Json) -> KubeGone | KubeUnavailable | KubeRejected:
    """The error for an answer of ``status`` with a Status object (or anything) as body."""
    try:
        body = text if isinstance(text, dict) else json.loads(text)
        message = str(body.get("message") or body.get("reason") or "")
    except (ValueError, AttributeError):
        message = text[:200].decode(errors="replace") if isinstance(text, bytes) else ""
    message = f"{path}: {status} {message}".rstrip()
    if status == 410:
        return KubeGone(message)
    if status == 429 or status >= 500:
        return KubeUnavailable(message)
    return KubeRejected(message, hint=_HINT_BY_STATUS.get(status, ""), status=status)
