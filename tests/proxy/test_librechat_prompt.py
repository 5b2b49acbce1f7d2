"""A chat that is written as one text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.librechat.prompt import as_chat

PROMPT = (
    "||>Instructions:\nBe terse.\n\n||>User:\nWhat is\na cat?\n||>Assistant:\nAn animal.\n"
    "||>User:\nAnd a dog?\n||>Pirate Bot:\n"
)


def converted(**fields: Any) -> Any:
    raw = as_chat(json.dumps({"prompt": PROMPT, **fields}).encode())
    return raw and json.loads(raw)


def test_the_labels_are_roles() -> None:
    chat = converted(model="m", max_tokens=5, stop=["||>"], stream=True, logprobs=1)
    assert chat == {
        "model": "m",
        "max_tokens": 5,
        "stop": ["||>"],
        "stream": True,
        "messages": [
            {"role": "system", "content": "Be terse."},
            {"role": "user", "content": "What is\na cat?"},
            {"role": "assistant", "content": "An animal."},
            {"role": "user", "content": "And a dog?"},
        ],
    }


def test_a_partial_answer_at_the_end_is_carried_on() -> None:
    chat = converted(prompt=PROMPT + "A dog is")
    assert chat["messages"][-1] == {"role": "assistant", "content": "A dog is"}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Once upon a time"},
        {"prompt": f"Once upon a time {PROMPT}"},
        {"prompt": [PROMPT]},
        {"prompt": "||>User:\n"},
        {"messages": []},
    ],
)
def test_all_else_stays_a_text(fields: dict[str, Any]) -> None:
    assert converted(**fields) is None


@given(st.binary())
def test_any_bytes_are_taken(raw: bytes) -> None:
    as_chat(raw)
    as_chat(b'{"prompt":"||>User:\\n' + raw)
