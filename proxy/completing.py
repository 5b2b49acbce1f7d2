"""The endpoints that a model answers: chats, texts, embeddings."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from proxy import sse, wire
from proxy.answering import Called, Message, Thought
from proxy.chat import Chats, Plan
from proxy.completions import TextReply, Texts, parse_text
from proxy.disconnect import STREAM_HEADERS, EventStream, run_until_disconnect
from proxy.embeddings import embeddings_object, parse_embeddings
from proxy.engines.base import Delta, EngineError, EngineUnavailable, Finished, TokenLogprob
from proxy.errors import ApiError, as_api_error
from proxy.headers import bearer_token, owner_of
from proxy.librechat.prompt import TextChunks, as_chat
from proxy.librechat.side import Kind, Side, repeats_itself, side_of
from proxy.requests import check_key, client_id_of, headers_for, json_response, read_body
from proxy.side import message_for
from proxy.wire import ChatRequest, Reply, Usage

CHECKPOINT_TOKENS = 600
"""Most tokens of a checkpoint that the model must write itself: somebody waits for it."""

NUDGE_S = 2.0
"""LibreChat 0.6 looks whether Stop was pressed when a piece of the answer comes, and else not:
until the first one, empty ones come this often."""

T = TypeVar("T")
Planning = Callable[[], Awaitable[Plan]]


async def chat_completions(request: Request) -> Response:
    check_key(request)
    raw = await read_body(request, request.app.state.config.max_body_bytes)
    if labelled := as_chat(raw):
        return await _answer(request, labelled, TextChunks)
    return await _answer(request, raw, Reply)


async def _answer(request: Request, raw: bytes, kind: type[Reply]) -> Response:
    """The answer to a chat's body, in objects of this kind."""
    side = side_of(raw, request.headers)
    if side and (answer := await _side_answer(request, side, raw)):
        return answer
    chat = wire.parse_chat(raw)
    if side and side.kind is Kind.CHECKPOINT:
        most = chat.max_tokens or CHECKPOINT_TOKENS
        chat = replace(chat, max_tokens=min(most, CHECKPOINT_TOKENS))
    state, owner = request.app.state, owner_of(request.headers, chat.user)
    chats: Chats = state.chats
    client_id = client_id_of(request)

    async def planning() -> Plan:
        plan = await chats.plan(chat, owner, client_id=client_id, aside=side is not None)
        return replace(plan, client_key=bearer_token(request.headers))

    plan = await _plan_at_once(request, chat, planning)
    reply = _reply(chat.model, include_usage=chat.include_usage, kind=kind)
    # Who else may want the same question answered twice at once, to have two answers.
    key = (owner, client_id, _digest(raw)) if repeats_itself(request.headers) else None
    if chat.stream:
        return EventStream(
            state.streams.read(key, partial(_frames, chats, _given(plan, planning), reply)),
            prelude=sse.data(reply.opening()),
            ping_s=state.config.timeouts.ping_s,
            nudge=sse.data(reply.delta("")),
            nudge_s=NUDGE_S,
            headers=headers_for(plan) if plan else {},
        )
    assert plan is not None
    answers = state.answers.read(key, partial(_complete, chats, plan, reply))
    body = await run_until_disconnect(request.receive, _only(answers))
    return json_response(body, headers=headers_for(plan))


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()


async def _plan_at_once(request: Request, chat: ChatRequest, planning: Planning) -> Plan | None:
    """None for a stream whose model is not there yet. It waits with its headers out, and is told
    of a failure in the stream. Raises EngineUnavailable, of which `errors.for_client` says how."""
    if chat.stream and not request.app.state.engine.ready():
        return None
    try:
        return await run_until_disconnect(request.receive, planning())
    except EngineUnavailable:
        if chat.stream:
            return None
        raise


def _given(plan: Plan | None, planning: Planning) -> Planning:
    """What gives the plan: at once where it is made already."""

    async def made() -> Plan:
        return plan or await planning()

    return made


async def _only(items: AsyncGenerator[T, None]) -> T:
    async with aclosing(items):
        return await anext(items)


def _reply(model: str, *, include_usage: bool, kind: type[Reply] = Reply) -> Reply:
    return kind(
        id=f"chatcmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=model or "chatfold",
        system_fingerprint="fp_chatfold",
        include_usage=include_usage,
    )


async def _side_answer(request: Request, side: Side, body: bytes) -> Response | None:
    """None where it must be asked of the model as it stands."""
    state = request.app.state
    state.metrics.side_request(side.kind)
    owner = owner_of(request.headers, side.user)
    transcript = wire.parse_chat(body).transcript if side.kind is Kind.CHECKPOINT else None
    work = state.sides.answer(side, transcript, owner)
    answer = await run_until_disconnect(request.receive, work)
    if answer is None:
        return None
    reply = _reply(side.model, include_usage=side.include_usage)
    headers = {"x-chatfold-side": str(side.kind)}
    if side.stream:
        return Response(
            b"".join(_whole_stream(reply, answer.text or answer.title, answer.usage)),
            headers={**STREAM_HEADERS, **headers},
        )
    return json_response(
        reply.completion_of(message_for(side.form, answer), answer.usage), headers=headers
    )


def _whole_stream(reply: Reply, text: str, usage: Usage) -> Iterator[bytes]:
    """The frames of an answer that is there already."""
    yield sse.data(reply.opening())
    yield sse.data(reply.delta(text))
    yield sse.data(reply.closing("stop"))
    if reply.include_usage:
        yield sse.data(reply.usage_chunk(usage))
    yield sse.DONE


async def _frames(chats: Chats, planned: Planning, reply: Reply) -> AsyncGenerator[bytes, None]:
    """The answers as server-sent events, behind the opening of the first one. A failure is the last
    frame; DONE then never comes."""
    try:
        plan = await planned()
        for index in range(1, plan.request.n):
            yield sse.data(reply.opening(index))
        async with aclosing(chats.run(plan)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    yield sse.data(reply.delta(event.text, event.index, event.logprobs))
                elif isinstance(event, Thought | Called):
                    yield sse.data(reply.part(event.delta(), event.index))
                elif isinstance(event, Finished):
                    for index, reason in enumerate((event.finish_reason, *event.others)):
                        yield sse.data(reply.closing(reason, index))
                    if reply.include_usage:
                        yield sse.data(reply.usage_chunk(_usage(event)))
                    yield sse.DONE
    except (EngineError, ApiError) as exc:
        chats.count_failure(exc)
        yield sse.error(as_api_error(exc).body())


async def _complete(chats: Chats, plan: Plan, reply: Reply) -> AsyncGenerator[dict[str, Any], None]:
    """The answers as one object, the only item."""
    messages = [Message() for _ in range(plan.request.n)]
    scores: list[list[TokenLogprob]] = [[] for _ in messages]
    finished: Finished | None = None
    try:
        async with aclosing(chats.run(plan)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    finished = event
                elif isinstance(event, Delta | Thought | Called):
                    messages[event.index].add(event)
                if isinstance(event, Delta):
                    scores[event.index] += event.logprobs
    except EngineError as exc:
        chats.count_failure(exc)
        raise
    assert finished is not None
    with_scores = plan.request.sampling.logprobs is not None
    choices = [
        wire.choice(message.json(), reason, index, scores[index] if with_scores else None)
        for index, (message, reason) in enumerate(
            zip(messages, (finished.finish_reason, *finished.others), strict=True)
        )
    ]
    yield reply.completion_with(choices, _usage(finished))


def _usage(finished: Finished) -> Usage:
    return Usage(
        finished.prompt_tokens,
        finished.cached_tokens,
        finished.completion_tokens,
        finished.reasoning_tokens,
    )


# -- texts and vectors ---------------------------------------------------------------------------


async def completions(request: Request) -> Response:
    check_key(request)
    state = request.app.state
    raw = await read_body(request, state.config.max_body_bytes)
    if labelled := as_chat(raw):
        return await _answer(request, labelled, TextChunks)
    wanted = parse_text(raw)
    owner, key = owner_of(request.headers, wanted.user), bearer_token(request.headers)
    texts = Texts(state.engine, state.metrics, state.config.timeouts)
    texts.check(wanted, owner)
    reply = TextReply(f"cmpl-{secrets.token_hex(12)}", int(time.time()), wanted.model)
    if wanted.stream:
        frames = texts.frames(wanted, owner, key, reply)
        return EventStream(frames, ping_s=state.config.timeouts.ping_s)
    work = texts.completion(wanted, owner, key, reply)
    return json_response(await run_until_disconnect(request.receive, work))


async def embeddings(request: Request) -> Response:
    check_key(request)
    state = request.app.state
    wanted = parse_embeddings(await read_body(request, state.config.max_body_bytes))
    arrived = time.monotonic()
    try:
        found = await run_until_disconnect(request.receive, state.engine.embed(wanted.inputs))
    except EngineError as exc:
        state.metrics.error(type(exc).__name__)
        raise
    state.metrics.embedded(time.monotonic() - arrived, prompt=found.prompt_tokens)
    return json_response(embeddings_object(wanted, found))
