"""What an OpenAI-compatible server streams, read as it comes: bytes in, pieces out. No I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from proxy.engines.base import TokenLogprob

DONE = b"[DONE]"
MAX_EVENT_BYTES = 1 << 20
"""No server's frame comes near; without a bound a line that never ends would fill the memory."""

LINE_END = re.compile(rb"\r\n|\n|\r")


class BadStream(ValueError):
    """What came is no event stream of chat completion chunks."""


class Frames:
    """Splits an event stream (text/event-stream of the HTML standard) into the data of its events.

    Bytes may come cut anywhere. An event that the end of the stream cuts off is never given out.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False
        self._data: list[bytes] = []
        self._n_bytes = 0

    def feed(self, received: bytes) -> list[bytes]:
        """The events that are complete now. Raises BadStream."""
        if self._after_cr and received.startswith(b"\n"):
            received = received[1:]
            self._after_cr = False
        if not received:
            return []
        self._after_cr = received.endswith(b"\r")
        *lines, self._rest = LINE_END.split(self._rest + received)
        events = [event for line in lines if (event := self._line(line)) is not None]
        if self._n_bytes + len(self._rest) > MAX_EVENT_BYTES:
            raise BadStream("an event is too long")
        return events

    def _line(self, line: bytes) -> bytes | None:
        if line:
            self._field(line)
            return None
        data, self._data, self._n_bytes = self._data, [], 0
        return b"\n".join(data) if data else None

    def _field(self, line: bytes) -> None:
        name, _, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
            self._n_bytes += len(value)


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: Details | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0


class Timings(msgspec.Struct):
    """llama-server's own account: tokens taken from its cache, tokens evaluated, milliseconds."""

    cache_n: int | None = None
    prompt_n: int | None = None
    prompt_ms: float | None = None
    predicted_n: int | None = None
    predicted_ms: float | None = None


class FunctionPart(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class CallPart(msgspec.Struct):
    """Some more of a call of a tool; its arguments come in pieces."""

    index: int = 0
    function: FunctionPart | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallPart] | None = None


class _Top(msgspec.Struct):
    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None
    top_logprobs: list[_Top] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Top] | None = None


class _Choice(msgspec.Struct):
    """Of a chat, with a `delta`, or of a text that goes on, with `text`."""

    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    object: str | None = None
    error: Any = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One frame. `opens` says that it belongs to the answer (a role, some text, its end) and not
    only to the books; `failed` is the frame itself where the server reports an error."""

    opens: bool = False
    text: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    failed: bytes | None = None
    reasoning: str = ""
    calls: Sequence[CallPart] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


def piece(data: bytes) -> Piece:
    """Raises BadStream."""
    try:
        chunk = _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise BadStream("a frame is not a chat completion chunk") from exc
    if chunk.error is not None or chunk.object == "error":
        return Piece(failed=data)
    if not chunk.choices:
        return Piece(usage=chunk.usage, timings=chunk.timings)
    choice = chunk.choices[0]
    delta = choice.delta or _NOTHING
    return Piece(
        opens=True,
        text=delta.content or choice.text or "",
        finish_reason=choice.finish_reason or None,
        usage=chunk.usage,
        timings=chunk.timings,
        reasoning=delta.reasoning_content or delta.reasoning or "",
        calls=delta.tool_calls or (),
        logprobs=_logprobs(choice.logprobs) if choice.logprobs else (),
    )


def _logprobs(found: _Logprobs) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            _token(one), one.logprob, tuple((_token(t), t.logprob) for t in one.top_logprobs or ())
        )
        for one in found.content or ()
    )


def _token(one: _Top) -> bytes:
    if one.bytes is not None and all(0 <= b < 256 for b in one.bytes):
        return bytes(one.bytes)
    return one.token.encode("utf-8", "surrogatepass")


_NOTHING = _Delta()
_DECODER = msgspec.json.Decoder(_Chunk)
