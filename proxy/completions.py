"""POST /v1/completions: a text goes on, without a template, a conversation or a memory.

Special tokens written in a text prompt count as such, as with llama.cpp's own server: who writes a
raw prompt writes its markup too. Several prompts are answered one after another.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from memory.context import Context, Shape
from proxy import sse, wire
from proxy.answer_format import parse_format
from proxy.bounds import within_bounds
from proxy.config import TimeoutsConfig
from proxy.engines.base import (
    Delta,
    Engine,
    EngineError,
    Finished,
    Generate,
    JsonFormat,
    Priority,
    Sampling,
    TokenLogprob,
)
from proxy.errors import as_api_error, bad_request
from proxy.metrics import CHAT, Metrics
from proxy.scores import legacy_scores
from proxy.wire import Usage

MAX_PROMPTS = 32
MAX_LOGPROBS = 5
DEFAULT_TOKENS = 16
NO_CONTEXT = Context((), "", False, Shape(0, 0, 0, 0, 0, 0))

Prompt = str | tuple[int, ...]
Given = str | list[str | int | list[int]] | None
"""As it stands in a body: a text, texts, token ids, or lists of them."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Answer number i of prompt p has the index p * n + i."""

    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    max_tokens: int
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    user: str | None = None
    format: JsonFormat | None = None


class _Body(wire.Options, frozen=True):
    prompt: Given = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None


_decoder = msgspec.json.Decoder(_Body)


def parse_text(body: bytes) -> TextRequest:
    """Raises ApiError (400) and nothing else."""
    request = wire.decode(body, _decoder)
    n = wire.number(request, "n", 1, 1, wire.MAX_CHOICES)
    _refuse_what_is_missing(request, n)
    top = wire.number(request, "logprobs", 0, 0, MAX_LOGPROBS)
    return TextRequest(
        model=request.model or "chatfold",
        prompts=_prompts(request.prompt),
        sampling=wire.sampling_of(request, logprobs=None if request.logprobs is None else top),
        max_tokens=wire.number(request, "max_tokens", DEFAULT_TOKENS, 1, wire.MAX_INT),
        n=n,
        stream=bool(request.stream),
        include_usage=request.wants_usage,
        user=request.user or None,
        format=parse_format(request.response_format),
    )


def _refuse_what_is_missing(request: _Body, n: int) -> None:
    if request.suffix:
        raise bad_request("`suffix` is not supported.", param="suffix")
    if request.echo:
        raise bad_request("`echo` is not supported.", param="echo")
    if request.best_of not in (None, n):
        raise bad_request("`best_of` is not supported: leave it out.", param="best_of")


def _prompts(prompt: Given) -> tuple[Prompt, ...]:
    if not prompt:
        raise bad_request("`prompt` is missing or empty.", param="prompt")
    return texts_of(prompt, "prompt", most=MAX_PROMPTS)


def texts_of(
    given: str | list[str | int | list[int]], param: str, *, most: int
) -> tuple[Prompt, ...]:
    """A text, token ids, or a list of either. Raises ApiError."""
    if isinstance(given, str):
        return (given,)
    if all(isinstance(x, int) for x in given):
        return (_tokens(given, param),)
    if len(given) > most:
        raise bad_request(f"`{param}` may hold {most} texts at most.", param=param)
    if any(isinstance(x, int) for x in given):
        sentence = f"`{param}` mixes token ids with texts."
        raise bad_request(sentence, param=param)
    return tuple(x if isinstance(x, str) else _tokens(x, param) for x in given)


def _tokens(tokens: Any, param: str) -> tuple[int, ...]:
    if not all(0 <= t <= wire.MAX_TOKEN_ID for t in tokens):
        raise bad_request(f"`{param}` holds a number that is no token id.", param=param)
    return tuple(tokens)


@dataclass(frozen=True, slots=True)
class TextReply:
    """Builds the objects of one answer; `id` begins with "cmpl-"."""

    id: str
    created: int
    model: str

    def object(
        self, choices: Sequence[dict[str, Any]], usage: Usage | None = None
    ) -> dict[str, Any]:
        head = {"id": self.id, "object": "text_completion", "created": self.created}
        found = {**head, "model": self.model, "choices": choices}
        return {**found, "usage": usage.to_json()} if usage else found


def _choice(
    text: str, index: int, *, logprobs: dict[str, Any] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


class Texts:
    """Answers text requests over an engine."""

    def __init__(self, engine: Engine, metrics: Metrics, timeouts: TimeoutsConfig) -> None:
        self._engine = engine
        self._metrics = metrics
        self._timeouts = timeouts

    def check(self, request: TextRequest, owner: str) -> None:
        """Raises RequestRefused."""
        for prompt in request.prompts:
            self._engine.check(_generate(request, prompt, owner, ""))

    async def frames(
        self, request: TextRequest, owner: str, client_key: str, reply: TextReply
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events. A failure is the last frame; DONE then never comes."""
        starts: dict[int, int] = {}
        try:
            async with aclosing(self._run(request, owner, client_key)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        start = starts.get(event.index, 0)
                        starts[event.index] = start + len(event.text)
                        scores = _scores(request, event.logprobs, start)
                        choice = _choice(event.text, event.index, logprobs=scores)
                        yield sse.data(reply.object([choice]))
                    elif isinstance(event, Usage):
                        if request.include_usage:
                            yield sse.data(reply.object([], event))
                    else:
                        for index, reason in event.items():
                            yield sse.data(reply.object([_choice("", index, reason=reason)]))
            yield sse.DONE
        except EngineError as exc:
            self._metrics.error(type(exc).__name__)
            yield sse.error(as_api_error(exc).body())

    async def completion(
        self, request: TextRequest, owner: str, client_key: str, reply: TextReply
    ) -> dict[str, Any]:
        """The whole answer as one object. Raises EngineError."""
        n = len(request.prompts) * request.n
        texts: list[list[str]] = [[] for _ in range(n)]
        entries: list[list[TokenLogprob]] = [[] for _ in range(n)]
        reasons: dict[int, str] = {}
        usage: Usage | None = None
        async with aclosing(self._run(request, owner, client_key)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    texts[event.index].append(event.text)
                    entries[event.index] += event.logprobs
                elif isinstance(event, Usage):
                    usage = event
                else:
                    reasons |= event
        choices = [
            _choice(
                "".join(texts[i]),
                i,
                logprobs=_scores(request, entries[i], 0),
                reason=reasons[i],
            )
            for i in range(n)
        ]
        return reply.object(choices, usage)

    async def _run(
        self, request: TextRequest, owner: str, client_key: str
    ) -> AsyncGenerator[Delta | dict[int, str] | Usage, None]:
        """Text, for each prompt the reasons of its answers by index, the usage of all at last."""
        done: list[Finished] = []
        for number, prompt in enumerate(request.prompts):
            first = number * request.n
            wanted = _generate(request, prompt, owner, client_key)
            async with self._engine.generate(wanted) as events:
                async for event in within_bounds(events, self._timeouts):
                    if isinstance(event, Delta):
                        yield Delta(event.text, first + event.index, event.logprobs)
                    elif isinstance(event, Finished):
                        done.append(event)
                        self._count(event)
                        yield dict(enumerate((event.finish_reason, *event.others), start=first))
        yield Usage(
            sum(f.prompt_tokens for f in done),
            sum(f.cached_tokens for f in done),
            sum(f.completion_tokens for f in done),
        )

    def _count(self, finished: Finished) -> None:
        self._metrics.tokens(
            CHAT,
            prompt=finished.prompt_tokens,
            cached=finished.cached_tokens,
            generated=finished.completion_tokens,
        )


def _generate(request: TextRequest, prompt: Prompt, owner: str, client_key: str) -> Generate:
    return Generate(
        owner=owner,
        context=NO_CONTEXT,
        priority=Priority.CHAT,
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        client_key=client_key,
        n=request.n,
        format=request.format,
        raw=prompt,
    )


def _scores(
    request: TextRequest, entries: Sequence[TokenLogprob], start_chars: int
) -> dict[str, Any] | None:
    if request.sampling.logprobs is None:
        return None
    return legacy_scores(entries, start_chars=start_chars)
