"""The application: one list of routes, one list of middleware, the lifespan."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from memory.context import Context, Shape
from memory.keeper import Keeper
from memory.policy import load_policy
from memory.store import Store, StoreError
from proxy import sse, wire
from proxy.answering import Called, Message, Thought
from proxy.anypath import AnyPath
from proxy.background import BackgroundModel, EngineTokens
from proxy.chat import Chats, Plan
from proxy.completions import TextReply, Texts, parse_text
from proxy.config import Config, model_file
from proxy.counted import Counted
from proxy.disconnect import STREAM_HEADERS, EventStream, run_until_disconnect
from proxy.doctor import DATABASE
from proxy.embeddings import embeddings_object, parse_embeddings
from proxy.engine_metrics import EngineCollector
from proxy.engines.base import Delta, Engine, EngineError, EngineUnavailable, Finished, TokenLogprob
from proxy.errors import ApiError, LastResort, as_api_error, exception_handlers, too_large
from proxy.headers import authorize, bearer_token, hints, owner_of
from proxy.librechat.side import Kind, Side, repeats_itself, side_of
from proxy.metrics import CONTENT_TYPE, Metrics
from proxy.running import Running
from proxy.shared import Joins
from proxy.side import Sides, message_for
from proxy.trace import Trace
from proxy.upkeep import Upkeep
from proxy.wire import ChatRequest, Reply, Usage

CHECKPOINT_TOKENS = 600
"""Most tokens of a checkpoint that the model must write itself: somebody waits for it."""

NUDGE_S = 2.0
"""LibreChat 0.6 looks whether Stop was pressed when a piece of the answer comes, and else not:
until the first one, empty ones come this often."""

T = TypeVar("T")
Planning = Callable[[], Awaitable[Plan]]


def create_app(config: Config, *, engine: Engine | None = None) -> Starlette:
    """The proxy as an ASGI application. Nothing is opened or started before its lifespan begins.

    `engine` takes the place of the one that the configuration names.
    """
    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/api/status", status, methods=["GET"]),
        Route("/api/context", context, methods=["POST"]),
        Route("/api/conversations", forget_all, methods=["DELETE"]),
        Route("/api/conversations/{conversation}", forget, methods=["DELETE"]),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Counted), Middleware(LastResort), Middleware(AnyPath)],
        exception_handlers=exception_handlers(),
        lifespan=_lifespan,
    )
    app.state.config = config
    app.state.engine = engine
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    """Opens the store, starts the engine and the keeper; ends them in the opposite order."""
    config: Config = app.state.config
    state = app.state
    async with AsyncExitStack() as stack:
        state.metrics = Metrics()
        trace = Trace(os.environ.get("CHATFOLD_TRACE", ""))
        stack.callback(trace.close)
        state.store = await Store.open(config.data / DATABASE)
        stack.push_async_callback(state.store.close)
        state.engine = state.engine or _engine(config)
        stack.push_async_callback(state.engine.stop)
        await state.engine.start()
        _serve_memory(app, config, trace, stack)
        yield


def _serve_memory(app: Starlette, config: Config, trace: Trace, stack: AsyncExitStack) -> None:
    state = app.state
    policy, counter = load_policy(config.policy), EngineTokens(state.engine)
    background = BackgroundModel(state.engine, state.metrics)

    def observe(event: str, /, **fields: Any) -> None:
        trace(event, **fields)
        if event == "summarised":
            state.metrics.summary(fields["made_by"])

    state.keeper = Keeper(
        store=state.store,
        completer=background,
        warmer=background,
        counter=counter,
        policy=policy,
        host=counter.host,
        observe=observe,
    )
    state.keeper.start()
    stack.push_async_callback(state.keeper.stop)
    state.policy = policy
    state.running = running = Running()
    state.streams = Joins[bytes](state.metrics.joined)
    state.answers = Joins[dict[str, Any]](state.metrics.joined)
    state.sides = Sides(
        engine=state.engine,
        store=state.store,
        counter=counter,
        policy=policy,
        metrics=state.metrics,
        settings=config.librechat,
        running=running,
    )
    state.chats = Chats(
        engine=state.engine,
        store=state.store,
        keeper=state.keeper,
        counter=counter,
        policy=policy,
        metrics=state.metrics,
        timeouts=config.timeouts,
        running=running,
    )
    upkeep = Upkeep(
        store=state.store,
        retention=config.retention,
        idle=lambda: _is_idle(state.keeper, state.engine),
    )
    upkeep.start()
    stack.push_async_callback(upkeep.stop)
    state.metrics.registry.register(EngineCollector(state.engine.status))
    gauge = state.metrics.gauge
    gauge(
        "background_pending",
        "Conversations that wait for the keeper.",
        lambda: state.keeper.pending,
    )
    gauge("background_running", "Conversations the keeper works on.", lambda: state.keeper.running)
    gauge("engine_ready", "1 when the model is loaded.", lambda: float(state.engine.ready()))


def _is_idle(keeper: Keeper, engine: Engine) -> bool:
    status = engine.status()
    busy = (*status.get("running", {}).values(), *status.get("waiting", {}).values())
    return not (keeper.running or keeper.pending or any(busy))


def _engine(config: Config) -> Engine:
    if config.upstream:
        from proxy.engines.remote import RemoteEngine

        return RemoteEngine.from_config(config)
    from proxy.engines.embedded.engine import EmbeddedEngine

    return EmbeddedEngine.from_config(config, trace_path=os.environ.get("CHATFOLD_TRACE", ""))


# -- chat ----------------------------------------------------------------------------------------


async def chat_completions(request: Request) -> Response:
    _authorize(request)
    raw = await _body(request, request.app.state.config.max_body_bytes)
    side = side_of(raw, request.headers)
    if side and (answer := await _side_answer(request, side, raw)):
        return answer
    chat = wire.parse_chat(raw)
    if side and side.kind is Kind.CHECKPOINT:
        most = chat.max_tokens or CHECKPOINT_TOKENS
        chat = replace(chat, max_tokens=min(most, CHECKPOINT_TOKENS))
    state, owner = request.app.state, owner_of(request.headers, chat.user)
    chats: Chats = state.chats
    client_id = _client_id(request)

    async def planning() -> Plan:
        plan = await chats.plan(chat, owner, client_id=client_id, aside=side is not None)
        return replace(plan, client_key=bearer_token(request.headers))

    plan = await _plan_at_once(request, chat, planning)
    reply = _reply(chat.model, include_usage=chat.include_usage)
    # Who else may want the same question answered twice at once, to have two answers.
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    key = (owner, client_id, digest) if repeats_itself(request.headers) else object()
    if chat.stream:
        return EventStream(
            state.streams.read(key, partial(_frames, chats, _given(plan, planning), reply)),
            ping_s=state.config.timeouts.ping_s,
            nudge=sse.data(reply.delta("")),
            nudge_s=NUDGE_S,
            headers=_headers(plan) if plan else {},
        )
    assert plan is not None
    answers = state.answers.read(key, partial(_complete, chats, plan, reply))
    body = await run_until_disconnect(request.receive, _only(answers))
    return _json(body, headers=_headers(plan))


async def _plan_at_once(request: Request, chat: ChatRequest, planning: Planning) -> Plan | None:
    """None for a stream whose model is not there yet. It waits with its headers out, and is told
    of a failure in the stream: a 503 would be tried again for 110 seconds."""
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


def _reply(model: str, *, include_usage: bool) -> Reply:
    return Reply(
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
    return _json(reply.completion_of(message_for(side.form, answer), answer.usage), headers=headers)


def _whole_stream(reply: Reply, text: str, usage: Usage) -> Iterator[bytes]:
    """The frames of an answer that is there already."""
    yield sse.data(reply.opening())
    yield sse.data(reply.delta(text))
    yield sse.data(reply.closing("stop"))
    if reply.include_usage:
        yield sse.data(reply.usage_chunk(usage))
    yield sse.DONE


async def _read_chat(request: Request) -> tuple[ChatRequest, str]:
    config: Config = request.app.state.config
    _authorize(request)
    chat = wire.parse_chat(await _body(request, config.max_body_bytes))
    return chat, owner_of(request.headers, chat.user)


async def _body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large(max_bytes)
    return bytes(body)


def _client_id(request: Request) -> str | None:
    header = request.app.state.config.conversation_header
    return hints(request.headers, conversation_header=header).conversation


def _authorize(request: Request) -> None:
    if error := authorize(request.headers, request.app.state.config.api_keys):
        raise error


def _headers(plan: Plan) -> dict[str, str]:
    headers = {
        "x-chatfold-conversation": plan.history.conversation,
        "x-chatfold-context": _shape(plan.context.shape),
    }
    if plan.degraded:
        headers["x-chatfold-memory"] = "degraded"
    return headers


def _shape(shape: Shape) -> str:
    return "; ".join(f"{name}={value}" for name, value in asdict(shape).items())


async def _frames(chats: Chats, planned: Planning, reply: Reply) -> AsyncGenerator[bytes, None]:
    """The answers as server-sent events. A failure is the last frame; DONE then never comes."""
    yield sse.data(reply.opening())
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
    _authorize(request)
    state = request.app.state
    wanted = parse_text(await _body(request, state.config.max_body_bytes))
    owner, key = owner_of(request.headers, wanted.user), bearer_token(request.headers)
    texts = Texts(state.engine, state.metrics, state.config.timeouts)
    texts.check(wanted, owner)
    reply = TextReply(f"cmpl-{secrets.token_hex(12)}", int(time.time()), wanted.model)
    if wanted.stream:
        frames = texts.frames(wanted, owner, key, reply)
        return EventStream(frames, ping_s=state.config.timeouts.ping_s)
    work = texts.completion(wanted, owner, key, reply)
    return _json(await run_until_disconnect(request.receive, work))


async def embeddings(request: Request) -> Response:
    _authorize(request)
    state = request.app.state
    wanted = parse_embeddings(await _body(request, state.config.max_body_bytes))
    work = state.engine.embed(wanted.inputs)
    found = await run_until_disconnect(request.receive, work)
    return _json(embeddings_object(wanted, found))


# -- everything else -----------------------------------------------------------------------------


async def models(request: Request) -> Response:
    """Answers at once, whatever the engine does: LibreChat waits five seconds and no longer."""
    _authorize(request)
    config: Config = request.app.state.config
    names = dict.fromkeys([_model_name(config), *config.librechat.names])
    return _json(wire.models(list(names), created=0))


def _model_name(config: Config) -> str:
    return "chatfold" if config.upstream else model_file(config).stem


async def healthz(request: Request) -> Response:
    return _json({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Where the model cannot be loaded, this says why, in the words that a chat would get."""
    engine: Engine = request.app.state.engine
    if engine.ready():
        return _json({"status": "ready"})
    trouble = engine.status().get("trouble") or "the model is not loaded yet"
    return _json({"status": trouble}, status=503)


async def metrics(request: Request) -> Response:
    _authorize(request)
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE)


async def status(request: Request) -> Response:
    """Facts for people and scripts; plain JSON."""
    _authorize(request)
    state = request.app.state
    try:
        store = await state.store.status()
    except StoreError as exc:
        store = {"degraded": True, "trouble": str(exc)}
    keeper: Keeper = state.keeper
    engine = state.engine.status()
    return _json(
        {
            "engine": engine,
            "queue": engine.get("waiting", {}),
            "background": {"running": keeper.running, "pending": keeper.pending},
            "policy": state.policy.name,
            "store": store,
        }
    )


async def context(request: Request) -> Response:
    """The context that a chat request with this body would be answered from. Writes nothing."""
    chat, owner = await _read_chat(request)
    client_id = _client_id(request)
    plan = await request.app.state.chats.plan(chat, owner, client_id=client_id)
    return _json(_context_json(plan.context), headers=_headers(plan))


async def forget(request: Request) -> Response:
    """Deletes a conversation with all its branches and summaries, down to the bytes in the file."""
    owner = _owner(request)
    conversation = request.path_params["conversation"]
    deleted = await request.app.state.store.forget_conversation(owner, conversation)
    if not deleted:
        raise ApiError(404, f"There is no conversation {conversation!r}.", code="not_found")
    await _forget_in_memory(request, owner)
    return _json({"deleted_messages": deleted})


async def forget_all(request: Request) -> Response:
    """Deletes everything that this owner ever said here."""
    owner = _owner(request)
    deleted = await request.app.state.store.forget_owner(owner)
    await _forget_in_memory(request, owner)
    return _json({"deleted_messages": deleted})


async def _forget_in_memory(request: Request, owner: str) -> None:
    request.app.state.running.forget(owner)
    await request.app.state.engine.forget(owner)


def _owner(request: Request) -> str:
    """Whose conversations a request without a body is about: `?user=` says what a body would."""
    _authorize(request)
    return owner_of(request.headers, request.query_params.get("user"))


def _context_json(context: Context) -> dict[str, Any]:
    messages = [{"role": m.role, "text": m.text} for m in context.messages]
    exact: list[object] = [(m.role, m.parts, m.token_ids) for m in context.messages]
    exact += [context.tools] if context.tools else []
    digest = hashlib.blake2b(repr(exact).encode("utf-8", "surrogatepass"), digest_size=16)
    return {
        "context": messages,
        "shape": asdict(context.shape),
        "digest": digest.hexdigest(),
    }


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        wire.encode(value), status_code=status, headers=headers, media_type="application/json"
    )
