# SPDX-License-Identifier: Apache-2.0
"""Writes the reference pages that are made from code; ``--check`` only says which are stale.

python docs/generate.py [--check]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
if str(CHECKOUT) not in sys.path:
    sys.path.insert(0, str(CHECKOUT))

from lbagent import metrics  # noqa: E402
from lbagent.config import Config  # noqa: E402
from lbagent.model.reason import Reason  # noqa: E402
from lbagent.plan import health  # noqa: E402
from lbagent.xdp.verdict import Verdict  # noqa: E402

REFERENCE = CHECKOUT / "docs" / "reference"
NOTICE = "<!-- Made by docs/generate.py from the code. Change it there and run `make docs`. -->"

Schema = dict[str, Any]


def config_page() -> str:
    """Every key of the configuration file, section by section, from the pydantic models."""
    schema = Config.model_json_schema()
    lines = [
        "# Configuration",
        "",
        "One file, `/etc/lbagent/lbagent.yaml`. Unknown keys are refused. `lbagent check FILE` names every",
        "mistake with its line. [lbagent.yaml](lbagent.yaml) is an example that uses most keys.",
        "Times are seconds.",
    ]
    for path, section in _sections("", schema, schema["$defs"]):
        if path:
            lines += ["", f"## `{path}`", "", section["description"]]
        lines += ["", "| key | type | default | meaning |", "|---|---|---|---|"]
        required = section.get("required", ())
        for name, key in section["properties"].items():
            default = "**required**" if name in required else _default(key)
            lines.append(f"| `{name}` | {_type(key, schema['$defs'])} | {default} | {_meaning(key, schema['$defs'])} |")
    return "\n".join(lines) + "\n"


def _sections(path: str, section: Schema, defs: Schema) -> Iterator[tuple[str, Schema]]:
    """The section and, depth first, those below it, each with its path in the file."""
    yield path, section
    for name, key in section["properties"].items():
        below = f"{path}.{name}" if path else name
        if (inner := _object(key, defs)) is not None:
            yield from _sections(below, inner, defs)
        elif key.get("type") == "array" and (inner := _object(key["items"], defs)) is not None:
            yield from _sections(f"{below}[]", inner, defs)


def _object(key: Schema, defs: Schema) -> Schema | None:
    target = defs[key["$ref"].rpartition("/")[2]] if "$ref" in key else key
    return target if "properties" in target else None


def _type(key: Schema, defs: Schema) -> str:
    if "anyOf" in key:
        return " or ".join(_type(k, defs) for k in key["anyOf"] if k.get("type") != "null")
    if "$ref" in key:
        target = defs[key["$ref"].rpartition("/")[2]]
        return "section" if "properties" in target else " or ".join(f"`{word}`" for word in target["enum"])
    match key["type"]:
        case "array":
            items = _type(key["items"], defs)
            return "list of " + ("sections" if items == "section" else items)
        case "object":
            return f"map of {_type(key['additionalProperties'], defs)}"
        case "string" if key.get("format") == "path":
            return "path"
        case kind:
            return str(kind) + _bounds(key)


def _bounds(key: Schema) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {key[word]:.10g}" for word, sign in words.items() if word in key]
    return f" {', '.join(bounds)}" if bounds else ""


def _default(key: Schema) -> str:
    value = key.get("default")
    if value is None or value == "" or isinstance(value, dict) or value == []:
        return "-"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _meaning(key: Schema, defs: Schema) -> str:
    text = key.get("description", "")
    if not text and (inner := _object(key, defs)) is not None:
        text = inner["description"]
    return text.replace("|", "\\|")


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


PAGES: dict[str, Callable[[], str]] = {
    "config.md": config_page,
    "health.md": health.reference,
    "metrics.md": metrics_page,
    "reasons.md": reasons_page,
    "verdicts.md": verdicts_page,
}


def page(name: str) -> str:
    """The whole text of a generated page."""
    title, _, rest = PAGES[name]().partition("\n")
    return f"{title}\n\n{NOTICE}\n{rest}"


def stale() -> list[str]:
    """Names of pages that differ from what would be written."""
    return [n for n in PAGES if not (REFERENCE / n).exists() or (REFERENCE / n).read_text() != page(n)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when a page is stale")
    if parser.parse_args().check:
        for name in stale():
            print(f"docs/reference/{name} is stale: make docs")
        return bool(stale())
    for name in PAGES:
        (REFERENCE / name).write_text(page(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
