# SPDX-License-Identifier: Apache-2.0
import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from lbagent import log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_a_line_is_an_event_and_its_facts_with_a_priority_for_journald() -> None:
    out = io.StringIO()
    log.configure(stream=out)
    log.get("bgp").info("route announced", prefix="192.0.2.1/32", peers=2)
    assert out.getvalue() == '<6>level=info event="route announced" room=bgp prefix=192.0.2.1/32 peers=2\n'


@pytest.mark.parametrize(("level", "priority"), [("debug", 7), ("info", 6), ("warning", 4), ("error", 3)])
def test_the_priority_is_syslogs(level: str, priority: int) -> None:
    out = io.StringIO()
    log.configure(stream=out, level="debug")
    getattr(log.get("agent"), level)("happened")
    assert out.getvalue().startswith(f"<{priority}>level={level} ")


def test_a_terminal_sees_the_time_and_no_priority() -> None:
    out = Terminal()
    log.configure(stream=out)
    log.get("agent").info("started")
    assert out.getvalue().startswith("timestamp=")
    assert out.getvalue().endswith("Z level=info event=started room=agent\n")


def test_an_event_stays_on_one_line_whatever_it_holds() -> None:
    out = io.StringIO()
    log.configure(stream=out)
    log.get("kube").info("read", text="a\nb", quoted='say "x"', ok=True)
    assert out.getvalue() == '<6>level=info event=read room=kube text=a\\nb quoted="say \\"x\\"" ok=true\n'


def test_an_exception_is_one_line_with_its_traceback() -> None:
    out = io.StringIO()
    log.configure(stream=out)
    try:
        raise KeyError("lost")
    except KeyError:
        log.get("agent").exception("pass failed")
    (line,) = out.getvalue().splitlines()
    assert line.startswith("<3>level=error")
    assert "KeyError: 'lost'" in line


def test_json_is_one_object_per_line() -> None:
    out = io.StringIO()
    log.configure(stream=out, form=log.Form.JSON)
    log.get("xdp").warning("program replaced", interface="eth0")
    priority, _, text = out.getvalue().partition(">")
    assert priority == "<4"
    assert json.loads(text) == {
        "event": "program replaced",
        "level": "warning",
        "room": "xdp",
        "interface": "eth0",
    }


def test_what_is_below_the_level_is_not_written() -> None:
    out = io.StringIO()
    log.configure(stream=out, level="warning")
    log.get("plan").info("assigned")
    assert out.getvalue() == ""


def test_libraries_speak_the_same_way_from_warning_up() -> None:
    out = io.StringIO()
    log.configure(stream=out, level="debug")
    logging.getLogger("aiohttp.client").info("chatter")
    logging.getLogger("aiohttp.client").warning("closed by %s", "peer")
    assert out.getvalue() == '<4>level=warning event="closed by peer" logger=aiohttp.client\n'


def test_a_logger_made_before_configure_follows_it() -> None:
    early = log.get("agent")
    out = io.StringIO()
    log.configure(stream=out)
    early.info("started")
    assert "event=started" in out.getvalue()
