"""openai-python's strict client: what it reads is of the types it declares, on every route.

The exceptions are stated here too, and `docs/api.md` tells them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIResponseValidationError, OpenAI
from openai.types import Completion
from pydantic import BaseModel, ValidationError

from tests.engine.tiny_bert import write_bert

from .asked import CHAT, EMBEDDED, FINISH, STREAMED, TEXT
from .serving import Proxy, serving

USAGE = {"stream": True, "stream_options": {"include_usage": True}}
CHATS = [name for name, (method, _) in STREAMED.items() if method == CHAT]
TEXTS = [name for name, (method, _) in STREAMED.items() if method == TEXT]


@contextmanager
def openai(proxy: Proxy, *, strict: bool) -> Iterator[OpenAI]:
    with (
        httpx.Client(trust_env=False, timeout=60) as http,
        OpenAI(
            base_url=f"{proxy.url}/v1",
            api_key="x",
            max_retries=0,
            http_client=http,
            _strict_response_validation=strict,
        ) as client,
    ):
        yield client


@pytest.fixture
def client(shared: Proxy) -> Iterator[OpenAI]:
    with openai(shared, strict=True) as it:
        yield it


def ask(client: OpenAI, name: str, **options: Any) -> Any:
    method, arguments = (STREAMED | EMBEDDED)[name]
    return attrgetter(method)(client).create(**arguments, **options)


def undeclared(value: Any, where: str = "") -> list[str]:
    """The paths of fields that no type of the client declares."""
    if isinstance(value, list):
        return [p for i, v in enumerate(value) for p in undeclared(v, f"{where}[{i}]")]
    if not isinstance(value, BaseModel):
        return []
    found = [f"{where}.{extra}" for extra in value.model_extra or {}]
    for field in type(value).model_fields:
        found += undeclared(getattr(value, field), f"{where}.{field}")
    return found


@pytest.mark.parametrize("name", STREAMED)
def test_an_answer_is_of_the_declared_type(client: OpenAI, name: str) -> None:
    answer = ask(client, name)
    assert undeclared(answer) == []
    assert answer.choices[0].finish_reason == FINISH.get(name, answer.choices[0].finish_reason)
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize("name", CHATS)
def test_each_piece_of_a_chat_is_of_the_declared_type(client: OpenAI, name: str) -> None:
    *pieces, usage = list(ask(client, name, **USAGE))
    assert undeclared([*pieces, usage]) == []
    reasons = [piece.choices[0].finish_reason for piece in pieces]
    assert reasons[-1] == FINISH.get(name, reasons[-1]) is not None
    assert usage.choices == []
    assert usage.usage.completion_tokens > 0


def test_models_are_of_the_declared_type(client: OpenAI) -> None:
    models = list(client.models.list())
    assert models
    assert undeclared(models) == []


def test_embeddings_are_of_the_declared_type(tmp_path: Path) -> None:
    """Asked without a format the client asks for base64 and unpacks it; made strict it complains of
    the base64 that it asked for itself, whoever sends it."""
    path = write_bert(tmp_path / "bert.gguf")
    with serving(tmp_path, "--model", str(path), "--n-ctx", "64") as proxy:
        with openai(proxy, strict=True) as client:
            assert undeclared(numbers := ask(client, "vectors of numbers")) == []
            with pytest.raises(APIResponseValidationError) as complaint:
                ask(client, "vectors")
        assert isinstance(complaint.value.__cause__, ValidationError)
        errors = complaint.value.__cause__.errors()
        assert {error["loc"] for error in errors} == {("data", i, "embedding") for i in range(2)}
        with openai(proxy, strict=False) as client:
            found = ask(client, "vectors")
    found = type(found).model_validate(found.to_dict(), strict=True)
    assert undeclared(found) == []
    assert found.data[0].embedding == numbers.data[0].embedding


def test_a_field_that_is_not_declared_would_be_found() -> None:
    """Of the checks here themselves."""
    answer = Completion.model_construct(id="x", choices=[], speed=3)
    assert undeclared([answer]) == ["[0].speed"]


# -- pieces of a text -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_of_a_text_differ_from_the_declared_type_in_the_reason_that_is_not_there_yet(
    shared: Proxy, name: str
) -> None:
    """The client has one type for whole texts and for pieces of them, whose `finish_reason` must be
    a word. OpenAI's own API sends null until the end, and so do we: any word before it would be
    taken for the end by clients that stop there."""
    with openai(shared, strict=False) as client:
        pieces = [piece.to_dict() for piece in ask(client, name, **USAGE)]
    assert len(pieces) > 2
    open_ones = 0
    for piece in pieces:
        for choice in piece["choices"]:
            if choice["finish_reason"] is None:
                open_ones += 1
                choice["finish_reason"] = "stop"
        assert undeclared(Completion.model_validate(piece, strict=True)) == []
    assert open_ones
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"]["completion_tokens"] > 0


def test_the_strict_client_complains_of_that_and_of_nothing_else(client: OpenAI) -> None:
    with pytest.raises(APIResponseValidationError) as complaint:
        list(ask(client, "text", **USAGE))
    assert isinstance(complaint.value.__cause__, ValidationError)
    (error,) = complaint.value.__cause__.errors()
    assert error["loc"] == ("choices", 0, "finish_reason")
    assert error["input"] is None
