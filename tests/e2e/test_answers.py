"""What may be asked of an answer beside its text, with OpenAI's own client over a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

from .serving import Proxy
from .test_api import openai_client, says

SHORT: dict[str, Any] = {"model": "m", "max_tokens": 12}


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    age: int | None


class Person(BaseModel):
    name: str = Field(max_length=20)
    pets: list[Pet] = Field(max_length=2)


@pytest.fixture
def client(shared: Proxy) -> Iterator[OpenAI]:
    with openai_client(shared) as it:
        yield it


# -- JSON ----------------------------------------------------------------------------------------


def test_a_model_of_pydantic_comes_back(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="m",
        messages=says("Describe a person."),
        response_format=Person,
        max_tokens=300,  # type: ignore[arg-type]
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_any_object_streamed_is_one_object(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        messages=says("Describe the smallest JSON object, as JSON."),  # type: ignore[arg-type]
        response_format={"type": "json_object"},
        model="m",
        max_tokens=400,
        temperature=0,
        logit_bias={"109": 5},
        stream=True,
    )
    chunks = [chunk.choices[0] for chunk in stream]
    text = "".join(c.delta.content or "" for c in chunks)
    assert text.startswith("{")
    if chunks[-1].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_kept_is_a_400_also_for_a_stream(
    client: OpenAI, stream: bool
) -> None:
    schema = {"type": "object", "patternProperties": {"a": {}}}
    with pytest.raises(BadRequestError, match="patternProperties") as caught:
        client.chat.completions.create(
            messages=says("Hi"),  # type: ignore[arg-type]
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            stream=stream,
            **SHORT,
        )
    assert caught.value.param == "response_format"


# -- several answers -----------------------------------------------------------------------------


def test_three_answers_are_the_same_streamed_and_whole_and_one_is_kept(
    client: OpenAI, shared: Proxy
) -> None:
    asked: dict[str, Any] = {
        "messages": says("Name a colour, please."),
        "n": 3,
        "seed": 11,
        **SHORT,
    }
    whole = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert whole.usage and whole.usage.completion_tokens <= 36
    streamed, reasons = ["", "", ""], {}
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert streamed == texts
    assert set(reasons) == {0, 1, 2}
    assert None not in reasons.values()
    stored = [text for _, text in shared.stored()]
    assert texts[0] in stored
    assert texts[1] not in stored


# -- log probabilities ---------------------------------------------------------------------------


def test_log_probabilities_streamed_and_whole_spell_the_text(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        **SHORT,
        "messages": says("Say: été, 東京"),
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0,
    }
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.logprobs and choice.logprobs.content
    entries = choice.logprobs.content
    assert b"".join(bytes(e.bytes or []) for e in entries).decode() == choice.message.content
    assert all(len(e.top_logprobs) == 3 and e.logprob <= 0 for e in entries)
    # Greedy: the likeliest token is the one that was taken.
    assert all(e.top_logprobs[0].bytes == e.bytes for e in entries)
    streamed = []
    for chunk in client.chat.completions.create(stream=True, **asked):
        found = chunk.choices[0].logprobs
        streamed += found.content or [] if found else []
    assert [e.token for e in streamed] == [e.token for e in entries]
