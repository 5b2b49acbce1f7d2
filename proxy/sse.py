"""Event streams (text/event-stream of the HTML standard, as OpenAI uses it): bytes only, no I/O."""

from __future__ import annotations

from typing import Any

import msgspec

PING = b": ping\n\n"
"""A comment: clients skip it, but it keeps the connection from looking dead."""

DONE = b"data: [DONE]\n\n"
"""Ends a stream that went well, and only such a one."""


def data(value: Any) -> bytes:
    """One frame. JSON holds no raw line break, so one `data:` line is always enough."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def comment(text: str) -> bytes:
    """A line that clients skip. Line breaks in `text` become spaces."""
    return b": " + " ".join(text.splitlines()).encode("utf-8", "replace") + b"\n\n"


def error(body: dict[str, Any]) -> bytes:
    """The last frame of a stream that failed; no DONE may follow, or clients take it as success."""
    return data(body)
