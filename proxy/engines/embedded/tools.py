"""Tools as a chat template is given them, and what stands in for a template that knows none. Pure.

A template writes the tools' JSON with its own words around it, and all of that is tokenized with
markup recognised. So each text in the JSON that could hold markup is replaced by a marker, which
stands for the text as it is, or as it stands in JSON where the template writes it through `tojson`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from memory.calls import RESULT_CLOSE, RESULT_OPEN, dump, read_object, split_calls
from proxy.engines.embedded.protocol import Part
from proxy.engines.hermes import told

HERMES, LLAMA3 = "hermes", "llama3"

# Every special token that chat models are known to have holds one of the characters left out here.
# What is harmless stays in place: templates compare types and look names up.
_HARMLESS = re.compile(r"[\w\s.,:;!?'/()+*=%$#@&^~-]*")

PROBE = "probe_of_tools"
PROBES = ({"type": "function", "function": {"name": PROBE, "description": "", "parameters": {}}},)


def read(tools: str) -> list[Any]:
    """Raises ValueError or RecursionError on what is no JSON list."""
    value = json.loads(tools) if tools else []
    if not isinstance(value, list):
        raise ValueError("tools are a list")
    return value


def masked(value: Any, mark: Callable[[str], str]) -> Any:
    """The same with `mark(text)` in the place of each text, or name of a field, that could hold
    markup."""
    match value:
        case str():
            return value if _HARMLESS.fullmatch(value) else mark(value)
        case dict():
            return {masked(k, mark): masked(v, mark) for k, v in value.items()}
        case list():
            return [masked(v, mark) for v in value]
    return value


def in_json(text: str) -> str:
    """A text as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def family(source: str) -> str:
    """In which form the models of this template write their calls."""
    return LLAMA3 if "<|start_header_id|>" in source and '"parameters"' in source else HERMES


def in_own_form(part: Part, form: str) -> Part:
    """An answer's calls in the model's own form. The canonical one is Hermes's."""
    text = "".join(part.parts)
    content, calls = split_calls(text) if form == LLAMA3 else (text, ())
    if not calls:
        return part
    lines = [_llama3(call.name, call.arguments) for call in calls]
    return Part(part.role, ("\n".join(filter(None, [content, "; ".join(lines)])),), part.token_ids)


def _llama3(name: str, arguments: str) -> str:
    value = read_object(arguments)
    parameters = arguments if value is None else value
    return f'{{"name": {dump(name)}, "parameters": {dump(parameters)}}}'


def told_in_system(messages: Sequence[Part], tools: str) -> list[Part]:
    """The tools in front of the system prompt: nothing that is added behind it later moves them."""
    text = told(tools)
    if messages and messages[0].role == "system":
        system = Part("system", (text, "\n\n", *messages[0].parts))
        return [system, *messages[1:]]
    return [Part("system", (text,)), *messages]


def results_as_user(messages: Sequence[Part]) -> list[Part]:
    """Results of tools as the user's messages. What is the user's already and stands beside them
    becomes one message with them: templates want user and assistant in turn."""
    out: list[Part] = []
    after_result = False
    for message in messages:
        is_result = message.role == "tool"
        part = Part("user", (RESULT_OPEN, *message.parts, RESULT_CLOSE)) if is_result else message
        if out and out[-1].role == part.role == "user" and (is_result or after_result):
            part = Part("user", (*out.pop().parts, "\n", *part.parts))
        out.append(part)
        after_result = is_result
    return out
