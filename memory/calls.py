"""A model's calls of tools as text: one canonical form, so that what a client sends back equals
what was stored. Pure.

The form is the one of Hermes and ChatML models, one line of JSON a call:

    Let me look.
    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

The ids of calls are not in it: they are drawn at random, and the order ties results to calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NoReturn

OPEN, CLOSE = "<tool_call>", "</tool_call>"
RESULT_OPEN, RESULT_CLOSE = "<tool_response>\n", "\n</tool_response>"
"""Around a tool's result where the chat template has no form of its own."""

EXACT_FLOAT = 2**53
"""Up to here 2.0 and 2 are the same number to a client that reads JSON into doubles."""

READ_MOST = 100
"""Levels of JSON that are followed. Some 900 would go, but how many depends on who asks, and one
text must always be read the same."""
NESTED_MOST = 64
"""Levels of arguments that have one form; deeper ones stay the text that they are. Less than what
is read, as the call stands around them."""

# A call's JSON is one line, so a closing tag inside one of its strings ends nothing.
_BLOCK = re.compile(r"<tool_call>\n(\{.*\})\n</tool_call>")


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `arguments` is a JSON object as text, or what the model wrote instead of one."""

    name: str
    arguments: str


def text_with_calls(content: str, calls: Sequence[Call]) -> str:
    """The canonical text of an answer that ends with calls. White space around `content` counts
    for nothing: clients trim it, or send null where nothing else is left.
    """
    return "\n".join([*filter(None, [content.strip()]), *map(_block, calls)])


def split_calls(text: str) -> tuple[str, tuple[Call, ...]]:
    """What text_with_calls made of it: the content, stripped, and the calls."""
    calls = tuple(filter(None, (_call(line) for line in _BLOCK.findall(text))))
    return (_BLOCK.sub("", text).strip(), calls) if calls else (text, ())


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is, None where it is anything else or nests deeper than
    READ_MOST. Never raises."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not nested_deeper(value, READ_MOST) else None


def nested_deeper(value: Any, most: int) -> bool:
    """Whether there are values more than `most` levels inside of this one."""
    level = [value]
    for _ in range(most + 1):
        level = [v for outer in level for v in _inner(outer)]
        if not level:
            return False
    return True


def dump(value: Any, *, sort: bool = False) -> str:
    """JSON on one line, as models are trained on it. Halves of surrogate pairs, which no UTF-8 can
    carry, become U+FFFD.
    """
    text = json.dumps(value, ensure_ascii=False, sort_keys=sort)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _block(call: Call) -> str:
    value = read_object(call.arguments)
    as_text = value is None or nested_deeper(value, NESTED_MOST)
    arguments = call.arguments if as_text else _normal(value)
    head = f'{{"name": {dump(call.name)}, "arguments": {dump(arguments, sort=True)}}}'
    return f"{OPEN}\n{head}\n{CLOSE}"


def _call(line: str) -> Call | None:
    value = read_object(line)
    if value is None or set(value) != {"name", "arguments"}:
        return None
    if not isinstance(value["name"], str):
        return None
    arguments = value["arguments"]
    return Call(value["name"], arguments if isinstance(arguments, str) else dump(arguments))


def _normal(value: Any) -> Any:
    """Whole floats as integers: a client that reads and writes the arguments makes 2 of 2.0."""
    match value:
        case dict():
            return {k: _normal(v) for k, v in value.items()}
        case list():
            return [_normal(v) for v in value]
        case float() if value.is_integer() and abs(value) < EXACT_FLOAT:
            return int(value)
    return value


def _finite(number: str) -> float:
    value = float(number)
    return value if isfinite(value) else _refuse(number)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
"""Strict: NaN and numbers without end are no JSON, and would be none again when written."""
