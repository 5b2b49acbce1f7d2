"""LibreChat's own current client before llama_cpp.server: bare, and through chatfold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.librechat_client import Chat, librechat, missing
from bench.servers import Bare

from .serving import serving

pytestmark = pytest.mark.slow

TURNS = 3
BRIEF: dict[str, Any] = {"instructions": "You are terse.", "maxTokens": 8}
LISTS = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Say a word."}]}],
    "max_tokens": 8,
    "stream": True,
}
"""As LibreChat sends a first message."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    with Bare(tmp_path_factory.mktemp("bare"), window_tokens=1024) as server:
        yield server


def ask(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=LISTS, timeout=60, trust_env=False)


def test_lists_of_parts_get_nothing_from_the_bare_server_and_an_answer_through_chatfold(
    bare: Bare, tmp_path: Path
) -> None:
    nothing = ask(bare.url)
    assert nothing.status_code == 200
    assert '"content"' not in nothing.text
    with serving(tmp_path, "--upstream", bare.url) as proxy:
        answer = ask(proxy.url)
    assert answer.status_code == 200
    assert '"finish_reason":"' in answer.text
    assert answer.text.count('"content":"') > 1
    assert answer.text.rstrip().endswith("data: [DONE]")


@pytest.mark.node
@pytest.mark.skipif(bool(missing()), reason=missing() or "it can run")
def test_librechat_gets_empty_answers_bare_and_real_ones_through_chatfold(
    bare: Bare, tmp_path: Path
) -> None:
    with librechat(bare) as client:
        chat = Chat(client, BRIEF)
        assert not chat.say("Say a word.").get("text", "").strip()
    with serving(tmp_path, "--upstream", bare.url) as proxy, librechat(proxy) as client:
        chat = Chat(client, BRIEF)
        for number in range(TURNS):
            answer = chat.say(f"Say word number {number}.")
            assert "error" not in answer, answer
            assert answer["text"].strip(), answer
        assert len(chat.history) == 2 * TURNS
