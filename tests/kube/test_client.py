# SPDX-License-Identifier: Apache-2.0
"""The door: errors, limits, credentials."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from lbagent.errors import KubeError, KubeGone, KubeRejected, KubeUnavailable
from lbagent.kube.client import CREDENTIALS_AGE_S, MERGE_PATCH, Client, KubeSilent, refusal, rfc3339
from tests.fakes.apiserver import ApiServer, write_kubeconfig
from tests.fakes.apiserver import kubeconfig as make_kubeconfig
from tests.kube.conftest import TOKEN, TestClocks

SERVICES = "/api/v1/services"


async def test_objects_are_read_and_written_as_raw_json(client: Client, server: ApiServer) -> None:
    body = {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}}
    made = await client.send("POST", "/api/v1/namespaces/default/services", body)
    assert made["spec"]["ports"][0]["port"] == 80
    patch = {"metadata": {"labels": {"a": "b"}}}
    await client.send("PATCH", "/api/v1/namespaces/default/services/web", patch, content_type=MERGE_PATCH)
    listed = await client.get(SERVICES, limit=5)
    assert listed["items"][0]["metadata"]["labels"] == {"a": "b"}
    assert server.requests[-1] == ("GET", "/api/v1/services?limit=5")


async def test_a_write_tells_the_server_its_time_limit(client: Client, server: ApiServer) -> None:
    with contextlib.suppress(KubeRejected):
        await client.send("PUT", SERVICES + "/x", {"metadata": {"name": "x"}}, timeout_s=1.5)
    assert server.requests[-1] == ("PUT", SERVICES + "/x?timeout=1500ms")
    with contextlib.suppress(KubeRejected):
        await client.send("PUT", SERVICES + "/x", {"metadata": {"name": "x"}}, timeout_s=99)
    assert server.requests[-1] == ("PUT", SERVICES + "/x?timeout=2000ms")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, KubeRejected),
        (401, KubeRejected),
        (403, KubeRejected),
        (404, KubeRejected),
        (409, KubeRejected),
        (410, KubeGone),
        (422, KubeRejected),
        (429, KubeUnavailable),
        (500, KubeUnavailable),
        (503, KubeUnavailable),
        (504, KubeUnavailable),
    ],
)
def test_every_answer_that_is_no_has_its_error(status: int, kind: type[KubeError]) -> None:
    for body in (b'{"message": "so"}', {"message": "so"}):
        error = refusal("/path", status, body)
        assert type(error) is kind
        assert error.message == f"/path: {status} so"
        assert getattr(error, "status", status) == status


def test_an_answer_that_is_not_from_an_api_server_is_quoted() -> None:
    assert "502 <html>" in refusal("/p", 502, b"<html>").message
    assert refusal("/p", 502, b"[]").message == "/p: 502 []"


async def test_missing_rights_are_told_with_what_to_grant(client: Client, server: ApiServer) -> None:
    server.forbidden.add(("list", "services"))
    with pytest.raises(KubeRejected) as caught:
        await client.get(SERVICES)
    assert caught.value.status == 403
    assert "rbac.yaml" in caught.value.hint


async def test_a_server_that_does_not_answer_is_unavailable_in_time(client: Client, server: ApiServer) -> None:
    server.answering.clear()
    with pytest.raises(KubeUnavailable, match="no answer within"):
        await client.send("PUT", SERVICES + "/x", {"metadata": {"name": "x"}}, timeout_s=0.2)


async def test_a_server_that_is_away_is_unavailable(client: Client, server: ApiServer) -> None:
    await server.stop()
    with pytest.raises(KubeUnavailable, match="Cannot connect"):
        await client.get(SERVICES)


async def test_an_answer_that_is_not_json_is_unavailable(tmp_path: Path) -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>login</html>", content_type="text/html")

    async with serving(page) as url, client_of(tmp_path, url) as client:
        with pytest.raises(KubeUnavailable, match="not JSON"):
            await client.get(SERVICES)


# --- watches ------------------------------------------------------------------------------------


async def test_a_watch_yields_events_and_ends_with_the_server(client: Client, server: ApiServer) -> None:
    server.create("services", {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}})
    async with client.watch(SERVICES, {"watch": "1", "timeoutSeconds": 1}, silence_s=5) as events:
        seen = [event["type"] async for event in events]
    assert seen == ["ADDED"]


async def test_a_silent_watch_is_given_up(client: Client, server: ApiServer) -> None:
    server.silent = True
    async with client.watch(SERVICES, {"watch": "1"}, silence_s=0.3) as events:
        with pytest.raises(KubeSilent, match="of silence"):
            await anext(events)


async def test_a_watch_whose_beginning_hangs_is_given_up_like_any_request(
    kubeconfig: Path, server: ApiServer, clocks: TestClocks
) -> None:
    client = Client(kubeconfig, timeout_s=0.2, clock=clocks.monotonic)
    server.answering.clear()
    with pytest.raises(KubeUnavailable, match="no answer"):
        async with client.watch(SERVICES, {"watch": "1"}, silence_s=60):
            pass
    await client.close()


async def test_lines_are_put_together_from_chunks_and_a_cut_one_is_dropped(tmp_path: Path) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in (b'{"type": "A', b'"}\n\n{"type": "B"}\n{"ty', b'pe": "C"'):
            await response.write(chunk)
            await asyncio.sleep(0.02)
        return response

    async with (
        serving(stream) as url,
        client_of(tmp_path, url) as client,
        client.watch(SERVICES, {}, silence_s=5) as events,
    ):
        assert [event["type"] async for event in events] == ["A", "B"]


async def test_a_refused_watch_raises_before_it_begins(client: Client, server: ApiServer) -> None:
    server.forbidden.add(("watch", "services"))
    with pytest.raises(KubeRejected):
        async with client.watch(SERVICES, {"watch": "1"}, silence_s=5):
            pass


# --- credentials --------------------------------------------------------------------------------


async def test_a_token_file_is_read_again_after_a_401(server: ApiServer, tmp_path: Path, clocks: TestClocks) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")
    config = make_kubeconfig(server.url)
    config["users"][0]["user"] = {"tokenFile": str(token)}
    file = tmp_path / "kubeconfig"
    file.write_text(json.dumps(config))
    client = Client(file, timeout_s=2.0, clock=clocks.monotonic)
    with pytest.raises(KubeRejected) as caught:
        await client.get(SERVICES)
    assert caught.value.status == 401
    token.write_text(TOKEN + "\n")
    await client.get(SERVICES)
    await client.close()


async def test_the_kubeconfig_is_read_again_every_minute(
    client: Client, server: ApiServer, kubeconfig: Path, clocks: TestClocks
) -> None:
    await client.get(SERVICES)
    server.tokens["other"] = "lbagent"
    write_kubeconfig(kubeconfig, server.url, token="other")
    del server.tokens[TOKEN]
    clocks.ahead_s = CREDENTIALS_AGE_S
    count = len(server.requests)
    await client.get(SERVICES)
    assert len(server.requests) == count + 1  # not by way of a 401


async def test_another_server_in_the_kubeconfig_is_used_without_a_restart(
    client: Client, kubeconfig: Path, clocks: TestClocks
) -> None:
    await client.get(SERVICES)
    async with ApiServer(tokens={TOKEN: "x"}) as other:
        write_kubeconfig(kubeconfig, other.url, token=TOKEN)
        clocks.ahead_s = CREDENTIALS_AGE_S
        await client.get(SERVICES)
        assert other.requests == [("GET", SERVICES)]


@pytest.mark.parametrize("text", [None, "", "just words", "{", '{"current-context": "x"}', "users: [1"])
async def test_an_unusable_kubeconfig_is_named_and_may_be_mended(
    text: str | None, tmp_path: Path, server: ApiServer, clocks: TestClocks
) -> None:
    file = tmp_path / "kubeconfig"
    if text is not None:
        file.write_text(text)
    client = Client(file, timeout_s=2.0, clock=clocks.monotonic)
    with pytest.raises(KubeUnavailable) as caught:
        await client.get(SERVICES)
    assert str(file) in caught.value.message
    assert caught.value.hint
    write_kubeconfig(file, server.url, token=TOKEN)
    await client.get(SERVICES)
    await client.close()


def test_times_are_written_as_the_api_writes_them() -> None:
    assert rfc3339(1_767_225_600.7) == "2026-01-01T00:00:00Z"


@contextlib.asynccontextmanager
async def serving(answer: object) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)  # type: ignore[arg-type]
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def client_of(folder: Path, url: str) -> AsyncIterator[Client]:
    client = Client(write_kubeconfig(folder / "kc", url), timeout_s=2.0, clock=TestClocks().monotonic)
    try:
        yield client
    finally:
        await client.close()
