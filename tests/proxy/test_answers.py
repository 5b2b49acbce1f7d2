"""Answers taken apart: reasoning, content and calls, however the text arrives."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memory.calls import CLOSE, OPEN, Call
from proxy.answers import AnswerStream, Content, Reasoning, read_bare, read_call
from proxy.engines.base import Thinking

PLAIN, FIRST = Thinking(), Thinking(first=True)
NAMES = ("weather", "f")
JSON_CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
CALL = Call("weather", '{"city": "Paris"}')
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Paris"}}'

Parts = tuple[str, str, tuple[Call, ...]]


def taken_apart(stream: AnswerStream, pieces: Sequence[str]) -> Parts:
    found = [p for text in pieces for p in stream.feed(text)] + stream.finish()
    reasoning = "".join(p.text for p in found if isinstance(p, Reasoning))
    content = "".join(p.text for p in found if isinstance(p, Content))
    calls = tuple(p for p in found if isinstance(p, Call))
    assert calls == stream.calls
    return reasoning, content, calls


def parts(text: str, thinking: Thinking = PLAIN, names: Sequence[str] = NAMES) -> Parts:
    """Fed character by character."""
    return taken_apart(AnswerStream(thinking, names), list(text))


# -- the naive twin ------------------------------------------------------------------------------


def naive(text: str, thinking: Thinking, names: Sequence[str]) -> Parts:
    """The same, of a whole text."""
    reasoning, body = "", text
    opened = text.lstrip().startswith(thinking.opening)
    if opened or thinking.first:
        inside = text.lstrip().removeprefix(thinking.opening) if opened else text
        reasoning, closed, body = inside.partition(thinking.closing)
        reasoning, body = reasoning.strip(), body.lstrip()
        if not closed:
            return reasoning, "", ()
    if not names:
        return reasoning, body, ()
    if re.match(
        r'\s*(<\|python_tag\|>)?\s*\{\s*"(name|type|function|parameters|arguments|id)"', body
    ):
        calls = read_bare(body, frozenset(names))
        if calls:
            return reasoning, "", tuple(calls)
    return reasoning, *naive_calls(body)


def naive_calls(body: str) -> tuple[str, tuple[Call, ...]]:
    content, calls, start = "", [], 0
    while (at := body.find(OPEN, start)) >= 0:
        inner, end = naive_inside(body[at + len(OPEN) :])
        call = read_call(inner)
        if call:
            content += body[start:at].rstrip()
            calls.append(call)
            start = at + len(OPEN) + end
        else:
            content += body[start : at + len(OPEN)]
            start = at + len(OPEN)
    rest = body[start:]
    return content + (rest if rest.strip() or not calls else ""), tuple(calls)


def naive_inside(text: str) -> tuple[str, int]:
    """What stands before the closing tag, and where what follows begins."""
    in_string = escaped = False
    for i, char in enumerate(text):
        if not in_string and text.startswith(CLOSE, i):
            return text[:i], i + len(CLOSE)
        if in_string and not escaped and char == "\\":
            escaped = True
            continue
        if char == '"' and not escaped:
            in_string = not in_string
        escaped = False
    return text, len(text)


FRAGMENTS = [
    *("<think>", "</think>", OPEN, CLOSE, "<|python_tag|>", "<", "</", "<tool", "think>", ">"),
    *(JSON_CALL, LLAMA_CALL, '{"name": "', '"', "}", "{", "\\", ";", "[]", "{}", "null"),
    *('{"name": "f", "arguments": {"x": "</tool_call>"}}', '{"name": "unknown"}'),
    *(" ", "\n", "\n\n", "\t", "Hello", "東京", "42", '{"answer": 1}'),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@settings(max_examples=600)
@given(TEXTS, st.sampled_from([PLAIN, FIRST]), st.sampled_from([(), NAMES]), st.data())
@example(f"{OPEN}{JSON_CALL}{CLOSE}", PLAIN, NAMES, None)
def test_a_stream_gives_what_the_whole_text_holds(
    text: str, thinking: Thinking, names: Sequence[str], data: st.DataObject | None
) -> None:
    """However it is cut: content is never taken back, and no call leaks into it."""
    places = st.lists(st.integers(0, len(text)), max_size=8)
    cuts = sorted(data.draw(places)) if data else []
    pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    expected = naive(text, thinking, names)
    assert taken_apart(AnswerStream(thinking, names), pieces) == expected
    assert taken_apart(AnswerStream(thinking, names), list(text)) == expected


@given(st.text() | TEXTS)
def test_without_tools_and_thoughts_every_character_is_content(text: str) -> None:
    if text.lstrip().startswith("<think>"):
        return
    assert parts(text, names=()) == ("", text, ())


# -- reasoning -----------------------------------------------------------------------------------


def test_reasoning_comes_first_and_the_answer_begins_behind_it() -> None:
    assert parts("<think>\nHm.\n</think>\n\nYes.") == ("Hm.", "Yes.", ())
    assert parts("\nHm.\n</think>\n\nYes.", FIRST) == ("Hm.", "Yes.", ())
    assert parts("<think>\nHm.\n</think>\n\nYes.", FIRST) == ("Hm.", "Yes.", ())
    assert parts("<think>\n\n</think>\n\nYes.") == ("", "Yes.", ())


def test_tags_in_the_middle_of_an_answer_are_text() -> None:
    text = "Use <think> and </think>."
    assert parts(text) == ("", text, ())


def test_an_answer_cut_off_in_its_reasoning_has_no_content() -> None:
    stream = AnswerStream(PLAIN)
    assert taken_apart(stream, ["<think>Hm, let me see"]) == ("Hm, let me see", "", ())
    assert stream.begin_chars == len("<think>Hm, let me see")


def test_where_the_answer_begins_is_told() -> None:
    for text in ("<think>a</think>\n\nYes.", "Yes."):
        stream = AnswerStream(PLAIN)
        taken_apart(stream, list(text))
        assert text[stream.begin_chars :] == "Yes."


def test_reasoning_is_shown_while_it_comes() -> None:
    stream = AnswerStream(PLAIN)
    assert stream.feed("<think>Hm") == [Reasoning("Hm")]
    assert stream.feed(" so </th") == [Reasoning(" so")]
    assert stream.feed("ink> Yes") == [Content("Yes")]


# -- calls ---------------------------------------------------------------------------------------


def test_calls_in_the_form_of_hermes() -> None:
    call = f"{OPEN}\n{JSON_CALL}\n{CLOSE}"
    assert parts(call) == ("", "", (CALL,))
    assert parts(f"Let me look.\n{call}\n{call}\n") == ("", "Let me look.", (CALL, CALL))
    assert parts(f"<think>Hm</think>\n{call}") == ("Hm", "", (CALL,))


def test_calls_in_the_form_of_llama() -> None:
    assert parts(LLAMA_CALL) == ("", "", (CALL,))
    assert parts(f"<|python_tag|>{LLAMA_CALL}") == ("", "", (CALL,))
    assert parts(f"{LLAMA_CALL}; {LLAMA_CALL}") == ("", "", (CALL, CALL))
    whole = json.dumps({"type": "function", "function": json.loads(JSON_CALL)})
    assert parts(whole) == ("", "", (CALL,))


def test_a_call_without_its_closing_tag_is_one_if_it_is_whole() -> None:
    """Models end with the end-of-turn token in its place."""
    assert parts(f"{OPEN}\n{JSON_CALL}") == ("", "", (CALL,))


def test_an_unfinished_call_is_text() -> None:
    for text in (
        f"Hm.\n{OPEN}\n{JSON_CALL[:-3]}",
        OPEN,
        f"{OPEN}{{",
        LLAMA_CALL[:-1],
        "<|python_tag|>",
    ):
        assert parts(text) == ("", text, ())


def test_json_that_calls_no_tool_is_an_answer() -> None:
    for text in ('{"name": "Bob", "age": 4}', '{"a": 1}', "{}", "<|python_tag|>print(1)"):
        assert parts(text) == ("", text, ())
    assert parts(LLAMA_CALL, names=()) == ("", LLAMA_CALL, ())


def test_json_that_cannot_be_a_call_is_shown_at_once() -> None:
    assert AnswerStream(PLAIN, NAMES).feed('{"b') != []
    assert AnswerStream(PLAIN, NAMES).feed('{"na') == []


def test_only_the_first_call_counts_where_one_is_wanted() -> None:
    call = f"{OPEN}\n{JSON_CALL}\n{CLOSE}"
    stream = AnswerStream(PLAIN, NAMES, one_call=True)
    assert taken_apart(stream, list(f"Hm. {call}\n{call} and more")) == ("", "Hm.", (CALL,))
    assert stream.end_chars == len(f"Hm. {call}")


@pytest.mark.parametrize("before", ["", "\n", "<|python_tag|>", " <|python_tag|> "])
def test_of_bare_calls_only_the_first_counts_where_one_is_wanted(before: str) -> None:
    for behind in ("", "\n", f"; {LLAMA_CALL}", f"\n{LLAMA_CALL}\n{LLAMA_CALL} "):
        stream = AnswerStream(PLAIN, NAMES, one_call=True)
        assert taken_apart(stream, list(before + LLAMA_CALL + behind)) == ("", "", (CALL,))
        assert stream.end_chars == len(before + LLAMA_CALL)


@pytest.mark.parametrize(
    "inner",
    ["[]", "null", "{}", '{"name": 1}', '{"name": ""}', '{"name": "f", "arguments": [1]}',
     '{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": "oops"}', "{" * 9000,
     '{"name": "f", "arguments": {"x": ' + "[" * 989 + "]" * 989 + "}}"],
)  # fmt: skip
def test_what_is_no_call_between_the_tags_is_text(inner: str) -> None:
    text = f"{OPEN}{inner}{CLOSE}"
    assert taken_apart(AnswerStream(PLAIN, NAMES), [text]) == ("", text, ())


def test_arguments_given_as_text_are_read() -> None:
    inner = json.dumps({"name": "f", "arguments": '{"x":1}'})
    assert read_call(inner) == Call("f", '{"x": 1}')
    assert read_call('{"name": "f"}') == Call("f", "{}")
