"""Embeddings, by a tiny BERT that the test writes; a model that makes none says so."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp as C
import numpy as np
import pytest

from memory.context import Context, ContextMessage, Shape
from proxy.engines.base import (
    Embeddings,
    EngineUnavailable,
    Generate,
    Priority,
    QueueFull,
    RequestRefused,
)
from proxy.engines.embedded.embedding import Embedder
from proxy.engines.embedded.engine import EMBEDDINGS_MOST, EmbeddedEngine, EmbeddedSettings
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.protocol import Cancel, Command, Embed, Load
from tests.engine.adapters import write_adapter
from tests.engine.tiny_bert import EMBD, N_CTX, write_bert
from tests.engine.tiny_models import EMBD as TINY_WIDTH
from tests.engine.tiny_models import write_gemma3

pytestmark = pytest.mark.slow

PATIENCE_S = 60.0


MANY = ["tower river " * 50] * 20_000
"""More than can be embedded before it is taken back."""


def settings(path: str) -> EmbeddedSettings:
    load = Load(path=path, n_ctx=128, cache_tokens=128, sequences=2, threads=1)
    return EmbeddedSettings(load, start_s=PATIENCE_S)


def with_engine(path: str, main: Any) -> Any:
    async def run() -> Any:
        engine = EmbeddedEngine(settings(path))
        await engine.start()
        try:
            async with asyncio.timeout(PATIENCE_S):
                work: Coroutine[Any, Any, Any] = main(engine)
                return await work
        finally:
            await engine.stop()

    return asyncio.run(run())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_bert(tmp_path_factory.mktemp("bert") / "bert.gguf"))


def vectors(found: Embeddings) -> Any:
    return np.array([np.frombuffer(v, "<f4") for v in found.vectors])


def test_equal_texts_have_equal_vectors_and_others_do_not(bert: str) -> None:
    async def main(engine: EmbeddedEngine) -> Embeddings:
        return await engine.embed(["tower river", "train", "tower river", (2, 6, 3)])

    found = with_engine(bert, main)
    v = vectors(found)
    assert v.shape == (4, EMBD)
    assert np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5)
    assert np.array_equal(v[0], v[2])
    assert not np.allclose(v[0], v[1], atol=1e-3)
    # [CLS] tower river [SEP], [CLS] train [SEP], the first again, and three ids as they are.
    assert found.prompt_tokens == 4 + 3 + 4 + 3


def test_what_cannot_be_embedded_is_refused_and_the_next_request_is_served(bert: str) -> None:
    async def main(engine: EmbeddedEngine) -> Embeddings:
        for wrong in (["a " * N_CTX], [()], [(10**6,)], [(-1,)]):
            with pytest.raises(RequestRefused) as caught:
                await engine.embed(wrong)
            assert caught.value.param == "input"
        with pytest.raises(RequestRefused, match="cannot answer"):
            async with engine.generate(question()) as events:
                async for _ in events:
                    pass
        return await engine.embed(["train"])

    assert len(with_engine(bert, main).vectors) == 1


def test_many_requests_at_once_each_get_their_own_vectors(bert: str) -> None:
    async def main(engine: EmbeddedEngine) -> list[Embeddings]:
        texts = [[word] * 3 for word in ("tower", "river", "train")]
        together = await asyncio.gather(*(engine.embed(t) for t in texts))
        alone = [await engine.embed(t) for t in texts]
        assert [t.vectors for t in together] == [a.vectors for a in alone]
        return together

    assert len({t.vectors for t in with_engine(bert, main)}) == 3


@pytest.mark.parametrize("ends", ["client", "time"])
def test_what_nobody_waits_for_any_more_is_taken_back(
    bert: str, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Command] = []
    begins = asyncio.Event()
    send = EmbeddedEngine._send

    def told(engine: EmbeddedEngine, command: Command) -> None:
        sent.append(command)
        send(engine, command)
        if isinstance(command, Embed):
            begins.set()

    monkeypatch.setattr(EmbeddedEngine, "_send", told)

    async def main(engine: EmbeddedEngine) -> Embeddings:
        if ends == "client":
            task = asyncio.create_task(engine.embed(MANY))
            await begins.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            engine._settings = replace(engine._settings, embeddings_s=0.01)
            with pytest.raises(EngineUnavailable, match="no time for embeddings"):
                await engine.embed(MANY)
            engine._settings = replace(engine._settings, embeddings_s=30)
        begun, taken_back = sent[-2:]
        assert isinstance(begun, Embed)
        assert taken_back == Cancel(id=begun.id)
        return await engine.embed(["train"])

    assert len(with_engine(bert, main).vectors) == 1


def test_no_more_wait_than_may_though_the_model_is_still_loading(bert: str) -> None:
    async def main() -> list[Embeddings | BaseException]:
        engine = EmbeddedEngine(settings(bert))
        await engine.start()
        try:
            wanted = (engine.embed(["train"]) for _ in range(EMBEDDINGS_MOST + 3))
            return await asyncio.gather(*wanted, return_exceptions=True)
        finally:
            await engine.stop()

    found = asyncio.run(main())
    refused = [f for f in found if isinstance(f, QueueFull)]
    assert len(refused) == 3
    assert sum(isinstance(f, Embeddings) for f in found) == EMBEDDINGS_MOST


def test_a_model_made_for_writing_makes_no_embeddings(model_path: str) -> None:
    async def main(engine: EmbeddedEngine) -> None:
        with pytest.raises(RequestRefused, match="makes no embeddings"):
            await engine.embed(["tower"])

    with_engine(model_path, main)


@pytest.mark.parametrize(
    "changes",
    [dict(rope_freq_base=100.0), dict(rope_scaling="linear", rope_freq_scale=0.1), dict(lora=True)],
    ids=["base", "scale", "adapter"],
)
def test_settings_of_the_model_hold_for_embeddings_too(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    path = str(write_gemma3(tmp_path / "gemma.gguf", embeds=True))
    if "lora" in changes:
        adapter = tmp_path / "a.gguf"
        write_adapter(adapter, architecture="gemma3", width=TINY_WIDTH)
        changes = dict(lora=(str(adapter),))
    plain, same, other = (vector_of(path, **kind) for kind in ({}, {}, changes))
    assert np.array_equal(plain, same)
    assert not np.allclose(plain, other, atol=1e-3)


def vector_of(path: str, **changes: Any) -> Any:
    kind: dict[str, Any] = dict(n_ctx=64, cache_tokens=64, sequences=1, threads=1, threads_batch=2)
    llama = Llama(Load(path=path, **kind | changes))
    embedder = Embedder(llama)
    assert embedder.possible
    vector = embedder.vector(embedder.tokens("the tower by the river " * 4))
    assert C.llama_n_threads_batch(embedder._context) == 2
    return np.frombuffer(vector or b"", "<f4")


def question() -> Generate:
    context = Context((ContextMessage("user", ("Hi",)),), "", False, Shape(1, 0, 0, 0, 0, 0))
    return Generate("a", context, Priority.CHAT, 4)
