"""Values of the table's keys: from text or TOML to the key's type, and back to TOML. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec

TYPES = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "Path": str,
}
"""How a key's annotation reads, and what it is converted to; a path is text until it is used."""

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "Path": "a path",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """What a key means and which values it takes; bounds are inclusive, and of each item in a
    list.
    """

    doc: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    secret: bool = False
    shown_default: str | None = None


def convert(kind: str, rule: Rule, value: object) -> object:
    """`value` as the type that `kind` names and within the bounds. Raises ValueError."""
    if item := _item(kind):
        return tuple(convert(item, rule, v) for v in _listed(value))
    target = TYPES[kind]
    # Text from the environment may become a number; in a file a number is written as one.
    converted: Any = msgspec.convert(
        value, target, strict=not isinstance(value, str) or target is str
    )
    if target in (int, float):
        if not (math.isfinite(converted) and rule.low <= converted <= rule.high):
            raise ValueError(converted)
    elif rule.choices and converted not in rule.choices:
        raise ValueError(converted)
    return converted


def wanted(kind: str, rule: Rule) -> str:
    """In words which values there are."""
    if item := _item(kind):
        return f"a list, each item {wanted(item, rule)}"
    if rule.choices:
        return f"one of {', '.join(rule.choices)}"
    words = WORDS[kind]
    if math.isinf(rule.low) and math.isinf(rule.high):
        return words
    if math.isinf(rule.high):
        return f"{words} of {rule.low:g} or more"
    return f"{words} from {rule.low:g} to {rule.high:.0f}"


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(toml(v) for v in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _item(kind: str) -> str:
    """The type of a list's items, "" for what is no list."""
    return kind.removeprefix("tuple[").removesuffix(", ...]") if kind.startswith("tuple[") else ""


def _listed(value: object) -> list[object]:
    """A list as it stands in a file, or one text with commas between the items."""
    if isinstance(value, str):
        return [item for item in map(str.strip, value.split(",")) if item]
    return msgspec.convert(value, list[object])
