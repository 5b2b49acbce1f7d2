"""Requests that belong to no chat are told from those that do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage

from memory.transcript import Message, Transcript
from proxy.librechat.quote import QUOTE_CHARS, Quote, instruction_of, quoted, shortened
from proxy.librechat.side import SUMMARIES, Form, Kind, Shape, Side, side_of
from proxy.librechat.summaries import (
    summary_of,
    to_summarise,
    without_instruction,
    without_summary,
)
from proxy.librechat.titles import (
    UNTITLED,
    first_words,
    language_of,
    message_in,
    title_of,
)

RECORDED = Path(__file__).parents[1] / "data" / "librechat"
NOW: dict[str, str] = {"user-agent": "langchainjs-openai/1.0.0 ((node/v20.20.2; linux; x64))"}
V0_6: dict[str, str] = {"user-agent": "OpenAI/JS 4.20.1"}
ANYBODY: dict[str, str] = {"user-agent": "curl/8"}

TITLE_V0_6 = (
    "Detect user language and write in the same language an extremely concise title for this "
    "conversation, which you must accurately detect.\nWrite in the detected language. Title in 5 "
    'Words or Less.\n\n||>User:\n"What is a cat?"\n||>Response:\n""A small animal.""\n\n||>Title:'
)
TITLE_V0_7 = (
    "Please generate a concise, 5-word-or-less title for the conversation, using its same "
    "language, with no punctuation. Apply title case conventions appropriate for the language. "
    'Never directly mention the language name or the word "title"\n\n'
    '||>User:\n"What is a cat?"\n||>Response:\n""A small animal.""\n\n||>Title:'
)
TITLE_NOW = (
    "Provide a concise, 5-word-or-less title for the conversation, using title case conventions. "
    "Only return the title itself.\n\nConversation:\nUser: What is a cat?\nAI: A small animal."
)
OWN_WORDS = "Nenne mir einen Titel:\n\nUser: Was ist eine Katze?\nAI: "
SUMMARY_V0_6 = (
    "Summarize the conversation by integrating new lines into the current summary.\n\nEXAMPLE:\n"
    "Current summary:\nThe human asks.\n\nNew lines:\nHuman: Why?\nAI: Because.\n\nNew summary:\n"
    "The human asks why.\n\nCurrent summary:\nAda keeps bees.\n\nNew lines:\n"
    "User: My hive is blue.\nAssistant: A fine colour.\nIt lasts.\n\nNew summary:"
)
CHECKPOINT = (
    "Hold on, before you continue I need you to write me a checkpoint of everything so far. Your "
    "context window is filling up.\n\n## Checkpoint"
)


def body(*messages: tuple[str, Any], **fields: Any) -> bytes:
    listed = [{"role": role, "content": content} for role, content in messages]
    return json.dumps({"model": "m", "messages": listed, **fields}, separators=(",", ":")).encode()


def known(raw: bytes, headers: dict[str, str] = ANYBODY) -> Side:
    side = side_of(raw, headers)
    assert side is not None
    return side


def recorded(name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((RECORDED / name).read_text())
    return entries


@pytest.mark.parametrize("name", ["current.json", "v0_6_9.json"])
def test_every_recorded_body_is_what_it_is(name: str) -> None:
    for entry in recorded(name):
        raw = json.dumps(entry["body"], separators=(",", ":")).encode()
        side = side_of(raw, entry["headers"])
        assert (side is None) == entry["body"]["stream"], entry["body"]["messages"]
        if side:
            assert side.kind in (Kind.TITLE, Kind.LANGUAGE)
            assert side.quote.user.strip('"') == "What is a cat?"


@pytest.mark.parametrize("text", [TITLE_V0_6, TITLE_V0_7, TITLE_NOW])
@pytest.mark.parametrize("role", ["system", "user"])
def test_a_title_is_known_by_its_words_whoever_sends_it(text: str, role: str) -> None:
    side = known(body((role, text)))
    assert side.kind is Kind.TITLE
    assert side.quote == Quote("What is a cat?", "A small animal.")
    assert side.form == Form()


def test_a_title_with_words_of_ones_own_is_known_by_its_structure() -> None:
    side = known(body(("user", OWN_WORDS)), NOW)
    assert (side.kind, side.quote.user) == (Kind.TITLE, "Was ist eine Katze?")
    with_ids = {"x-conversation-id": "1", **ANYBODY}
    assert known(body(("user", OWN_WORDS)), with_ids).kind is Kind.TITLE
    assert side_of(body(("user", OWN_WORDS)), ANYBODY) is None


def test_one_question_that_is_no_stream_belongs_to_no_chat_of_librechat() -> None:
    assert known(body(("system", "Be brief."), ("user", "Is this spam?")), NOW).kind is Kind.OTHER
    assert side_of(body(("user", "Is this spam?")), ANYBODY) is None
    assert side_of(body(("user", "Is this spam?")), V0_6) is None


def test_a_chat_that_a_header_names_may_want_whole_answers_from_its_first_turn() -> None:
    named = {"x-conversation-id": "1", **ANYBODY}
    assert side_of(body(("user", "Is this spam?")), named) is None
    assert side_of(body(("system", "Be brief."), ("user", "Is this spam?")), named) is None


@pytest.mark.parametrize("headers", [NOW, V0_6, ANYBODY])
def test_a_chat_is_a_chat(headers: dict[str, str]) -> None:
    said = [("user", "What is a cat?"), ("assistant", "An animal."), ("user", TITLE_NOW)]
    assert side_of(body(("user", TITLE_NOW), stream=True), headers) is None
    assert side_of(body(*said, stream=True), headers) is None
    assert side_of(body(*said), headers) is None
    assert side_of(body(("user", CHECKPOINT), ("assistant", "Why?"), stream=True), headers) is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_checkpoint_is_known_by_its_last_message(stream: bool) -> None:
    again = "Hold on again, update your checkpoint. Merge the new messages"
    for text in (CHECKPOINT, again):
        parts = [{"type": "text", "text": text}]
        side = known(body(("user", "Hi."), ("assistant", "Yes?"), ("user", parts), stream=stream))
        assert (side.kind, side.text, side.stream) == (Kind.CHECKPOINT, text, stream)


def test_a_summary_of_0_6_is_known() -> None:
    assert known(body(("system", SUMMARY_V0_6))).kind is Kind.SUMMARY
    summary, lines = to_summarise(SUMMARY_V0_6)
    assert summary == "Ada keeps bees."
    assert lines == (
        Message("user", "My hive is blue."),
        Message("assistant", "A fine colour.\nIt lasts."),
    )


def test_what_cannot_be_read_is_left_to_whoever_complains() -> None:
    for raw in (b"", b"{", b"[]", b"\xff", b'{"messages":"Write me"}', b'{"messages":[]}'):
        assert side_of(raw, NOW) is None


@given(st.binary())
def test_any_bytes_are_taken(raw: bytes) -> None:
    side_of(raw, NOW)
    side_of(TITLE_NOW.encode() + raw, ANYBODY)


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_is_taken(value: Any) -> None:
    fields = {"messages": [{"role": "user", "content": TITLE_NOW}], "functions": value}
    side_of(json.dumps(fields).encode(), NOW)
    side_of(json.dumps(value).encode(), NOW)


# -- forms ---------------------------------------------------------------------------------------


FUNCTION = {"name": "output_formatter", "parameters": {"properties": {"title": {}}}}
SCHEMA = {"properties": {"language": {}, "title": {}}}


def test_the_form_of_the_answer_is_read_from_the_request() -> None:
    raw = ("user", TITLE_NOW)
    assert known(body(raw, functions=[FUNCTION])).form == Form(
        Shape.FUNCTION, "output_formatter", ("title",)
    )
    tool = {"type": "function", "function": {"name": "extract", "parameters": SCHEMA}}
    assert known(body(raw, tools=[tool])).form == Form(Shape.TOOL, "extract", ("language", "title"))
    wanted = {"type": "json_schema", "json_schema": {"name": "extract", "schema": SCHEMA}}
    assert known(body(raw, response_format=wanted)).form == Form(
        Shape.JSON, "", ("language", "title")
    )
    assert known(body(raw, response_format={"type": "json_object"})).form.fields == (
        "language",
        "title",
    )


@pytest.mark.parametrize("shape", list(Shape))
def test_each_form_is_a_message_that_openai_defines(shape: Shape) -> None:
    form = Form(shape, "extract", ("language", "title"))
    raw = message_in(form, title="Cats", language="English")
    message = ChatCompletionMessage.model_validate_json(json.dumps(raw), strict=True)
    assert not message.model_extra
    wanted = {"language": "English", "title": "Cats"}
    match shape:
        case Shape.TEXT:
            assert message.content == "Cats"
        case Shape.JSON:
            assert json.loads(message.content or "") == wanted
        case Shape.FUNCTION:
            assert message.function_call is not None
            assert json.loads(message.function_call.arguments) == wanted
        case Shape.TOOL:
            assert message.tool_calls is not None
            call: Any = message.tool_calls[0]
            assert (call.function.name, json.loads(call.function.arguments)) == ("extract", wanted)


# -- titles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "title"),
    [
        ("Cats And Dogs", "Cats And Dogs"),
        ('"Cats And Dogs."', "Cats And Dogs"),
        ("Title: **Cats**\n\nThis title is concise.", "Cats"),
        ("\n\n# The Life of Cats\n", "The Life of Cats"),
        ("タイトル：「東京の観光名所」", "東京の観光名所"),
        (
            "one two three four five six seven eight nine ten",
            "one two three four five six seven eight",
        ),
        ("", ""),
        ("...", ""),
    ],
)
def test_a_models_words_become_a_title(said: str, title: str) -> None:
    assert title_of(said) == title


@pytest.mark.parametrize(
    ("said", "title"),
    [
        ("What is a cat?", "What is a cat?"),
        ("Please tell me everything about the history of cats.", "Please tell me everything about"),
        (
            "東京の観光名所を３つ教えてください。それから京都も。",
            "東京の観光名所を３つ教えてください。それ",
        ),
        ("x" * 500, "x" * 60),
        ("", UNTITLED),
        (" \n ", UNTITLED),
    ],
)
def test_the_first_words_are_a_title_too(said: str, title: str) -> None:
    assert first_words(said) == title


@given(st.text())
def test_a_title_is_one_short_line(text: str) -> None:
    for title in (title_of(text), first_words(text)):
        assert len(title) <= 60
        assert len(title.splitlines()) <= 1


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is a cat?", "English"),
        ("Was ist eine Katze und wie alt wird sie?", "German"),
        ("猫とは何ですか？", "Japanese"),
        ("Что такое кошка?", "Russian"),
        ("고양이가 뭐예요?", "Korean"),
        ("", "English"),
    ],
)
def test_the_language_is_named_as_librechat_wants_it(text: str, language: str) -> None:
    assert language_of(text) == language


def test_a_long_quote_is_cut_and_the_rest_of_the_request_is_not() -> None:
    for request in (TITLE_V0_6, TITLE_V0_7, TITLE_NOW):
        assert shortened(request) == request
        long = request.replace("What is a cat?", "What? " * 5000)
        short = shortened(long)
        assert len(short) < len(request) + QUOTE_CHARS
        assert short.startswith(request[:80])
        assert quoted(short) is not None
    assert shortened("Nothing is quoted here.") == "Nothing is quoted here."


def test_the_instruction_can_stand_by_itself() -> None:
    assert instruction_of(TITLE_NOW).endswith("Only return the title itself.")
    assert "cat" not in instruction_of(TITLE_V0_7)


FORMS = (
    re.compile(
        r"(?P<head>.*?)\|\|>User:\n\"(?P<user>.*?)\"\n\|\|>Response:\n\"(?P<answer>.*)\".*",
        re.DOTALL,
    ),
    re.compile(r"(?P<head>.*?)User: (?P<user>.*?)\nAI: ?(?P<answer>.*)", re.DOTALL),
)
"""What quotes look like, as an expression says it: short, and quadratic."""


@given(
    st.lists(
        st.sampled_from(
            ['||>User:\n"', '"\n||>Response:\n"', "User: ", "\nAI:", "Conversation:", '"', " ", "a"]
        )
    ).map("".join)
)
def test_a_quote_is_what_the_expression_finds(text: str) -> None:
    found = next(filter(None, (form.fullmatch(text) for form in FORMS)), None)
    wanted = found and Quote(found["user"], found["answer"].strip('"'))
    assert quoted(text) == wanted
    front = re.sub(r"\s*Conversation:\s*\Z", "", found["head"]).strip() if found else text
    assert instruction_of(text) == front
    assert shortened(text, most_chars=len(text)) == text


LONG = 1 << 17
"""So many labels take an expression that goes back for each of them longer than a test may take."""


@pytest.mark.parametrize("piece", ["User: ", '||>User:\n"', " "])
def test_a_quote_without_an_end_is_read_once(piece: str) -> None:
    assert known(body(("user", f"A title: {piece * LONG}")), NOW).kind is Kind.OTHER
    assert not known(body(("user", CHECKPOINT + piece * LONG))).quote
    assert instruction_of(f"A{piece * LONG}User: b\nAI: c").startswith("A")
    assert to_summarise(SUMMARIES[0] + "\nCurrent summary:\n\n\nNew lines:\n" * LONG)[0] == ""


# -- its own summaries ---------------------------------------------------------------------------

SAID = (Message("assistant", "A small animal."), Message("user", "And a dog?"))


def test_librechats_own_summary_is_told_from_the_prompt() -> None:
    prompt = "Be kind.\n\n## Conversation Summary\n\n## Checkpoint\nThe user asked about cats."
    assert without_summary(Transcript(prompt, SAID)) == Transcript("Be kind.", SAID)
    first = Message("user", "<summary>\nCats.\n</summary>\n\nThis is your own checkpoint: ...")
    assert without_summary(Transcript("Be kind.", (first, *SAID))) == Transcript("Be kind.", SAID)
    assert without_summary(Transcript("Be kind.", SAID)) is None
    assert without_summary(Transcript("Be kind.", ())) is None
    assert summary_of(Transcript(prompt, SAID)) == "## Checkpoint\nThe user asked about cats."
    assert summary_of(Transcript("Be kind.", (first, *SAID))) == "Cats."
    assert summary_of(Transcript("Be kind.", SAID)) == ""
    assert summary_of(Transcript("Be kind.", ())) == ""


def test_a_checkpoint_is_of_what_stands_before_it() -> None:
    asked = Transcript("", (*SAID, Message("user", CHECKPOINT)))
    assert without_instruction(asked) == Transcript("", SAID)
