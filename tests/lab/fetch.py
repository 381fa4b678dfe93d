# SPDX-License-Identifier: Apache-2.0
"""HTTP from inside a namespace: the socket is made there, the rest happens in the calling process."""

import http.client
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.lab.netns import Namespace

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Response:
    """``headers`` by lower-case name."""

    status: int
    headers: dict[str, str]
    text: str


def fetch(
    namespace: Namespace,
    url: str,
    *,
    method: str = "GET",
    body: str | None = None,
    headers: dict[str, str] | None = None,
    ca_file: Path | None = None,
) -> Response:
    """One request. Raises OSError when no complete answer came."""
    target = urlsplit(url)
    host, port = target.hostname or "", target.port or 80
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        with namespace.entered():
            connection.sock = socket.create_connection((host, port), timeout=TIMEOUT_S)
        if target.scheme == "https":
            context = ssl.create_default_context(cafile=str(ca_file))
            connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
        connection.request(method, target.path or "/", body, headers or {})
        answer = connection.getresponse()
        text = answer.read().decode()
        return Response(answer.status, {key.lower(): value for key, value in answer.getheaders()}, text)
    except http.client.HTTPException as error:
        raise OSError(f"{method} {url}: {error!r}") from error
    finally:
        connection.close()
