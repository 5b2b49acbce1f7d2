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

# llama_cpp.server and OpenAI give the numbers in the sentence only. What kind of error it is, is
# known from the code by then.
OVERFLOW_NUMBERS = re.compile(
    r"context length is (?P<window>\d+) tokens\D+(?P<asked>\d+) tokens"
    r"(?:\D*(?P<prompt>\d+) in (?:the messages|your prompt))?"
)


def failure(status: int, received: bytes) -> EngineError:
    """What an answer other than 200 means."""
    error = _error_object(received)
    sentence = _sentence(error) or f"The upstream server answered with status {status}."
    if 400 <= status < 500 and _is_overflow(error):
        return _overflow(error, sentence)
    if status == 429:
        return QueueFull(sentence)
    if status == 408 or status >= 500:
        return EngineUnavailable(sentence)
    if status < 400:
        return RequestRefused(f"The upstream URL is not the right one: it answers with {status}.")
    return RequestRefused(sentence)


def failure_in_stream(received: bytes) -> EngineError:
    """What an error frame means; its status is in its code, where there is one."""
    error = _error_object(received)
    code = error.get("code")
    is_status = isinstance(code, int) and 400 <= code < 600
    refused = _is_overflow(error) or error.get("type") == "invalid_request_error"
    status = code if is_status else 400 if refused else 500
    assert isinstance(status, int)
    if not _sentence(error):
        return EngineUnavailable("The upstream server reported an error without words.")
    return failure(status, received)


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


def _overflow(error: Mapping[str, Any], sentence: str) -> EngineError:
    prompt, window = error.get("n_prompt_tokens"), error.get("n_ctx")
    if isinstance(prompt, int) and isinstance(window, int):
        return ContextOverflow(prompt_tokens=prompt, window_tokens=window)
    if found := OVERFLOW_NUMBERS.search(sentence):
        window, asked = int(found["window"]), int(found["asked"])
        prompt = int(found["prompt"] or asked)
        # A prompt that would fit by itself does not fit with its answer.
        too_long = prompt if prompt > window else asked
        return ContextOverflow(prompt_tokens=too_long, window_tokens=window)
    return RequestRefused(sentence)
