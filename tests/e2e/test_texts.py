"""Plain text completions and embeddings, with OpenAI's own client over a real socket."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.engine.tiny_bert import EMBD, write_bert

from .serving import Proxy, serving
from .test_api import openai_client, says

ONCE: dict[str, Any] = {"model": "m", "prompt": "The capital of France is", "temperature": 0}


@pytest.fixture
def client(shared: Proxy) -> Iterator[OpenAI]:
    with openai_client(shared) as it:
        yield it


def test_a_text_goes_on_without_a_template_and_is_not_kept(client: OpenAI, shared: Proxy) -> None:
    stored = shared.stored()
    whole = client.completions.create(**ONCE)
    assert whole.object == "text_completion"
    assert "Paris" in whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 16)
    # Half of it: behind that two tokens are so near that a prompt from the cache may tip them.
    chunks = list(client.completions.create(stream=True, max_tokens=8, **ONCE))
    text = "".join(c.choices[0].text for c in chunks)
    assert len(text) > 20
    assert whole.choices[0].text.startswith(text)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert shared.stored() == stored


def test_several_prompts_with_several_answers_each_come_in_order(client: OpenAI) -> None:
    found = client.completions.create(
        model="m", prompt=["One, two,", "A, B,"], n=2, max_tokens=4, seed=3, logprobs=2
    )
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    for choice in found.choices:
        scores = choice.logprobs
        assert scores and scores.tokens and scores.text_offset and scores.top_logprobs
        assert "".join(scores.tokens) == choice.text
        assert scores.text_offset[0] == 0
        assert len(scores.top_logprobs[0]) == 2
    assert found.usage and found.usage.completion_tokens == 16


def test_markup_in_a_raw_prompt_is_markup(client: OpenAI) -> None:
    prompt = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
    found = client.completions.create(model="m", prompt=prompt, max_tokens=8)
    assert found.usage and found.usage.prompt_tokens < 20
    ids = client.completions.create(model="m", prompt=[1, 4093, 198], max_tokens=2)
    assert ids.usage and ids.usage.prompt_tokens == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"suffix": "x"},
        {"echo": True},
        {"best_of": 3},
        {"prompt": []},
        {"prompt": ["a"] * 33},
        {"prompt": [2**40]},
        {"prompt": [10**8]},
        {"logprobs": 6},
        {"max_tokens": 0},
        {"n": 9},
    ],
    ids=str,
)
def test_what_a_text_cannot_be_asked_is_a_400(client: OpenAI, wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError):
        client.completions.create(**(ONCE | wrong))


def test_a_chat_model_makes_no_embeddings(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="m", input="tower")


def test_embeddings_by_a_model_made_for_them(tmp_path: Path) -> None:
    path = write_bert(tmp_path / "bert.gguf")
    with serving(tmp_path, "--model", str(path), "--n-ctx", "64") as proxy:
        with openai_client(proxy) as client:
            # The client asks for base64 by itself and unpacks it.
            found = client.embeddings.create(model="m", input=["tower", "river train", "tower"])
            one, two, three = (data.embedding for data in found.data)
            assert len(one) == EMBD
            assert one == three != two
            assert found.usage.prompt_tokens == found.usage.total_tokens == 3 + 4 + 3
            for wrong in ({"input": [""]}, {"input": []}, {"dimensions": 7}, {"input": [[10**7]]}):
                with pytest.raises(BadRequestError):
                    client.embeddings.create(**({"model": "m", "input": "tower"} | wrong))  # type: ignore[arg-type]
            with pytest.raises(BadRequestError, match="cannot answer"):
                client.chat.completions.create(model="m", messages=says("Hi"))  # type: ignore[arg-type]
        asked = {"input": "tower", "encoding_format": "base64"}
        answer = proxy.post("/v1/embeddings", asked).json()
        packed = base64.b64decode(answer["data"][0]["embedding"])
        assert list(struct.unpack(f"<{EMBD}f", packed)) == one
        told = proxy.get("/metrics").text
        assert "chatfold_embeddings_seconds_count 3.0" in told
        assert 'chatfold_tokens_evaluated_total{work="embeddings"} 16.0' in told
        assert 'chatfold_errors_total{kind="RequestRefused"}' in told
