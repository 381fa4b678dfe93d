# SPDX-License-Identifier: Apache-2.0
"""Two forms of the API for one set of tests: the emulator, and a real control plane (once per session)."""

import contextlib
import json
import signal
import ssl
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fakes.apiserver import ApiServer
from tests.k8s.controlplane import ADMIN_TOKEN, ControlPlane, kubeconfig

Json = dict[str, Any]

MERGE, STRATEGIC = "application/merge-patch+json", "application/strategic-merge-patch+json"
SERVICES = "/api/v1/namespaces/{}/services"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"
EVENTS = "/api/v1/namespaces/{}/events"
NODES = "/api/v1/nodes"


@dataclass(frozen=True)
class Answer:
    """``code`` and decoded body."""

    code: int
    body: Json


class Api:
    """The tests' own view of an API server, independent of lbagent's client. Every test has its namespace."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, *, ca_file: Path | None, server: "ApiServer | ControlPlane"
    ) -> None:
        self.url = url
        self.ca_file = ca_file
        self.server = server
        self.namespace = f"t-{uuid.uuid4().hex[:8]}"
        self._session = session
        self._ssl: ssl.SSLContext | bool = ssl.create_default_context(cafile=str(ca_file)) if ca_file else True

    async def call(
        self, method: str, path: str, body: Json | None = None, *, form: str = "", token: str | None = ADMIN_TOKEN
    ) -> Answer:
        headers = {"Content-Type": form or (MERGE if method == "PATCH" else "application/json")}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body)
        limit = aiohttp.ClientTimeout(total=30)
        async with self._session.request(
            method, self.url + path, data=data, headers=headers, ssl=self._ssl, timeout=limit
        ) as response:
            return Answer(response.status, await response.json(content_type=None))

    async def watch(self, path: str, **query: str | int) -> list[Json]:
        """All events until the server ends the watch; pass timeoutSeconds."""
        headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        params = {key: str(value) for key, value in {"watch": 1, **query}.items()}
        async with self._session.get(self.url + path, params=params, headers=headers, ssl=self._ssl) as response:
            assert response.status == 200, await response.text()
            return [json.loads(line) for line in (await response.read()).splitlines() if line]

    def kubeconfig(self, file: Path, *, token: str = ADMIN_TOKEN) -> Path:
        file.write_text(json.dumps(kubeconfig(self.url, token=token, ca_file=self.ca_file)))
        return file

    # --- shorthands ---------------------------------------------------------------------------

    async def make_service(self, name: str = "web", **spec: Any) -> Json:
        answer = await self.try_service(name, **spec)
        assert answer.code == 201, answer
        return answer.body

    async def try_service(self, name: str = "web", **spec: Any) -> Answer:
        spec = {"type": "LoadBalancer", "ports": [{"port": 80}], **spec}
        return await self.call("POST", SERVICES.format(self.namespace), {"metadata": {"name": name}, "spec": spec})

    async def service(self, name: str = "web") -> Json:
        return (await self.call("GET", f"{SERVICES.format(self.namespace)}/{name}")).body

    async def patch(self, body: Json, *, name: str = "web", status: bool = False, form: str = MERGE) -> Answer:
        path = f"{SERVICES.format(self.namespace)}/{name}" + ("/status" if status else "")
        return await self.call("PATCH", path, body, form=form)

    # --- faults -------------------------------------------------------------------------------

    async def restart(self) -> None:
        """As a crash and a start of kube-apiserver on the same etcd."""
        if isinstance(self.server, ApiServer):
            await self.server.restart()
        else:
            self.server.restart_apiserver()

    def hang(self) -> None:
        """Connections stay, answers do not come."""
        if isinstance(self.server, ApiServer):
            self.server.answering.clear()
        else:
            self.server.signal_apiserver(signal.SIGSTOP)

    def recover(self) -> None:
        if isinstance(self.server, ApiServer):
            self.server.answering.set()
        else:
            self.server.signal_apiserver(signal.SIGCONT)


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("plane"), address="127.0.0.1") as running:
        yield running


@pytest.fixture(params=["embedded", pytest.param("real", marks=pytest.mark.k8s)])
async def api(request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    """One API in both forms."""
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        server: ApiServer | ControlPlane
        if request.param == "embedded":
            server = await stack.enter_async_context(ApiServer(tokens={ADMIN_TOKEN: "admin"}, bookmark_s=0.5))
            made = Api(session, server.url, ca_file=None, server=server)
        else:
            server = request.getfixturevalue("plane")
            made = Api(session, server.url, ca_file=server.ca_file, server=server)
        answer = await made.call("POST", "/api/v1/namespaces", {"metadata": {"name": made.namespace}})
        assert answer.code == 201, answer
        yield made


@pytest.fixture
async def real(plane: ControlPlane) -> AsyncIterator[Api]:
    """The real one only."""
    async with aiohttp.ClientSession() as session:
        made = Api(session, plane.url, ca_file=plane.ca_file, server=plane)
        answer = await made.call("POST", "/api/v1/namespaces", {"metadata": {"name": made.namespace}})
        assert answer.code == 201, answer
        yield made
