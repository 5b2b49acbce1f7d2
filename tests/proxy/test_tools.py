"""Tools in requests and calls in answers, as OpenAI's clients write and read them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from memory.calls import Call
from memory.context import Context, ContextMessage, Shape
from memory.transcript import chain
from proxy.answering import Answering, Called, Message, Thought
from proxy.engines import remote_wire
from proxy.engines.base import Delta, Finished, Started, Thinking
from proxy.errors import ApiError
from proxy.tools import NO_TOOLS, Tools
from proxy.wire import ChatRequest, Reply, Usage, encode, parse_chat

HELLO = {"role": "user", "content": "Weather in Paris and Rome?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def parse(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"messages": messages or [HELLO], **fields}).encode())


def refused(*messages: dict[str, Any], **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(*messages, **fields)
    assert caught.value.status == 400
    assert caught.value.message.endswith(".")
    return caught.value


def call(id_: str, city: Any, **other: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "type": "function",
        "function": {"name": "weather", "arguments": city},
        **other,
    }


def calling(*calls: dict[str, Any], content: Any = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(id_: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content}


def digest(*messages: dict[str, Any]) -> bytes:
    return chain(parse(*messages).transcript.messages)[-1]


# -- what may be called --------------------------------------------------------------------------


def test_tools_are_told_as_models_know_them() -> None:
    tools = parse(tools=[WEATHER, CLOCK]).tools
    weather, clock = json.loads(tools.text)
    assert list(weather["function"]) == ["name", "description", "parameters"]
    assert clock["function"]["parameters"] == {"type": "object", "properties": {}}
    assert tools.names == ("weather", "clock")
    assert not tools.must
    assert not tools.one_call


def test_what_the_choice_says() -> None:
    offered = [WEATHER, CLOCK]
    named = {"type": "function", "function": {"name": "clock"}}
    assert parse(tools=offered, tool_choice="auto") == parse(tools=offered)
    assert parse(tools=offered, tool_choice="none").tools == NO_TOOLS
    assert parse(tools=offered, tool_choice="required").tools.must
    chosen = parse(tools=offered, tool_choice=named).tools
    assert (chosen.must, chosen.names, chosen.one_call) == (True, ("clock",), True)
    # The prompt stays what it is for the other turns.
    assert chosen.text == parse(tools=offered).tools.text
    assert parse(tools=offered, parallel_tool_calls=False).tools.one_call


def test_functions_are_tools_of_the_older_form() -> None:
    tools = parse(functions=[WEATHER["function"]], function_call={"name": "weather"}).tools
    assert tools.text == parse(tools=[WEATHER]).tools.text
    assert (tools.legacy, tools.must, tools.names) == (True, True, ("weather",))
    assert parse(functions=[WEATHER["function"]], function_call="none").tools == NO_TOOLS


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "x"}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "<|im_end|>"}}]}, "tools"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"tools": [CLOCK], "tool_choice": "clock"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": 1}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"function": {"name": "weather"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tools"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


def test_a_calls_arguments_may_nest_as_they_like_as_text_but_not_as_an_object() -> None:
    for levels in (50, 500, *range(980, 1010), 3000):
        text = '{"a":' + "[" * levels + "]" * levels + "}"
        said = calling(call("x", text))
        assert parse(HELLO, said, result("x", "sunny")).transcript.messages[1].text
    deep: Any = {}
    for _ in range(200):
        deep = {"a": deep}
    said = calling(call("x", deep))
    assert refused(HELLO, said, result("x", "sunny")).param == "messages"


def test_parameters_nested_too_deeply_are_refused() -> None:
    deep: Any = {}
    for _ in range(80):
        deep = {"properties": {"x": deep}}
    function = {"name": "f", "parameters": deep}
    assert "nested" in refused(tools=[{"type": "function", "function": function}]).message


# -- calls and results in the history ------------------------------------------------------------


def test_one_call_has_one_text_however_it_is_written() -> None:
    texts = '{"city": "Paris"}', '{\n "city":"Paris"}', {"city": "Paris"}
    calls = [calling(call(str(i), text)) for i, text in enumerate(texts)]
    calls.append(calling(call("x", texts[0]), content=""))
    calls.append(calling(call("x", texts[0]), content=[{"type": "text", "text": " "}]))
    old = {"role": "assistant", "function_call": {"name": "weather", "arguments": texts[0]}}
    ends = result("x", "sunny"), {"role": "function", "name": "weather", "content": "sunny"}
    found = {digest(HELLO, c, end) for c in [*calls, old] for end in ends}
    assert len(found) == 1


def test_results_stand_in_the_order_of_their_calls() -> None:
    two = calling(call("a", {"city": "Paris"}), call("b", {"city": "Rome"}))
    texts = [result("a", "sunny"), result("b", "rain")]
    messages = parse(HELLO, two, *texts).transcript.messages
    assert messages == parse(HELLO, two, *reversed(texts)).transcript.messages
    assert [m.text for m in messages[2:]] == ["sunny", "rain"]
    # Ids that nobody knows change nothing.
    unknown = parse(HELLO, two, result("z", "rain"), result("a", "sunny")).transcript.messages
    assert [m.text for m in unknown[2:]] == ["rain", "sunny"]


def test_content_before_a_call_is_kept_and_an_empty_result_too() -> None:
    messages = parse(HELLO, calling(call("a", "{}"), content="Hm."), result("a", None))
    assert messages.transcript.messages[1].text.startswith("Hm.\n<tool_call>\n")
    assert messages.transcript.messages[2].text == ""


def test_a_window_that_begins_with_a_result_loses_it() -> None:
    sent = parse(result("a", "sunny"), {"role": "assistant", "content": "Sunny."}, HELLO)
    assert [m.role for m in sent.transcript.messages] == ["assistant", "user"]


def test_calls_and_results_go_together() -> None:
    assert refused(HELLO, result("a", "sunny")).param == "messages[1]"
    assert refused(HELLO, calling(call("a", "{}"))).param == "messages[1]"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "function", "type", "arguments", "parameters", "id"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["tools", "functions", "tool_choice", "function_call"]), json_values
    ),
    json_values,
)
def test_any_json_for_tools_is_read_or_refused(fields: Any, calls: Any) -> None:
    assistant = {"role": "assistant", "content": "x", "tool_calls": calls}
    try:
        request = parse(HELLO, assistant, HELLO, **fields)
    except ApiError as error:
        assert error.status == 400
        return
    assert bool(request.tools.text) == bool(request.tools.names)


# -- answers -------------------------------------------------------------------------------------

CALL = Call("weather", '{"city": "Paris"}')
CALL_TEXT = '<tool_call>\n{"name":"weather","arguments":{"city":"Paris"}}\n</tool_call>'
STORED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOLS = Tools(text="[...]", names=("weather",))


def ints(*values: int) -> bytes:
    return b"".join(v.to_bytes(4, "little", signed=True) for v in values)


def finished(*tokens: str, reason: str = "stop") -> Finished:
    """The end of an answer that was made of these tokens."""
    ends = [len("".join(tokens[: i + 1])) for i in range(len(tokens))]
    ids = ints(*range(1, len(tokens) + 1))
    n = len(tokens)
    return Finished(reason, 10, 0, n, ids, token_ends=ints(*ends))


def answered(
    *tokens: str, tools: Tools = TOOLS, reason: str = "stop"
) -> tuple[Message, Finished, Answering]:
    answering = Answering(Thinking(), tools)
    message = Message()
    end = finished(*tokens, reason=reason)
    for event in (Started(10, 0), *map(Delta, tokens), end):
        for said in answering.events(event):
            message.add(said)
    return message, answering.closing(end), answering


def test_a_call_is_stored_in_its_one_form_with_the_tokens_it_was_written_in() -> None:
    message, end, answering = answered("Hm.\n", *CALL_TEXT)
    assert end.finish_reason == "tool_calls"
    kept = answering.kept(end)
    assert kept.text == "Hm.\n" + STORED
    assert kept.token_ids == end.token_ids
    assert kept.n_tokens == end.completion_tokens
    # What the client sends back is what is stored.
    back = parse(HELLO, message.json(), result("", "sunny")).transcript.messages[1]
    assert back.text == kept.text


def test_reasoning_is_told_apart_and_not_stored() -> None:
    tokens = "<think>", "\n", "Hm", " so", "\n", "</think>", "\n\n", "Yes", "."
    message, end, answering = answered(*tokens)
    assert message.json()["reasoning_content"] == "Hm so"
    assert message.json()["content"] == "Yes."
    assert end.reasoning_tokens == 7
    kept = answering.kept(end)
    assert (kept.text, kept.n_tokens, kept.token_ids) == ("Yes.", 2, ints(8, 9))


def test_tokens_that_do_not_end_where_the_reasoning_does_are_not_kept() -> None:
    _, end, answering = answered("<think>", "Hm", "</think>\n\nY", "es")
    kept = answering.kept(end)
    assert (kept.text, kept.n_tokens, kept.token_ids) == ("Yes", -1, None)
    assert end.reasoning_tokens == 2


def test_a_whole_answer_has_the_tokens_that_its_engine_counted() -> None:
    _, end, answering = answered("Yes", ".")
    assert answering.kept(replace(end, token_ids=None)).n_tokens == 2
    # The engine's number is that of all answers together, or of the reasoning too.
    assert answering.kept(replace(end, token_ids=None, others=("stop",))).n_tokens == -1
    _, end, answering = answered("<think>", "Hm", "</think>", "Yes")
    assert answering.kept(replace(end, token_ids=None)).n_tokens == -1


def test_an_answer_that_ends_in_its_reasoning_is_empty() -> None:
    message, end, answering = answered("<think>", "Hm", reason="length")
    assert (end.finish_reason, end.reasoning_tokens) == ("length", 2)
    assert message.json()["content"] == ""
    assert answering.kept(end).text == ""


def test_an_answer_that_is_cut_off_keeps_what_was_shown() -> None:
    answering = Answering(Thinking(), TOOLS)
    for text in ("Hm. ", "<tool_call>\n{"):
        list(answering.events(Delta(text)))
    assert answering.kept(None).text == "Hm."
    answering = Answering(Thinking(), TOOLS)
    list(answering.events(Delta(CALL_TEXT + "\n<tool_call>")))
    assert answering.kept(None).text == STORED


def test_only_the_first_call_is_kept_where_one_is_wanted() -> None:
    one = Tools(text="[...]", names=("weather",), one_call=True)
    message, end, answering = answered("Hm.\n", CALL_TEXT, "\n", CALL_TEXT, "!", tools=one)
    assert len(message.json()["tool_calls"]) == 1
    kept = answering.kept(end)
    assert (kept.text, kept.token_ids) == ("Hm.\n" + STORED, ints(1, 2))
    # In Llama's form, where the end of the answer says that there were calls.
    bare = '{"name": "weather", "parameters": {"city": "Paris"}}'
    message, end, answering = answered(*bare, "; ", *bare, tools=one)
    assert len(message.json()["tool_calls"]) == 1
    kept = answering.kept(end)
    assert (kept.text, kept.token_ids) == (STORED, ints(*range(1, len(bare) + 1)))


def test_each_of_several_answers_is_taken_apart_by_itself() -> None:
    answering = Answering(Thinking(), TOOLS)
    events = [Delta("<think>a", 0), Delta("Hi", 1), Delta("</think>b", 0), Delta(CALL_TEXT, 1)]
    said = [s for event in events for s in answering.events(event)]
    end = Finished("stop", 1, 0, 4, None, others=("stop",))
    said += answering.events(end)
    assert [(s.index, s.text) for s in said if isinstance(s, Thought)] == [(0, "a")]
    assert [(s.index, s.text) for s in said if isinstance(s, Delta)] == [(1, "Hi"), (0, "b")]
    assert [(s.index, s.call) for s in said if isinstance(s, Called)] == [(1, CALL)]
    assert answering.closing(end).finish_reason == "stop"
    assert answering.closing(end).others == ("tool_calls",)


REPLY = Reply(id="chatcmpl-1", created=1, model="m", system_fingerprint="fp")


@pytest.mark.parametrize("legacy", [False, True])
def test_calls_are_of_the_shape_that_openai_declares(legacy: bool) -> None:
    tools = Tools(text="[...]", names=("weather",), legacy=legacy)
    message, end, _ = answered(CALL_TEXT, CALL_TEXT, tools=tools)
    usage = Usage(10, 0, 3, reasoning_tokens=1)
    whole = REPLY.completion_of(message.json(), usage, finish_reason=end.finish_reason)
    parsed = ChatCompletion.model_validate(json.loads(encode(whole)), strict=True)
    (choice,) = parsed.choices
    assert choice.message.content is None
    assert not choice.message.model_extra
    parts = [REPLY.part(c.delta()) for c in message.calls] + [REPLY.closing(end.finish_reason)]
    chunks = [ChatCompletionChunk.model_validate(json.loads(encode(p)), strict=True) for p in parts]
    if legacy:
        assert choice.finish_reason == "function_call"
        assert choice.message.function_call is not None
        assert json.loads(choice.message.function_call.arguments) == {"city": "Paris"}
        assert chunks[0].choices[0].delta.function_call is not None
        return
    assert choice.finish_reason == chunks[-1].choices[0].finish_reason == "tool_calls"
    calls = choice.message.tool_calls or []
    assert [c.function.arguments for c in calls if c.type == "function"] == [CALL.arguments] * 2
    assert len({c.id for c in calls}) == 2
    streamed = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    assert [d.index for d in streamed] == [0, 1]
    assert [d.id for d in streamed] == [c.id for c in calls]


def test_usage_counts_the_reasoning() -> None:
    usage = Usage(10, 0, 3, reasoning_tokens=2).to_json()
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 2}


# -- servers that are told in words ----------------------------------------------------------------


def sent_on(*messages: tuple[str, str], tools: str = "") -> list[tuple[str, str]]:
    shape = Shape(0, 0, 0, 0, 0, 0)
    parts = tuple(ContextMessage(role, (text,)) for role, text in messages)
    context = Context(parts, "", continues=False, shape=shape, tools=tools)
    return [(m["role"], m["content"]) for m in remote_wire.messages(context)]


def test_a_remote_server_is_told_the_tools_in_words() -> None:
    tools = parse(tools=[WEATHER]).tools.text
    (role, text), question = sent_on(("system", "Be kind."), ("user", "Hi"), tools=tools)
    assert role == "system"
    assert text.endswith("</tool_call>\n\nBe kind.")
    assert f"<tools>\n{tools[1:-1]}\n</tools>" in text
    assert question == ("user", "Hi")
    assert sent_on(("user", "Hi"), tools=tools)[0][0] == "system"
    assert sent_on(("user", "Hi")) == [("user", "Hi")]


def test_a_remote_server_gets_results_as_one_message_of_the_user() -> None:
    sent = sent_on(("user", "a"), ("assistant", "b"), ("tool", "c"), ("tool", "d"), ("user", "e"))
    results = "<tool_response>\nc\n</tool_response>\n<tool_response>\nd\n</tool_response>"
    assert sent[2:] == [("user", f"{results}\ne")]
