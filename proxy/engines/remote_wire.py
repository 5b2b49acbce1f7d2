"""What is said to an OpenAI-compatible server and what its answers mean: pure, no I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from memory.calls import RESULT_CLOSE, RESULT_OPEN
from memory.context import Context, ContextMessage
from memory.transcript import TOOL, USER
from proxy.engines.base import (
    ContextOverflow,
    EngineError,
    EngineUnavailable,
    Generate,
    QueueFull,
    RequestRefused,
    Sampling,
)

CHAT_PATH = "/chat/completions"
VERSION = re.compile(r"/v\d\w*$")

WINDOW_DEFAULT_TOKENS = 4096
SENTENCE_CHARS = 500

OVERFLOW_CODES = ("context_length_exceeded", "exceed_context_size_error")
"""OpenAI's and llama_cpp.server's `code`; llama-server's `type`."""

# llama_cpp.server and OpenAI give the numbers in the sentence only. What kind of error it is, is
# known from the code by then.
OVERFLOW_NUMBERS = re.compile(
    r"context length is (?P<window>\d+) tokens\D+(?P<asked>\d+) tokens"
    r"(?:\D*(?P<prompt>\d+) in (?:the messages|your prompt))?"
)


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where the server is. `shown` may stand in logs; the others hold no secrets either, as user
    info and query are left out."""

    chat: str
    models: str
    props: str
    shown: str
    left_out: bool


def upstream(url: str) -> Upstream:
    """From a URL with or without /v1, a slash at its end, or the whole path."""
    parts = urlsplit(url)
    secrets, _, host = parts.netloc.rpartition("@")
    path = parts.path.rstrip("/")
    is_whole = path.endswith(CHAT_PATH)
    path = path.removesuffix(CHAT_PATH)
    if not is_whole and not VERSION.search(path):
        path += "/v1"
    base = f"{parts.scheme}://{host}{path}"
    return Upstream(
        chat=base + CHAT_PATH,
        models=base + "/models",
        props=VERSION.sub("", base) + "/props",
        shown=f"{parts.scheme}://{'***@' if secrets else ''}{host}{path}",
        left_out=bool(secrets or parts.query),
    )


# -- the request ---------------------------------------------------------------------------------


def body(
    request: Generate,
    *,
    model: str,
    max_tokens: int | None,
    stream: bool = True,
    with_usage: bool = False,
) -> bytes:
    """The JSON of a chat request. A warming request asks for one token: none is not allowed."""
    fields: dict[str, Any] = {
        "model": model,
        "messages": messages(request.context),
        "stream": stream,
        **sampling_fields(request.sampling),
    }
    if with_usage:
        fields["stream_options"] = {"include_usage": True}
    if max_tokens is not None:
        fields["max_tokens"] = max(1, max_tokens)
    return msgspec.json.encode(fields)


def messages(context: Context) -> list[dict[str, str]]:
    return [_message(m) for m in context.messages]


def _message(message: ContextMessage) -> dict[str, str]:
    """Results of tools as the user's: a server wants ids with them, which are not kept."""
    text = _text(message.text)
    if message.role == TOOL:
        return {"role": USER, "content": RESULT_OPEN + text + RESULT_CLOSE}
    return {"role": message.role, "content": text}


def _text(text: str) -> str:
    # Lone surrogates cannot be encoded: they become U+FFFD.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """OpenAI's fields; what is llama.cpp's own only where it differs from the default, as strict
    servers refuse fields they do not know."""
    default = Sampling()
    always = ("temperature", "top_p")
    others = (
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "min_p",
        "repeat_penalty",
    )
    fields = {name: getattr(sampling, name) for name in always}
    for name in others:
        if (value := getattr(sampling, name)) != getattr(default, name):
            fields[name] = value
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return fields


# -- errors --------------------------------------------------------------------------------------


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
    value = _get(value, "error") or value
    return value if isinstance(value, dict) else {"message": value}


def _sentence(error: Mapping[str, Any]) -> str:
    said = error.get("message") or error.get("detail")
    if isinstance(said, list):
        said = "; ".join(str(_get(item, "msg") or "") for item in said)
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


# -- what the server is --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """What the server says of its model. `window_from` names who said how long the window is."""

    name: str
    window_tokens: int
    window_from: str


def found(models: object, props: object, *, n_ctx: int) -> Found:
    """From the bodies of GET /v1/models and GET /props (None where there is none).

    A window that is set (`n_ctx`) can make the server's own smaller, never larger.
    """
    data = _get(models, "data")
    first = data[0] if isinstance(data, list) and data else None
    name = _get(first, "id")
    window, source = _window(first, props)
    if n_ctx and (not window or n_ctx < window):
        window, source = n_ctx, "n_ctx"
    return Found(
        name=name if isinstance(name, str) and name else "default",
        window_tokens=window or WINDOW_DEFAULT_TOKENS,
        window_from=source or "default",
    )


def _window(model: object, props: object) -> tuple[int, str]:
    """The surest first: what the server runs with comes before what the model was trained for."""
    places = {
        "/props": _get(props, "default_generation_settings", "n_ctx"),
        "max_model_len": _get(model, "max_model_len"),
        "meta.n_ctx": _get(model, "meta", "n_ctx"),
        "meta.n_ctx_train": _get(model, "meta", "n_ctx_train"),
    }
    for source, value in places.items():
        if isinstance(value, int) and value > 0:
            return value, source
    return 0, ""


def _get(value: object, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
