# SPDX-License-Identifier: Apache-2.0
"""One kind of object, kept equal to the cluster: list, then watch, for ever.

The endless loop is trivial; ``session`` below it is finite. What is known is served all the time,
also while the API server is away: fail static. The hard cases, each with its rule:

  410, as a status or inside a 200   list again
  the watch ends, or breaks           go on from the last resourceVersion
  away for longer than RESUME_S       list again: the cluster may be another one by now
  resourceVersions went backwards     etcd was restored: list again
  nothing heard for SILENCE_S         give the watch up, go on from where it was
  an object cannot be read            keep its last readable value, name it in ``problems``

kopf's watching.py is the model of the shape.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from lbagent import log
from lbagent.backoff import Backoff
from lbagent.errors import KubeError, KubeGone
from lbagent.kube import parse
from lbagent.kube.client import Client, Json, KubeSilent, refusal
from lbagent.kube.field import Field, Unreadable
from lbagent.metrics import Metrics
from lbagent.model.service import ServiceKey

_log = log.get("kube")

Value = TypeVar("Value")
Changed = Callable[[], None]

PAGE = 500
SILENCE_S = 150.0
"""Bookmarks come every minute, but on a quiet cluster the first one may be left out (measured, 1.36)."""
RESUME_S = 60.0
"""An orderly restart of an API server takes seconds; restoring etcd from a backup takes longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind(Generic[Value]):
    """What to watch: the word for logs and metrics, where it is, and how to read one object.

    ``matters(old, new)``: would a planner see the difference?
    """

    name: str
    path: str
    read: Callable[[Json], Value]
    matters: Callable[[Value, Value], bool] = lambda old, new: old != new


Difference = Callable[[ServiceKey, Value | None], None]
"""Called for each object that is new, changed, or (None) gone."""


class Clocks(Protocol):
    """Seconds: monotonic for waiting, wall for what people read."""

    @property
    def monotonic(self) -> Callable[[], float]: ...
    @property
    def wall(self) -> Callable[[], float]: ...


def spoken(key: ServiceKey) -> str:
    """The name of any object: ``namespace/name``, or just the name of a cluster-wide one."""
    return str(key) if key.namespace else key.name


class Watch(Generic[Value]):
    """``objects`` by namespace and name ('' for cluster-wide kinds); ``problems`` by the same key.

    ``listed``: one complete list has arrived. ``listed_at``: monotonic time at which the latest
    complete list was asked for: whatever was written before it is in ``objects``. ``heard_at``:
    monotonic time of the server's last word on this kind. Objects are replaced, never changed.
    """

    def __init__(
        self,
        kind: Kind[Value],
        *,
        client: Client,
        clocks: Clocks,
        metrics: Metrics,
        watch_timeout_s: float,
        difference: Difference[Value] | None = None,
    ) -> None:
        self.kind = kind
        self.objects: dict[ServiceKey, Value] = {}
        self.problems: dict[ServiceKey, str] = {}
        self.listed = False
        self.listed_at = float("-inf")
        self.heard_at = clocks.monotonic()
        self._client = client
        self._clocks = clocks
        self._metrics = metrics
        self._watch_timeout_s = watch_timeout_s
        self._difference = difference
        self._version = ""  # where to go on
        self._must_list = True
        self._backoff = Backoff(first_s=0.5, cap_s=10.0)
        self._lost_at: float | None = None
        self._complaint = ""
        self._patience: asyncio.Timeout | None = None
        self._arrived = asyncio.Event()
        metrics.listed(kind.name, is_listed=False)

    async def run(self, changed: Changed) -> None:
        """For ever."""
        while True:
            wait_s = await self._guarded_session(changed)
            await asyncio.sleep(wait_s)

    async def session(self, changed: Changed) -> None:
        """List if need be, then follow one watch to its end. Raises KubeError."""
        if self._lost_at is not None and self._clocks.monotonic() - self._lost_at > RESUME_S:
            self._must_list = True
        if self._must_list:
            await self._list(changed)
        else:
            await self._check_history()
        await self._follow(changed)

    async def newer(self, key: ServiceKey, old: Value | None) -> Value | None:
        """Wait until the object differs from ``old``; the caller sets the limit. None: it is gone."""
        while self.objects.get(key) is old:
            await self._arrived.wait()
        return self.objects.get(key)

    def list_again(self) -> None:
        """Leave the watch under way and begin with a list, at once. What is known stays."""
        self._must_list = True
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(0.0)

    # --- what goes wrong ----------------------------------------------------------------------

    async def _guarded_session(self, changed: Changed) -> float:
        """One session; how many seconds to wait before the next."""
        began = self._clocks.monotonic()
        try:
            async with asyncio.timeout(None) as self._patience:
                await self.session(changed)
        except TimeoutError:
            return 0.0  # list_again
        except KubeGone as error:
            self._must_list = True
            return self._broken("gone", error)
        except KubeSilent as error:
            self._metrics.watch_restarted(self.kind.name, cause="silent")
            _log.debug("watch silent", resource=self.kind.name, error=str(error))
            return 0.0  # we have waited
        except KubeError as error:
            if self._lost_at is None:
                self._lost_at = self._clocks.monotonic()
            return self._broken("error", error)
        finally:
            self._patience = None
        self._metrics.watch_restarted(self.kind.name, cause="expired")
        if self._clocks.monotonic() - began < 1.0:  # something on the way cuts every watch short
            return self._backoff.failed()
        self._backoff.succeeded()
        return 0.0

    def _broken(self, cause: str, error: KubeError) -> float:
        self._metrics.watch_restarted(self.kind.name, cause=cause)
        wait_s = self._backoff.failed()
        if error.message != self._complaint:  # once, not at every attempt
            _log.warning("watch broken", resource=self.kind.name, cause=cause, error=str(error))
            self._complaint = error.message
        return wait_s

    # --- the exchange -------------------------------------------------------------------------

    async def _list(self, changed: Changed) -> None:
        asked_at = self._clocks.monotonic()
        found: dict[ServiceKey, Value] = {}
        seen: set[ServiceKey] = set()
        token = ""
        while True:
            query: dict[str, str | int] = {"limit": PAGE} | ({"continue": token} if token else {})
            page = Field(await self._client.get(self.kind.path, **query))
            self._hear()
            seen.update(self._read_into(found, item) for item in page.values("items"))
            version = page.child("metadata").text("resourceVersion")
            token = page.child("metadata").text("continue")
            if not token:
                break
        for key in self.objects.keys() - found.keys():
            self._report(key, None)
        for key, value in found.items():
            old = self.objects.get(key)
            if old is None or self.kind.matters(old, value):
                self._report(key, value)
        self.objects = found
        self.problems = {key: why for key, why in self.problems.items() if key in seen}
        self._version = version
        self._must_list = False
        self.listed = True
        self.listed_at = asked_at
        self._metrics.listed(self.kind.name)
        _log.info("listed", resource=self.kind.name, objects=len(found), unreadable=len(self.problems), version=version)
        self._wake()
        changed()

    async def _check_history(self) -> None:
        """A watch from a resourceVersion that the server has not reached yet stays silent for ever."""
        page = await self._client.get(self.kind.path, limit=1)
        now = parse.resource_version_of(page)
        if now.isdigit() and self._version.isdigit() and int(now) < int(self._version):
            raise KubeGone(f"{self.kind.path}: resourceVersion went back from {self._version} to {now}")

    async def _follow(self, changed: Changed) -> None:
        query: dict[str, str | int] = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": max(1, int(self._watch_timeout_s)),
        }
        async with self._client.watch(self.kind.path, query, silence_s=SILENCE_S) as events:
            self._hear()
            async for event in events:
                matters = self._apply(event)
                self._hear()
                self._backoff.succeeded()
                if matters:
                    changed()

    def _apply(self, event: Json) -> bool:
        """Take one event in; does it matter? Raises KubeError for an ERROR event."""
        obj = event.get("object")
        match event.get("type"):
            case "ADDED" | "MODIFIED":
                matters = self._put(obj)
            case "DELETED":
                matters = self._drop(obj)
            case "BOOKMARK":
                matters = False
            case "ERROR":
                status = obj if isinstance(obj, dict) else {}
                code = status.get("code")
                raise refusal(self.kind.path, code if isinstance(code, int) else 500, status)
            case unknown:
                _log.warning("unknown event passed over", resource=self.kind.name, type=unknown)
                return False
        with contextlib.suppress(Unreadable):  # named already
            self._version = parse.resource_version_of(obj) or self._version
        self._wake()
        return matters

    # --- the store ----------------------------------------------------------------------------

    def _put(self, obj: object) -> bool:
        found: dict[ServiceKey, Value] = {}
        self._read_into(found, obj)
        matters = False
        for key, value in found.items():
            old = self.objects.get(key)
            self.objects[key] = value
            if old is None or self.kind.matters(old, value):
                self._report(key, value)
                matters = True
        return matters

    def _drop(self, obj: object) -> bool:
        try:
            key = parse.name_of(obj)
        except Unreadable as error:
            self._complain(ServiceKey("", "?"), error)
            return False
        self.problems.pop(key, None)
        if self.objects.pop(key, None) is None:
            return False
        self._report(key, None)
        return True

    def _read_into(self, found: dict[ServiceKey, Value], obj: object) -> ServiceKey:
        """Read one object, or keep what it was when it could be read; the key it stands under."""
        key = ServiceKey("", "?")
        try:
            key = parse.name_of(obj)
            assert isinstance(obj, dict)
            value, old = self.kind.read(obj), self.objects.get(key)
            found[key] = old if old is not None and old == value else value  # readers compare by identity first
            self.problems.pop(key, None)
        except Unreadable as error:
            self._complain(key, error)
            if key in self.objects:
                found[key] = self.objects[key]
        return key

    def _complain(self, key: ServiceKey, error: Unreadable) -> None:
        self._metrics.unreadable(self.kind.name)
        if self.problems.get(key) != error.message:
            _log.warning("unreadable object skipped", resource=self.kind.name, object=spoken(key), error=error.message)
        self.problems[key] = error.message

    def _report(self, key: ServiceKey, value: Value | None) -> None:
        if self._difference is not None:
            self._difference(key, value)

    def _hear(self) -> None:
        self.heard_at = self._clocks.monotonic()
        self._lost_at = None
        self._metrics.heard(self.kind.name, at=self._clocks.wall())
        if self._complaint:
            self._complaint = ""
            _log.info("watch resumed", resource=self.kind.name)

    def _wake(self) -> None:
        self._arrived.set()
        self._arrived.clear()
