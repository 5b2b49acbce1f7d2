"""JSON without recursion, for files that nest deeper than the parsers go. Pure.

LibreChat's recursive export holds each message's answers inside it: a chat of six hundred messages
is 1,200 levels deep, and the usual parsers end with a RecursionError at a thousand.
"""

from __future__ import annotations

import json
import re
from typing import Any

_STRING = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(
    r"-?(?:0|[1-9][0-9]{0,399})(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,4})?|true|false|null"
)


class DeepJsonError(ValueError):
    """The text is not JSON; says where."""


def parse_deep(text: str) -> Any:
    """As json.loads, but for numbers of more than 400 digits, NaN and Infinity, which are refused.
    Raises DeepJsonError."""
    root: list[Any] = []
    parser = _Parser(text)
    stack: list[Any] = [root]
    while stack:
        container = stack[-1]
        value, opened = parser.item(container, top=len(stack) == 1)
        if value is _END:
            stack.pop()
        elif opened:
            stack.append(value)
        if len(stack) == 1 and root:
            break
    parser.end()
    return root[0]


_END = object()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def item(self, container: Any, *, top: bool) -> tuple[Any, bool]:
        """Reads what comes next in the container and puts it in: (value, whether it is a container
        just opened). (_END, False) where the container ends."""
        char = self._peek()
        if not top and char == ("}" if isinstance(container, dict) else "]"):
            self._at += 1
            return _END, False
        if not top and container:
            self._expect(",")
        key = self._key() if isinstance(container, dict) else None
        value, opened = self._value()
        if isinstance(container, dict):
            container[key] = value
        else:
            container.append(value)
        return value, opened

    def end(self) -> None:
        if self._peek():
            raise self._wrong("the end")

    def _key(self) -> str:
        if self._peek() != '"':
            raise self._wrong("a name")
        key = self._string()
        self._expect(":")
        return key

    def _value(self) -> tuple[Any, bool]:
        char = self._peek()
        if char in ("{", "["):
            self._at += 1
            return ({} if char == "{" else []), True
        if char == '"':
            return self._string(), False
        if match := _SCALAR.match(self._text, self._at):
            self._at = match.end()
            return json.loads(match.group()), False
        raise self._wrong("a value")

    def _string(self) -> str:
        try:
            text, self._at = _STRING.raw_decode(self._text, self._at)
        except ValueError as exc:
            raise self._wrong("a string") from exc
        return str(text)

    def _expect(self, char: str) -> None:
        if self._peek() != char:
            raise self._wrong(repr(char))
        self._at += 1

    def _peek(self) -> str:
        match = _SPACE.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._text[self._at : self._at + 1]

    def _wrong(self, wanted: str) -> DeepJsonError:
        return DeepJsonError(f"{wanted} was expected at character {self._at}")
