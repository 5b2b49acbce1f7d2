"""How two JSON schemas become one that demands both. Pure; what is not known how is a GrammarError.

Each is what one schema says by itself: no `$ref`, `allOf`, `anyOf` or `oneOf`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from proxy.engines.embedded.grammar import GrammarError
from proxy.engines.embedded.keywords import (
    ASSERTIONS,
    TYPES,
    NoValue,
    Schema,
    list_of,
    short,
    types_in,
)

COMPOSED = frozenset(("$ref", "allOf", "anyOf", "oneOf"))
"""Keywords that say what a schema is made of."""

OBJECT = ("properties", "additionalProperties")


def own(part: Schema, path: str, *, inner: bool) -> dict[str, Any]:
    """What a schema says by itself. An `inner` one stands in another's `allOf`."""
    said = {k: v for k, v in part.items() if k in ASSERTIONS or k == "nullable"}
    if not isinstance(said.get("properties", {}), dict):
        raise GrammarError(f"`properties` at {short(path)} is not an object.")
    if not isinstance(said.get("required", []), list):
        raise GrammarError(f"`required` at {short(path)} is not a list of names.")
    if "enum" in said:
        list_of(part, "enum", path)
    if "type" in said:
        said["type"] = types_in(part, path)
        said.pop("nullable", None)  # It is in there.
    if part.get("unevaluatedProperties") is False:
        if not inner:
            said["unevaluatedProperties"] = False
        elif COMPOSED & part.keys():
            raise GrammarError(
                f"`unevaluatedProperties` inside of `allOf` at {short(path)} is not supported."
            )
        else:
            said.setdefault("additionalProperties", False)
    return said


def both(a: Schema, b: Schema, path: str) -> dict[str, Any]:
    """A schema that holds where both hold. Raises GrammarError."""
    if ("prefixItems" in a) != ("prefixItems" in b) and "items" in (b if "prefixItems" in a else a):
        raise GrammarError(f"`items` beside `prefixItems` of another at {short(path)}.")
    merged = {**b, **a}
    for key in (k for k in a if k in b and k not in OBJECT):
        merged[key] = _joined(key, a[key], b[key], path)
    if all(any(key in x for key in OBJECT) for x in (a, b)):
        merged |= _joined_objects(a, b)
    if merged.get("type") == []:
        raise NoValue(path)
    return merged


def canonical(value: object) -> bytes:
    """Equal for equal JSON values; true is none of the numbers."""
    return msgspec.json.encode(value, order="deterministic")


def _joined(key: str, a: Any, b: Any, path: str) -> Any:
    if a is b or canonical(a) == canonical(b):
        return a
    if key in JOINED:
        return JOINED[key](a, b)
    if key in NARROWED and all(type(x) in (int, float) for x in (a, b)):
        return NARROWED[key](a, b)
    if key == "const":
        raise NoValue(path)
    raise GrammarError(f"`{key}` is demanded twice at {short(path)}, in two ways.")


def _joined_objects(a: Schema, b: Schema) -> dict[str, Any]:
    """`additionalProperties` of one holds for what only the other knows."""
    (mine, my_others), (yours, your_others) = (
        (x.get("properties", {}), x.get("additionalProperties", True)) for x in (a, b)
    )
    found: dict[str, Any] = {
        name: _all(mine.get(name, my_others), yours.get(name, your_others))
        for name in {**mine, **yours}
    }
    joined: dict[str, Any] = {"properties": found} if found else {}
    if "additionalProperties" in a or "additionalProperties" in b:
        joined["additionalProperties"] = _all(my_others, your_others)
    return joined


def _all(a: Any, b: Any) -> Any:
    if a is b or b is True:
        return a
    if a is True:
        return b
    if a is False or b is False:
        return False
    return a if canonical(a) == canonical(b) else {"allOf": [a, b]}


def _types(a: list[str], b: list[str]) -> list[str]:
    mine, yours = ({*x, "integer"} if "number" in x else {*x} for x in (a, b))
    common = mine & yours
    return [t for t in TYPES if t in common and not (t == "integer" and "number" in common)]


def _values(a: list[Any], b: list[Any]) -> list[Any]:
    known = {canonical(v) for v in b}
    return [v for v in a if canonical(v) in known]


JOINED: dict[str, Callable[[Any, Any], Any]] = {
    "required": lambda a, b: [*a, *b],
    "type": _types,
    "enum": _values,
    "items": _all,
    "nullable": lambda a, b: a is True or b is True,
}
NARROWED: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems"), min),
}
