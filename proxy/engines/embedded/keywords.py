"""What the keywords of a JSON schema say by themselves: which are known, and what they imply. Pure;
all that is wrong is a GrammarError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.engines.embedded.grammar import GrammarError
from proxy.engines.embedded.numbers import is_whole

Schema = Mapping[str, Any]

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
IMPLIED = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "minLength", "maxLength", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
"""What a schema without `type` is about, by what it says."""

BOUNDS = IMPLIED["number"]
MOST_DIGITS = 32
"""Of an integer's bounds."""
ASSERTIONS = frozenset(("type", "enum", "const", *sum(IMPLIED.values(), ())))

REFUSED = (
    *("not", "if", "then", "else", "$dynamicRef", "$recursiveRef", "dependencies"),
    *("dependentRequired", "dependentSchemas", "patternProperties", "propertyNames"),
    *("minProperties", "maxProperties", "contains", "minContains", "maxContains"),
    *("multipleOf", "uniqueItems", "unevaluatedItems"),
)


class NoValue(GrammarError):
    """Of a branch that the rest rules out there may be others."""

    def __init__(self, path: str) -> None:
        super().__init__(f"The schema at {short(path)} allows no value at all.")


def check(schema: Schema, path: str) -> None:
    for key in REFUSED:
        if schema.get(key, False) is not False:
            raise GrammarError(f"`{key}` at {short(path)} is not supported.")
    if not isinstance(schema.get("unevaluatedProperties", False), bool):
        raise GrammarError(f"`unevaluatedProperties` at {short(path)} is not supported.")


def types_in(schema: Schema, path: str) -> list[str]:
    """What `type` says, with OpenAPI's `nullable`; nothing where it is not said."""
    if "type" not in schema:
        return []
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not types or any(t not in TYPES for t in types):
        raise GrammarError(f"`type` at {short(path)} is none of {', '.join(TYPES)}.")
    return list(dict.fromkeys([*types, "null"] if schema.get("nullable") is True else types))


def implied_type(schema: Schema) -> list[str]:
    return [t for t, keys in IMPLIED.items() if any(k in schema for k in keys)][:1]


def list_of(schema: Schema, key: str, path: str) -> list[Any]:
    found = schema[key]
    if not isinstance(found, list) or not found:
        raise GrammarError(f"`{key}` at {short(path)} is not a list with something in it.")
    return found


def count_of(schema: Schema, key: str, path: str) -> int | None:
    value = schema.get(key)
    if value is None:
        return None
    if not is_whole(value) or value < 0:
        raise GrammarError(f"`{key}` at {short(path)} is not a whole number from 0.")
    return int(value)


def not_below(low: int, high: int | None, path: str) -> int | None:
    if high is not None and high < low:
        raise NoValue(path)
    return high


def integer_bounds(schema: Schema, path: str) -> tuple[int | None, int | None]:
    """(least, most), both allowed."""
    found = {key: schema[key] for key in BOUNDS if schema.get(key) is not None}
    for key, value in found.items():
        if not is_whole(value):
            raise GrammarError(f"`{key}` of an integer at {short(path)} is not a whole number.")
        if abs(value) >= 10**MOST_DIGITS:
            raise GrammarError(f"`{key}` at {short(path)} has more than {MOST_DIGITS} digits.")
    lows = [found[k] + n for k, n in (("minimum", 0), ("exclusiveMinimum", 1)) if k in found]
    highs = [found[k] - n for k, n in (("maximum", 0), ("exclusiveMaximum", 1)) if k in found]
    low, high = max(lows, default=None), min(highs, default=None)
    if low is not None and high is not None and low > high:
        raise NoValue(path)
    return (None if low is None else int(low)), (None if high is None else int(high))


def types_of(value: object) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number"}
        case str():
            return {"string"}
        case list():
            return {"array"}
    return {"object"}


def short(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "…"
