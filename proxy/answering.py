"""The answers to one request, on their way from the engine to the client and to the store."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from memory.calls import Call, text_with_calls
from memory.transcript import ASSISTANT
from proxy.answers import AnswerStream, Content, Piece, Reasoning
from proxy.engines.base import Delta, Event, Finished, Thinking
from proxy.tools import NO_TOOLS, Tools, call_json, function_json


@dataclass(frozen=True, slots=True)
class Thought:
    """Some more of the model's reasoning, in answer number `index`."""

    text: str
    index: int = 0

    def delta(self) -> dict[str, Any]:
        return {"reasoning_content": self.text}


@dataclass(frozen=True, slots=True)
class Called:
    """A whole call, the `number`-th of answer number `index`."""

    call: Call
    id: str
    number: int = 0
    index: int = 0
    legacy: bool = False

    def delta(self) -> dict[str, Any]:
        if self.legacy:
            return {"function_call": function_json(self.call)}
        return {"tool_calls": [{"index": self.number, **call_json(self.call, self.id)}]}


ClientEvent = Event | Thought | Called


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer as it is stored: without its reasoning, its calls in their one form.

    `token_ids` are the tokens that the model wrote it in, None where they are not known or do not
    begin and end where the answer does. `n_tokens` is -1 where nobody has counted them.
    """

    text: str
    n_tokens: int = -1
    token_ids: bytes | None = None


class Answering:
    """Feed it the engine's events; it gives back those for the client."""

    def __init__(self, thinking: Thinking, tools: Tools = NO_TOOLS) -> None:
        self._thinking = thinking
        self._tools = tools
        self._streams: dict[int, AnswerStream] = {}
        self._content: list[str] = []
        """What was given out of the first answer, the one that is stored."""

    def events(self, event: Event) -> Iterator[ClientEvent]:
        if isinstance(event, Delta):
            pieces = self._stream(event.index).feed(event.text)
            yield from self._said(pieces, event)
        elif isinstance(event, Finished):
            for index in sorted(self._streams):
                yield from self._said(self._streams[index].finish(), Delta("", index))
        else:
            yield event

    def closing(self, finished: Finished) -> Finished:
        """The same with the reason as clients know it, and the reasoning counted."""
        return replace(
            finished,
            finish_reason=self._reason(finished.finish_reason, 0),
            others=tuple(self._reason(r, i) for i, r in enumerate(finished.others, start=1)),
            reasoning_tokens=self._n_reasoning(finished),
        )

    def kept(self, finished: Finished | None) -> Kept:
        """What is stored of it; without `finished`, of an answer that was cut off."""
        stream = self._stream(0)
        content = "".join(self._content)
        text = text_with_calls(content, stream.calls) if stream.calls else content
        if finished is None:
            return Kept(text)
        if finished.token_ids is None and stream.is_whole and not finished.others:
            return Kept(text, finished.completion_tokens)
        ids = self._ids(stream, finished)
        return Kept(text) if ids is None else Kept(text, len(ids), ids.tobytes())

    def _stream(self, index: int) -> AnswerStream:
        if index not in self._streams:
            names, one_call = self._tools.names, self._tools.one_call
            self._streams[index] = AnswerStream(self._thinking, names, one_call=one_call)
        return self._streams[index]

    def _said(self, pieces: Sequence[Piece], delta: Delta) -> Iterator[ClientEvent]:
        index = delta.index
        content = "".join(p.text for p in pieces if isinstance(p, Content))
        for piece in pieces:
            if isinstance(piece, Reasoning):
                yield Thought(piece.text, index)
        if index == 0:
            self._content.append(content)
        if content or delta.logprobs:
            yield replace(delta, text=content)
        calls = [p for p in pieces if isinstance(p, Call)]
        before = len(self._streams[index].calls) - len(calls)
        for number, call in enumerate(calls, start=before):
            yield Called(call, f"call_{secrets.token_hex(12)}", number, index, self._tools.legacy)

    def _reason(self, reason: str, index: int) -> str:
        stream = self._stream(index)
        # An answer that was to end with its first call is whole, whatever came behind it.
        whole = reason == "stop" or stream.end_chars is not None
        if not (whole and stream.calls):
            return reason
        return "function_call" if self._tools.legacy else "tool_calls"

    def _n_reasoning(self, finished: Finished) -> int:
        begin = self._stream(0).begin_chars
        return sum(0 <= end <= begin for end in _ints(finished.token_ends)) if begin else 0

    def _ids(self, stream: AnswerStream, finished: Finished) -> array[int] | None:
        """The tokens between the answer's two ends, if tokens begin and end there."""
        if finished.token_ids is None:
            return None
        ids, ends = _ints(finished.token_ids), [0, *_ints(finished.token_ends)]
        if stream.is_whole:
            return ids
        last = stream.end_chars
        if stream.begin_chars not in ends or (last is not None and last not in ends):
            return None
        first = ends.index(stream.begin_chars)
        return ids[first:] if last is None else ids[first : ends.index(last)]


def _ints(data: bytes) -> array[int]:
    return array("i", data)


@dataclass(slots=True)
class Message:
    """One answer gathered to a whole message."""

    content: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Called] = field(default_factory=list)

    def add(self, event: ClientEvent) -> None:
        match event:
            case Delta(text=text):
                self.content.append(text)
            case Thought(text=text):
                self.thoughts.append(text)
            case Called():
                self.calls.append(event)

    def json(self) -> dict[str, Any]:
        """`content` is null where there are calls and nothing else, as clients expect it."""
        content = "".join(self.content)
        message: dict[str, Any] = {"role": ASSISTANT, "content": content, "refusal": None}
        if self.thoughts:
            message["reasoning_content"] = "".join(self.thoughts)
        if self.calls:
            message["content"] = content or None
            if self.calls[0].legacy:
                message["function_call"] = function_json(self.calls[0].call)
            else:
                message["tool_calls"] = [call_json(c.call, c.id) for c in self.calls]
        return message
