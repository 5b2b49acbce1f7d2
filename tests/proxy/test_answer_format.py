"""What `response_format` may say, and log probabilities in both of OpenAI's shapes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs

from proxy.answer_format import ResponseFormat, parse_format
from proxy.engines.base import JsonFormat, TokenLogprob
from proxy.errors import ApiError
from proxy.scores import LEAST, chat_scores, legacy_scores


def parsed(value: Any) -> JsonFormat | None:
    return parse_format(msgspec.convert(value, ResponseFormat | None))


def test_formats() -> None:
    raw = msgspec.json.decode(
        b'{"type": "json_schema", "json_schema": {"strict": true, "schema": {"a": 1}}}',
        type=ResponseFormat,
    )
    assert parse_format(raw) == JsonFormat('{"a": 1}')
    assert parse_format(None) is None
    assert parsed({"type": "text"}) is None
    assert parsed({"type": "json_object"}) == JsonFormat("")
    with pytest.raises(ApiError):
        parsed({"type": "json_schema"})
    with pytest.raises(ApiError):
        parsed({"type": "grammar"})


ENTRIES = (
    TokenLogprob("é".encode()[:1], -0.5, (("é".encode()[:1], -0.5), (b"<|end|>", float("-inf")))),
    TokenLogprob("é".encode()[1:], -0.25),
    TokenLogprob(b" b", -1.0),
)


def test_scores_of_a_chat_are_what_openais_client_reads() -> None:
    found = chat_scores(ENTRIES)
    read = ChoiceLogprobs.model_validate(msgspec.json.decode(msgspec.json.encode(found)))
    assert read.content is not None
    whole = b"".join(bytes(token.bytes or []) for token in read.content)
    assert whole.decode() == "é b"
    assert [t.logprob for t in read.content[0].top_logprobs] == [-0.5, LEAST]
    assert read.content[0].token == "\ufffd"


def test_offsets_of_a_text_completion_count_characters() -> None:
    found = legacy_scores(ENTRIES, start_chars=10)
    read = Logprobs.model_validate(found, strict=True)
    assert read.text_offset == [10, 10, 11]
    assert read.tokens == ["\ufffd", "\ufffd", " b"]
