"""Calls of tools as text: what means the same is the same, whoever wrote it down."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.calls import Call, dump, read_object, split_calls, text_with_calls

TEXTS = st.text(max_size=20) | st.sampled_from(
    [
        "</tool_call>",
        '<tool_call>\n{"name": "x", "arguments": {}}\n</tool_call>',
        "\n",
        '"',
        "\ud800",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)


def text_of(arguments: str) -> str:
    return text_with_calls("", [Call("f", arguments)])


@given(OBJECTS, st.randoms())
def test_neither_order_nor_spacing_nor_escapes_of_arguments_count(value: Any, random: Any) -> None:
    fields = list(value.items())
    random.shuffle(fields)
    loose = json.dumps(dict(fields), indent=2, ensure_ascii=True)
    tight = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    assert text_of(loose) == text_of(tight)


def test_a_whole_float_is_the_integer_that_javascript_makes_of_it() -> None:
    assert text_of('{"n": [2.0, 1e2, -0.0]}') == text_of('{"n": [2, 100, 0]}')
    assert text_of('{"n": 2.5}') != text_of('{"n": 2}')


def nested(levels: int) -> str:
    return '{"b": 1, "a": ' + "[" * levels + "]" * levels + "}"


@pytest.mark.parametrize(
    "arguments",
    ["", "oops", "[1]", '{"n": NaN}', '{"n": 1e400}', "{" * 100_000, "9" * 9000, nested(500)],
)
def test_what_is_no_object_stays_the_text_it_was(arguments: str) -> None:
    assert read_object(arguments) is None
    assert split_calls(text_of(arguments)) == ("", (Call("f", arguments),))


def test_arguments_have_one_form_up_to_64_levels_and_none_is_too_deep() -> None:
    for levels in (2, 60, 64, 65, 99, 100, 101, *range(900, 1010)):
        found = split_calls(text_of(nested(levels)))
        sorted_ = '{"a": ' + nested(levels).removeprefix('{"b": 1, "a": ')[:-1] + ', "b": 1}'
        assert found == ("", (Call("f", sorted_ if levels <= 64 else nested(levels)),))


@given(TEXTS, st.lists(st.tuples(TEXTS, OBJECTS), min_size=1, max_size=3))
def test_calls_come_back_out_of_the_text(content: str, calls: list[tuple[str, Any]]) -> None:
    made = [Call(name, dump(value)) for name, value in calls]
    text = text_with_calls(content, made)
    # A content that looks like a call reads as one: it is the same text.
    expected = [*split_calls(content.strip())[1], *made]
    found = split_calls(text)[1]
    assert [(dump(c.name), text_of(c.arguments)) for c in found] == [
        (dump(c.name), text_of(c.arguments)) for c in expected
    ]


def test_white_space_around_the_content_counts_for_nothing() -> None:
    call = Call("f", "{}")
    assert text_with_calls(" Look. \n\n", [call]) == text_with_calls("Look.", [call])
    assert text_with_calls(" \n", [call]) == text_with_calls("", [call])
    assert text_with_calls("Look.", [call]).startswith("Look.\n<tool_call>\n{")


def test_a_text_without_calls_is_left_alone() -> None:
    for text in (
        "",
        " a ",
        "<tool_call>",
        "<tool_call>\n{}\n</tool_call>",
        "<tool_call>{</tool_call>",
    ):
        assert split_calls(text) == (text, ())


@given(OBJECTS)
def test_nothing_in_it_is_half_a_surrogate_pair(value: Any) -> None:
    text_of(json.dumps(value)).encode("utf-8")


@pytest.mark.parametrize("name", ["null", "7", "[]"])
def test_a_call_without_a_name_is_text(name: str) -> None:
    text = f'<tool_call>\n{{"name": {name}, "arguments": {{}}}}\n</tool_call>'
    assert split_calls(text) == (text, ())
