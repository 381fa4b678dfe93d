# SPDX-License-Identifier: Apache-2.0
"""What the code itself says of its commands and its configuration, as values; generate.py and man.py print them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click

from lbagent.config import Config

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key of the configuration. ``type`` and ``default`` are Markdown; ``default`` '' means required."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A mapping in the file: ``bgp.peers[]``; '' is the file itself."""

    path: str
    meaning: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """``lbctl show``, with what click prints of it. ``options``: words and meaning, but for --help and --version."""

    name: str
    usage: str
    meaning: str
    options: tuple[tuple[str, str], ...]
    is_group: bool


# --- the configuration, from the pydantic models -----------------------------------------------


def sections() -> Iterator[Section]:
    """The file and, depth first, the sections below it."""
    schema = Config.model_json_schema()
    defs = schema["$defs"]
    for path, section in _below("", schema, defs):
        required = section.get("required", ())
        keys = tuple(
            Key(
                name=name,
                type=_type(key, defs),
                default="" if name in required else _default(key),
                meaning=_meaning(key, defs),
            )
            for name, key in section["properties"].items()
        )
        yield Section(path=path, meaning=section["description"], keys=keys)


def _below(path: str, section: Schema, defs: Schema) -> Iterator[tuple[str, Schema]]:
    yield path, section
    for name, key in section["properties"].items():
        below = f"{path}.{name}" if path else name
        if (inner := _object(key, defs)) is not None:
            yield from _below(below, inner, defs)
        elif key.get("type") == "array" and (inner := _object(key["items"], defs)) is not None:
            yield from _below(f"{below}[]", inner, defs)


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
    return str(text)


# --- the commands, from click's tree ------------------------------------------------------------


def commands(name: str, command: click.Command, parent: click.Context | None = None) -> Iterator[Command]:
    """The command and, depth first, those below it."""
    context = click.Context(command, info_name=name, parent=parent)
    options = [p for p in command.params if isinstance(p, click.Option) and "--version" not in p.opts]
    pieces = [piece for piece in command.collect_usage_pieces(context) if options or piece != "[OPTIONS]"]
    records = [option.get_help_record(context) for option in options]
    yield Command(
        name=context.command_path,
        usage=" ".join([context.command_path, *pieces]),
        meaning=" ".join(f"{command.help or ''}\n{command.epilog or ''}".split()),
        options=tuple(record for record in records if record),
        is_group=isinstance(command, click.Group),
    )
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            inner = command.get_command(context, below)
            assert inner is not None
            yield from commands(below, inner, context)
