"""Whether a value that a schema spells out keeps to what stands beside it. Pure."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from proxy.engines.embedded.formats import FORMATS
from proxy.engines.embedded.grammar import GrammarError
from proxy.engines.embedded.keywords import BOUNDS, Schema, count_of, short, types_in, types_of

COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
}
UNKNOWN = {
    "string": ("pattern",),
    "array": ("items", "prefixItems"),
    "object": ("properties", "required", "additionalProperties"),
}
"""What is not looked at here, by the type that it speaks of."""


def fits(value: Any, schema: Schema, path: str) -> bool:
    """Raises GrammarError where it is not known."""
    kinds = types_of(value)
    if "type" in schema and not kinds & {*types_in(schema, path)}:
        return False
    for key in (key for kind in kinds for key in UNKNOWN.get(kind, ())):
        if key in schema:
            raise GrammarError(f"`{key}` beside values at {short(path)} is not supported.")
    if "string" in kinds:
        return _has_length(value, schema, "Length", path) and _has_format(value, schema)
    if "array" in kinds:
        return _has_length(value, schema, "Items", path)
    return "number" not in kinds or _in_bounds(value, schema, path)


def _has_length(value: str | list[Any], schema: Schema, what: str, path: str) -> bool:
    high = count_of(schema, f"max{what}", path)
    low = count_of(schema, f"min{what}", path) or 0
    return low <= len(value) and (high is None or len(value) <= high)


def _has_format(value: str, schema: Schema) -> bool:
    found = FORMATS.get(str(schema.get("format")))
    return not found or re.fullmatch(found.regex, value, re.ASCII) is not None


def _in_bounds(value: float, schema: Schema, path: str) -> bool:
    bounds = {key: schema[key] for key in BOUNDS if schema.get(key) is not None}
    for key, bound in bounds.items():
        if "number" not in types_of(bound):
            raise GrammarError(f"`{key}` at {short(path)} is not a number.")
    return all(COMPARED[key](value, bound) for key, bound in bounds.items())
