"""What LibreChat's clients send, in all their generations, against the running proxy."""

from __future__ import annotations

from typing import Any

import pytest

from .serving import Proxy

BASES = ("", "/", "/v1", "/v1/", "/v1/chat/completions", "/anything/v1")
"""What may stand in OPENAI_REVERSE_PROXY behind the port."""


def says(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("base", BASES)
def test_every_form_of_the_url_leads_to_chat_and_models(shared: Proxy, base: str) -> None:
    body = {"model": "gpt-3.5-turbo", "messages": says("Hi."), "max_tokens": 1}
    for path in (f"{base}/chat/completions", base.removesuffix("/chat/completions") or "/"):
        answer = shared.post(path, body)
        assert answer.status_code == 200, path
        assert answer.json()["object"] == "chat.completion"
    models = shared.get(f"{base.removesuffix('/chat/completions')}/models")
    assert models.json() == shared.get("/v1/models").json()


def test_a_path_that_nothing_can_mean_names_the_right_url(shared: Proxy) -> None:
    error = shared.post("/v1/chats", {}).json()["error"]
    assert f"OPENAI_REVERSE_PROXY={shared.url}/v1" in error["message"]
