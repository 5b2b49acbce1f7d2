"""What a model's text is made of: reasoning, content, calls of tools. Text in, pieces out. Pure.

    <think> ... </think>  Let me look.  <tool_call> {"name": ..., "arguments": ...} </tool_call>
    reasoning             content       call

Reasoning stands at the beginning or nowhere. Calls are looked for only where there are tools, in
the forms of Hermes and ChatML models (above), and of Llama 3: an answer that is nothing but JSON,
`{"name": ..., "parameters": ...}`, also behind `<|python_tag|>`. What turns out to be no call is
content, unchanged. No piece ever ends inside a tag, and no part of a call is given out as content.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memory.calls import CLOSE, DECODER, OPEN, READ_MOST, Call, dump, nested_deeper, read_object
from proxy.engines.base import ModelInfo, Thinking

PYTHON_TAG = "<|python_tag|>"

# How JSON that is a call begins, as far as it is there: what goes on otherwise is content at once.
_BARE = re.compile(r"\{\s*(?:\"(?P<key>\w*)(?P<end>\"?))?")
_BARE_KEYS = ("name", "type", "function", "parameters", "arguments", "id")

_STRING = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\Z)', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class Content:
    text: str


Piece = Reasoning | Content | Call


class AnswerStream:
    """Feed it an answer's text as it comes; it gives back pieces that are safe to show.

    `names` are those of the tools, () where there are none; with `one_call` nothing behind the
    first call counts. White space around reasoning, and between content and calls, is nobody's; in
    an answer without either every character is kept.
    """

    def __init__(
        self, thinking: Thinking, names: Sequence[str] = (), *, one_call: bool = False
    ) -> None:
        self._thinking = thinking
        self._names = frozenset(names)
        self._one_call = one_call
        self._state = self._at_start
        self._held = ""
        self._given_chars = 0
        self._thought = False
        self._calls: list[Call] = []
        self.begin_chars = 0
        """Where the answer begins in the text: behind the reasoning and its tags."""
        self.end_chars: int | None = None
        """Where it ends, if before the end of the text."""

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(self._calls)

    @property
    def is_whole(self) -> bool:
        """Whether all of the text so far is the answer: no reasoning before it, no call cut off."""
        return not self.begin_chars and self.end_chars is None

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        return self._pieces(last=False)

    def finish(self) -> list[Piece]:
        """The text has ended: what waited for more is content now, or a call."""
        return self._pieces(last=True)

    def _pieces(self, *, last: bool) -> list[Piece]:
        """Each state gives what it can and says whether another one goes on at once."""
        pieces: list[Piece] = []
        while True:
            state = self._state
            pieces += state(last)
            if self._state == state:
                return pieces

    # -- states ----------------------------------------------------------------------------------

    def _at_start(self, last: bool) -> Iterator[Piece]:
        """White space, then perhaps the tag that opens the reasoning; a model may write it though
        the prompt opened it already."""
        text, tag = self._held.lstrip(), self._thinking.opening
        if text.startswith(tag):
            self._take(len(self._held) - len(text) + len(tag))
            self._state = self._in_reasoning
        elif last or not tag.startswith(text):
            self._state = self._in_reasoning if self._thinking.first else self._at_answer
        yield from ()

    def _in_reasoning(self, last: bool) -> Iterator[Piece]:
        if not self._thought:
            self._take_space()
        text, tag = self._held, self._thinking.closing
        at = text.find(tag)
        end = at if at >= 0 else len(text) - (0 if last else _overlap(text, tag))
        if shown := text[:end].rstrip():
            self._thought = True
            yield Reasoning(shown)
        if at >= 0:
            self._take(at + len(tag))
            self._state = self._behind_reasoning
        else:
            self._take(len(text) if last else len(shown))
        self.begin_chars = self._given_chars

    def _behind_reasoning(self, last: bool) -> Iterator[Piece]:
        self._take_space()
        self.begin_chars = self._given_chars
        if self._held or last:
            self._state = self._at_answer
        yield from ()

    def _at_answer(self, last: bool) -> Iterator[Piece]:
        """All of it may be one call in bare JSON."""
        if not self._names or not _may_be_bare(self._held, last=last):
            self._state = self._in_content
        elif last:
            self._state = self._in_content
            if calls := read_bare(self._held, self._names):
                self._take(_end_of_first(self._held) if self._one_call else len(self._held))
                yield from self._called(calls)

    def _in_content(self, last: bool) -> Iterator[Piece]:
        if not self._names:
            yield from self._content(len(self._held))
            return
        at = self._held.find(OPEN)
        if at >= 0:
            yield from self._content(len(self._held[:at].rstrip()))
            self._state = self._in_call
            return
        # White space waits: a call may follow it.
        n = len(self._held)
        end = n if last else len(self._held[: n - _overlap(self._held, OPEN)].rstrip())
        if not self._calls or self._held[:end].strip():
            yield from self._content(end)

    def _in_call(self, last: bool) -> Iterator[Piece]:
        """What is held is white space, the opening tag, and what came of the call."""
        body_at = self._held.index(OPEN) + len(OPEN)
        close_at = closing(self._held, body_at)
        if close_at < 0 and not last:
            return
        end = len(self._held) if close_at < 0 else close_at
        call = read_call(self._held[body_at:end])
        self._state = self._in_content
        if call:
            self._take(end if close_at < 0 else end + len(CLOSE))
            yield from self._called([call])
        else:
            # The tag alone is content: behind it another call may begin.
            yield from self._content(body_at)

    def _at_end(self, last: bool) -> Iterator[Piece]:
        self._take(len(self._held))
        yield from ()

    # -- what they share -------------------------------------------------------------------------

    def _content(self, n: int) -> Iterator[Piece]:
        if text := self._take(n):
            yield Content(text)

    def _called(self, calls: Sequence[Call]) -> Iterator[Piece]:
        if self._one_call:
            self.end_chars = self._given_chars
            self._state = self._at_end
            calls = calls[:1]
        self._calls += calls
        yield from calls

    def _take_space(self) -> None:
        self._take(len(self._held) - len(self._held.lstrip()))

    def _take(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        self._given_chars += n
        return text


def content_of(text: str, model: ModelInfo | None) -> str:
    """A whole answer without its reasoning, where none was wanted and no tools were offered: a
    model may still open it by itself."""
    thinking = model.thinking if model else Thinking()
    stream = AnswerStream(replace(thinking, first=False))
    pieces = [*stream.feed(text), *stream.finish()]
    return "".join(piece.text for piece in pieces if isinstance(piece, Content))


def _may_be_bare(text: str, *, last: bool) -> bool:
    """Whether an answer that begins so may be a call in bare JSON."""
    text = text.lstrip()
    if not last and PYTHON_TAG.startswith(text):
        return True
    text = text.removeprefix(PYTHON_TAG).lstrip()
    found = _BARE.match(text)
    if not found:
        return not text
    key, rest = found["key"], text[found.end() :]
    if key is None:
        return not rest
    if found["end"]:
        return key in _BARE_KEYS
    return not rest and any(k.startswith(key) for k in _BARE_KEYS)


def closing(text: str, start: int) -> int:
    """Where the call that begins at `start` is closed, -1 where it is not: a tag inside one of its
    JSON's strings closes nothing, nor does one inside a string that has no end yet."""
    if text.find(CLOSE, start) < 0:
        return -1
    at = _STRING.sub(lambda m: " " * len(m[0]), text[start:]).find(CLOSE)
    return at if at < 0 else start + at


def read_call(text: str) -> Call | None:
    """The call that the text between the tags is, None if it is none."""
    value = read_object(text.strip())
    return None if value is None else _call(value)


def read_bare(text: str, names: frozenset[str]) -> list[Call]:
    """The calls that an answer of nothing but JSON is: one, or several behind each other. Empty if
    it is anything else, or calls what is no tool: JSON may be the answer itself."""
    values: list[Any] = []
    rest = text.strip().removeprefix(PYTHON_TAG).lstrip()
    while rest:
        try:
            value, end = DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        if nested_deeper(value, READ_MOST):
            return []
        values.append(value)
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    calls = [_call(v) if isinstance(v, dict) else None for v in values]
    found = [c for c in calls if c and c.name in names]
    return found if len(found) == len(calls) else []


def _end_of_first(text: str) -> int:
    """Where the first of the calls ends that an answer in bare JSON is."""
    start = len(text) - len(text.lstrip().removeprefix(PYTHON_TAG).lstrip())
    return DECODER.raw_decode(text, start)[1]


def _call(value: dict[str, Any]) -> Call | None:
    """`{"name", "arguments" or "parameters"}`, also wrapped as OpenAI's `{"function": {...}}`."""
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    elif isinstance(inner, str):
        value = {"name": inner, **value}
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = read_object(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return Call(name, dump(arguments))


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`, short of all of it."""
    for n in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:n]):
            return n
    return 0
