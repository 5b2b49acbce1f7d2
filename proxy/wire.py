"""OpenAI's chat objects: request bodies to values, answers to JSON. Pure.

Requests are checked as far as a wrong answer could come of it and no further: clients send many
fields that mean nothing here, and those are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import msgspec

from memory.calls import text_with_calls
from memory.transcript import ASSISTANT, TOOL, USER, Message, Transcript
from proxy.answer_format import ResponseFormat, parse_format
from proxy.engines.base import JsonFormat, Sampling, TokenLogprob
from proxy.errors import ApiError, bad_request
from proxy.scores import chat_scores
from proxy.tools import (
    NO_TOOLS,
    FunctionCall,
    ToolCall,
    Tools,
    misplaced,
    parse_tools,
    result_order,
    unanswered,
)

SYSTEM_ROLES = ("system", "developer")
TOOL_ROLES = (TOOL, "function")
KNOWN_ROLES = frozenset((USER, ASSISTANT, *SYSTEM_ROLES, *TOOL_ROLES))
PLAIN_ROLES = frozenset((USER, ASSISTANT, *SYSTEM_ROLES))

MAX_STOPS = 16
MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_INT = 2**63 - 1
MAX_TOKEN_ID = 2**31 - 1
RANDOM_SEED = -1
"""Asks for a fresh seed, as llama.cpp's clients do."""
SEEDS = 2**32 - 1
"""llama.cpp's seeds are the numbers below; this one itself makes it draw a fresh one."""

DEFAULTS = Sampling()

Number = TypeVar("Number", int, float)
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat request, checked and normalised. `model` is "" where the client named none."""

    model: str
    transcript: Transcript
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    user: str | None = None
    n: int = 1
    tools: Tools = NO_TOOLS
    format: JsonFormat | None = None
    thinks: bool = True
    """False where the client wants no reasoning from a model that would."""


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class _Message(msgspec.Struct, frozen=True):
    # Required, so that a body of millions of `{}` ends at the first one.
    role: str
    content: str | list[_Part] | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None

    @property
    def calls(self) -> list[ToolCall]:
        if self.function_call:
            return [ToolCall(self.function_call)]
        return self.tool_calls or []


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class _TemplateOptions(msgspec.Struct, frozen=True):
    """What llama-server and vLLM pass on to a chat template; no other option is."""

    enable_thinking: bool | None = None


class Options(msgspec.Struct, frozen=True):
    """What chats and plain texts have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class _Body(Options, frozen=True):
    messages: list[_Message] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: msgspec.Raw = msgspec.Raw(b"null")
    tool_choice: msgspec.Raw = msgspec.Raw(b"null")
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: _TemplateOptions | None = None
    functions: msgspec.Raw = msgspec.Raw(b"null")
    function_call: msgspec.Raw = msgspec.Raw(b"null")


_decoder = msgspec.json.Decoder(_Body)


def parse_chat(body: bytes) -> ChatRequest:
    """Raises ApiError (400, one sentence, `param` where one is to blame) and nothing else."""
    request = decode(body, _decoder)
    return ChatRequest(
        model=request.model or "",
        transcript=_transcript(request.messages),
        sampling=sampling_of(request, logprobs=_logprobs(request)),
        stream=bool(request.stream),
        include_usage=request.wants_usage,
        max_tokens=_max_tokens(request),
        user=request.user or None,
        n=number(request, "n", 1, 1, MAX_CHOICES),
        tools=_tools(request),
        format=parse_format(request.response_format),
        thinks=(request.chat_template_kwargs or _TemplateOptions()).enable_thinking is not False,
    )


def _tools(request: _Body) -> Tools:
    return parse_tools(
        request.tools,
        request.functions,
        request.tool_choice,
        request.function_call,
        parallel=request.parallel_tool_calls is not False,
    )


def decode(body: bytes, decoder: msgspec.json.Decoder[S]) -> S:
    """Raises ApiError."""
    try:
        return decoder.decode(body.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise bad_request(f"The body is not UTF-8 (byte {exc.start}).") from exc
    except RecursionError as exc:
        raise bad_request("The body is nested too deeply.") from exc
    except msgspec.ValidationError as exc:
        raise _wrong_shape(exc) from exc
    except msgspec.DecodeError as exc:
        sentence = f"The body is not valid JSON, or escapes half of a surrogate pair: {exc}."
        raise bad_request(sentence) from exc


def _wrong_shape(exc: msgspec.ValidationError) -> ApiError:
    # "Expected `str`, got `int` - at `$.messages[0].role`"
    problem, _, path = str(exc).partition(" - at `$")
    param = path.strip("`.") or None
    what = f"`{param}`" if param else "The body"
    return bad_request(f"{what} has the wrong type or size: {problem}.", param=param)


def _transcript(messages: list[_Message] | None) -> Transcript:
    """System messages first and merged, wherever they stand; empty answers left out."""
    if not messages:
        raise bad_request("`messages` must hold at least one message.", param="messages")
    system: list[str] = []
    chat: list[Message] = []
    for index, message in enumerate(_in_order(messages)):
        text = message.content
        # Most messages are plain: no place is spelled out for an error that they do not have.
        if message.role not in PLAIN_ROLES or not isinstance(text, str):
            _check_role(message.role, f"messages[{index}].role")
            text = _text(message, f"messages[{index}].content")
        if message.role in SYSTEM_ROLES:
            system.append(text)
        elif message.role in TOOL_ROLES:
            _add_result(chat, text, f"messages[{index}]")
        elif message.role == ASSISTANT and message.calls:
            calls = [c.function.call for c in message.calls]
            chat.append(Message(ASSISTANT, text_with_calls(text, calls)))
        elif message.role == USER or text.strip():
            chat.append(Message(message.role, text))
    if messages[-1].calls:
        raise unanswered(f"messages[{len(messages) - 1}]")
    transcript = Transcript("\n\n".join(filter(None, system)), tuple(chat))
    if not transcript.system and not transcript.messages:
        raise bad_request("`messages` holds no text at all.", param="messages")
    return transcript


def _in_order(messages: list[_Message]) -> list[_Message]:
    """The same with results of tools in the order of their calls."""
    if not any(m.role in TOOL_ROLES for m in messages):
        return messages
    out: list[_Message] = []
    for is_result, run in groupby(messages, key=lambda m: m.role in TOOL_ROLES):
        group = list(run)
        if is_result and out:
            order = result_order(out[-1].calls, [m.tool_call_id for m in group])
            group = [group[i] for i in order] if order else group
        out += group
    return out


def _add_result(chat: list[Message], text: str, where: str) -> None:
    if not chat:
        return  # A window that slid cut its call away; alone it says nothing.
    if chat[-1].role == USER:
        raise misplaced(where)
    chat.append(Message(TOOL, text))


def _check_role(role: str, where: str) -> None:
    if role not in KNOWN_ROLES:
        known = "system, developer, user, assistant or tool"
        raise bad_request(f"`{where}` must be {known}, not {_short(role)}.", param=where)


def _text(message: _Message, where: str) -> str:
    if isinstance(message.content, str):
        return message.content
    if message.content is None and message.role in (USER, *SYSTEM_ROLES):
        raise bad_request(f"`{where}` is missing.", param=where)
    parts = message.content or []
    return "\n".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(parts))


def _part_text(part: _Part, where: str) -> str:
    match part:
        case _Part(type="text", text=str(text)) | _Part(type="refusal", refusal=str(text)):
            return text
        case _Part(type="text" | "refusal"):
            raise bad_request(f"`{where}` has no text.", param=where)
        case _Part(type="image_url"):
            raise bad_request("This model cannot see images.", param=where)
        case _Part(type="input_audio"):
            raise bad_request("This model cannot hear.", param=where)
    sentence = f"`{where}` is of the type {_short(part.type)}; only text is supported."
    raise bad_request(sentence, param=where)


def sampling_of(request: Options, *, logprobs: int | None) -> Sampling:
    """Raises ApiError."""
    return Sampling(
        temperature=number(request, "temperature", DEFAULTS.temperature, 0.0, 5.0),
        top_p=number(request, "top_p", DEFAULTS.top_p, 0.0, 1.0),
        top_k=number(request, "top_k", DEFAULTS.top_k, -1, MAX_TOKEN_ID),
        min_p=number(request, "min_p", DEFAULTS.min_p, 0.0, 1.0),
        seed=_seed(request),
        presence_penalty=number(request, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=number(request, "frequency_penalty", 0.0, -2.0, 2.0),
        repeat_penalty=number(request, "repeat_penalty", DEFAULTS.repeat_penalty, 0.01, 10.0),
        logit_bias=_logit_bias(request.logit_bias or {}),
        stop=_stops(request.stop),
        logprobs=logprobs,
    )


def number(request: Options, name: str, default: Number, low: Number, high: Number) -> Number:
    """The field, if it is within these bounds. Raises ApiError."""
    value: Number | None = getattr(request, name)
    if value is None:
        return default
    if not low <= value <= high:
        # The value itself is left out: it may be thousands of digits long.
        raise bad_request(f"`{name}` must be from {low} to {high}.", param=name)
    return value


def _logprobs(request: _Body) -> int | None:
    if request.top_logprobs is not None and not request.logprobs:
        sentence = "`top_logprobs` is given out with `logprobs` only: set it to true."
        raise bad_request(sentence, param="top_logprobs")
    top = number(request, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    return top if request.logprobs else None


def _seed(request: Options) -> int | None:
    seed = number(request, "seed", RANDOM_SEED, -MAX_INT - 1, MAX_INT)
    return None if seed == RANDOM_SEED else seed % SEEDS


def _max_tokens(request: Options) -> int | None:
    """`max_completion_tokens`, the newer name, wins."""
    newer, older = "max_completion_tokens", "max_tokens"
    name = older if request.max_completion_tokens is None else newer
    return number(request, name, 0, 1, MAX_INT) or None


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise bad_request(f"`stop` may hold {MAX_STOPS} texts at most.", param="stop")
    return tuple(text for text in stops if text)


def _logit_bias(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    return tuple((_token_id(key), _bias(value)) for key, value in biases.items())


def _token_id(key: str) -> int:
    # Ten digits are enough, and int() refuses thousands.
    if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_TOKEN_ID):
        sentence = f"`logit_bias` has the key {_short(key)}, which is no token id."
        raise bad_request(sentence, param="logit_bias")
    return int(key)


def _bias(value: float) -> float:
    if not -100 <= value <= 100:
        raise bad_request("`logit_bias` values must be from -100 to 100.", param="logit_bias")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer; `cached_tokens` of the prompt were not evaluated."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass(frozen=True, slots=True)
class Reply:
    """Builds the objects of one answer; what is the same in all of them is given once.

    `id` begins with "chatcmpl-", `created` is in seconds since the epoch, `model` is the name that
    the request used. A stream is opening, deltas, closing, and `usage_chunk` if `include_usage`.
    """

    id: str
    created: int
    model: str
    system_fingerprint: str
    include_usage: bool = False

    def opening(self, index: int = 0) -> dict[str, Any]:
        return self.part({"role": ASSISTANT, "content": "", "refusal": None}, index)

    def delta(
        self, text: str, index: int = 0, logprobs: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        scores = chat_scores(logprobs) if logprobs else None
        return self._chunk({"content": text}, index, logprobs=scores)

    def part(self, delta: dict[str, Any], index: int = 0) -> dict[str, Any]:
        """A chunk with what came of the message: reasoning, a call."""
        return self._chunk(delta, index)

    def closing(self, finish_reason: str, index: int = 0) -> dict[str, Any]:
        return self._chunk({}, index, finish_reason=finish_reason)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage.to_json()}

    def completion(self, text: str, finish_reason: str, usage: Usage) -> dict[str, Any]:
        """The whole answer as one object."""
        message = {"role": ASSISTANT, "content": text, "refusal": None}
        return self.completion_of(message, usage, finish_reason=finish_reason)

    def completion_of(
        self, message: dict[str, Any], usage: Usage, *, finish_reason: str = "stop"
    ) -> dict[str, Any]:
        """The same around a message that is there already."""
        return self.completion_with([choice(message, finish_reason)], usage)

    def completion_with(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The same with several answers."""
        return {**self._head("chat.completion"), "choices": choices, "usage": usage.to_json()}

    def _chunk(
        self,
        delta: dict[str, Any],
        index: int,
        *,
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice]}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def choice(
    message: dict[str, Any],
    finish_reason: str,
    index: int = 0,
    logprobs: Sequence[TokenLogprob] | None = None,
) -> dict[str, Any]:
    """A whole answer; `logprobs` None where none were asked for."""
    return {
        "index": index,
        "message": message,
        "logprobs": None if logprobs is None else chat_scores(logprobs),
        "finish_reason": finish_reason,
    }


def models(names: list[str], *, created: int) -> dict[str, Any]:
    """The object of GET /v1/models."""
    return {"object": "list", "data": [model(name, created=created) for name in names]}


def model(name: str, *, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "chatfold"}


def encode(value: Any) -> bytes:
    """JSON in UTF-8."""
    return msgspec.json.encode(value)
