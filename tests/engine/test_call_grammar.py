"""Calls that must come: what llama.cpp lets through of an answer, text by text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace
from test_prompt import prompter
from test_tools_prompt import LLAMA31, QWEN_THINKS, R1, TOOLS, llama

from proxy.engines.embedded.call_grammar import CALLS_MOST, grammar_of_calls
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.sampling import Grammar
from proxy.engines.embedded.template import CHATML, ChatTemplate
from tests.engine.submits import greedy

__all__ = ["llama"]

CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
TAGGED = f"<tool_call>\n{CALL}\n</tool_call>"
BARE = CALL.replace("arguments", "parameters")


def allowed(llama: Llama, text: str, source: str = CHATML, **options: Any) -> bool:
    """Whether an answer may be exactly this text."""
    template = ChatTemplate(source, bos="", eos="")
    kind: dict[str, Any] = {"tools": TOOLS, "names": ("weather",), "one_call": False} | options
    text_of_grammar = grammar_of_calls(
        **kind,
        form=template.form,
        think_tags=template.think_tags if template.thinks else None,
        thinks_first=template.thinks_first,
    )
    return passes(llama, text_of_grammar, text)


def passes(llama: Llama, text_of_grammar: str, text: str) -> bool:
    grammar = Grammar(llama, text_of_grammar)
    try:
        for token in llama.tokenize(text, markup=False):
            if not grammar.allows(token):
                return False
            grammar.accept(token)
        return grammar.allows(llama.eos)
    finally:
        grammar.close()


def test_only_a_call_is_let_through(llama: Llama) -> None:
    assert allowed(llama, TAGGED)
    assert not allowed(llama, "")
    assert not allowed(llama, f"Let me look.\n{TAGGED}")
    assert not allowed(llama, TAGGED.replace("weather", "clock"))
    assert not allowed(llama, TAGGED.replace('"Paris"', "5"))
    assert not allowed(llama, TAGGED.removesuffix("</tool_call>"))
    assert not allowed(llama, BARE)


def test_several_calls_or_one(llama: Llama) -> None:
    assert allowed(llama, f"{TAGGED}\n{TAGGED}")
    assert not allowed(llama, f"{TAGGED}\n{TAGGED}", one_call=True)
    assert not allowed(llama, "\n".join([TAGGED] * (CALLS_MOST + 1)))


def test_llamas_form(llama: Llama) -> None:
    assert allowed(llama, BARE, LLAMA31)
    assert allowed(llama, f"{BARE}; {BARE}", LLAMA31)
    assert not allowed(llama, TAGGED, LLAMA31)


def test_a_model_that_thinks_may_do_so_first(llama: Llama) -> None:
    assert allowed(llama, f"Hm, 3 < 5.\n</think>\n\n{TAGGED}", R1)
    assert not allowed(llama, TAGGED, R1)
    assert allowed(llama, f"<think>\nHm.\n</think>\n\n{TAGGED}", QWEN_THINKS)
    assert allowed(llama, TAGGED, QWEN_THINKS)
    assert not allowed(llama, f"<think>\nHm.\n</think>\n\n{TAGGED}")


@pytest.mark.parametrize("source", [R1, QWEN_THINKS], ids=["in-prompt", "by-the-model"])
def test_behind_a_thought_that_the_prompt_closed_none_is_demanded(
    llama: Llama, source: str
) -> None:
    p = prompter(llama, source)
    asked = greedy(1, 8, tools=TOOLS, must_call=("weather",))
    off, continued = replace(asked, thinks=False), replace(asked, continues=True)
    thought = f"Hm.\n</think>\n\n{TAGGED}"
    opened = f"<think>\n{thought}"
    assert passes(llama, p.call_grammar(asked), thought if source == R1 else opened)
    for submit in (off, continued):
        grammar = p.call_grammar(submit)
        assert passes(llama, grammar, TAGGED)
        assert not passes(llama, grammar, thought)
    assert not passes(llama, p.call_grammar(off), opened)


@pytest.mark.parametrize(
    "parameters",
    [
        {"not": {}},
        {"$ref": "#/$defs/a"},
        {"properties": {"x": {"multipleOf": 3}}},
        {"type": "array"},
        json.loads('{"allOf":[' * 400 + "{}" + "]}" * 400),
    ],
    ids=lambda x: str(x)[:20],
)
def test_a_schema_that_no_grammar_holds_leaves_any_object(
    llama: Llama, parameters: dict[str, Any]
) -> None:
    function = {"name": "weather", "parameters": parameters}
    tools = json.dumps([{"type": "function", "function": function}])
    assert allowed(llama, TAGGED, tools=tools)


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


CITY = {"city": {"type": "string"}}


def test_many_tools_with_long_descriptions_are_followed(llama: Llama) -> None:
    told = {f"p{i}": {"type": "integer", "description": "what it is for " * 10} for i in range(10)}
    others = [tool(f"f{i}", properties=told) for i in range(60)]
    tools = json.dumps([*others, tool("weather", properties=CITY)])
    names = (*(f"f{i}" for i in range(60)), "weather")
    assert allowed(llama, TAGGED, tools=tools, names=names)
    assert not allowed(llama, TAGGED.replace('"Paris"', "5"), tools=tools, names=names)


def test_what_only_tells_is_told_from_properties_of_that_name(llama: Llama) -> None:
    described = {"title": "x", "properties": {"title": {"type": "null"}}, "required": ["title"]}
    tools = json.dumps([tool("weather", **described)])
    assert allowed(llama, TAGGED.replace('"city": "Paris"', '"title": null'), tools=tools)
    assert not allowed(llama, TAGGED.replace('"city": "Paris"', '"title": "x"'), tools=tools)
    assert not allowed(llama, TAGGED, tools=tools)


@pytest.mark.parametrize(
    "bad",
    [
        {"multipleOf": 3},
        {"anyOf": [{}] * 1000, "properties": {f"p{i}": {} for i in range(1000)}},
        {"enum": list(range(9000))},
        {"allOf": [{"const": "x" * 70_000}]},
    ],
    ids=lambda x: str(x)[:20],
)
def test_a_tool_that_no_grammar_holds_leaves_the_others_theirs(
    llama: Llama, bad: dict[str, Any]
) -> None:
    tools = json.dumps([tool("weather", properties=CITY), tool("clock", properties={"x": bad})])
    clock = TAGGED.replace("weather", "clock")
    assert allowed(llama, clock, tools=tools, names=("weather", "clock"))
    wrong = TAGGED.replace('"Paris"', "5")
    assert not allowed(llama, wrong, tools=tools, names=("weather", "clock"))


def test_schemas_that_are_too_much_together_leave_any_object(llama: Llama) -> None:
    names = {f"a name of a property that is {i}": {"type": "string"} for i in range(900)}
    tools = json.dumps([tool(f"f{i}", properties=names) for i in range(4)])
    call = TAGGED.replace("weather", "f3")
    assert allowed(llama, call, tools=tools, names=tuple(f"f{i}" for i in range(4)))
