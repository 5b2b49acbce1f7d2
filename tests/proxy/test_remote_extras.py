"""JSON, tools, reasoning and log probabilities on their way to a server and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from scripted_kinds import llama_cpp, llama_server
from scripted_upstream import DONE, ROLE, Exchange, Upstream, end, frames, say
from test_remote import ask, asking, serving, text

from memory.calls import Call, text_with_calls
from memory.context import Context, ContextMessage, Shape
from proxy.answering import Answering, Called
from proxy.config import RemoteConfig
from proxy.engines.base import (
    CallFormat,
    Delta,
    Finished,
    Generate,
    JsonFormat,
    Priority,
    RequestRefused,
    Sampling,
    Started,
    Thinking,
    TokenLogprob,
)
from proxy.tools import Tools

pytestmark = pytest.mark.anyio

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
TOOLS = json.dumps([WEATHER])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def streaming(*values: Any) -> Any:
    async def script(exchange: Exchange) -> None:
        await exchange.stream(frames(ROLE, *values) + DONE)

    return script


def with_tools(*messages: tuple[str, str], **options: Any) -> Generate:
    some = tuple(ContextMessage(role, (said,)) for role, said in messages)
    context = Context(some, "", False, Shape(1, 10, 0, 0, 4, 0), tools=TOOLS)
    return Generate("me", context, Priority.CHAT, **options)


JSON_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
}


@pytest.mark.parametrize(
    ("kind", "schema", "sent"),
    [
        (llama_cpp, "", {"type": "json_object"}),
        (llama_cpp, json.dumps(SCHEMA), {"type": "json_object", "schema": SCHEMA}),
        (llama_server, json.dumps(SCHEMA), JSON_SCHEMA),
        (Upstream, json.dumps(SCHEMA), JSON_SCHEMA),
        (Upstream, "", {"type": "json_object"}),
    ],
)
async def test_a_schema_goes_on_in_the_form_that_the_server_takes(
    kind: Any, schema: str, sent: dict[str, Any]
) -> None:
    server = kind()
    async with serving(server, remote=RemoteConfig()) as engine:
        await ask(engine, asking(format=JsonFormat(schema)))
    assert server.seen[-1].body["response_format"] == sent


async def test_calls_that_come_in_pieces_become_the_text_of_a_call() -> None:
    server = Upstream(
        chat=streaming(
            say("Let me look."),
            delta(tool_calls=[{"index": 0, "id": "x", "function": {"name": "weather"}}]),
            delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a": '}}]),
            delta(tool_calls=[{"index": 0, "function": {"arguments": '"Paris"}'}}]),
            delta(tool_calls=[{"index": 1, "function": {"name": "weather", "arguments": "{}"}}]),
            end("tool_calls"),
        )
    )
    async with serving(server) as engine:
        events = await ask(engine, with_tools(("user", "Weather?")))
    calls = [Call("weather", '{"a": "Paris"}'), Call("weather", "{}")]
    assert text(events) == text_with_calls("Let me look.", calls)


async def test_each_piece_of_a_call_is_a_sign_of_life_and_no_frame_for_the_client() -> None:
    """Whoever waits for the next event for so long and no longer would give up a long call."""
    named = delta(tool_calls=[{"index": 0, "function": {"name": "weather", "arguments": "{"}}])
    piece = delta(tool_calls=[{"index": 0, "function": {"arguments": " "}}])
    last = delta(tool_calls=[{"index": 0, "function": {"arguments": "}"}}])
    server = Upstream(chat=streaming(named, *[piece] * 50, last, end("tool_calls")))
    async with serving(server) as engine:
        events = await ask(engine, with_tools(("user", "Weather?")))
    assert len([e for e in events if isinstance(e, Delta)]) == 53
    answering = Answering(Thinking(), Tools(TOOLS, ("weather",)))
    given = [out for event in events for out in answering.events(event)]
    assert [type(e) for e in given] == [Started, Called]


@pytest.mark.parametrize("kind", [llama_cpp, llama_server, Upstream])
async def test_every_server_is_told_tools_and_calls_in_words(kind: Any) -> None:
    called = text_with_calls("", [Call("weather", '{"a": "Paris"}')])
    server = kind()
    async with serving(server, remote=RemoteConfig()) as engine:
        request = with_tools(("user", "Weather?"), ("assistant", called), ("tool", "Rain"))
        await ask(engine, request)
    body = server.seen[-1].body
    assert "tools" not in body
    system, _, assistant, result = body["messages"]
    assert "weather" in system["content"]
    assert assistant == {"role": "assistant", "content": called}
    assert result["role"] == "user"


CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [
        (CallFormat(("weather",), one_call=True), {"tool_choice": NAMED}),
        (CallFormat(("weather", "clock")), {"tool_choice": "required"}),
        (
            CallFormat(("weather", "clock"), one_call=True),
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
    ],
)
async def test_a_call_that_must_come_is_demanded_by_the_servers_own_fields(
    wanted: CallFormat, sent: dict[str, Any]
) -> None:
    """And the name that vLLM says with each piece is the name once."""
    first = {"index": 0, "id": "x", "function": {"name": "weather", "arguments": '{"a": '}}
    then = {"function": {"name": "weather", "arguments": '"Paris"}'}}
    chat = streaming(delta(tool_calls=[first]), delta(tool_calls=[then]), end())
    server = Upstream(chat=chat)
    request = with_tools(("system", "Be short."), ("user", "Weather?"), format=wanted)
    tools = json.dumps([WEATHER, CLOCK])
    request = replace(request, context=replace(request.context, tools=tools))
    async with serving(server) as engine:
        await engine.model()
        engine.check(request)
        events = await ask(engine, request)
    body = server.seen[-1].body
    asked = {k: v for k, v in body.items() if k in ("tool_choice", "parallel_tool_calls")}
    assert asked == sent
    assert body["tools"] == [WEATHER, CLOCK]
    # Not in words as well: the server's own template tells them.
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    assert text(events) == text_with_calls("", [Call("weather", '{"a": "Paris"}')])


@pytest.mark.parametrize("kind", [llama_cpp, llama_server])
async def test_a_call_that_was_demanded_before_the_server_was_known_is_refused_by_llama_cpps(
    kind: Any,
) -> None:
    request = with_tools(("user", "Weather?"), format=CallFormat(("weather",)))
    server = kind()
    async with serving(server, remote=RemoteConfig()) as engine:
        with pytest.raises(RequestRefused) as refused:
            await ask(engine, request)
        assert refused.value.param == "tool_choice"
    assert not any(exchange.body.get("stream") for exchange in server.seen)


def goes_on(said: str, reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "text": said, "logprobs": None, "finish_reason": reason}
    return {"object": "text_completion", "choices": [choice]}


@pytest.mark.parametrize("raw", ["Once upon", (5, 6, 7)], ids=str)
async def test_a_raw_prompt_goes_to_the_servers_route_for_texts(raw: str | tuple[int, ...]) -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}

    asked: list[Any] = []

    async def texts(exchange: Exchange) -> None:
        asked.append(exchange.body)
        pieces = (goes_on(" a"), goes_on(" time", "length"), usage)
        await exchange.stream(frames(*pieces) + DONE)

    server = Upstream()
    server.routes[("POST", "/v1/completions")] = texts
    request = asking(raw=raw, max_tokens=2, sampling=Sampling(stop=("!",)))
    async with serving(server) as engine:
        await engine.model()
        engine.check(request)
        calibration = engine.status()["calibration"]
        events = await ask(engine, request)
        # Nothing is learned of chats from a text without one.
        assert engine.status()["calibration"] == calibration
        with pytest.raises(RequestRefused) as refused:
            engine.check(replace(request, sampling=Sampling(logprobs=1)))
        assert refused.value.param == "logprobs"
    (body,) = asked
    assert server.seen == []
    assert "messages" not in body
    assert body["prompt"] == (raw if isinstance(raw, str) else list(raw))
    assert (body["max_tokens"], body["stop"], body["stream"]) == (2, ["!"], True)
    assert text(events) == " a time"
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.finish_reason, finished.prompt_tokens) == ("length", 3)


async def test_a_server_without_a_route_for_texts_says_so_once() -> None:
    server = Upstream()
    async with serving(server) as engine:
        with pytest.raises(RequestRefused):
            await ask(engine, asking(raw="Once upon"))
        assert text(await ask(engine)) == "Hello"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_comes_between_the_tags_that_the_proxy_knows(name: str) -> None:
    server = Upstream(
        chat=streaming(delta(**{name: "Hm, "}), delta(**{name: "so."}), say("Yes."), end())
    )
    async with serving(server) as engine:
        assert text(await ask(engine)) == "<think>Hm, so.</think>Yes."
        server.chat = streaming(delta(**{name: "Hm"}), end("length"))
        assert text(await ask(engine)) == "<think>Hm</think>"


async def test_log_probabilities_are_passed_on_and_back() -> None:
    told = {"token": "Hé", "logprob": -0.5, "bytes": [72, 195, 169], "top_logprobs": [
        {"token": "Hé", "logprob": -0.5, "bytes": None}]}  # fmt: skip
    chunk = say("Hé")
    chunk["choices"][0]["logprobs"] = {"content": [told]}
    server = Upstream(chat=streaming(chunk, end()))
    request = replace(asking(), sampling=Sampling(logprobs=1))
    async with serving(server) as engine:
        engine.check(request)
        events = await ask(engine, request)
    (said,) = [e for e in events if isinstance(e, Delta)]
    token = "Hé".encode()
    assert said.logprobs == (TokenLogprob(token, -0.5, ((token, -0.5),)),)
    assert (server.seen[0].body["logprobs"], server.seen[0].body["top_logprobs"]) == (True, 1)


async def test_what_no_server_is_asked_for_is_refused_at_once() -> None:
    async with serving(llama_cpp()) as engine:
        for request, param in (
            (asking(n=2), "n"),
            (asking(format=CallFormat(("weather",))), "tool_choice"),
            (asking(raw="Once upon"), "prompt"),
            (asking(raw="Once upon", sampling=Sampling(logprobs=2)), "prompt"),
            (asking(sampling=Sampling(logprobs=2)), "logprobs"),
        ):
            with pytest.raises(RequestRefused) as refused:
                engine.check(request)
            assert refused.value.param == param
