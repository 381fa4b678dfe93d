# SPDX-License-Identifier: Apache-2.0
"""Tables for people, JSON and YAML for programs. One line per row, no borders, ``-`` for empty."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

FORMATS = ("table", "json", "yaml")


def cell(value: Any) -> str:
    """A value as one word or a comma list; never truncated."""
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list | tuple):
        return ",".join(cell(item) for item in value)
    if isinstance(value, Mapping):
        return " ".join(f"{key}={cell(item)}" for key, item in value.items())
    return str(value)


def rows(items: Sequence[Mapping[str, Any]]) -> str:
    """Columns from the keys of the first row."""
    if not items:
        return "(none)"
    columns = list(items[0])
    grid = [[name.upper().replace("_", "-") for name in columns]]
    grid += [[cell(item.get(name)) for name in columns] for item in items]
    widths = [max(len(line[i]) for line in grid) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in grid
    )


def facts(items: Mapping[str, Any]) -> str:
    """``name  value`` lines."""
    width = max((len(name) for name in items), default=0)
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {cell(value)}" for name, value in items.items())


def machine(value: Any, form: str) -> str:
    """JSON or YAML."""
    if form == "json":
        return json.dumps(value, indent=2)
    import yaml  # only who asks for YAML waits for it

    return str(yaml.safe_dump(value, sort_keys=False)).rstrip()
