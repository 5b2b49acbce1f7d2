"""The sample code that this project began with, with only its base_url changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI, Stream
from openai.types.chat import ChatCompletionChunk

from .conftest import WINDOW_TOKENS
from .serving import Proxy, serving

ANSWER = """承知しました。東京にはたくさんの観光スポットがありますが、ここでは三つをご紹介します: 

1. 東京スカイツリー: 2012年に開業した東京スカイツリーは、東京都有形文化財に指定されているタワービルのひとつです。高さ378mあり、展望台からは東京の街並みや富士山などを一望することができます。

2. 東京タワー: 1958年に開業した東京タワーは、日本初の本格的な電波塔として有名です。高さ333mあり、展望台からは東京の街並みやレインボーブリッジなどを一望することができます。

3. 東京国立博物館: 1959年に開業した東京国立博物館は、日本最古で最大級の美術館の一つです。国宝や重要文化財を含む約110,000点もの美術品を収蔵しており、そのコレクションは世界的に有名です。"""  # noqa: E501

MESSAGES: Any = [
    {"role": "system", "content": "あなたは優秀な日本の観光ガイドです。"},
    {"role": "user", "content": "東京の観光名所を３つ教えてください"},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "他にお勧めはありますか？"},
]


@contextmanager
def example(proxy: Proxy) -> Iterator[Stream[ChatCompletionChunk]]:
    """The call as it stands in the sample: max_tokens is larger than any window used here."""
    with (
        httpx.Client(trust_env=False, timeout=100) as http,
        OpenAI(base_url=f"{proxy.url}/v1", api_key="Dummy", http_client=http) as client,
        client.chat.completions.create(
            model="gpt-3.5-turbo",
            max_tokens=4096,
            temperature=0.01,
            top_p=0.01,
            messages=MESSAGES,
            stream=True,
        ) as stream,
    ):
        yield stream


def test_the_sample_prints_its_answer_as_it_comes(shared: Proxy) -> None:
    text: list[str] = []
    with example(shared) as stream:
        for chunk in stream:
            content = chunk.choices[0].delta.content
            if content is not None:
                text.append(content)
            if len(text) == 40:
                break
    assert len(text) == 40
    assert "".join(text).strip()
    assert "\ufffd" not in "".join(text)
    shared.wait_idle()


def test_the_sample_fits_the_window_whole(shared: Proxy) -> None:
    """Nothing of it is left out, and there is room for an answer."""
    shape = shared.post("/api/context", {"messages": MESSAGES, "max_tokens": 4096}).json()["shape"]
    assert shape["verbatim_turns"] == 2
    assert shape["dropped_messages"] == 0
    assert sum(v for k, v in shape.items() if k.endswith("_tokens")) < WINDOW_TOKENS


@pytest.mark.slow
def test_the_sample_ends_properly_though_max_tokens_is_larger_than_the_window(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, "--n-ctx", "1024") as proxy, example(proxy) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert text.strip()
    assert "\ufffd" not in text
    assert reasons[-1] in ("stop", "length")
    assert not any(reasons[:-1])
