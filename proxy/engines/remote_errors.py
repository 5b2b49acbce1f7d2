"""What a server's refusals and error frames mean: pure, no I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from proxy.engines.base import (
    ContextOverflow,
    EngineError,
    EngineUnavailable,
    QueueFull,
    RequestRefused,
)
from proxy.engines.remote_server import get

SENTENCE_CHARS = 500

OVERFLOW_CODES = ("context_length_exceeded", "exceed_context_size_error")
"""OpenAI's and llama_cpp.server's `code`; llama-server's `type`."""

VAGUE_TYPES = ("BadRequestError", "invalid_request_error")
"""The `type` that vLLM and SGLang, and DeepSeek, give to whatever is wrong with a request."""

# Where the code tells an overflow, sentences are read for their numbers only. Where it is vague, no
# more can be known than what they say: the one place where a text decides.
NUMBERS = tuple(
    re.compile(sentence)
    for sentence in (
        # llama_cpp.server, OpenAI, vLLM before 0.10
        r"context length is (?P<window>\d+) tokens\D+(?P<asked>\d+) tokens"
        r"(?:\D*(?P<prompt>\d+) in (?:the messages|your prompt))?",
        # vLLM from 0.10 on
        r"(?:is too large: (?P<completion>\d+)\..*)?context length is (?P<window>\d+) tokens"
        r"\D+your request has (?P<prompt>\d+) input tokens",
        r"prompt \(length (?P<prompt>\d+)\) is longer than the maximum model length of"
        r" (?P<window>\d+)",
        # vLLM from 0.17 on
        r"context length is (?P<window>\d+) tokens\D+(?P<completion>\d+) output tokens and your"
        r" prompt contains (?P<prompt>\d+) input tokens",
        # vLLM; SGLang
        r"Input length \((?P<prompt>\d+)(?: tokens)?\) exceeds (?:model's|the) maximum"
        r" (?:context|allowed) length \((?P<window>\d+)",
        # SGLang
        r"input \((?P<prompt>\d+) tokens\) is longer than the model's context length"
        r" \((?P<window>\d+) tokens\)",
        r"context length of (?P<window>\d+) tokens\D+(?P<asked>\d+) tokens: (?P<prompt>\d+) tokens"
        r" from the input",
    )
)
# vLLM from 0.16 on counts no further than the window, or not at all.
WINDOW_ALONE = tuple(
    re.compile(sentence)
    for sentence in (
        r"You passed \d+ input \w+ and requested \d+ output tokens\D+(?P<window>\d+) tokens",
        r"context length is (?P<window>\d+) tokens\D+\d+ output tokens and your prompt contains"
        r" (?:at least \d+ input tokens|\d+ characters)",
    )
)
# vLLM where no max_tokens was asked: what the prompt leaves of the window.
EXCESS_ALONE = re.compile(r"max_tokens must be at least 1, got -(?P<excess>\d+)")
EXCESS_SHARE = 8
"""How much a prompt is over a window is taken for this part of it where nobody says it. Estimates
are off by that much in scripts that a vocabulary knows little of."""


def failure(status: int, received: bytes, *, window_tokens: int = 0) -> EngineError:
    """What an answer other than 200 means. `window_tokens` is the window as it is believed to be,
    for servers that tell an overflow without any number."""
    error = _error_object(received)
    sentence = _sentence(error) or f"The upstream server answered with status {status}."
    if 400 <= status < 500 and (overflow := _overflow(error, sentence, window_tokens)):
        return overflow
    if status == 429:
        return QueueFull(sentence)
    if status == 408 or status >= 500:
        return EngineUnavailable(sentence)
    if status < 400:
        return RequestRefused(f"The upstream URL is not the right one: it answers with {status}.")
    return RequestRefused(sentence)


def failure_in_stream(received: bytes, *, window_tokens: int = 0) -> EngineError:
    """What an error frame means; its status is in its code, where there is one."""
    error = _error_object(received)
    code = error.get("code")
    is_status = isinstance(code, int) and 400 <= code < 600
    refused = _is_overflow(error) or error.get("type") == "invalid_request_error"
    status = code if is_status else 400 if refused else 500
    assert isinstance(status, int)
    if not _sentence(error):
        return EngineUnavailable("The upstream server reported an error without words.")
    return failure(status, received, window_tokens=window_tokens)


def _error_object(received: bytes) -> Mapping[str, Any]:
    """`{"error": {...}}` (OpenAI), `{"error": "..."}`, `{"detail": ...}` (FastAPI), or bare."""
    try:
        value = msgspec.json.decode(received)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    value = get(value, "error") or value
    return value if isinstance(value, dict) else {"message": value}


def _sentence(error: Mapping[str, Any]) -> str:
    said = error.get("message") or error.get("detail")
    if isinstance(said, list):
        said = "; ".join(str(get(item, "msg") or "") for item in said)
    return " ".join(said.split())[:SENTENCE_CHARS] if isinstance(said, str) else ""


def _is_overflow(error: Mapping[str, Any]) -> bool:
    return error.get("code") in OVERFLOW_CODES or error.get("type") in OVERFLOW_CODES


def _overflow(
    error: Mapping[str, Any], sentence: str, window_tokens: int
) -> ContextOverflow | None:
    told = _is_overflow(error)
    if not told and error.get("type") not in VAGUE_TYPES:
        return None
    prompt, window = error.get("n_prompt_tokens"), error.get("n_ctx")
    if isinstance(prompt, int) and isinstance(window, int):
        return ContextOverflow(prompt_tokens=prompt, window_tokens=window)
    return _in_words(sentence) or _by_the_window(sentence, window_tokens, told=told)


def _in_words(sentence: str) -> ContextOverflow | None:
    for pattern in NUMBERS:
        if found := pattern.search(sentence):
            n = {name: int(digits) for name, digits in found.groupdict(default="0").items()}
            asked = n.get("asked", 0) or n["prompt"] + n.get("completion", 0)
            prompt = n["prompt"] or asked
            # A prompt that would fit by itself does not fit with its answer.
            too_long = prompt if prompt > n["window"] else asked
            if too_long < n["window"]:
                return _by_a_share(n["window"])
            return ContextOverflow(prompt_tokens=too_long, window_tokens=n["window"])
    alone = next((found for p in WINDOW_ALONE if (found := p.search(sentence))), None)
    return _by_a_share(int(alone["window"])) if alone else None


def _by_the_window(sentence: str, window_tokens: int, *, told: bool) -> ContextOverflow | None:
    """With the window as it is known, which the sentence does not tell."""
    if not window_tokens:
        return None
    if found := EXCESS_ALONE.search(sentence):
        prompt = window_tokens + int(found["excess"])
        return ContextOverflow(prompt_tokens=prompt, window_tokens=window_tokens)
    return _by_a_share(window_tokens) if told else None


def _by_a_share(window_tokens: int) -> ContextOverflow:
    prompt = window_tokens + window_tokens // EXCESS_SHARE
    return ContextOverflow(prompt_tokens=prompt, window_tokens=window_tokens)
