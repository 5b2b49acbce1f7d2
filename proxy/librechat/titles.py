"""Titles: made of a model's words or of the user's first ones, in the form that is asked for.
Pure.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from memory.language import LATIN, has_word_spaces, language, script
from proxy.librechat.side import Form, Shape

UNTITLED = "New Chat"
"""What LibreChat itself calls a chat without a title."""

WORDS_MOST = 8
"""Five are asked for; small models do not count."""
FIRST_WORDS = 5
CHARS_MOST = 60
DENSE_CHARS = 20
"""Where words are not parted by spaces."""

_LANGUAGE_OF_SCRIPT = {"cyrillic": "Russian", "devanagari": "Hindi"}
_LABEL = re.compile(r"^\W*(?:(?:conversation )?title|タイトル|titel|titre|título)\s*[:：]\s*", re.I)
_EDGES = " \t\"'“”‘’「」『』«»`*_#>.,:;!…。、！：-–—"


def title_of(text: str) -> str:
    """A model's answer as a title: its first line without labels, quotes and full stop; "" where
    nothing is left."""
    lines = (line.strip() for line in _LABEL.sub("", text.strip()).splitlines())
    return _limited(next(filter(None, lines), ""), words=WORDS_MOST)


def first_words(text: str) -> str:
    """The beginning of what the user said, as a title."""
    return _limited(" ".join(text.split()), words=FIRST_WORDS) or UNTITLED


def language_of(text: str) -> str:
    """The language as LibreChat wants it named. English when in doubt, as LibreChat does it."""
    found = script(text)
    name = language(text) if found == LATIN else _LANGUAGE_OF_SCRIPT.get(found, found)
    return (name or "english").capitalize()


def message_in(form: Form, *, title: str, language: str) -> dict[str, Any]:
    """The assistant's message that holds the answer in the form that was asked for."""
    if form.shape is Shape.TEXT:
        return {"role": "assistant", "content": title or language, "refusal": None}
    known = {"title": title, "language": language}
    arguments = msgspec.json.encode({name: known.get(name, "") for name in form.fields}).decode()
    call = {"name": form.name, "arguments": arguments}
    match form.shape:
        case Shape.FUNCTION:
            extra: dict[str, Any] = {"function_call": call}
        case Shape.TOOL:
            extra = {"tool_calls": [{"id": "call_title", "type": "function", "function": call}]}
        case _:
            return {"role": "assistant", "content": arguments, "refusal": None}
    return {"role": "assistant", "content": None, "refusal": None, **extra}


def _limited(text: str, *, words: int) -> str:
    if not has_word_spaces(text):
        return text[:DENSE_CHARS].strip(_EDGES)
    text = " ".join(text.split()[:words])
    if len(text) > CHARS_MOST:
        text = text[:CHARS_MOST].rsplit(" ", 1)[0]
    return text.strip(_EDGES)
