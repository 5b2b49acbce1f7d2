"""The application: one list of routes, one list of middleware, the lifespan."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from memory.context import Context
from memory.keeper import Keeper
from memory.policy import load_policy
from memory.rewriting import Rewriter
from memory.store import Store, StoreError
from proxy import wire
from proxy.anypath import AnyPath
from proxy.background import BackgroundModel, EngineTokens
from proxy.chat import Chats
from proxy.completing import chat_completions, completions, embeddings
from proxy.config import Config, model_file
from proxy.counted import Counted
from proxy.doctor import DATABASE
from proxy.engine_metrics import EngineCollector
from proxy.engines.base import Engine
from proxy.errors import ApiError, LastResort, exception_handlers
from proxy.forgetting import forget_in_memory, forgotten
from proxy.headers import owner_of
from proxy.inspecting.api import api_routes, owner_asked_for
from proxy.metrics import CONTENT_TYPE, Metrics
from proxy.pages.access import Sessions
from proxy.pages.render import Templates
from proxy.pages.routes import page_routes
from proxy.requests import check_key, client_id_of, headers_for, json_response, read_chat
from proxy.running import Running
from proxy.shared import Joins
from proxy.side import Sides
from proxy.trace import Trace
from proxy.upkeep import Upkeep

OPENAPI = Path(__file__).parent / "openapi.json"
"""The routes of the OpenAI API as they are served, for machines."""


def create_app(config: Config, *, engine: Engine | None = None) -> Starlette:
    """The proxy as an ASGI application. Nothing is opened or started before its lifespan begins.

    `engine` takes the place of the one that the configuration names.
    """
    routes = [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/models", models, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/api/status", status, methods=["GET"]),
        Route("/api/context", context, methods=["POST"]),
        Route("/api/conversations", forget_all, methods=["DELETE"]),
        Route("/api/conversations/{conversation}", forget, methods=["DELETE"]),
        *api_routes(),
        *page_routes(),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Counted), Middleware(LastResort), Middleware(AnyPath)],
        exception_handlers=exception_handlers(),
        lifespan=_lifespan,
    )
    app.state.config = config
    app.state.engine = engine
    app.state.sessions = Sessions()
    app.state.templates = Templates()
    app.state.stopping = lambda: False
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
    again = BackgroundModel(state.engine, state.metrics)
    state.background, state.again = background, again

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
    state.rewriter = Rewriter(
        store=state.store,
        keeper=state.keeper,
        completer=again,
        counter=counter,
        host=counter.host,
        observe=observe,
    )
    state.rewriter.start()
    stack.push_async_callback(state.rewriter.stop)
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
        forget=lambda owner: forget_in_memory(state, owner),
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


# -- everything else -----------------------------------------------------------------------------


async def models(request: Request) -> Response:
    """Answers at once, whatever the engine does: LibreChat waits five seconds and no longer."""
    check_key(request)
    config: Config = request.app.state.config
    names = dict.fromkeys([_model_name(config), *config.librechat.names])
    return json_response(wire.models(list(names), created=0))


def _model_name(config: Config) -> str:
    return "chatfold" if config.upstream else model_file(config).stem


async def openapi(request: Request) -> Response:
    check_key(request)
    return Response(OPENAPI.read_bytes(), media_type="application/json")


async def healthz(request: Request) -> Response:
    return json_response({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Where the model cannot be loaded, this says why, in the words that a chat would get."""
    engine: Engine = request.app.state.engine
    if engine.ready():
        return json_response({"status": "ready"})
    trouble = engine.status().get("trouble") or "the model is not loaded yet"
    return json_response({"status": trouble}, status=503)


async def metrics(request: Request) -> Response:
    check_key(request)
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE)


async def status(request: Request) -> Response:
    """Facts for people and scripts; plain JSON."""
    check_key(request)
    state = request.app.state
    try:
        store = await state.store.status()
    except StoreError as exc:
        store = {"degraded": True, "trouble": str(exc)}
    keeper: Keeper = state.keeper
    engine = state.engine.status()
    return json_response(
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
    chat, owner = await read_chat(request)
    client_id = client_id_of(request)
    plan = await request.app.state.chats.plan(chat, owner, client_id=client_id)
    return json_response(_context_json(plan.context), headers=headers_for(plan))


async def forget(request: Request) -> Response:
    """Deletes a conversation with all its branches and summaries, down to the bytes in the file."""
    owner = await _owner(request)
    conversation = request.path_params["conversation"]
    state = request.app.state
    deleted = await forgotten(
        state, owner, lambda: state.store.forget_conversation(owner, conversation)
    )
    if not deleted:
        raise ApiError(404, f"There is no conversation {conversation!r}.", code="not_found")
    return json_response({"deleted_messages": deleted})


async def forget_all(request: Request) -> Response:
    """Deletes everything that this owner ever said here."""
    owner = await _owner(request)
    state = request.app.state
    deleted = await forgotten(state, owner, lambda: state.store.forget_owner(owner))
    return json_response({"deleted_messages": deleted})


async def _owner(request: Request) -> str:
    """Whose conversations a request without a body is about: `?user=` says what a body would,
    `?owner=` what it says in the rest of the inspector's API."""
    if "owner" in request.query_params:
        return await owner_asked_for(request)
    check_key(request)
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
