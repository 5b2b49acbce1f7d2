"""What a schema allows, its grammar allows, and nothing else: asked of llama.cpp itself, with the
model's own tokens, and of Python's JSON reader.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from proxy.engines.embedded import pattern
from proxy.engines.embedded import schema as module
from proxy.engines.embedded.grammar import GrammarError, Item, Rules, literal
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.protocol import Load
from proxy.engines.embedded.sampling import Grammar
from proxy.engines.embedded.schema import grammar_of

Allows = Callable[[Any, str], bool]


@pytest.fixture(scope="module")
def llama(model_path: str) -> Llama:
    return Llama(Load(path=model_path, n_ctx=64, cache_tokens=64, sequences=1, threads=1))


@pytest.fixture(scope="module")
def allows(llama: Llama) -> Allows:
    def allows(schema: Any, text: str) -> bool:
        grammar = Grammar(llama, grammar_of("" if schema is None else json.dumps(schema)))
        try:
            for token in [*llama.tokenize(text, markup=False), llama.eos]:
                if not grammar.allows(token):
                    return False
                grammar.accept(token)
            return True
        finally:
            grammar.close()

    return allows


def an(type_: str | list[str], **keywords: Any) -> dict[str, Any]:
    return {"type": type_, **keywords}


def objects(**properties: Any) -> dict[str, Any]:
    return an("object", properties=properties, additionalProperties=False)


LIST = {
    "$defs": {"node": {**objects(v=an("integer")), "required": ["v"]}},
    "$ref": "#/$defs/node",
}
LIST["$defs"]["node"]["properties"]["next"] = {"$ref": "#/$defs/node"}  # type: ignore[index]

DEFS = {
    "$defs": {
        "a": an("object", properties={"a": an("integer")}, required=["a"]),
        "b": an("object", properties={"b": an("string")}, required=["b"]),
        "c": an("object", properties={"c": an("null")}, required=["c"]),
    }
}
A_OR_B = ['{"a":1}', '{"b":"x"}', "{}"]

CASES: list[tuple[Any, list[str], list[str]]] = [
    (
        None,
        ["{}", '{"a": 1}', '{"a":{"b":[1,2.5e3,null,true,"x"]}}', '{\n  "é": "東京"\n}'],
        ["[]", "1", '{"a":}', '{"a":1,}', "{}x", '{"a":"b\nc"}', '{"a":01}', ""],
    ),
    (
        {**objects(a=an("integer"), b=an("string")), "required": ["a"]},
        ['{"a": 1}', '{"a":-7, "b": "x"}'],
        ["{}", '{"b": "x"}', '{"a": 1.5}', '{"a": 1, "c": 2}', '{"a": 1, "a": 2}'],
    ),
    (
        objects(a=True, b=True, c=True),
        ["{}", '{"b": 1}', '{"a": 1, "c": 2}', '{"a":1,"b":2,"c":3}', "{ }"],
        ['{"c": 1, "a": 2}', '{, "a": 1}'],
    ),
    (
        an("object", properties={"ab": an("null")}, additionalProperties=an("integer")),
        ['{"ab": null, "abc": 1, "a": 2, "": 3}', '{"x": 1}', "{}"],
        ['{"ab": 1}', '{"x": null}', '{"\\u0061b": 1}'],
    ),
    (
        an("object", properties={"a\nb": an("null"), "a" * 3000: {}}, additionalProperties={}),
        ['{"' + "a" * n + '": 1}' for n in (0, 1, 3000, 3001)] + ['{"a\\nb": null, "ab": 1}'],
        ['{"a\\nb": 1}', '{"' + "a" * 3000 + '": 1, "' + "a" * 3000 + '": 1}'],
    ),
    (an("integer", minimum=0, maximum=120), ["0", "7", "99", "120"], ["-1", "121", "007", "1.0"]),
    (an("integer", exclusiveMinimum=-3, maximum=1234), ["-2", "0", "1234"], ["-3", "1235", "-"]),
    (an("number", minimum=0), ["0", "0.5", "1e9"], ["-1", "-0.5", "1e999", ".5"]),
    (an("boolean"), ["true", "false"], ["True", "1"]),
    ({"enum": ["a", 'q"\\', 3, None]}, ['"a"', '"q\\"\\\\"', "3", "null"], ['"b"', "4", "a"]),
    ({"const": {"a": ["é"]}}, ['{"a":["é"]}'], ['{"a":[]}']),
    ({"enum": ["a", "bbb", 7], "minLength": 2}, ['"bbb"', "7"], ['"a"']),
    ({"enum": ["a", "bbb"], "maxLength": 2}, ['"a"'], ['"bbb"']),
    ({"enum": [1, 5, 2.5, "x"], "minimum": 2}, ["5", "2.5", '"x"'], ["1"]),
    ({"enum": [1, 5], "exclusiveMaximum": 5}, ["1"], ["5"]),
    ({"enum": [[], [1]], "maxItems": 0}, ["[]"], ["[1]"]),
    ({"enum": ["2024-02-29", "soon"], "format": "date"}, ['"2024-02-29"'], ['"soon"']),
    (an("string", nullable=True, enum=["a", None, 3]), ['"a"', "null"], ["3"]),
    (
        an("object", required=["a"], additionalProperties=an("integer")),
        ['{"a":1}', '{"a":1,"b":2}'],
        ['{"a":"x"}', '{"b":1}', '{"a":1,"b":"x"}'],
    ),
    (an("object", properties={"a": {}}, required=["b"]), ['{"b":1}'], ["{}", '{"a":1}']),
    (an("object", properties={"a": False}, additionalProperties={}), ['{"b":1}'], ['{"a":1}']),
    (an("string", format="date", minLength=1, maxLength=10), ['"2024-02-29"'], ['"2024"']),
    (an("integer", minimum=10**17), [f"{10**17}", f"{10**18}"], [f"{10**17 - 1}", ""]),
    (an("integer", maximum=-(10**17)), [f"-{10**17}"], [f"-{10**17 - 1}", "0", ""]),
    ({"type": ["string", "null"]}, ['"x"', "null"], ["1"]),
    ({"type": "string", "enum": ["a", 1]}, ['"a"'], ["1"]),
    (an("string", minLength=2, maxLength=3), ['"ab"', '"東京都"', '"a\\n"'], ['"a"', '"abcd"']),
    (
        an("string", pattern="^[A-Z]{2}-\\d+$"),
        ['"AB-7"', '"XY-123"'],
        ['"ab-7"', '"AB-"', '"AB-7 "'],
    ),
    (an("string", pattern="b+"), ['"b"', '"abba"'], ['"a"', '""']),
    (an("string", pattern='^(a|")\\\\.$'), ['"a\\\\x"', '"\\"\\\\y"'], ['"a\\x"', '""\\\\y"']),
    (an("string", pattern="^[^a]$"), ['"b"', '"\\""', '"é"'], ['"a"', '"""']),
    (an("string", format="date"), ['"2024-02-29"'], ['"2024-13-01"', '"24-01-01"']),
    (
        an("string", format="date-time"),
        ['"2024-02-29T23:59:59Z"', '"2024-01-01T00:00:00.5+09:00"'],
        ['"2024-02-29 23:59:59"', '"2024-02-29T24:00:00Z"'],
    ),
    (
        an("array", items=an("integer"), minItems=1, maxItems=2),
        ["[1]", "[1, 2]"],
        ["[]", "[1,2,3]"],
    ),
    (an("array", prefixItems=[an("integer"), an("null")]), ["[1,null]"], ["[null,1]", "[1]"]),
    (an("array", maxItems=0), ["[]"], ["[1]"]),
    ({"anyOf": [an("integer"), an("null")]}, ["1", "null"], ['"1"']),
    (
        {"allOf": [objects(a=an("integer")), an("object", required=["a"])]},
        ['{"a": 1}'],
        ["{}"],
    ),
    ({"allOf": [an("integer", minimum=3), {"maximum": 5}]}, ["3", "5"], ["2", "6"]),
    (
        {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], **DEFS},
        ['{"a":1,"b":"x"}'],
        ['{"a":1}', '{"b":"x"}', "{}"],
    ),
    ({"$ref": "#/$defs/a", "allOf": [{"$ref": "#/$defs/b"}], **DEFS}, ['{"a":1,"b":"x"}'], A_OR_B),
    (
        {"$ref": "#/$defs/a", "oneOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/c"}], **DEFS},
        ['{"a":1,"b":"x"}', '{"a":1,"c":null}'],
        [*A_OR_B, '{"c":null}', '{"a":1,"b":"x","c":null}'],
    ),
    (
        {"allOf": [{"anyOf": [{"const": 1}, {"const": 2}]}, {"anyOf": [{"enum": [2, 3]}, {}]}]},
        ["1", "2"],
        ["3", "true"],
    ),
    (
        {
            "allOf": [
                {"anyOf": [objects(a=an("integer")), an("null")]},
                {"oneOf": [{"required": ["a"]}, an("null")]},
            ]
        },
        ['{"a":1}', "null"],
        ["{}", '{"a":"x"}', '{"b":1}'],
    ),
    (
        {"anyOf": [an("integer"), an("string")], "oneOf": [an("string"), an("null")]},
        ['"x"'],
        ["1", "null"],
    ),
    (
        # What one part forbids or limits among the others, another cannot bring in.
        {
            "allOf": [
                an("object", properties={"a": {}}, additionalProperties=an("integer")),
                an("object", properties={"b": an(["integer", "string"]), "a": an("null")}),
            ]
        },
        ['{"a":null,"b":1}'],
        ['{"b":"x"}', '{"a":1}', '{"c":"x"}'],
    ),
    ({"allOf": [objects(a={}), objects(b={})]}, ["{}"], ['{"a":1}', '{"b":1}']),
    (
        {
            "allOf": [{"$ref": "#/$defs/a"}],
            "properties": {"b": {}},
            "unevaluatedProperties": False,
            **DEFS,
        },
        ['{"b":2,"a":1}'],
        ['{"b":2,"a":1,"c":1}', '{"b":2}'],
    ),
    (
        {"allOf": [an("number"), an("integer"), {"minimum": 1}, {"minimum": 3, "maximum": 5}]},
        ["3", "5"],
        ["2", "3.5", "6"],
    ),
    ({"allOf": [an("integer"), an("number")]}, ["3"], ["3.5"]),
    ({"allOf": [an("string", nullable=True), an("string")]}, ['"x"'], ["null"]),
    ({"allOf": [an("array", items=an("integer")), {"items": {"minimum": 2}}]}, ["[2]"], ["[1]"]),
    ({"allOf": [{"enum": [1, 2]}, {"enum": [True, 2]}]}, ["2"], ["1", "true"]),
    (
        {"$ref": "#/$defs/n", "$defs": {"n": objects(n={"allOf": [{"$ref": "#/$defs/n"}]})}},
        ['{"n":{"n":{}}}'],
        ['{"n":1}'],
    ),
    (LIST, ['{"v":1}', '{"v":1, "next":{"v":2,"next":{"v":3}}}'], ['{"next":{"v":1}}']),
    ({"type": "string", "$comment": "x", "x-mine": 7}, ['"a"'], ["1"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), CASES, ids=lambda x: str(x)[:40])
def test_the_grammar_allows_what_the_schema_does(
    allows: Allows, schema: Any, good: list[str], bad: list[str]
) -> None:
    assert [t for t in good if not allows(schema, t)] == []
    assert [t for t in bad if allows(schema, t)] == []
    for text in good:
        json.loads(text)


def chain(n: int) -> dict[str, Any]:
    """Choices of choices: 2 to the n ways to begin."""
    names = {
        f"d{i}": {"anyOf": [an("object", title="x", **link(i, "a")), an("object", **link(i, "b"))]}
        for i in range(n)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**names, f"d{n}": an("null")}}


def link(i: int, name: str) -> dict[str, Any]:
    return {"properties": {name: {"$ref": f"#/$defs/d{i + 1}"}}}


def doubling(n: int) -> dict[str, Any]:
    """2 to the n ways to begin, spelled out in n definitions."""
    names: dict[str, Any] = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/e{i + 1}"}]}
        for i in range(n)
    }
    others = {
        f"e{i}": {"anyOf": [{"$ref": f"#/$defs/e{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]}
        for i in range(n)
    }
    ends = {f"d{n}": an("null"), f"e{n}": an("boolean")}
    return {"$ref": "#/$defs/d0", "$defs": names | others | ends}


def nested(n: int) -> Any:
    schema: Any = an("null")
    for _ in range(n):
        schema = an("array", items=schema)
    return schema


def shared(schema: Any, n: int = 1000) -> Any:
    """Keywords that apply to each of so many branches."""
    return {**schema, "anyOf": [{}] * n}


def inherited(n: int) -> Any:
    """Each of two others: 2 to the n parts."""
    names: dict[str, Any] = {
        f"d{i}": {"title": f"{i}", "allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(n)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**names, f"d{n}": an("null")}}


REFUSED: list[tuple[Any, str]] = [
    ({"$ref": "https://example.com/schema.json"}, "outside"),
    ({"$ref": "file:///etc/passwd"}, "outside"),
    ({"$ref": "#/$defs/nothing"}, "nowhere"),
    ({"$ref": "#"}, "without end"),
    ({"anyOf": [{"$ref": "#"}, an("null")]}, "without end"),
    ({"allOf": [{"$ref": "#"}]}, "without end"),
    (doubling(30), "too many choices"),
    (nested(200), "nested too deeply"),
    (an("string", maxLength=10**9), "repetitions"),
    (an("string", minLength=10**400), "repetitions"),
    (an("string", pattern="^(a{9999}){9999}$"), "repetitions"),
    (an("string", pattern="^(a*)*$"), "empty"),
    (an("string", pattern="^(?=a)b$"), "look-around"),
    (an("string", pattern="(" * 100 + ")" * 100), "deeply"),
    (an("string", pattern="(a"), "parenthesis"),
    (an("string", pattern="[z-a]"), "range"),
    (an("string", pattern="a{3,2}"), "wrong way round"),
    (an("string", pattern="\\"), "an end"),
    (an("string", pattern="[" + "a" * 10_000), "characters"),
    (an("string", pattern=r"^[^\s\S]$"), "class without"),
    (an("object", properties=[]), "`properties`"),
    (an("object", required="a"), "`required`"),
    (an("object", patternProperties={"a": {}}), "`patternProperties`"),
    (an("number", maximum=3.5), "`maximum`"),
    (an("integer", minimum=5, maximum=4), "no value"),
    (an("array", items=False, minItems=1), "no value"),
    ({"not": {}}, "`not`"),
    ({"allOf": [an("string"), an("integer")]}, "no value"),
    ({"allOf": [{"const": 1}, {"const": True}]}, "no value"),
    ({"allOf": [an("array", prefixItems=[an("null")]), {"items": an("null")}]}, "`prefixItems`"),
    ({"allOf": [objects(a={}), {"required": ["b"]}]}, "forbids"),
    (an("object", unevaluatedProperties={}), "`unevaluatedProperties`"),
    ({"allOf": [{"$ref": "#/$defs/a"}], "$ref": 7}, "not a text"),
    (inherited(30), "without end"),
    ({"type": "null", "anyOf": [{"enum": [1]}, an("string")]}, "no value"),
    (
        {"anyOf": [{"$ref": "#/$defs/x"}, {}], "$defs": {"x": {"enum": [], "type": []}}},
        "`type`|`enum`",
    ),
    (
        {"anyOf": [{"$ref": "#/$defs/x"}, {}], "$defs": {"x": {"enum": [1], "type": "null"}}},
        "no value",
    ),
    (an("integer", multipleOf=3), "`multipleOf`"),
    (an("thing"), "`type`"),
    ({"type": [{}]}, "`type`"),
    ({"type": [{}], "enum": [1]}, "`type`"),
    ({"const": 1, "enum": 5}, "`enum`"),
    (an("object", properties={"a" * 60_000: {}}, additionalProperties=True), "too large"),
    ({"enum": []}, "`enum`"),
    ({"enum": [1, 2], "minimum": 3}, "no value"),
    ({"enum": [1, 2], "minimum": "x"}, "`minimum`"),
    ({"enum": ["a"], "pattern": "b"}, "`pattern`"),
    ({"const": {"a": 1}, "properties": {"a": an("string")}}, "`properties`"),
    ({"const": [1], "items": an("string")}, "`items`"),
    (an("string", format="date", minLength=11), "`format`"),
    (an("string", format="time", maxLength=9), "`format`"),
    ({"anyOf": "x"}, "`anyOf`"),
    ({"anyOf": [1]}, "not an object"),
    ([], "not an object"),
    (False, "not an object"),
    ({"enum": list(range(9000))}, "too many choices"),
    ({"description": "x" * 70_000}, "characters"),
    (shared(an("object", properties={f"p{i}": {} for i in range(4000)})), "too much work"),
    (shared(an("object", properties={"x" * 50_000: {}})), "too much work"),
    (shared(an("object", properties={"x" * 4000: {}}, additionalProperties={})), "too much work"),
    (shared({"enum": list(range(4000))}), "too much work"),
    (shared({"const": "x" * 50_000}), "too much work"),
    (objects(**{f"p{i}": an("integer", maximum=10**31 + i) for i in range(400)}), "too much work"),
    (an("integer", minimum=-(10**40)), "32 digits"),
]


@pytest.mark.parametrize(("schema", "why"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_followed_is_refused_with_a_sentence(schema: Any, why: str) -> None:
    with pytest.raises(GrammarError, match=why) as caught:
        grammar_of(json.dumps(schema))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["{", '"\\ud800"', "[" * 60_000, "nonsense"])
def test_a_schema_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(GrammarError, match="JSON"):
        grammar_of(text)


def test_a_pattern_that_applies_in_many_places_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = []

    def matching(rules: Rules, regex: str) -> list[Item]:
        read.append(regex)
        return literal(regex)

    monkeypatch.setattr(pattern, "matching", matching)
    grammar_of(json.dumps(shared(an("string", pattern="a"))))
    assert read == ["a"]


def test_a_schema_for_which_python_has_no_room_is_refused() -> None:
    def deep(n: int) -> str:
        return deep(n - 1) if n else grammar_of(json.dumps(nested(60)))

    with pytest.raises(GrammarError, match="deeply"):
        deep(sys.getrecursionlimit() - len(inspect.stack()) - 200)


def test_every_grammar_of_a_large_schema_is_taken_by_llama_cpp(llama: Llama) -> None:
    properties = {f"property {i}": an("integer", minimum=i) for i in range(200)}
    schemas: list[Any] = [
        an("object", properties=properties, required=list(properties)[::2]),
        an("object", properties=properties, additionalProperties=True),
        {"enum": list(range(module.MAX_DEPTH, 2000))},
        nested(50),
        chain(20),
        an("string", maxLength=2000),
        an("string", pattern="^(a{1000}){1000}$"),
    ]
    for schema in schemas:
        Grammar(llama, grammar_of(json.dumps(schema))).close()


def test_repeats_inside_repeats_are_refused_where_they_multiply() -> None:
    deep = "(" * 4 + "a" + "){1,9}" * 4
    with pytest.raises(GrammarError, match="repeats inside repeats"):
        grammar_of(json.dumps({"type": "string", "pattern": f"^{deep}$"}))
    # Beside each other, and of a fixed number, they may be as many as one likes.
    for text in ("^(a+b*)+(c?d){2,3}[0-9]+$", "^((((a{2}){2}){2}){2}){2}$", "^(a|b+|(c*d)?e)+$"):
        grammar_of(json.dumps({"type": "string", "pattern": text}))
