"""Tools as clients use them: over a real socket, with the real model, which is made to call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from .serving import Proxy, serving

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city. <|im_end|> ends nothing.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}
# Without arguments: a small model that may write any object may also never come to its end.
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "parameters": NOTHING}}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 80}
MUST: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}


@contextmanager
def openai(proxy: Proxy) -> Iterator[OpenAI]:
    with (
        httpx.Client(trust_env=False, timeout=60) as http,
        OpenAI(
            base_url=f"{proxy.url}/v1",
            api_key="x",
            max_retries=0,
            http_client=http,
            _strict_response_validation=True,
        ) as client,
    ):
        yield client


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def result(answer: dict[str, Any], content: str) -> dict[str, Any]:
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    return {"role": "tool", "tool_call_id": call["id"], "content": content}


def message(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["choices"][0]["message"]
    return found


def read(answer: dict[str, Any]) -> int:
    """Tokens of prompt and answer together: all that the next prompt begins with."""
    total: int = answer["usage"]["total_tokens"]
    return total


def cached(answer: dict[str, Any]) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_a_call_that_is_asked_for_comes(shared: Proxy) -> None:
    with openai(shared) as client:
        named = {"type": "function", "function": {"name": "clock"}}
        for choice, name in (("required", "weather"), (named, "clock")):
            tools = [WEATHER] if choice == "required" else [WEATHER, CLOCK]
            answer = client.chat.completions.create(
                model="any",
                messages=[{"role": "user", "content": "The weather in Rome, please."}],
                tools=tools,  # type: ignore[arg-type]
                tool_choice=choice,  # type: ignore[arg-type]
                parallel_tool_calls=False,
                **GREEDY,
            )
            (only,) = answer.choices
            assert only.finish_reason == "tool_calls"
            assert only.message.content is None
            (call,) = only.message.tool_calls or []
            assert call.type == "function"
            assert call.function.name == name
            arguments = json.loads(call.function.arguments)
            assert arguments in ([{}] if name == "clock" else [{"city": "Paris"}, {"city": "Rome"}])


def test_a_stream_gives_each_call_whole_and_its_tags_never(shared: Proxy) -> None:
    with openai(shared) as client:
        stream = client.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": "The weather in Rome, please."}],
            stream=True,
            stream_options={"include_usage": True},
            **MUST,
            **GREEDY,
        )
        chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert not any(c.delta.content for c in choices)
    (delta,) = [d for c in choices for d in c.delta.tool_calls or []]
    assert (delta.index, delta.type) == (0, "function")
    assert delta.id and delta.function and delta.function.name == "weather"
    assert set(json.loads(delta.function.arguments or "")) == {"city"}
    assert [c.finish_reason for c in choices][-1] == "tool_calls"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens


def test_functions_are_answered_in_their_own_form(shared: Proxy) -> None:
    options = {"functions": [WEATHER["function"]], "function_call": {"name": "weather"}, **GREEDY}
    sent = [user("The weather in Rome, please.")]
    answer = shared.chat(sent, **options)
    call = message(answer)["function_call"]
    assert set(json.loads(call["arguments"])) == {"city"}
    assert answer["choices"][0]["finish_reason"] == "function_call"
    sent += [message(answer), {"role": "function", "name": "weather", "content": "rain"}]
    assert shared.chat(sent, **(options | {"function_call": "auto", "max_tokens": 5}))


def test_without_tools_text_that_looks_like_a_call_is_text(shared: Proxy) -> None:
    asked = user('Say: <tool_call>{"name": "weather", "arguments": {}}</tool_call>')
    for extra in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        answer = shared.chat([asked], temperature=0, max_tokens=8, **extra)
        assert "tool_calls" not in message(answer)
        assert message(answer)["content"]


def test_json_that_was_asked_for_calls_no_tool_and_is_streamed(shared: Proxy) -> None:
    """Though it looks like a call of one that is offered."""
    properties = {"name": {"const": "weather"}, "arguments": {"const": {"city": "Rome"}}}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with openai(shared) as client:
        stream = client.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": "The weather in Rome, as JSON."}],
            tools=[WEATHER],  # type: ignore[list-item]
            response_format=wanted,  # type: ignore[arg-type]
            stream=True,
            **GREEDY,
        )
        choices = [chunk.choices[0] for chunk in stream]
    texts = [c.delta.content for c in choices if c.delta.content]
    assert json.loads("".join(texts)) == {"name": "weather", "arguments": {"city": "Rome"}}
    assert len(texts) > 3
    assert not any(c.delta.tool_calls for c in choices)
    assert choices[-1].finish_reason == "stop"


def test_the_context_that_is_shown_tells_whether_there_are_tools(shared: Proxy) -> None:
    bodies = [{"messages": [user("Hi")]} | extra for extra in ({}, {"tools": [WEATHER]})]
    without, with_tools = (shared.post("/api/context", body).json() for body in bodies)
    assert without["digest"] != with_tools["digest"]
    assert with_tools["shape"]["system_tokens"] > without["shape"]["system_tokens"] + 100


def test_tools_longer_than_the_window_are_refused_in_a_sentence(shared: Proxy) -> None:
    long = {"type": "function", "function": {"name": "f", "description": "word " * 4000}}
    response = shared.post("/v1/chat/completions", {"messages": [user("Hi")], "tools": [long]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_each_step_of_a_turn_with_tools_evaluates_what_is_new(tmp_path: Path) -> None:
    """The call's own tokens, in the model's own spacing, stand in the prompt that brings its
    result; and so they do after a restart."""
    with serving(tmp_path, "--n-ctx", "2048") as proxy:
        sent = [user("The weather in Paris?")]
        for result_text in ("sunny, 21 degrees", "rain, 9 degrees"):
            calling = proxy.chat(sent, **MUST, **GREEDY)
            proxy.wait_idle()
            sent += [message(calling), result(calling, result_text)]
            spoken = proxy.chat(sent, tools=[WEATHER], temperature=0, max_tokens=12)
            proxy.wait_idle()
            assert cached(spoken) >= read(calling)
            sent += [message(spoken), user("And in Rome?")]
            last = spoken
        with_other_spacing = json.loads(json.dumps(sent))
        call = with_other_spacing[1]["tool_calls"][0]["function"]
        call["arguments"] = json.dumps(json.loads(call["arguments"]), separators=(",", ":"))
        with_other_spacing[1]["content"] = ""
        later = proxy.chat(with_other_spacing, tools=[WEATHER], temperature=0, max_tokens=12)
        assert cached(later) >= read(last)
        roles = [role for role, _ in proxy.stored()]
        assert roles == ["user", "assistant", "tool", "assistant"] * 2 + ["user", "assistant"]
        proxy.wait_idle()
    sent += [message(later), user("Thanks. And tomorrow?")]
    with serving(tmp_path, "--n-ctx", "2048") as proxy:
        again = proxy.chat(sent, tools=[WEATHER], temperature=0, max_tokens=4)
        assert cached(again) >= read(later)


LLAMA3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    '{% if tools and loop.index0 == 1 %}{{ \'Answer as {"name": ..., "parameters": ...}.\n\' }}'
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}{# <|start_header_id|> #}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Llama 3's: tools in the first question, calls as bare JSON; with this model's markup."""


def test_a_model_with_llamas_template_calls_in_its_form(tmp_path: Path) -> None:
    with serving(tmp_path, "--n-ctx", "1024", CHATFOLD_ENGINE_CHAT_TEMPLATE=LLAMA3) as proxy:
        sent = [{"role": "system", "content": "Be brief."}, user("The weather in Paris?")]
        calling = proxy.chat(sent, **MUST, **GREEDY)
        proxy.wait_idle()
        sent += [message(calling), result(calling, "sunny")]
        spoken = proxy.chat(sent, tools=[WEATHER], temperature=0, max_tokens=12)
        assert cached(spoken) >= read(calling)


@pytest.mark.long
def test_a_long_chat_with_tools_stays_within_its_window_and_flat(tmp_path: Path) -> None:
    with serving(tmp_path, "--n-ctx", "1024", "--policy", "extractive") as proxy:
        sent: list[dict[str, Any]] = []
        for i in range(7):
            sent.append(user(f"Day {i}: the weather in Paris, please, and tell me more of it."))
            calling = proxy.chat(sent, **MUST, **GREEDY)
            sent += [message(calling), result(calling, f"day {i}: sunny, {i + 10} degrees. " * 4)]
            spoken = proxy.chat(sent, tools=[WEATHER], temperature=0, max_tokens=12)
            sent.append(message(spoken))
            proxy.wait_idle()
            evaluated = calling["usage"]["prompt_tokens"] - cached(calling)
            assert not i or evaluated <= 40, f"turn {i} evaluated {evaluated} tokens"
        body = {"messages": [*sent, user("?")], "tools": [WEATHER]}
        assert proxy.post("/api/context", body).json()["shape"]["summaries"] >= 1
