# SPDX-License-Identifier: Apache-2.0
"""The last Snapshot on disk, so that a host boots and serves while the API is down.

The file is the planner's input: ``lbctl snapshot`` gives the same text and ``lbagent plan`` reads
it back. It holds no secret, for the Snapshot has none.
"""

import json
import os
import types
from array import array
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from lbagent.errors import ControlError
from lbagent.model.state import Snapshot

FORMAT = "lbagent.io/snapshot/v1"


def dump(snapshot: Snapshot) -> str:
    """One JSON document."""
    return json.dumps({"format": FORMAT, "snapshot": plain(snapshot)}, separators=(",", ":"), sort_keys=True)


def parse(text: str) -> Snapshot:
    """The Snapshot in ``text``. Raises ControlError when it is no snapshot of this format."""
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ControlError(f"snapshot has format {document['format']!r}, not {FORMAT}")
        value = _value(Snapshot, document["snapshot"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ControlError(f"not a snapshot: {type(error).__name__}: {error}") from error
    if not isinstance(value, Snapshot):
        raise ControlError("not a snapshot")
    return value


def save(path: Path, snapshot: Snapshot) -> None:
    """Replace the file atomically; a crash leaves the old one or the new one. Raises ControlError."""
    aside = path.with_suffix(".new")
    try:
        with open(aside, "w", encoding="utf-8", opener=_private) as file:
            file.write(dump(snapshot))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise ControlError(
            f"cannot keep the last snapshot in {path}: {error}", hint="free space, or grant the right"
        ) from error


def load(path: Path) -> Snapshot | None:
    """The Snapshot kept in the file, None when there is none. Raises ControlError when it cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeError) as error:
        raise ControlError(f"cannot read {path}: {error}") from error


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o640)


def plain(value: Any) -> Any:
    """A model value as JSON's types. A mapping whose keys are not text becomes a list of pairs."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {str(key): plain(item) for key, item in value.items()}
        return [[plain(key), plain(item)] for key, item in value.items()]
    if isinstance(value, frozenset):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, tuple | list | array):
        return [plain(item) for item in value]
    return value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _value(kind: Any, value: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value)
    if origin in (dict, Mapping):
        pairs = value.items() if isinstance(value, dict) else value
        return {_value(args[0], key): _value(args[1], item) for key, item in pairs}
    if origin is frozenset:
        return frozenset(_value(args[0], item) for item in value)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], item) for item in value)
        return tuple(_value(arg, item) for arg, item in zip(args, value, strict=True))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if is_dataclass(kind):
        hints = _hints(kind)  # type: ignore[arg-type]
        known = {name: _value(hints[name], item) for name, item in value.items() if name in hints}
        return kind(**known)  # type: ignore[operator]
    if kind is float:
        return float(value)
    return value
