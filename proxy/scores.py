"""Log probabilities of tokens in OpenAI's two shapes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxy.engines.base import TokenLogprob

LEAST = -9999.0
"""OpenAI's number for a token that is as good as impossible: JSON knows no infinity."""


def chat_scores(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`logprobs` of a chat choice. A token that is a part of a character shows as U+FFFD: its
    `bytes` are what counts.
    """
    return {"content": [_entry(entry) for entry in entries], "refusal": None}


def _entry(entry: TokenLogprob) -> dict[str, Any]:
    top = [_token(token, logprob) for token, logprob in entry.top]
    return {**_token(entry.token, entry.logprob), "top_logprobs": top}


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(token), "bytes": list(token), "logprob": max(logprob, LEAST)}


def legacy_scores(entries: Sequence[TokenLogprob], *, start_chars: int) -> dict[str, Any]:
    """`logprobs` of a text completion; `start_chars` of its text came before these tokens."""
    return {
        "tokens": [_text(e.token) for e in entries],
        "token_logprobs": [max(e.logprob, LEAST) for e in entries],
        "top_logprobs": [{_text(t): max(p, LEAST) for t, p in e.top} for e in entries],
        "text_offset": _offsets(entries, start_chars),
    }


def _offsets(entries: Sequence[TokenLogprob], start_chars: int) -> list[int]:
    """Where each token begins; those that make one character together begin where it does."""
    data, offsets = b"", []
    for entry in entries:
        offsets.append(start_chars + len(data.decode("utf-8", "ignore")))
        data += entry.token
    return offsets


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
