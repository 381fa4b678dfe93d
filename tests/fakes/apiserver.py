# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes API as far as lbagent uses it, in one process and without a cluster.

    async with ApiServer(tokens={"secret": "lbagent"}) as server:
        ... server.url ...

    python -m tests.fakes.apiserver --listen 127.0.0.1:8001 --token secret [--kubeconfig FILE]

Lists with limit and continue, watches with bookmarks and timeouts, resourceVersions, 409, 410 (as
an ERROR event inside a 200), merge and strategic patches, the status subresource, and what a
Service is given by the real server (rules in ``service_rules``). Everything here was seen on a real
kube-apiserver first; tests/k8s/test_contract.py holds both to the same cases. Knobs for faults
are the public attributes and methods of ApiServer.
"""

import argparse
import asyncio
import contextlib
import copy
import datetime
import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from tests.fakes import service_rules

Json = dict[str, Any]
Name = tuple[str, str]
"""Namespace ('' for cluster-wide kinds) and name."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A resource the server knows."""

    group_version: str
    plural: str
    kind: str
    namespaced: bool = True
    has_status: bool = False

    @property
    def root(self) -> str:
        return ("/api/" if self.group_version == "v1" else "/apis/") + self.group_version


KINDS = (
    Kind("v1", "services", "Service", has_status=True),
    Kind("v1", "nodes", "Node", namespaced=False, has_status=True),
    Kind("v1", "namespaces", "Namespace", namespaced=False),
    Kind("v1", "events", "Event"),
    Kind("events.k8s.io/v1", "events", "Event"),
    Kind("discovery.k8s.io/v1", "endpointslices", "EndpointSlice"),
    Kind("coordination.k8s.io/v1", "leases", "Lease"),
)
MERGE, STRATEGIC = "application/merge-patch+json", "application/strategic-merge-patch+json"


class Refused(Exception):
    """An answer other than 2xx."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message

    @property
    def status(self) -> Json:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }


@dataclass(slots=True)
class Change:
    """One line of history."""

    version: int
    kind: Kind
    type: str
    obj: Json


@dataclass(slots=True)
class Store:
    """Objects by kind and name, the history of changes, and who is listening."""

    objects: dict[Kind, dict[Name, Json]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    version: int = 100
    compacted: int = 0
    history: list[Change] = field(default_factory=list)
    listeners: set["asyncio.Queue[Change | None]"] = field(default_factory=set)

    def record(self, kind: Kind, type_: str, obj: Json) -> Json:
        """Store ``obj`` under the next resourceVersion and tell the listeners."""
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        key = (obj["metadata"].get("namespace", ""), obj["metadata"]["name"])
        if type_ == "DELETED":
            del self.objects[kind][key]
        else:
            self.objects[kind][key] = obj
        change = Change(self.version, kind, type_, obj)
        self.history.append(change)
        for listener in self.listeners:
            listener.put_nowait(change)
        return obj


class ApiServer:
    """The server. ``tokens``: user by bearer token; empty means nobody is asked.

    ``bookmark_s``: how often a watch gets a bookmark. ``forbidden``: (verb, plural) answered 403.
    ``requests``: (method, path with query) of all that came in, for tests to look at.
    """

    def __init__(
        self,
        *,
        tokens: dict[str, str] | None = None,
        bookmark_s: float = 5.0,
        namespaces: Iterable[str] = ("default", "lbagent"),
    ) -> None:
        self.tokens = dict(tokens or {})
        self.bookmark_s = bookmark_s
        self.forbidden: set[tuple[str, str]] = set()
        self.requests: list[tuple[str, str]] = []
        self.answering = asyncio.Event()
        self.answering.set()
        self.delay_s = 0.0
        self.silent = False
        self.store = Store()
        self.address = ("127.0.0.1", 0)
        self._runner: web.AppRunner | None = None
        self._pages: dict[str, tuple[int, list[Json]]] = {}  # what is left of a list, by continue token
        self._allocator = service_rules.Allocator()
        for namespace in ("kube-system", *namespaces):
            self.create("namespaces", {"metadata": {"name": namespace}})
        if "lbagent" in namespaces:  # free, as the manifest brings it: nobody has to wait for a holder before
            self.create("leases", {"metadata": {"name": "lbagent"}, "spec": {}}, namespace="lbagent")

    # --- life and faults ----------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; a restarted server listens where it did before."""
        app = web.Application(client_max_size=8 << 20)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port or self.address[1], reuse_address=True)
        await site.start()
        assert site._server is not None
        self.address = site._server.sockets[0].getsockname()[:2]

    async def stop(self) -> None:
        """Close the listener and every connection; what was stored stays."""
        self.drop_watches()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def restart(self) -> None:
        """As kube-apiserver on the same etcd: old resourceVersions are Expired afterwards."""
        await self.stop()
        self.compact()
        await self.start(self.address[0])

    def compact(self) -> None:
        """Forget the history: a watch or a continue token from before answers 410."""
        self.store.compacted = self.store.version
        self.store.history.clear()

    def restore(self, backup: Store) -> None:
        """As etcd restored from a backup: objects and resourceVersions go backwards."""
        self.drop_watches()
        self.store = backup

    def backup(self) -> Store:
        """A copy for ``restore``."""
        store = self.store
        return Store(copy.deepcopy(store.objects), store.version, store.compacted, copy.deepcopy(store.history))

    def drop_watches(self) -> None:
        """End every watch under way, orderly."""
        for listener in self.store.listeners:
            listener.put_nowait(None)

    # --- objects, also for tests to call directly ---------------------------------------------

    def objects(self, plural: str) -> dict[Name, Json]:
        """All objects of a kind by (namespace, name)."""
        return self.store.objects[_kind(plural)]

    def create(self, plural: str, body: Json, *, namespace: str = "", kind: Kind | None = None) -> Json:
        """POST."""
        kind = kind or _kind(plural)
        obj = copy.deepcopy(body)
        meta = obj.setdefault("metadata", {})
        if kind.namespaced:
            meta["namespace"] = namespace or meta.get("namespace", "default")
            if ("", meta["namespace"]) not in self.store.objects[_kind("namespaces")]:
                raise Refused(404, "NotFound", f'namespaces "{meta["namespace"]}" not found')
        if "name" not in meta and meta.get("generateName"):
            meta["name"] = meta["generateName"] + uuid.uuid4().hex[:5]
        key = (meta.get("namespace", ""), meta["name"])
        if key in self.store.objects[kind]:
            raise Refused(409, "AlreadyExists", f'{kind.plural} "{key[1]}" already exists')
        meta.setdefault("uid", str(uuid.uuid4()))
        meta.setdefault("creationTimestamp", now_text())
        meta["managedFields"] = [{"manager": "test", "operation": "Update", "apiVersion": kind.group_version}]
        obj |= {"apiVersion": kind.group_version, "kind": kind.kind}
        if kind.has_status:
            obj["status"] = {}
        if kind.kind == "Namespace":
            meta.setdefault("labels", {})["kubernetes.io/metadata.name"] = meta["name"]
        if kind.kind == "Node":
            taint = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}
            obj.setdefault("spec", {}).setdefault("taints", []).append(taint)
        if kind.kind == "Service":
            self._prepare_service(obj, None)
        return copy.deepcopy(self.store.record(kind, "ADDED", obj))

    def replace(self, plural: str, body: Json, *, status: bool = False, kind: Kind | None = None) -> Json:
        """PUT, with the check of metadata.resourceVersion where the body has one."""
        kind = kind or _kind(plural)
        meta = body["metadata"]
        old = self._get(kind, (meta.get("namespace", ""), meta["name"]))
        wanted = meta.get("resourceVersion")
        if wanted and wanted != old["metadata"]["resourceVersion"]:
            raise Refused(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {kind.plural} "{meta["name"]}": the object has been modified; '
                "please apply your changes to the latest version and try again",
            )
        new = copy.deepcopy(body)
        for kept in ("uid", "creationTimestamp", "deletionTimestamp", "managedFields"):
            if kept in old["metadata"]:
                new["metadata"][kept] = old["metadata"][kept]
        if kind.has_status:
            kept_half = "spec" if status else "status"
            new[kept_half] = copy.deepcopy(old.get(kept_half, {}))
        if kind.kind == "Service":
            self._prepare_service(new, old)
        if "deletionTimestamp" in new["metadata"] and not new["metadata"].get("finalizers"):
            return self._remove(kind, new)
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        if new == old:  # no write, no event: as the real one
            return copy.deepcopy(old)
        return copy.deepcopy(self.store.record(kind, "MODIFIED", new))

    def patch(self, plural: str, name: Name, body: Json, *, status: bool = False, form: str = MERGE) -> Json:
        """PATCH, merge or strategic."""
        return self._patch(_kind(plural), name, body, status=status, form=form)

    def delete(self, plural: str, name: Name, *, kind: Kind | None = None) -> Json:
        """DELETE; with finalizers the object stays, marked."""
        kind = kind or _kind(plural)
        obj = copy.deepcopy(self._get(kind, name))
        if obj["metadata"].get("finalizers"):
            if "deletionTimestamp" not in obj["metadata"]:
                obj["metadata"]["deletionTimestamp"] = now_text()
                self.store.record(kind, "MODIFIED", obj)
            return copy.deepcopy(obj)
        return self._remove(kind, obj)

    def _remove(self, kind: Kind, obj: Json) -> Json:
        if kind.kind == "Service":
            self._allocator.free(obj)
        return copy.deepcopy(self.store.record(kind, "DELETED", obj))

    def _patch(self, kind: Kind, name: Name, body: Json, *, status: bool, form: str) -> Json:
        old = self._get(kind, name)
        new = merge(copy.deepcopy(old), body) if form == MERGE else merge_strategic(copy.deepcopy(old), body)
        if "resourceVersion" not in body.get("metadata", {}):
            new["metadata"].pop("resourceVersion", None)  # last writer wins
        return self.replace(kind.plural, new, status=status, kind=kind)

    def _get(self, kind: Kind, name: Name) -> Json:
        try:
            return self.store.objects[kind][name]
        except KeyError:
            raise Refused(404, "NotFound", f'{kind.plural} "{name[1]}" not found') from None

    def _prepare_service(self, new: Json, old: Json | None) -> None:
        try:
            service_rules.prepare(new, old, self._allocator)
        except service_rules.Invalid as error:
            raise Refused(422, "Invalid", f'Service "{new["metadata"]["name"]}" is invalid: {error}') from None

    # --- HTTP ---------------------------------------------------------------------------------

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        await self.answering.wait()
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        try:
            if request.path in ("/readyz", "/livez", "/healthz"):
                return web.Response(text="ok")
            if request.path == "/version":
                return web.json_response({"gitVersion": "v1.36.0-embedded"})
            self._authenticate(request)
            kind, namespace, name, subresource = _route(request.path)
            verb = _verb(request, name)
            if (verb, kind.plural) in self.forbidden:
                raise Refused(403, "Forbidden", f"{kind.plural} is forbidden: cannot {verb}")
            if verb == "watch":
                return await self._watch(request, kind, namespace)
            if verb == "list":
                return web.json_response(self._list(request, kind, namespace))
            body = await _body(request) if request.can_read_body else {}
            return self._object(verb, kind, (namespace, name), subresource, body, request.content_type)
        except Refused as error:
            return web.json_response(error.status, status=error.code)

    def _authenticate(self, request: web.Request) -> None:
        if not self.tokens:
            return
        header = request.headers.get("Authorization", "")
        if not header:
            raise Refused(403, "Forbidden", 'User "system:anonymous" cannot do this')
        if header.removeprefix("Bearer ") not in self.tokens:
            raise Refused(401, "Unauthorized", "Unauthorized")

    def _object(
        self, verb: str, kind: Kind, name: Name, subresource: str, body: Json, content_type: str
    ) -> web.Response:
        status = subresource == "status"
        match verb:
            case "create":
                return web.json_response(self.create(kind.plural, body, namespace=name[0], kind=kind), status=201)
            case "get":
                return web.json_response(self._get(kind, name))
            case "update":
                return web.json_response(self.replace(kind.plural, body, status=status, kind=kind))
            case "patch" if content_type in (MERGE, STRATEGIC):
                return web.json_response(self._patch(kind, name, body, status=status, form=content_type))
            case "patch":
                raise Refused(415, "UnsupportedMediaType", f"{content_type} is not known here")
            case "delete":
                return web.json_response(self.delete(kind.plural, name, kind=kind))
            case _:
                raise Refused(405, "MethodNotAllowed", "the server does not allow this method on the resource")

    def _list(self, request: web.Request, kind: Kind, namespace: str) -> Json:
        query = request.query
        limit = int(query.get("limit", 0))
        token = query.get("continue", "")
        if token:
            version, found = self._pages.pop(token, (0, []))
            if version <= self.store.compacted:
                raise Refused(410, "Expired", "The provided continue parameter is too old")
        else:
            wanted = _selector(query, namespace)
            version = self.store.version
            found = [obj for _, obj in sorted(self.store.objects[kind].items()) if wanted(obj)]
        page, rest = (found[:limit], found[limit:]) if limit else (found, [])
        meta: Json = {"resourceVersion": str(version)}
        if rest:
            meta |= {"continue": uuid.uuid4().hex, "remainingItemCount": len(rest)}
            self._pages[meta["continue"]] = (version, rest)
        items = [{k: v for k, v in obj.items() if k not in ("kind", "apiVersion")} for obj in page]
        return {"kind": f"{kind.kind}List", "apiVersion": kind.group_version, "metadata": meta, "items": items}

    async def _watch(self, request: web.Request, kind: Kind, namespace: str) -> web.StreamResponse:
        query = request.query
        wanted = _selector(query, namespace)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        since = int(query.get("resourceVersion") or 0)
        if since and since < self.store.compacted:
            gone = Refused(410, "Expired", f"too old resource version: {since} ({self.store.compacted})")
            await _send(response, "ERROR", gone.status)
            return response
        queue: asyncio.Queue[Change | None] = asyncio.Queue()
        self.store.listeners.add(queue)
        try:
            for change in self._backlog(kind, since):
                if wanted(change.obj):
                    await _send(response, change.type, change.obj)
            limit_s = float(query.get("timeoutSeconds") or 1800)
            bookmarks = query.get("allowWatchBookmarks") in ("1", "true")
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                async with asyncio.timeout(limit_s):
                    await self._stream(response, queue, kind, wanted, since, bookmarks=bookmarks)
        finally:
            self.store.listeners.discard(queue)
        return response

    def _backlog(self, kind: Kind, since: int) -> list[Change]:
        if not since:
            return [Change(0, kind, "ADDED", obj) for _, obj in sorted(self.store.objects[kind].items())]
        return [change for change in self.store.history if change.kind == kind and change.version > since]

    async def _stream(
        self,
        response: web.StreamResponse,
        queue: "asyncio.Queue[Change | None]",
        kind: Kind,
        wanted: Callable[[Json], bool],
        since: int,
        *,
        bookmarks: bool,
    ) -> None:
        while True:
            try:
                change = await asyncio.wait_for(queue.get(), self.bookmark_s)
            except TimeoutError:
                if bookmarks and not self.silent:
                    meta = {"resourceVersion": str(max(since, self.store.version)), "creationTimestamp": None}
                    mark = {"kind": kind.kind, "apiVersion": kind.group_version, "metadata": meta}
                    await _send(response, "BOOKMARK", mark)
                continue
            if change is None:
                return
            if change.kind == kind and change.version > since and wanted(change.obj) and not self.silent:
                await _send(response, change.type, change.obj)


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = target if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


def merge_strategic(target: Any, patch: Any) -> Any:
    """Strategic merge, with the two lists of a Service that we patch: conditions and finalizers."""
    if not isinstance(patch, dict):
        return patch
    result = target if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif key == "conditions":
            by_type = {c["type"]: c for c in result.get(key, [])}
            for condition in value:
                if condition.get("$patch") == "delete":
                    by_type.pop(condition["type"], None)
                else:
                    by_type[condition["type"]] = by_type.get(condition["type"], {}) | condition
            result[key] = list(by_type.values())
        elif key == "finalizers":
            result[key] = list(dict.fromkeys([*result.get(key, []), *value]))
        elif key.startswith("$deleteFromPrimitiveList/"):
            name = key.partition("/")[2]
            result[name] = [item for item in result.get(name, []) if item not in value]
        else:
            result[key] = merge_strategic(result.get(key), value)
    return result


def kubeconfig(url: str, *, token: str = "") -> Json:
    """A kubeconfig as a JSON value (which is YAML too)."""
    user = {"token": token} if token else {}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": {"server": url}}],
        "users": [{"name": "lbagent", "user": user}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lbagent"}}],
        "current-context": "lab",
    }


def write_kubeconfig(path: Path, url: str, *, token: str = "") -> Path:
    path.write_text(json.dumps(kubeconfig(url, token=token), indent=1))
    return path


def now_text() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _kind(plural: str) -> Kind:
    return next(kind for kind in KINDS if kind.plural == plural)


def _route(path: str) -> tuple[Kind, str, str, str]:
    """Path -> kind, namespace, name, subresource; the last three may be empty."""
    for kind in KINDS:
        if not path.startswith(kind.root + "/"):
            continue
        parts = path.removeprefix(kind.root + "/").strip("/").split("/")
        namespace = ""
        if kind.namespaced and parts[0] == "namespaces" and len(parts) >= 3:
            namespace, parts = parts[1], parts[2:]
        if parts[0] == kind.plural and parts[2:] in ([], ["status"]):
            return kind, namespace, *([*parts[1:], "", ""][:2])  # type: ignore[return-value]
    raise Refused(404, "NotFound", "the server could not find the requested resource")


def _verb(request: web.Request, name: str) -> str:
    if request.method == "GET" and not name:
        return "watch" if request.query.get("watch") in ("1", "true") else "list"
    return {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(
        request.method, request.method
    )


async def _body(request: web.Request) -> Json:
    try:
        body = await request.json()
    except ValueError:
        raise Refused(400, "BadRequest", "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Refused(400, "BadRequest", "the body is not an object")
    return body


def _selector(query: Any, namespace: str) -> Callable[[Json], bool]:
    labels = dict(part.split("=", 1) for part in query.get("labelSelector", "").split(",") if "=" in part)
    fields = dict(part.split("=", 1) for part in query.get("fieldSelector", "").split(",") if "=" in part)

    def wanted(obj: Json) -> bool:
        meta = obj["metadata"]
        return (
            (not namespace or meta.get("namespace") == namespace)
            and labels.items() <= meta.get("labels", {}).items()
            and fields.get("metadata.name", meta["name"]) == meta["name"]
        )

    return wanted


async def _send(response: web.StreamResponse, type_: str, obj: Json) -> None:
    await response.write(json.dumps({"type": type_, "object": obj}).encode() + b"\n")


async def main() -> None:
    parser = argparse.ArgumentParser(description="Kubernetes API emulator of lbagent's tests")
    parser.add_argument("--listen", default="127.0.0.1:8001")
    parser.add_argument("--token", default="")
    parser.add_argument("--kubeconfig", default="", help="write a kubeconfig here once it listens")
    options = parser.parse_args()
    host, _, port = options.listen.rpartition(":")
    server = ApiServer(tokens={options.token: "lab"} if options.token else None)
    await server.start(host, int(port))
    try:
        if options.kubeconfig:
            write_kubeconfig(Path(options.kubeconfig), server.url, token=options.token)
        print(server.url, flush=True)
        await asyncio.Event().wait()
    finally:
        await server.stop()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
