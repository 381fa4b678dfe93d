# SPDX-License-Identifier: Apache-2.0
"""The man pages lbagent(8), lbctl(8) and lbagent.yaml(5), as troff, from what the code says of itself."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import click
import outline

from lbagent import __version__
from lbagent.cli import ctl, daemon

_FILES = (
    ("/etc/lbagent/lbagent.yaml", "The configuration: lbagent.yaml(5)."),
    ("/run/lbagent/lbagent.sock", "The socket that lbctl asks."),
    ("/var/lib/lbagent", "The last snapshot of the cluster, the phase of a drain, compiled programs."),
    ("/sys/fs/bpf/lbagent", "Pinned maps, program and links. They outlive the daemon."),
)


def pages(nouns: Mapping[str, str], exit_codes: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """Text by file name. ``exit_codes``: code, which tool (both when empty), meaning."""

    def codes(name: str) -> list[tuple[str, str]]:
        return [(code, f"{words[:1].upper()}{words[1:]}.") for code, tool, words in exit_codes if tool in ("", name)]

    return {
        "lbagent.8": _page(
            "lbagent",
            8,
            "external load balancer for Kubernetes",
            _synopsis("lbagent", daemon.main),
            _section(
                "DESCRIPTION",
                "The daemon watches Services of type LoadBalancer, assigns addresses, announces them by BGP",
                "through ExaBGP and forwards their packets with an XDP program. systemd runs it as",
                "lbagent.service, and ExaBGP as lbagent-bgp.service. Stopping the daemon changes nothing",
                "that is forwarded or announced.",
            ),
            _commands("lbagent", daemon.main),
            _list("FILES", _FILES),
            _list("EXIT STATUS", codes("lbagent")),
            _see("lbctl(8), lbagent.yaml(5)"),
        ),
        "lbctl.8": _page(
            "lbctl",
            8,
            "look at the running lbagent",
            _synopsis("lbctl", ctl.main),
            _section(
                "DESCRIPTION",
                "Asks the daemon on this host what is announced, what is forwarded, and why not. Members of",
                "the group lbagent may look; drain, undrain, reload and confirm are for root. Commands and nouns may",
                "be shortened to any unique prefix. Options of lbctl itself stand before the command.",
            ),
            _commands("lbctl", ctl.main),
            _list("NOUNS OF SHOW", ((noun, nouns[noun]) for noun in ctl.NOUNS)),
            _list("ENVIRONMENT", [("LBAGENT_SOCKET", "Another socket than the default.")]),
            _list("EXIT STATUS", codes("lbctl")),
            _see("lbagent(8), lbagent.yaml(5)"),
        ),
        "lbagent.yaml.5": _page(
            "lbagent.yaml",
            5,
            "configuration of lbagent",
            _section(
                "DESCRIPTION",
                "One YAML file, by default /etc/lbagent/lbagent.yaml. Unknown keys are refused.",
                "lbagent check FILE names every mistake with its line. Times are seconds.",
            ),
            _keys(),
            _see("lbagent(8), lbctl(8)"),
        ),
    }


def _page(name: str, section: int, purpose: str, *parts: Iterable[str]) -> str:
    lines = [
        f'.\\" SPDX-License-Identifier: Apache-2.0\n.\\" Made by docs/generate.py from the code.\n'
        f'.TH {name.upper()} {section} "" "lbagent {__version__}" "lbagent"',
        ".nh",
        ".ad l",
        ".SH NAME",
        f"{_text(name)} \\- {_text(purpose)}",
    ]
    for part in parts:
        lines += part
    return "\n".join(lines) + "\n"


def _text(words: str) -> str:
    """Plain text as troff: Markdown's marks go, no line may look like a request."""
    escaped = re.sub(r"`|\*\*", "", words).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped


def _section(title: str, *lines: str) -> Iterator[str]:
    yield f".SH {title}"
    yield from (_text(line) for line in lines)


def _entry(head: str, words: str) -> Iterator[str]:
    yield from (".TP", f".B {_text(head)}", _text(words))


def _list(title: str, entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield f".SH {title}"
    for head, words in entries:
        yield from _entry(head, words)


def _synopsis(name: str, root: click.Command) -> Iterator[str]:
    yield ".SH SYNOPSIS"
    for command in outline.commands(name, root):
        if not command.is_group:
            yield from (_text(command.usage), ".br")


def _commands(name: str, root: click.Command) -> Iterator[str]:
    top, *below = outline.commands(name, root)
    yield from _list(
        "OPTIONS", [*top.options, ("--version", "Print the version."), ("--help", "Also of each command.")]
    )
    yield ".SH COMMANDS"
    for command in below:
        if command.is_group:
            continue
        yield from (f".SS {_text(command.usage)}", _text(command.meaning))
        for words, meaning in command.options:
            yield from _entry(words, meaning or "-")


def _keys() -> Iterator[str]:
    for section in outline.sections():
        yield from (f".SH {_text(section.path or 'THE FILE')}", _text(section.meaning))
        for key in section.keys:
            default = "required" if not key.default else f"default {key.default}" if key.default != "-" else "optional"
            yield from _entry(key.name, f"{key.meaning.rstrip('.')} ({key.type}; {default}).")


def _see(pages: str) -> Iterator[str]:
    yield from _section("SEE ALSO", pages)
