# SPDX-License-Identifier: Apache-2.0
"""The file itself: ``load(path) -> Config``, or a ConfigError with every mistake at once.

Each mistake reads ``file:line: key: message``. The only reader of the YAML file.
"""

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lbagent.config.rules import RULES, Location
from lbagent.config.sections import Config
from lbagent.errors import ConfigError

DEFAULT_PATH = Path("/etc/lbagent/lbagent.yaml")


class _Lines(yaml.SafeLoader):
    """Safe loader that notes the line of every key, and refuses a key given twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[tuple[int, str]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                self.duplicates.append((key.start_mark.line + 1, str(key.value)))
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _lines(node: yaml.Node | None, where: Location = ()) -> Iterator[tuple[Location, int]]:
    if node is not None:
        yield where, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            for place, line in _lines(value, (*where, key.value)):
                yield place, key.start_mark.line + 1 if place == (*where, key.value) else line
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*where, index))


def _say(where: Location) -> str:
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "(file)"


def _sentence(error: Any) -> str:
    kind, message = error["type"], str(error["msg"])
    if kind == "extra_forbidden":
        return "unknown key"
    if kind == "missing":
        return "is missing"
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    value = error.get("input")
    shown = f"{value!r} " if isinstance(value, str | int | float | bool) else ""
    return f"{shown}{message[:1].lower()}{message[1:]}"


def _causes(errors: Sequence[Any]) -> Iterator[Any]:
    """Without "too short" of a list whose items were refused: that is a consequence, not a mistake."""
    places = [tuple(e["loc"]) for e in errors]
    for error, place in zip(errors, places, strict=True):
        inside = any(len(other) > len(place) and other[: len(place)] == place for other in places)
        if not (error["type"] == "too_short" and inside):
            yield error


def parse(text: str, *, name: str = "lbagent.yaml") -> Config:
    """The configuration in ``text``. Raises ConfigError with one ``problems`` line per mistake."""
    try:
        loader = _Lines(text)
        node = loader.get_single_node()
        tree = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise _refused(name, [f"{name}:{line}: (file): not YAML: {error.problem}"]) from error
    except yaml.YAMLError as error:
        raise _refused(name, [f"{name}:1: (file): not YAML: {error}"]) from error
    if not isinstance(tree, dict):
        raise _refused(name, [f"{name}:1: (file): is not a mapping; start from docs/reference/config.md"])
    line_by_place = dict(_lines(node))

    def problem(where: Location, message: str) -> tuple[int, str]:
        place = where
        while place not in line_by_place:
            place = place[:-1]
        return line_by_place[place], f"{name}:{line_by_place[place]}: {_say(where)}: {message}"

    found = [(line, f"{name}:{line}: {key}: is given twice") for line, key in loader.duplicates]
    config: Config | None = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found += [problem(tuple(e["loc"]), _sentence(e)) for e in _causes(error.errors())]
    if config is not None:
        found += [problem(where, message) for rule in RULES for where, message in rule(config)]
    if found or config is None:
        raise _refused(name, [text for _, text in sorted(set(found))])
    return config


def _refused(name: str, problems: list[str]) -> ConfigError:
    count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
    return ConfigError(f"{name} has {count}", hint=f"lbagent check {name}", problems=tuple(problems))


def load(path: Path) -> Config:
    """The configuration in a file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", problems=(f"{path}:1: (file): {error}",)) from error
    return parse(text, name=str(path))
