"""Chats that LibreChat 0.6 writes as one text (OPENAI_FORCE_PROMPT). Pure.

    ||>Instructions:
    You are terse.

    ||>User:
    What is a cat?
    ||>Assistant:

As a text it would be evaluated whole with every turn past the window; as the chat that it is it has
a memory. The answer is a text completion all the same.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from memory.transcript import ASSISTANT, USER
from proxy.wire import Reply, Usage

START = "||>"
_LABEL = re.compile(r"^\|\|>(?P<who>[^\n:]{1,60}):\n?", re.MULTILINE)
_ROLES = {"instructions": "system", "user": USER}


def as_chat(body: bytes) -> bytes | None:
    """The same request with messages in place of its prompt; None for all others, and for what
    cannot be read."""
    if START.encode() not in body or b'"prompt"' not in body:
        return None
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(fields, dict) or "messages" in fields:
        return None
    prompt = fields.pop("prompt", None)
    messages = _messages(prompt) if isinstance(prompt, str) else []
    # Its scores would be those of another shape, and echo has nothing to repeat.
    for name in ("logprobs", "echo", "suffix", "best_of"):
        fields.pop(name, None)
    return msgspec.json.encode({**fields, "messages": messages}) if messages else None


def _messages(prompt: str) -> list[dict[str, str]]:
    """Empty where the prompt has no labels. The label at its end only asks for the answer."""
    marks = list(_LABEL.finditer(prompt))
    if not marks or prompt[: marks[0].start()].strip():
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(prompt)]
    return [
        {"role": _ROLES.get(mark["who"].lower(), ASSISTANT), "content": text}
        for mark, end in zip(marks, ends, strict=True)
        if (text := prompt[mark.end() : end].strip())
    ]


class TextChunks(Reply):
    """Builds the objects of a text completion out of a chat's answer."""

    def completion_with(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        texts = [_text(c["index"], c["message"], c["finish_reason"]) for c in choices]
        return {**self._head("text_completion"), "choices": texts, "usage": usage.to_json()}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head("text_completion"), "choices": [], "usage": usage.to_json()}

    def _chunk(
        self,
        delta: dict[str, Any],
        index: int,
        *,
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {**self._head("text_completion"), "choices": [_text(index, delta, finish_reason)]}


def _text(index: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
    text = said.get("content") or ""
    return {"text": text, "index": index, "logprobs": None, "finish_reason": reason}
