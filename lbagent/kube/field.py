# SPDX-License-Identifier: Apache-2.0
"""A JSON object with the path that led to it, so that a complaint can name the field.

Readers return the API's meaning of "unset" for a missing or null field, and raise Unreadable for
a value of the wrong type.
"""

import datetime
import ipaddress
from enum import StrEnum
from sys import intern
from typing import Any, TypeVar

from lbagent.errors import KubeError

Word = TypeVar("Word", bound=StrEnum)


class Unreadable(KubeError):
    """An object of the API that is not what the API promises. The message names the field."""


class Field:
    """A JSON object somewhere inside another. ``path`` is '' for the outermost."""

    __slots__ = ("_object", "_path")

    def __init__(self, value: object, path: str = "") -> None:
        self._path = path
        if not isinstance(value, dict):
            raise self.wrong("", value, "an object")
        self._object: dict[str, Any] = value

    def __contains__(self, key: str) -> bool:
        return self._object.get(key) is not None

    def child(self, key: str) -> "Field":
        """The object under ``key``; an empty one when unset."""
        value = self._object.get(key)
        return Field({} if value is None else value, self._join(key))

    def children(self, key: str) -> list["Field"]:
        """The objects of a list."""
        return [Field(item, f"{self._join(key)}[{i}]") for i, item in enumerate(self.values(key))]

    def text(self, key: str, *, default: str = "", required: bool = False) -> str:
        """Text; ``required`` refuses a missing or empty one."""
        value = self._object.get(key)
        if value is None and not required:
            return default
        if not isinstance(value, str) or (required and not value):
            raise self.wrong(key, value, "text")
        return value

    def word(self, key: str, words: type[Word]) -> Word | None:
        """A member of an enumeration, None when unset."""
        text = self.text(key)
        if not text:
            return None
        try:
            return words(text)
        except ValueError:
            raise self.wrong(key, text, "one of " + ", ".join(words)) from None

    def number(self, key: str, *, default: int = 0, required: bool = False) -> int:
        """A whole number."""
        value = self._object.get(key)
        if value is None and not required:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(key, value, "a whole number")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._object.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def values(self, key: str) -> list[Any]:
        """A list, its items unread."""
        value = self._object.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(key, value, "a list")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self.values(key)
        for i, value in enumerate(values):
            if not isinstance(value, str):
                raise self.wrong(f"{key}[{i}]", value, "text")
        return tuple(values)

    def texts_by_key(self, key: str) -> dict[str, str]:
        """A map of texts (labels, annotations), interned: the same ones stand on many objects."""
        values = self.child(key)._object  # noqa: SLF001  (our own class)
        for name, value in values.items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise self.wrong(f"{key}.{name}", value, "text")
        return {intern(name): intern(value) for name, value in values.items()}

    def address(self, key: str, *, default: str | None = None) -> str:
        """Canonical text of an IP address; ``default`` when unset, refused when there is none."""
        text = self.text(key)
        return default if not text and default is not None else self._canonical(key, text)

    def first_address(self, key: str) -> str:
        """Canonical text of the first of a list of IP addresses, '' when it is empty."""
        values = self.texts(key)
        return self._canonical(f"{key}[0]", values[0]) if values else ""

    def time(self, key: str) -> float:
        """RFC 3339 -> seconds since the epoch, 0 when unset. YAML readers hand over a datetime."""
        value = self._object.get(key)
        if value is None:
            return 0.0
        try:
            moment = value if isinstance(value, datetime.datetime) else datetime.datetime.fromisoformat(value)
        except (TypeError, ValueError):
            raise self.wrong(key, value, "a time") from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()

    def wrong(self, key: str, value: object, expected: str) -> Unreadable:
        """The complaint about the field under ``key``, to be raised."""
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return Unreadable(f"{self._join(key) or 'the object'} is {shown}, not {expected}")

    def _canonical(self, key: str, text: str) -> str:
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:
            raise self.wrong(key, text, "an IP address") from None

    def _join(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path and key else self._path or key
