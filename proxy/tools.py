"""Tools in OpenAI's requests, and calls in its answers: JSON to values and back. Pure.

`functions` and `function_call`, the form before tools, are read as tools and answered in their own
form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from memory.calls import NESTED_MOST, READ_MOST, Call, dump, nested_deeper
from proxy.errors import ApiError, bad_request

MAX_TOOLS = 128
NAME = re.compile(r"[\w.-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tools:
    """What the model may call. `text` is a JSON list for its chat template, "" for no tools.

    With `must` one of them has to be called. With `one_call` only the first call counts. `legacy`
    answers with `function_call`.
    """

    text: str = ""
    names: tuple[str, ...] = ()
    must: bool = False
    one_call: bool = False
    legacy: bool = False


NO_TOOLS = Tools()


class FunctionCall(msgspec.Struct, frozen=True):
    """As in messages. Some clients send the arguments as an object."""

    name: str
    arguments: str | dict[str, Any] | None = None

    @property
    def call(self) -> Call:
        """Raises ApiError."""
        given = self.arguments
        if not isinstance(given, dict):
            return Call(self.name, given or "{}")
        if nested_deeper(given, READ_MOST):
            raise bad_request("The arguments of a call are nested too deeply.", param="messages")
        return Call(self.name, dump(given))


class ToolCall(msgspec.Struct, frozen=True):
    function: FunctionCall
    id: str | None = None


class _Function(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(msgspec.Struct, frozen=True):
    type: str = "function"
    function: _Function | None = None


class _Named(msgspec.Struct, frozen=True):
    name: str


class _Choice(msgspec.Struct, frozen=True):
    type: str = "function"
    function: _Named | None = None
    # Of `function_call`, where the name stands by itself.
    name: str | None = None


def parse_tools(
    tools: msgspec.Raw,
    functions: msgspec.Raw,
    tool_choice: msgspec.Raw,
    function_call: msgspec.Raw,
    *,
    parallel: bool,
) -> Tools:
    """Of the fields as they stand in the body. Raises ApiError."""
    offered = [_function(tool) for tool in _read(tools, list[_Tool], "tools") or []]
    if offered:
        choice = _choice(tool_choice, "tool_choice")
        return _chosen(offered, choice, "tool_choice", one_call=not parallel)
    offered = _read(functions, list[_Function], "functions") or []
    if offered:
        choice = _choice(function_call, "function_call")
        return _chosen(offered, choice, "function_call", one_call=True, legacy=True)
    for raw, param, missing in (
        (tool_choice, "tool_choice", "tools"),
        (function_call, "function_call", "functions"),
    ):
        if _choice(raw, param) not in ("auto", "none"):
            sentence = f"`{param}` asks for a call, but there are no {missing}."
            raise bad_request(sentence, param=missing)
    return NO_TOOLS


def _read(raw: msgspec.Raw, wanted: Any, param: str) -> Any:
    """A value of the type `wanted`, or None for null."""
    try:
        return msgspec.json.decode(raw, type=wanted | None)
    except (msgspec.DecodeError, RecursionError) as exc:
        problem = str(exc).partition(" - at ")[0]
        raise bad_request(f"`{param}` cannot be read: {problem}.", param=param) from exc


def _function(tool: _Tool) -> _Function:
    if tool.type != "function":
        raise bad_request("Only tools of the type function are supported.", param="tools")
    if tool.function is None:
        raise bad_request("A tool of the type function has no `function`.", param="tools")
    return tool.function


def _choice(raw: msgspec.Raw, param: str) -> str | _Choice:
    choice: str | _Choice | None = _read(raw, str | _Choice, param)
    return choice or "auto"


def _chosen(
    offered: Sequence[_Function],
    choice: str | _Choice,
    param: str,
    *,
    one_call: bool,
    legacy: bool = False,
) -> Tools:
    _check(offered, "functions" if legacy else "tools")
    if choice == "none":
        return NO_TOOLS
    names = tuple(f.name for f in offered)
    wanted = _wanted(choice, names, param)
    return Tools(
        text=dump([_told(f) for f in offered]),
        names=(wanted,) if wanted else names,
        must=choice != "auto",
        # A name asks for one call of it.
        one_call=one_call or wanted is not None,
        legacy=legacy,
    )


def _check(offered: Sequence[_Function], param: str) -> None:
    if len(offered) > MAX_TOOLS:
        raise bad_request(f"`{param}` may hold {MAX_TOOLS} at most.", param=param)
    for function in offered:
        if not NAME.fullmatch(function.name):
            sentence = "A function's name has 1 to 128 letters, digits, dots, dashes, underscores."
            raise bad_request(sentence, param=param)
        if nested_deeper(function.parameters, NESTED_MOST):
            raise bad_request(f"`{param}` is nested too deeply.", param=param)


def _wanted(choice: str | _Choice, names: Sequence[str], param: str) -> str | None:
    """The one function that is asked for, None where any will do."""
    if isinstance(choice, str):
        if choice not in ("auto", "required"):
            raise bad_request(f"`{param}` must be auto, none, required or a function.", param=param)
        return None
    name = choice.function.name if choice.function else choice.name
    if name is None:
        raise bad_request(f"`{param}` names no function.", param=param)
    if name not in names:
        raise bad_request(f"`{param}` names a function that is not offered.", param=param)
    return name


def _told(function: _Function) -> dict[str, Any]:
    """As models were trained to read it; what is not theirs to know (`strict`) is left out."""
    told: dict[str, Any] = {"name": function.name}
    if function.description:
        told["description"] = function.description
    empty = {"type": "object", "properties": {}}
    told["parameters"] = empty if function.parameters is None else function.parameters
    return {"type": "function", "function": told}


# -- messages ------------------------------------------------------------------------------------


def result_order(calls: Sequence[ToolCall], results: Sequence[str | None]) -> list[int] | None:
    """In which order results with these call ids stand behind the calls: that of the calls.

    The ids are not kept, so that the order must say it. None where an id is missing or unknown.
    """
    places = {call.id: i for i, call in enumerate(calls)}
    if len(places) != len(calls) or len(set(results)) != len(results):
        return None
    if any(id_ is None or id_ not in places for id_ in results):
        return None
    return sorted(range(len(results)), key=lambda i: places[results[i]])


def misplaced(where: str) -> ApiError:
    sentence = f"`{where}` is a tool's result, but no call stands before it."
    return bad_request(sentence, param=where)


def unanswered(where: str) -> ApiError:
    sentence = f"`{where}` calls tools: their results must follow it."
    return bad_request(sentence, param=where)


# -- answers -------------------------------------------------------------------------------------


def call_json(call: Call, id_: str) -> dict[str, Any]:
    """One of a message's `tool_calls`."""
    return {"id": id_, "type": "function", "function": function_json(call)}


def function_json(call: Call) -> dict[str, str]:
    return {"name": call.name, "arguments": call.arguments}
