"""What OpenAI's own clients ask in the tests of their types: each route, each form of answer."""

from __future__ import annotations

from typing import Any

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"name": "weather", "parameters": CITY}
TOOL: dict[str, Any] = {"type": "function", "function": WEATHER}
SCHEMA: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
LABELLED = "||>Instructions:\nBe short.\n||>User:\nSay hi.\n||>Assistant:\n"
"""As LibreChat 0.6 writes a prompt: a chat with a memory, answered as a text."""

CHAT, TEXT, VECTORS = "chat.completions", "completions", "embeddings"

_CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "The weather in Rome, please."}],
    "max_tokens": 4,
    "temperature": 0,
}
_TEXT: dict[str, Any] = {"model": "m", "prompt": "One, two,", "max_tokens": 3, "temperature": 0}
_CALL: dict[str, Any] = {"max_tokens": 60, "tools": [TOOL], "parallel_tool_calls": False}

STREAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, _CHAT),
    "chat stop": (CHAT, _CHAT | {"max_tokens": 30, "stop": [" "]}),
    "chat n": (CHAT, _CHAT | {"n": 2, "seed": 3, "temperature": 1}),
    "chat logprobs": (CHAT, _CHAT | {"logprobs": True, "top_logprobs": 2}),
    "chat json": (CHAT, _CHAT | {"max_tokens": 40, "response_format": SCHEMA}),
    "chat tool": (CHAT, _CHAT | _CALL | {"tool_choice": "required"}),
    "chat named tool": (
        CHAT,
        _CHAT | _CALL | {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
    ),
    "chat function": (
        CHAT,
        _CHAT | {"max_tokens": 60, "functions": [WEATHER], "function_call": {"name": "weather"}},
    ),
    "text": (TEXT, _TEXT),
    "text stop": (TEXT, _TEXT | {"max_tokens": 30, "stop": ","}),
    "text n": (TEXT, _TEXT | {"prompt": ["One,", "A,"], "n": 2, "seed": 3, "temperature": 1}),
    "text logprobs": (TEXT, _TEXT | {"logprobs": 2}),
    "text of a chat": (TEXT, _TEXT | {"prompt": LABELLED}),
}
"""By name: the client's method and its arguments. Asked streamed, with usage, and not."""

FINISH = {"chat stop": "stop", "chat tool": "tool_calls", "chat function": "function_call"}
"""What some answers must end with, so that they are what they are asked for."""

EMBEDDED: dict[str, tuple[str, dict[str, Any]]] = {
    "vectors": (VECTORS, {"model": "m", "input": ["tower", "river train"]}),
    "vectors of numbers": (VECTORS, {"model": "m", "input": "tower", "encoding_format": "float"}),
}
