"""Settings of the embedded engine: each reaches the model process, and does there what it says."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from memory.context import Context, ContextMessage, Shape
from proxy.config import Config, EngineConfig
from proxy.engines.base import EngineUnavailable, Finished, Generate, Priority, Sampling
from proxy.engines.embedded.engine import EmbeddedEngine, EmbeddedSettings
from proxy.engines.embedded.protocol import Load
from tests.engine.adapters import write_adapter

PATIENCE_S = 60.0

OWN = {f.name for f in fields(EmbeddedSettings)} - {"load"}
KEYS = {f.name: f.default for f in fields(EngineConfig)}
NOT_FROM_THE_SECTION = {"path", "n_ctx", "trace_path", "snapshots"}


def other(value: Any) -> Any:
    """A value of the same type that is not this one."""
    if isinstance(value, tuple):
        return ("x",)
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else value + 1


def test_every_key_of_the_section_reaches_the_engine_under_its_own_name(tmp_path: Path) -> None:
    changed = replace(EngineConfig(), **{name: other(value) for name, value in KEYS.items()})
    engine = EmbeddedEngine.from_config(Config(data=tmp_path, engine=changed))
    settings = engine._settings
    for name in KEYS:
        (holder,) = [h for h in (settings, settings.load) if hasattr(h, name)]
        assert getattr(holder, name) == other(KEYS[name]), name


def test_every_setting_of_the_model_process_has_a_key_and_the_same_default() -> None:
    defaults = dict(zip(Load.__struct_fields__[1:], Load.__struct_defaults__, strict=True))
    assert set(Load.__struct_fields__) - NOT_FROM_THE_SECTION == set(KEYS) - OWN
    for name in set(KEYS) - OWN:
        assert defaults[name] == KEYS[name], name


def test_the_other_fields_come_from_the_top_level(tmp_path: Path) -> None:
    config = Config(data=tmp_path, n_ctx=100, queue_limit=7)
    settings = EmbeddedEngine.from_config(config, trace_path="t")._settings
    assert (settings.load.n_ctx, settings.load.trace_path, settings.queue_limit) == (100, "t", 7)
    assert settings.load.path.endswith(".gguf")
    assert settings.load.snapshots == str(tmp_path / "snapshots")


# -- in the model process ------------------------------------------------------------------------

QUESTION = "Tell me in one sentence what a lighthouse is good for, and for whom. " * 10
"""Long enough to be worth a snapshot."""


def engine(model_path: str, **changes: Any) -> EmbeddedEngine:
    small: dict[str, Any] = dict(n_ctx=256, cache_tokens=512, sequences=4, n_ubatch=32, threads=1)
    load = Load(path=model_path, **small | changes)
    return EmbeddedEngine(EmbeddedSettings(load, start_s=PATIENCE_S))


async def ask(engine: EmbeddedEngine) -> Finished:
    shape = Shape(1, 0, 0, 0, 0, 0)
    context = Context((ContextMessage("user", (QUESTION,)),), "", False, shape)
    request = Generate("anna", context, Priority.CHAT, 8, Sampling(temperature=0.0))
    async with engine.generate(request) as stream:
        return [event async for event in stream][-1]  # type: ignore[return-value]


def answered(model_path: str, **changes: Any) -> tuple[Finished, dict[str, Any]]:
    """One question to a fresh process, and what it tells of itself. Stops it in good order, so
    that it writes its snapshots."""

    async def run() -> tuple[Finished, dict[str, Any]]:
        running = engine(model_path, **changes)
        await running.start()
        try:
            return await ask(running), running.status()
        finally:
            await running.stop()

    return asyncio.run(run())


def test_a_state_comes_back_under_the_same_settings_only(model_path: str, tmp_path: Path) -> None:
    adapter = str(write_adapter(tmp_path / "a.gguf"))
    ways: list[dict[str, Any]] = [
        {},
        dict(lora=(adapter,)),
        dict(lora=(f"{adapter}:0.5",)),
        dict(cache_type_k="q8_0"),
    ]
    plain = answered(model_path)[0]
    for way in ways:
        kept = {**way, "snapshots": str(tmp_path / "snapshots")}
        first, again = answered(model_path, **kept)[0], answered(model_path, **kept)[0]
        assert (first.cached_tokens, again.cached_tokens) == (0, first.prompt_tokens - 1), way
        assert first.token_ids == again.token_ids
        if "lora" in way:
            assert first.token_ids != plain.token_ids


def test_an_adapter_leaves_the_tokens_fingerprint_alone(model_path: str, tmp_path: Path) -> None:
    async def fingerprint(**changes: Any) -> str:
        running = engine(model_path, **changes)
        await running.start()
        try:
            return (await running.model()).fingerprint
        finally:
            await running.stop()

    adapter = str(write_adapter(tmp_path / "a.gguf"))
    plain = asyncio.run(fingerprint())
    assert asyncio.run(fingerprint(lora=(adapter,), cache_type_k="q8_0")) == plain


def test_the_status_tells_what_was_chosen(model_path: str, tmp_path: Path) -> None:
    adapter = str(write_adapter(tmp_path / "a.gguf"))
    changes = dict(cache_type_v="q8_0", lora=(f"{adapter}:0.5",), gpu_layers=-1, mmap=False)
    details = answered(model_path, **changes)[1]["details"]
    expected = {
        "threads": 1,
        "threads_batch": 1,
        "flash_attention": True,
        "cache_type_k": "f16",
        "cache_type_v": "q8_0",
        "mmap": False,
        "lora": "a.gguf:0.5",
        "chat_template": "the model's own",
    }
    assert {name: details[name] for name in expected} == expected
    if details["gpu_layers"] == 0:
        assert "gpu_layers has no effect" in details["warning"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(lora=("none.gguf",)), "engine.lora: the adapter none.gguf cannot be read"),
        (dict(chat_template="{% if %}"), "engine.chat_template: The chat template does not parse"),
        (dict(chat_template="{{ 1 }}"), "engine.chat_template: The chat template leaves out"),
        (dict(cache_type_v="q4_0", flash_attention="off"), "engine.flash_attention off"),
    ],
)
def test_what_cannot_be_loaded_says_why_to_who_asks_and_once_in_the_log(
    model_path: str, changes: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        running = engine(model_path, **changes)
        await running.start()
        try:
            with pytest.raises(EngineUnavailable) as caught:
                await running.model()
            assert told in str(caught.value)
            assert "\n" not in str(caught.value)
            async with asyncio.timeout(PATIENCE_S):
                while running.status()["restarts"] < 2:  # noqa: ASYNC110 (it tells nobody)
                    await asyncio.sleep(0.01)
            assert running.status()["trouble"] == str(caught.value)
        finally:
            await running.stop()

    with caplog.at_level(logging.ERROR, logger="chatfold.engine"):
        asyncio.run(run())
    assert len([r for r in caplog.records if told in r.getMessage()]) == 1
