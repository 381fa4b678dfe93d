# SPDX-License-Identifier: Apache-2.0
"""``/metrics`` for Prometheus, ``/healthz`` and ``/readyz`` for whoever watches the host.

Both health pages answer 200 or 503 with the reasons as JSON.
"""

import asyncio
from collections.abc import Callable, Mapping

from aiohttp import web

from lbagent.errors import ControlError
from lbagent.metrics import CONTENT_TYPE, Metrics

Health = Callable[[], Mapping[str, str]]
"""Name of a check -> '' when fine, else what is wrong."""


class Pages:
    """Serves the three pages on ``listen`` (``address:port``)."""

    def __init__(
        self, *, listen: str, metrics: Metrics, refresh: Callable[[], None], alive: Health, ready: Health
    ) -> None:
        self._address, _, port = listen.rpartition(":")
        self._port = int(port)
        self._metrics = metrics
        self._refresh = refresh
        self._alive = alive
        self._ready = ready

    def application(self) -> web.Application:
        """The routes; separate from the listening socket for tests."""
        app = web.Application()
        app.router.add_get("/metrics", self._metrics_page)
        app.router.add_get("/healthz", self._page(self._alive))
        app.router.add_get("/readyz", self._page(self._ready))
        return app

    async def run(self) -> None:
        """Serve for ever. Raises ControlError when the address cannot be bound."""
        runner = web.AppRunner(self.application(), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._address.strip("[]"), self._port).start()
            await asyncio.Event().wait()
        except OSError as error:
            raise ControlError(
                f"cannot listen on {self._address}:{self._port}: {error}", hint="choose another http.listen"
            ) from error
        finally:
            await runner.cleanup()

    async def _metrics_page(self, _request: web.Request) -> web.Response:
        self._refresh()
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    @staticmethod
    def _page(health: Health) -> Callable[[web.Request], "asyncio.Future[web.Response]"]:
        async def page(_request: web.Request) -> web.Response:
            checks = dict(health())
            wrong = {name: why for name, why in checks.items() if why}
            body = {"ok": not wrong, "checks": {name: why or "ok" for name, why in checks.items()}}
            return web.json_response(body, status=503 if wrong else 200)

        return page  # type: ignore[return-value]
