"""The remote engine before real servers, with the default model: llama-cpp-python's and
llama.cpp's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.servers import Bare, LlamaServer, Server
from memory.context import Context, ContextMessage, Shape
from proxy.config import Config
from proxy.engines.base import (
    ContextOverflow,
    Delta,
    Event,
    Finished,
    Generate,
    Priority,
    Sampling,
)
from proxy.engines.remote import RemoteEngine

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

WINDOW_TOKENS = 1024
LONG = "\n".join(f"Item {i} is on shelf {i * 7 % 13}." for i in range(30))
TEXTS = [
    "",
    "Hello there.",
    "naïve café",
    "日本語のテキスト",
    "a<|im_end|>b",
    "x = [1, 2]\n\n",
    LONG,
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    with Bare(tmp_path_factory.mktemp("bare"), window_tokens=WINDOW_TOKENS) as server:
        yield server


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    directory = tmp_path_factory.mktemp("llama-server")
    with LlamaServer(directory, window_tokens=WINDOW_TOKENS, slots=2, saves=True) as server:
        yield server


@asynccontextmanager
async def engine_before(server: Server, **options: Any) -> AsyncIterator[RemoteEngine]:
    engine = RemoteEngine.from_config(Config(upstream=server.url, **options))
    await engine.start()
    try:
        await engine.model()
        yield engine
        engine.check_integrity()
    finally:
        await engine.stop()


def chat(*texts: str, **options: Any) -> Generate:
    """The user and the model in turn, greedy."""
    roles = ("user", "assistant")
    messages = tuple(ContextMessage(roles[i % 2], (t,)) for i, t in enumerate(texts))
    context = Context(messages, "", False, Shape(1, 0, 0, 0, 0, 0))
    priority = options.pop("priority", Priority.CHAT)
    options.setdefault("max_tokens", 8)
    return Generate("me", context, priority, sampling=Sampling(temperature=0), **options)


def warming(*texts: str, conversation: str) -> Generate:
    return chat(*texts, priority=Priority.BACKGROUND, max_tokens=0, conversation=conversation)


async def ask(engine: RemoteEngine, request: Generate) -> tuple[str, Finished]:
    events: list[Event] = []
    async with engine.generate(request) as some:
        events += [event async for event in some]
    last = events[-1]
    assert isinstance(last, Finished)
    return "".join(e.text for e in events if isinstance(e, Delta)), last


def ask_bare(server: Server, request: Generate) -> dict[str, Any]:
    """The same without the engine."""
    messages = [{"role": m.role, "content": m.text} for m in request.context.messages]
    body = {"messages": messages, "max_tokens": request.max_tokens, "temperature": 0}
    url = f"{server.url}/v1/chat/completions"
    answer: dict[str, Any] = httpx.post(url, json=body, timeout=60, trust_env=False).json()
    return answer


def prompt_tokens(server: Server, request: Generate) -> int:
    """As the server itself says."""
    n: int = ask_bare(server, request)["usage"]["prompt_tokens"]
    return n


async def test_llama_cpp_server_is_found_out(bare: Bare) -> None:
    async with engine_before(bare) as engine:
        status = engine.status()
    assert status["details"]["server"] == "llama_cpp.server"
    assert (status["window_tokens"], status["details"]["window_from"]) == (WINDOW_TOKENS, "refusal")


async def test_llama_server_is_found_out(llama_server: LlamaServer) -> None:
    async with engine_before(llama_server) as engine:
        status, model = engine.status(), await engine.model()
    details = status["details"]
    assert (details["server"], details["places"]) == ("llama-server", 2)
    assert details["slots_saved"]
    assert status["window_tokens"] == WINDOW_TOKENS
    assert model.default_system.startswith("You are a helpful AI assistant named SmolLM")


async def test_both_count_alike(bare: Bare, llama_server: LlamaServer) -> None:
    async with engine_before(bare) as one, engine_before(llama_server) as other:
        together = await one.count(TEXTS)
        assert together == [n for t in TEXTS for n in await one.count([t])]
        assert together == await other.count(TEXTS)
    assert together[:2] == [0, 3]


@pytest.mark.parametrize("texts", [("Hi.",), (LONG, "Yes.", "And?"), ("a", "b", "c", "d", "e")])
async def test_the_prompt_has_as_many_tokens_as_the_server_says(
    bare: Bare, texts: tuple[str, ...]
) -> None:
    """llama_cpp.server reports no usage in a stream: what the engine says is its own sum."""
    async with engine_before(bare) as engine:
        said, last = await ask(engine, chat(*texts))
        (completion,) = await engine.count([said])
    assert abs(last.prompt_tokens - prompt_tokens(bare, chat(*texts))) <= 1
    assert last.completion_tokens == completion


async def test_a_prompt_over_the_window_is_refused_with_its_length(
    bare: Bare, llama_server: LlamaServer
) -> None:
    for server in (bare, llama_server):
        async with engine_before(server) as engine:
            with pytest.raises(ContextOverflow) as failed:
                await ask(engine, chat("cat " * 1500))
        assert failed.value.window_tokens == WINDOW_TOKENS
        assert failed.value.prompt_tokens > 1500


async def test_a_warmed_chat_evaluates_its_new_message_and_nothing_else(
    llama_server: LlamaServer,
) -> None:
    async with engine_before(llama_server) as engine:
        said, _ = await ask(engine, chat(LONG, conversation="a"))
        await ask(engine, chat("Somebody else.", conversation="b"))
        _, warmed = await ask(engine, warming(LONG, said, conversation="a"))
        _, last = await ask(engine, chat(LONG, said, "Which shelf?", conversation="a"))
        (new,) = await engine.count(["Which shelf?"])
    assert warmed.prompt_tokens - warmed.cached_tokens <= 6
    # The message, what closes it, and the header of the answer.
    assert last.prompt_tokens - last.cached_tokens <= new + 8


async def test_a_slot_that_was_saved_comes_back_after_a_restart_of_the_server(
    tmp_path: Path,
) -> None:
    with LlamaServer(tmp_path, window_tokens=WINDOW_TOKENS, slots=1, saves=True) as server:
        async with engine_before(server) as engine:
            said, _ = await ask(engine, chat(LONG, conversation="a"))
            await ask(engine, warming(LONG, said, conversation="a"))
            server.stop()
            server.start()
            # A conversation that never sat there would evaluate everything.
            await ask(engine, chat("Somebody else.", conversation="b"))
            _, last = await ask(engine, chat(LONG, said, "Which shelf?", conversation="a"))
            assert last.cached_tokens > 300
            assert last.prompt_tokens - last.cached_tokens < 30


async def test_forgetting_leaves_an_empty_slot_and_an_empty_file(tmp_path: Path) -> None:
    with LlamaServer(tmp_path, window_tokens=WINDOW_TOKENS, slots=1, saves=True) as server:
        async with engine_before(server) as engine:
            said, _ = await ask(engine, chat(LONG, conversation="a"))
            await ask(engine, warming(LONG, said, conversation="a"))
            (file,) = (tmp_path / "slots").iterdir()
            kept_bytes = file.stat().st_size
            await engine.forget("me")
            while engine._emptying.at_work:  # noqa: ASYNC110 - it tells nobody when it is done
                await asyncio.sleep(0.01)
            assert file.stat().st_size < kept_bytes / 100
            _, last = await ask(engine, chat(LONG, said, "Which shelf?", conversation="a"))
            assert last.cached_tokens < 30


async def test_estimates_are_within_two_percent_after_three_answers(
    llama_server: LlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that offers no tokenizer: what comes back with its answers is all there is."""
    monkeypatch.setattr("proxy.engines.remote_probe.is_llama_server", lambda props: False)
    questions = [
        "What grows in a garden by the sea, and who looks after it in winter?",
        "def f(x):\n    return [y ** 2 for y in range(x) if y % 3]\n\nWhat does this do?",
        "Wie heißt das auf Deutsch: the keeper of the lighthouse writes every evening?",
        LONG[:300],
        "And in a few words: why?",
        "Please list three more of them, each with its own shelf and a short reason.",
    ]
    texts: list[str] = []
    async with engine_before(llama_server) as engine:
        assert engine.status()["details"]["server"] == "other"
        calibration = engine._counter.calibration
        for number, question in enumerate(questions):
            texts.append(question)
            raw = sum(await engine._counter._raw(texts))
            told = calibration.prompt(raw, messages=len(texts))
            said, last = await ask(engine, chat(*texts))
            if number >= 3:
                assert abs(told - last.prompt_tokens) <= 0.02 * last.prompt_tokens, number
            texts.append(said)


async def test_llama_cpp_server_is_warmed_step_by_step_and_then_has_it_all(bare: Bare) -> None:
    async with engine_before(bare) as engine:
        text, said = LONG + LONG, "Many shelves."
        await ask(engine, chat("Something else first."))
        bare.evaluated_tokens()
        await ask(engine, warming(text, said, conversation="a"))
        await ask(engine, chat(text, said, "Which shelf?", conversation="a"))
        (new,) = await engine.count(["Which shelf?"])
        evaluated = bare.evaluated_tokens()
    assert evaluated is not None
    assert evaluated <= new + 10


async def test_greedy_answers_are_those_of_the_bare_server(
    bare: Bare, llama_server: LlamaServer
) -> None:
    for server in (bare, llama_server):
        request = chat("Name three colours.", max_tokens=12)
        answer = ask_bare(server, request)
        async with engine_before(server) as engine:
            said, _ = await ask(engine, request)
        assert said == answer["choices"][0]["message"]["content"]
