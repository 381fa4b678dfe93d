# SPDX-License-Identifier: Apache-2.0
"""`lbctl`: look at the running daemon through its UNIX socket. Imports nothing heavy.

Exit codes: 0 fine, 1 failed, 2 usage, 3 degraded, 4 daemon unreachable.
"""

import json
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from lbagent import __version__
from lbagent.cli import table

DEFAULT_SOCKET = Path("/run/lbagent/lbagent.sock")
NOUNS = ("services", "vips", "backends", "rings", "routes", "peers", "pools", "drops", "config", "events")
FAILED, DEGRADED, UNREACHABLE = 1, 3, 4
ANSWER_S = 30.0


class _Unreachable(Exception):
    pass


class _Refused(Exception):
    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def ask(path: Path, verb: str, arguments: Mapping[str, Any]) -> Any:
    """One request to the daemon. Raises _Unreachable or _Refused."""
    request = json.dumps({"verb": verb, "args": dict(arguments)}).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S)
            connection.connect(str(path))
            connection.sendall(request)
            with connection.makefile("rb") as answer:
                line = answer.readline()
        reply = json.loads(line)
    except PermissionError as error:
        raise _Unreachable(f"{path}: not permitted; join the group lbagent or use sudo") from error
    except (OSError, ValueError) as error:
        raise _Unreachable(f"{path}: {error}; is lbagent running? systemctl status lbagent") from error
    if not reply["ok"]:
        raise _Refused(reply["error"], reply.get("hint", ""))
    return reply["result"]


class _Prefixes(click.Group):
    """Accepts unique prefixes of commands: ``lbctl st``."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        matches = [c for c in self.list_commands(ctx) if c.startswith(name)]
        exact = [c for c in matches if c == name] or matches
        if len(exact) > 1:
            ctx.fail(f"{name} may be {' or '.join(exact)}")
        return super().get_command(ctx, exact[0]) if exact else None


class _Noun(click.ParamType[str]):
    name = "noun"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        matches = [noun for noun in NOUNS if noun.startswith(value)]
        if len(matches) != 1:
            self.fail(f"{value!r} is none of {', '.join(NOUNS)} (unique prefixes do)", param, ctx)
        return matches[0]


@click.group(cls=_Prefixes, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lbctl")
@click.option(
    "--socket",
    "path",
    type=click.Path(path_type=Path),
    default=DEFAULT_SOCKET,
    show_default=True,
    envvar="LBAGENT_SOCKET",
)
@click.option("-o", "--output", "form", type=click.Choice(table.FORMATS), default="table", show_default=True)
@click.option("-w", "--watch", "every_s", type=click.FloatRange(min=0.1), default=None, help="Repeat every SECONDS.")
@click.pass_context
def main(ctx: click.Context, path: Path, form: str, every_s: float | None) -> None:
    """Look at the running lbagent: what is announced, what is forwarded, and why not."""
    ctx.obj = (path, form, every_s)


def _answer(
    ctx: click.Context, verb: str, human: Callable[[Any], str], arguments: Mapping[str, Any] | None = None
) -> Any:
    """Ask, print in the chosen form, repeat when watching; errors in the chosen form too."""
    path, form, every_s = ctx.obj
    while True:
        try:
            result = ask(path, verb, arguments or {})
        except (_Unreachable, _Refused) as error:
            hint = getattr(error, "hint", "")
            if form == "table":
                click.echo(f"lbctl: {error}" + (f" ({hint})" if hint else ""), err=True)
            else:
                click.echo(table.machine({"error": str(error), "hint": hint}, form))
            sys.exit(UNREACHABLE if isinstance(error, _Unreachable) else FAILED)
        if every_s is not None and form == "table":
            click.clear()
        click.echo(human(result) if form == "table" else table.machine(result, form))
        if every_s is None:
            return result
        time.sleep(every_s)


@main.command()
@click.pass_context
def status(ctx: click.Context) -> None:
    """One screen: is this host fine, and what does it do? Exit 3 when it is not fine."""
    result = _answer(ctx, "status", _status)
    if not result["ok"]:
        sys.exit(DEGRADED)


def _status(result: Any) -> str:
    shown = {
        "host": f"{result['host']} (lbagent {result['version']})",
        "state": "fine" if result["ok"] else "; ".join(f"{k}: {v}" for k, v in result["problems"].items()),
        "lease": result["lease"],
        "api": "from memory of an earlier life" if result["from_memory"] else f"answered {result['api_age_s']} s ago",
        "drain": result["drain"],
        "xdp": result["xdp"],
        "services": result["services"],
        "vips": result["vips"],
        "routes": result["routes"],
        "last pass": result["pass"],
    }
    return table.facts(shown) + "\n\n" + table.rows(result["peers"])


@main.command()
@click.argument("noun", type=_Noun())
@click.pass_context
def show(ctx: click.Context, noun: str) -> None:
    """Show services, vips, backends, rings, routes, peers, pools, drops, config or events."""
    _answer(ctx, f"show {noun}", _config if noun == "config" else table.rows)


def _config(result: Any) -> str:
    return table.machine(result, "yaml")


@main.command()
@click.argument("name")
@click.pass_context
def explain(ctx: click.Context, name: str) -> None:
    """Why is this Service (NAMESPACE/NAME, or an address) where it is?"""
    _answer(ctx, "explain", _explain, {"name": name})


def _explain(result: Any) -> str:
    said = f"{result['reason'] or '-'}: {result['sentence']}" + (f" ({result['detail']})" if result["detail"] else "")
    lines = [table.facts({"service": result["service"], "addresses": result["addresses"], "reason": said})]
    if result["hint"]:
        lines.append(f"next       {result['hint']}")
    lines.append("")
    for sentence in result["sentences"]:
        line = f"{'!' if sentence['is_obstacle'] else ' '} {sentence['about']:<9}  {sentence['text']}"
        lines.append(click.style(line, bold=True) if sentence["is_obstacle"] else line)
    for vip in result["vips"]:
        head = {k: v for k, v in vip.items() if k not in ("backends", "vip")}
        lines += ["", f"vip {vip['vip']}", table.facts(head), table.rows(vip["backends"])]
    if result["routes"]:
        lines += ["", table.rows(result["routes"])]
    if result["changes"]:
        lines += ["", "last changes", table.rows(result["changes"][:10])]
    return "\n".join(lines)


@main.command(epilog="For IPv6: lbctl trace [2001:db8::9]:4711 [2001:db8:1::1]:53/udp")
@click.argument("source", required=False)
@click.argument("destination", required=False)
@click.option("--packet", metavar="HEX", help="Trace this frame instead of one made from addresses.")
@click.pass_context
def trace(ctx: click.Context, source: str | None, destination: str | None, packet: str | None) -> None:
    """Run a packet SRC[:PORT] DST:PORT/PROTO through the loaded program; nothing is counted or remembered."""
    if packet is not None:
        _answer(ctx, "trace", table.facts, {"packet": packet})
        return
    if source is None or destination is None:
        raise click.UsageError("give SRC[:PORT] DST:PORT/PROTO, or --packet HEX")
    where, slash, protocol = destination.partition("/")
    address, port = _endpoint(where, "80")
    client, client_port = _endpoint(source, "40000")
    arguments = {
        "source": client,
        "source_port": client_port,
        "destination": address,
        "destination_port": port,
        "protocol": protocol if slash else "tcp",
    }
    _answer(ctx, "trace", table.facts, arguments)


def _endpoint(text: str, port: str) -> tuple[str, str]:
    """``1.2.3.4:80``, ``[2001:db8::1]:80``, or an address alone."""
    if text.startswith("["):
        address, _, rest = text[1:].partition("]")
        return address, rest.removeprefix(":") or port
    if text.count(":") == 1:
        address, _, given = text.partition(":")
        return address, given
    return text, port


@main.command()
@click.option("--every", "every_s", type=click.FloatRange(min=0.1), default=1.0, show_default=True)
@click.option("--count", type=click.IntRange(min=1), default=None, help="Stop after so many screens.")
@click.pass_context
def top(ctx: click.Context, every_s: float, count: int | None) -> None:
    """Packets and bits per second by VIP and by backend, live."""
    path, form, _ = ctx.obj
    before, shown = _counters(path), 0
    while count is None or shown < count:
        time.sleep(every_s)
        after = _counters(path)
        rates = _rates(before, after)
        if form == "table":
            if count is None:
                click.clear()
            click.echo("\n\n".join(table.rows(rates[kind]) for kind in ("vips", "backends")))
        else:
            click.echo(table.machine(rates, form))
        before, shown = after, shown + 1


def _counters(path: Path) -> Any:
    try:
        return ask(path, "counters", {})
    except (_Unreachable, _Refused) as error:
        click.echo(f"lbctl: {error}", err=True)
        sys.exit(UNREACHABLE if isinstance(error, _Unreachable) else FAILED)


def _rates(before: Any, after: Any) -> dict[str, list[dict[str, Any]]]:
    """Per second, busiest first."""
    span_s = max(after["at_s"] - before["at_s"], 1e-3)
    nothing = {"packets": 0, "bytes": 0}
    rates: dict[str, list[dict[str, Any]]] = {}
    for kind in ("vips", "backends"):
        rows = []
        for name, now in after[kind].items():
            then = before[kind].get(name, nothing)
            pps = (now["packets"] - then["packets"]) / span_s
            bps = (now["bytes"] - then["bytes"]) * 8 / span_s
            rows.append({kind[:-1]: name, "packets_per_s": round(pps), "bits_per_s": round(bps)})
        rates[kind] = sorted(rows, key=lambda row: (-row["packets_per_s"], row[kind[:-1]]))
    return rates


@main.command()
@click.pass_context
def diff(ctx: click.Context) -> None:
    """What the last pass had to change; nothing when all is as it should be."""
    _answer(ctx, "diff", lambda steps: "\n".join(steps) or "nothing to change")


@main.command()
@click.pass_context
def snapshot(ctx: click.Context) -> None:
    """All the agent knows, as one JSON document that `lbagent plan` reads back."""
    _answer(ctx, "snapshot", lambda result: table.machine(result, "json"))


@main.command()
@click.pass_context
def confirm(ctx: click.Context) -> None:
    """Let the next pass do what the guard holds back (see `lbctl diff`)."""
    _answer(ctx, "confirm", lambda held: "\n".join(["confirmed:", *held] if held else ["nothing was held back"]))


@main.command()
@click.option("--check", is_flag=True, help="Only show what would change.")
@click.pass_context
def reload(ctx: click.Context, check: bool) -> None:
    """Read the configuration again; a broken one is refused and the last good one stays."""
    _answer(ctx, "reload", _reload, {"check": check})


def _reload(result: Any) -> str:
    done = "taken over" if result["taken_over"] else "not taken over (--check)"
    return "\n".join([*(result["changes"] or ["nothing changes"]), done])


@main.command()
@click.option("--wait", is_flag=True, help="Return when the routes are withdrawn.")
@click.pass_context
def drain(ctx: click.Context, wait: bool) -> None:
    """Leave: announce with graceful-shutdown, wait until quiet, then withdraw. Forwarding goes on."""
    result = _answer(ctx, "drain", _phase)
    while wait and not _is_gone(ctx):
        time.sleep(0.5)
    if wait and result["phase"] != "out":
        click.echo("drained", err=True)


def _is_gone(ctx: click.Context) -> bool:
    try:
        status = ask(ctx.obj[0], "status", {})
    except (_Unreachable, _Refused) as error:
        click.echo(f"lbctl: {error}", err=True)
        sys.exit(UNREACHABLE if isinstance(error, _Unreachable) else FAILED)
    return status["drain"]["phase"] == "out" and not status["routes"]["announced"]


@main.command()
@click.pass_context
def undrain(ctx: click.Context) -> None:
    """Come back: announce again what this host forwards."""
    _answer(ctx, "undrain", _phase)


def _phase(result: Any) -> str:
    return f"drain phase: {result['phase']} for {result['for_s']} s"
