# SPDX-License-Identifier: Apache-2.0
"""Writes the reference pages and man pages that are made from code; ``--check`` only says which are stale.

python docs/generate.py [--check]
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
if str(CHECKOUT) not in sys.path:
    sys.path.insert(0, str(CHECKOUT))

import man  # noqa: E402
import outline  # noqa: E402

from lbagent import metrics  # noqa: E402
from lbagent.cli import ctl, daemon  # noqa: E402
from lbagent.kube import event, publish  # noqa: E402
from lbagent.model.reason import Judgement, Reason  # noqa: E402
from lbagent.model.service import Service, ServiceKey  # noqa: E402
from lbagent.plan import health  # noqa: E402
from lbagent.plan.report import is_reported  # noqa: E402
from lbagent.xdp.verdict import Verdict  # noqa: E402

DOCS = CHECKOUT / "docs"
NOTICE = "<!-- Made by docs/generate.py from the code. Change it there and run `make docs`. -->"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    heads = list(heads)
    lines = [" | ".join(heads), "|".join("---" for _ in heads)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return [f"|{line}|" if line.startswith("---") else f"| {line} |" for line in lines]


def config_page() -> str:
    """Every key of the configuration file, section by section."""
    lines = [
        "# Configuration",
        "",
        "One file, `/etc/lbagent/lbagent.yaml`. Unknown keys are refused. `lbagent check FILE` names every",
        "mistake with its line. [lbagent.yaml](lbagent.yaml) is an example that uses most keys.",
        "Times are seconds.",
    ]
    for section in outline.sections():
        if section.path:
            lines += ["", f"## `{section.path}`", "", section.meaning]
        rows = [(f"`{k.name}`", k.type, k.default or "**required**", k.meaning) for k in section.keys]
        lines += ["", *_table(("key", "type", "default", "meaning"), rows)]
    return "\n".join(lines) + "\n"


NOUNS: Mapping[str, str] = {
    "services": "Services of type LoadBalancer with their addresses, mode and Reason",
    "vips": "address, port and protocol: wanted, held by the kernel, proven by a test packet",
    "backends": "nodes by ring: weight, state, share of the ring, next hop found or not",
    "rings": "consistent-hash rings: backends, how many are active, how many VIPs use them",
    "routes": "prefixes: wanted, told to ExaBGP, and the VIPs an announcement still waits for",
    "peers": "BGP sessions, routes sent and acknowledged, the last error",
    "pools": "pools: size and use",
    "drops": "packets dropped by this host since its maps were made, by verdict",
    "config": "the configuration in force, with all defaults; as YAML",
    "events": "the last 1,000 changes this agent made, newest first",
}
"""What ``lbctl show`` shows; a noun without a word here is an error."""

EXIT_CODES: Sequence[tuple[str, str, str]] = (
    ("0", "", "fine"),
    ("1", "", "failed: the daemon refused, a check found something, the input cannot be used"),
    ("2", "", "the command line is wrong"),
    ("3", "lbctl", "status: the host is degraded; the screen says why"),
    ("3", "lbagent", "plan: some Service of ours is not served"),
    ("4", "lbctl", "the daemon cannot be reached"),
)
"""Code, which of the two tools (both when empty), meaning."""


def cli_page() -> str:
    """Every command with its options, from click's tree."""
    lines = [
        "# Commands",
        "",
        "`lbagent` is the daemon and what needs no daemon. `lbctl` asks the running daemon through its UNIX",
        "socket: members of the group `lbagent` may look; `drain`, `undrain`, `reload` and `confirm` are for root.",
        "Commands and nouns may be shortened to any unique prefix in `lbctl` (`lbctl sh ro`). Options of",
        "`lbctl` itself (`-o`, `-w`, `--socket`) stand before the command. The environment variable",
        "`LBAGENT_SOCKET` names another socket. Every command also takes `--help`; both programs `--version`.",
        "",
        *_table(
            ("exit code", "means"),
            [(code, f"`{tool}` {words}" if tool else words) for code, tool, words in EXIT_CODES],
        ),
        "",
        "## What `lbctl show` shows",
        "",
        *_table(("noun", "rows"), [(f"`{noun}`", NOUNS[noun]) for noun in ctl.NOUNS]),
    ]
    for name, root in (("lbagent", daemon.main), ("lbctl", ctl.main)):
        for command in outline.commands(name, root):
            lines += ["", f"## {command.name}", "", "```text", command.usage, "```", "", command.meaning]
            if command.options:
                lines += ["", *_table(("option", "meaning"), [(f"`{w}`", m or "-") for w, m in command.options])]
    return "\n".join(lines) + "\n"


def _told(reason: Reason) -> tuple[str, str] | None:
    """The Event of a Reason; None when the plan never asks for one, or it has no word."""
    service = Service(key=ServiceKey("default", "web"))
    return None if is_reported(service, Judgement(reason=reason)) else event.word(reason)


def events_page() -> str:
    """Every Event and condition that lbagent puts on a Service."""
    reasons_by_word: dict[tuple[str, str], list[Reason]] = {}
    for reason in Reason:
        if (word := _told(reason)) is not None:
            reasons_by_word.setdefault(word, []).append(reason)
    done = {
        event.ALLOCATED: "addresses were written into the status",
        event.RELEASED: "addresses were taken out of the status",
    }
    rows = [(f"`{word}`", kind, said) for (kind, word), said in done.items()]
    rows += [
        (f"`{word}`", kind, ", ".join(f"`{reason.value}`" for reason in reasons))
        for (kind, word), reasons in reasons_by_word.items()
    ]
    silent = ", ".join(f"`{reason.value}`" for reason in Reason if _told(reason) is None)
    every_host = ", ".join(f"`{reason.value}`" for reason in Reason if reason in event.OF_THIS_HOST)
    lines = [
        "# Events and conditions",
        "",
        "What `kubectl describe service` shows. An Event's message is the sentence of the",
        "[Reason](reasons.md), what it is about, and what to do. Its source names the LB host.",
        "",
        *_table(("Event", "type", "said when the Reason is"), rows),
        "",
        f"Without an Event: {silent}.",
        "",
        f"Every LB host speaks for itself about {every_host}.",
        "About all else only the holder of the lease speaks.",
        f"The same Event is sent at most every {event.HUSH_S:g} s; its count rises meanwhile.",
        "",
        "## Conditions",
        "",
        *_table(
            ("condition in `status.conditions`", "is"),
            [
                (f"`{publish.SATISFIED}`", "`True` when the Reason is `satisfied`; its reason is the Reason's word"),
                (
                    f"`{publish.PORTS_ERROR}`",
                    "`True` when some port cannot be forwarded; `ingress[].ports[].error` says which",
                ),
            ],
        ),
        "",
        "The lease holder writes both. A Service that is ours also carries the finalizer",
        f"`{publish.CLEANUP_FINALIZER}` from its first address until its routes are gone",
        "(`kubernetes.finalizer`).",
    ]
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Every metric, from the catalogue."""
    head = "# Metrics\n\n`GET /metrics` on `http.listen`. No label is unbounded: client addresses never appear.\n\n"
    return head + metrics.reference()


def reasons_page() -> str:
    """Every Reason with its sentence and what to do, from the model."""
    lines = [
        "# Reasons",
        "",
        "Why a Service is where it is. Each Service has exactly one, and the CLI, Events, metrics and logs all",
        "print the same word.",
        "",
        "| reason | the Service ... | what to do |",
        "|---|---|---|",
    ]
    lines += [f"| `{reason.value}` | {reason.sentence} | {reason.hint or '-'} |" for reason in Reason]
    return "\n".join(lines) + "\n"


def verdicts_page() -> str:
    """Every Verdict in the order of the kernel's list, from its Python twin."""
    lines = [
        "# Verdicts",
        "",
        "What happened to a packet. Each packet that the XDP program sees gets exactly one, and every one is",
        'counted: `lbagent_packets_total{verdict="..."}`. Drops are always named.',
        "",
        "| verdict | number | meaning |",
        "|---|---|---|",
    ]
    lines += [f"| `{verdict.word}` | {verdict.value} | {verdict.sentence} |" for verdict in Verdict]
    return "\n".join(lines) + "\n"


def _noticed(make: Callable[[], str]) -> str:
    title, _, rest = make().partition("\n")
    return f"{title}\n\n{NOTICE}\n{rest}"


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": cli_page,
    "config.md": config_page,
    "events.md": events_page,
    "health.md": health.reference,
    "metrics.md": metrics_page,
    "reasons.md": reasons_page,
    "verdicts.md": verdicts_page,
}


def written() -> dict[Path, str]:
    """The whole text of every generated file."""
    texts = {DOCS / "reference" / name: _noticed(make) for name, make in PAGES.items()}
    return texts | {DOCS / "man" / name: text for name, text in man.pages(NOUNS, EXIT_CODES).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when a page is stale")
    check = parser.parse_args().check
    stale = {path: text for path, text in written().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if check:
            print(f"{path.relative_to(CHECKOUT)} is stale: make docs")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return bool(stale and check)


if __name__ == "__main__":
    sys.exit(main())
