"""Calls that must come, as grammars: an answer that calls one of the tools and says nothing else.
Pure.

Arguments are held to the tool's schema as far as a grammar can hold it. What cannot be followed is
any object: other than under `response_format`, the schema is advice to the model first of all.
"""

from __future__ import annotations

from typing import Any

from memory.calls import CLOSE, OPEN, dump
from proxy.engines.embedded.grammar import GrammarError, char_class, literal
from proxy.engines.embedded.schema import Work, grammar_of
from proxy.engines.embedded.tools import LLAMA3, read

CALLS_MOST = 8
"""A small model that may go on calling does."""

TOLD = frozenset(("title", "description", "examples", "example", "default", "$comment"))
"""Keywords that hold an answer to nothing."""
ANY_OBJECT = {"type": "object"}


def grammar_of_calls(
    tools: str,
    names: tuple[str, ...],
    *,
    one_call: bool,
    form: str,
    think_tags: tuple[str, str] | None,
    thinks_first: bool,
) -> str:
    """GBNF of answers that call tools of these names, in the model's own form.

    With `think_tags` the answer may begin with reasoning; with `thinks_first` it begins inside of
    it. Raises GrammarError.
    """
    offered = [t["function"] for t in read(tools) if t["function"]["name"] in names]
    calls = _calls(offered, form).replace("root ::=", "call ::=", 1)
    more = 0 if one_call else CALLS_MOST - 1
    rules = [f"root ::= {_thought(think_tags, first=thinks_first)} tagged more{{0,{more}}}"]
    if form == LLAMA3:
        rules += ["tagged ::= call", 'more ::= "; " call']
    else:
        rules += [f"tagged ::= {_text(OPEN + chr(10))} call {_text(chr(10) + CLOSE)}"]
        rules += [f"more ::= {_text(chr(10))} tagged"]
    if think_tags:
        rules += _thinking(think_tags)
    return "\n".join([*rules, calls])


def _calls(offered: list[dict[str, Any]], form: str) -> str:
    """Each tool's schema as it is; else those that can be followed; else objects and no more."""
    wanted = [_wanted(function["parameters"]) for function in offered]
    try:
        return _any_of(offered, wanted, form)
    except GrammarError:
        work = Work()  # All of them together, so that many are not many times as much.
    try:
        return _any_of(offered, [_followed(w, work) for w in wanted], form)
    except GrammarError:
        return _any_of(offered, [ANY_OBJECT] * len(offered), form)


def _any_of(offered: list[dict[str, Any]], arguments: list[dict[str, Any]], form: str) -> str:
    calls = [_schema(f["name"], a, form) for f, a in zip(offered, arguments, strict=True)]
    return grammar_of(dump({"anyOf": calls}))


def _schema(name: str, arguments: dict[str, Any], form: str) -> dict[str, Any]:
    field = "parameters" if form == LLAMA3 else "arguments"
    return {
        "type": "object",
        "properties": {"name": {"const": name}, field: arguments},
        "required": ["name", field],
        "additionalProperties": False,
    }


def _wanted(parameters: dict[str, Any]) -> dict[str, Any]:
    try:
        # Whatever it says: arguments are an object.
        wanted = {**_bare(parameters), "type": "object"}
    except RecursionError:
        return ANY_OBJECT
    # References say where they begin to count: there the schema is not the whole one any more.
    return ANY_OBJECT if "$ref" in dump(wanted) else wanted


def _bare(schema: Any) -> Any:
    """A schema without what it only tells."""
    match schema:
        case list():
            return [_bare(part) for part in schema]
        case dict():
            return {k: _within(k, v) for k, v in schema.items() if k not in TOLD}
    return schema


def _within(key: str, value: Any) -> Any:
    if key in ("const", "enum"):
        return value
    if key == "properties" and isinstance(value, dict):
        return {name: _bare(schema) for name, schema in value.items()}
    return _bare(value)


def _followed(wanted: dict[str, Any], work: Work) -> dict[str, Any]:
    try:
        grammar_of(dump(wanted), work)
    except GrammarError:
        return ANY_OBJECT
    return wanted


def _thought(think_tags: tuple[str, str] | None, *, first: bool) -> str:
    if think_tags is None:
        return '""'
    return "thought" if first else f"( {_text(think_tags[0])} thought )?"


def _thinking(think_tags: tuple[str, str]) -> list[str]:
    """Reasoning ends at the closing tag, whose first two characters stand nowhere in it."""
    one, two = think_tags[1][0], think_tags[1][1]
    no_one = char_class([(ord(one), ord(one))], but=True)
    no_two = char_class([(ord(two), ord(two))], but=True)
    inside = f"( {no_one} | {_text(one)} {no_two} )*"
    return [f"thought ::= {inside} {_text(think_tags[1])} [\\n]{{0,2}}"]


def _text(text: str) -> str:
    (item,) = literal(text)
    return str(item)
