# SPDX-License-Identifier: Apache-2.0
"""`lbagent`: the daemon and the verbs that need no daemon.

Exit codes: 0 fine, 1 failed, 2 usage, 3 degraded (some Service is not served).
"""

import asyncio
import sys
from pathlib import Path

import click

from lbagent import __version__
from lbagent.config import DEFAULT_PATH, Config, load
from lbagent.errors import ConfigError, LbagentError

TOR_SYSTEMS = ("frr", "bird", "gobgp", "eos", "nxos", "junos", "sonic")

_config_option = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    default=DEFAULT_PATH,
    show_default=True,
    help="Configuration file.",
)


class _Commands(click.Group):
    """`plan` brings half of the daemon with it; the others need not wait for that."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "plan"])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name == "plan":
            from lbagent.cli.offline import plan

            return plan
        return super().get_command(ctx, name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lbagent")
def main() -> None:
    """External load-balancer tier for Kubernetes on bare metal."""


def _load(path: Path) -> Config:
    try:
        return load(path)
    except ConfigError as error:
        for line in error.problems:
            click.echo(line, err=True)
        raise SystemExit(1) from None


def _fail(error: BaseException) -> None:
    """One line for an expected error; a bug keeps its traceback."""
    if isinstance(error, BaseExceptionGroup):
        expected, others = error.split(LbagentError)
        if others is not None or expected is None:
            raise error
        for inner in expected.exceptions:
            _fail(inner)
        return
    click.echo(f"lbagent: {error}", err=True)


@main.command()
@_config_option
def run(path: Path) -> None:
    """Run the daemon (systemd does this)."""
    from lbagent.agent.run import run as run_agent

    settings = _load(path)
    try:
        asyncio.run(run_agent(path, settings))
    except (LbagentError, ExceptionGroup) as error:
        _fail(error)
        sys.exit(1)


@main.command()
@click.argument("path", type=click.Path(path_type=Path), default=DEFAULT_PATH)
def check(path: Path) -> None:
    """Check a configuration file; every mistake with its line."""
    settings = _load(path)
    click.echo(f"{path}: fine ({len(settings.pools)} pools, {len(settings.bgp.peers)} peers)")


@main.command()
@_config_option
def doctor(path: Path) -> None:
    """Is this machine fit to run lbagent? One line per check, with what to install or grant."""
    from lbagent.cli.doctor import examine

    findings = list(examine(path))
    width = max(len(f.name) for f in findings)
    for finding in findings:
        mark = "ok  " if finding.ok else "FAIL"
        click.echo(f"{mark} {finding.name:<{width}}  {finding.found}")
        if not finding.ok and finding.remedy:
            click.echo(f"     {'':<{width}}  -> {finding.remedy}")
    sys.exit(0 if all(f.ok for f in findings) else 1)


@main.command()
@_config_option
@click.option("--yes", is_flag=True, help="Do it; without this only say what it means.")
def uninstall(path: Path, yes: bool) -> None:
    """Take the program off every interface and forget all kernel tables: forwarding ends here."""
    from lbagent.xdp.forwarder import uninstall as end

    settings = _load(path)
    if not yes:
        click.echo("This ends forwarding on this host at once. Drain it first (lbctl drain --wait), then add --yes.")
        sys.exit(1)
    try:
        end(settings.paths)
    except LbagentError as error:
        _fail(error)
        sys.exit(1)


@main.group()
def render() -> None:
    """Write what other programs read, from the one configuration file."""


@render.command("exabgp")
@_config_option
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder to write into.")
@click.option("--user", default="", help="Who ExaBGP becomes when started as root; default: who runs this.")
def render_exabgp(path: Path, out: Path, user: str) -> None:
    """ExaBGP's configuration and environment, judged by ExaBGP itself before they replace anything."""
    from lbagent.bgp import launch

    settings = _load(path)
    try:
        launch.install(settings.bgp, settings.paths, out, user=user)
    except LbagentError as error:
        _fail(error)
        sys.exit(1)


@render.command("tor")
@_config_option
@click.option("--peer", required=True, help="Name of the router under bgp.peers.")
@click.option("--os", "system", type=click.Choice(TOR_SYSTEMS), required=True, help="What the router runs.")
def render_tor(path: Path, peer: str, system: str) -> None:
    """The router's side of a session, to paste: ECMP, filters, limits, BFD, graceful shutdown."""
    from lbagent.bgp import tor

    try:
        click.echo(tor.snippet(_load(path), peer=peer, os=tor.RouterOs(system)), nl=False)
    except LbagentError as error:
        _fail(error)
        sys.exit(1)


@render.command("bfdd")
@_config_option
def render_bfdd(path: Path) -> None:
    """The configuration of FRR's bfdd, which watches the routers beside ExaBGP (peers with bfd_ms)."""
    from lbagent.bgp import render as texts

    click.echo(texts.bfdd_conf(_load(path).bgp), nl=False)
