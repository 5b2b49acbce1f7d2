"""The embedded engine with its real model process: who gets which answer when things go wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.context import Context, ContextMessage, Shape
from proxy import trace
from proxy.engines.base import (
    CallFormat,
    ContextOverflow,
    Delta,
    EngineBroken,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    Finished,
    Generate,
    JsonFormat,
    Priority,
    QueueFull,
    ReaderStalled,
    RequestRefused,
    Sampling,
    Started,
)
from proxy.engines.embedded import engine as module
from proxy.engines.embedded import protocol, translation
from proxy.engines.embedded.engine import EmbeddedEngine, EmbeddedSettings
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.protocol import Load

PATIENCE_S = 60.0
"""Only a test that fails waits this long."""

GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def load(model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    # The model process looks at its books after every step, and dies when they do not balance.
    monkeypatch.setenv("CHATFOLD_CHECK_INTEGRITY", "1")
    return Load(
        path=model_path,
        n_ctx=768,
        cache_tokens=1536,
        sequences=4,
        n_batch=512,
        n_ubatch=32,
        threads=1,
        gpu_layers=0,
        trace_path=str(tmp_path / "trace.jsonl"),
    )


@asynccontextmanager
async def running(load: Load, **settings: Any) -> AsyncIterator[EmbeddedEngine]:
    """A started engine; whatever happens, nothing of it is left behind."""
    engine = EmbeddedEngine(EmbeddedSettings(load, start_s=PATIENCE_S, **settings))
    await engine.start()
    try:
        yield engine
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await engine.stop()
        if engine._process:
            assert engine._process.returncode is not None


def context(*texts: str, continues: bool = False) -> Context:
    roles = ("user", "assistant")
    messages = tuple(ContextMessage(roles[i % 2], (t,)) for i, t in enumerate(texts))
    return Context(messages, "", continues, Shape(1, 0, 0, 0, 0, 0))


def ask(
    *texts: str,
    max_tokens: int | None = 4,
    priority: Priority = Priority.CHAT,
    sampling: Sampling = GREEDY,
) -> Generate:
    return Generate("a", context(*texts), priority, max_tokens, sampling)


async def answer(engine: EmbeddedEngine, request: Generate) -> tuple[str, Finished]:
    """The whole text and the last event; the events come in the promised order."""
    async with engine.generate(request) as stream:
        events = [event async for event in stream]
    assert isinstance(events[0], Started)
    assert all(isinstance(event, Delta) for event in events[1:-1])
    assert isinstance(events[-1], Finished)
    return "".join(e.text for e in events if isinstance(e, Delta)), events[-1]


async def until(done: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not done():  # noqa: ASYNC110 (the engine's status is asked for, it tells nobody)
            await asyncio.sleep(0.005)


def busy(engine: EmbeddedEngine, *, waiting: bool = False) -> int:
    return sum(engine.status()["waiting" if waiting else "running"].values())


def is_gone(pid: int) -> bool:
    """Whether the process is dead; one that nobody has buried yet is dead too."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return not Path("/proc/self/stat").exists() or not Path(f"/proc/{pid}").exists()
    return state in "ZX"


def traced(load: Load) -> list[dict[str, Any]]:
    return trace.read(Path(load.trace_path))


def long_text(n_words: int, word: str = "tower") -> str:
    """About `n_words` tokens."""
    return " ".join([word] * n_words)


# -- answers -------------------------------------------------------------------------------------


def test_the_second_turn_of_a_chat_evaluates_its_new_message_only(load: Load) -> None:
    async def main() -> None:
        async with running(load) as engine:
            info = await engine.model()
            assert engine.ready()
            assert info.budget.window_tokens == 768
            assert "SmolLM" in info.default_system
            text, end = await answer(engine, ask("Where is Tokyo Tower?", max_tokens=8))
            assert text
            assert end.finish_reason == "length"
            assert end.completion_tokens == 8
            ids = end.token_ids
            assert ids is not None
            again = context("Where is Tokyo Tower?", text, "And Kyoto?").messages
            messages = (again[0], replace(again[1], token_ids=ids), again[2])
            request = replace(ask(), context=replace(context(), messages=messages))
            _, second = await answer(engine, request)
            new = second.prompt_tokens - end.prompt_tokens - end.completion_tokens
            assert second.prompt_tokens - second.cached_tokens == new + 1

    asyncio.run(main())


def test_warming_evaluates_once_and_the_request_behind_it_only_what_is_new(load: Load) -> None:
    async def main() -> None:
        async with running(load) as engine:
            warm = ask(long_text(100), max_tokens=0, priority=Priority.BACKGROUND)
            _, first = await answer(engine, warm)
            assert first.prompt_tokens - first.cached_tokens > 100
            _, second = await answer(engine, warm)
            assert second.cached_tokens == second.prompt_tokens == first.prompt_tokens
            assert second.queued_s >= 0
            _, chat = await answer(engine, ask(long_text(100)))
            assert chat.cached_tokens == first.prompt_tokens

    asyncio.run(main())


def test_the_same_seed_gives_the_same_text(load: Load) -> None:
    # Each time in an empty cache: sums of logits depend on where the cells lie.
    sampling = Sampling(temperature=1.0, seed=11)
    request = ask("Tell me a story.", max_tokens=8, sampling=sampling)

    async def main() -> None:
        texts = set()
        for _ in range(3):
            async with running(load) as engine:
                texts.add((await answer(engine, request))[0])
        assert len(texts) == 1

    asyncio.run(main())


def test_what_the_engine_cannot_do_is_refused_and_the_next_request_works(load: Load) -> None:
    async def main() -> None:
        async with running(load) as engine:
            with pytest.raises(ContextOverflow) as overflow:
                await answer(engine, ask(long_text(900)))
            assert overflow.value.prompt_tokens > 900
            assert overflow.value.window_tokens == 768
            with pytest.raises(RequestRefused, match="no text"):
                await answer(engine, replace(ask(max_tokens=0), context=context()))
            odd = ContextMessage("user", ("a lone \ud800 surrogate",), b"\xff\xff\xff\x7f")
            surrogate = replace(context(), messages=(odd,))
            assert (await answer(engine, replace(ask(), context=surrogate)))[1].completion_tokens
            assert engine.status()["restarts"] == 0

    asyncio.run(main())


def test_a_schema_becomes_a_grammar_once_for_the_check_and_the_answer(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def grammar_of(schema: str) -> str:
        asked.append(schema)
        return 'root ::= "7"'

    monkeypatch.setattr(translation, "grammar_of", grammar_of)
    request = replace(ask("Hello"), format=JsonFormat('{"const": 7}'))

    async def main() -> None:
        async with running(load) as engine:
            engine.check(request)
            assert (await answer(engine, request))[0] == "7"

    asyncio.run(main())
    assert asked == ['{"const": 7}']


def test_a_bias_for_a_token_that_the_model_does_not_have_is_refused(load: Load) -> None:
    """At once where the model is known already, else as soon as it is."""

    def biased(token: int) -> Generate:
        return ask("Hi", sampling=replace(GREEDY, logit_bias=((2, 1.0), (token, 1.0))))

    async def main() -> None:
        async with running(load) as engine:
            with pytest.raises(RequestRefused, match="no token 49152") as refused:
                await answer(engine, biased(49152))
            assert refused.value.param == "logit_bias"
            with pytest.raises(RequestRefused):
                engine.check(biased(2**31 - 1))
            engine.check(biased(49151))
            assert (await answer(engine, biased(49151)))[1].completion_tokens

    asyncio.run(main())


def test_texts_are_counted_while_the_model_is_busy(load: Load) -> None:
    async def main() -> None:
        async with running(load) as engine:
            assert await engine.count([]) == []
            async with engine.generate(ask(long_text(600))):
                await until(lambda: busy(engine))
                counts = await engine.count(["", "Hello world", "<|im_end|>", "東京"])
                assert busy(engine), "the counts came before the prompt was evaluated"
            assert counts[0] == 0
            assert counts[1] == 2
            assert counts[2] > 1, "markup in a text is text"

    asyncio.run(main())


# -- leaving and giving way ----------------------------------------------------------------------


def test_leaving_during_prefill_stops_the_batch_and_the_next_request_works(load: Load) -> None:
    async def main() -> None:
        async with running(load) as engine:
            async with engine.generate(ask(long_text(600))):
                await until(lambda: busy(engine))
            await until(lambda: not busy(engine))
            _, end = await answer(engine, ask("Hello"))
            assert end.completion_tokens
            assert engine.status()["restarts"] == 0
        first = [t["event"] for t in traced(load) if t.get("request") == 1]
        if "request_interrupted" in first:  # Unless it left between two batches.
            first.remove("request_interrupted")
        assert first == ["request_queued", "request_started", "request_cancelled"]

    asyncio.run(main())


def test_leaving_while_waiting_in_line_is_leaving_too(load: Load) -> None:
    async def main() -> None:
        one_place = replace_load(load, sequences=1)
        async with running(one_place) as engine, engine.generate(ask(long_text(600))):
            await until(lambda: busy(engine))
            async with engine.generate(ask("Hello")):
                await until(lambda: busy(engine, waiting=True))
            await until(lambda: not busy(engine, waiting=True))
            assert busy(engine)

    asyncio.run(main())


def test_a_chat_breaks_into_background_work_that_then_goes_on(load: Load) -> None:
    async def main() -> None:
        async with running(load) as engine:
            background = ask(long_text(400), max_tokens=0, priority=Priority.BACKGROUND)
            task = asyncio.create_task(answer(engine, background))
            await until(lambda: busy(engine))
            await answer(engine, ask("Hello"))
            assert not task.done()
            _, end = await task
            assert engine.status()["preemptions"] >= 1
            batches = [t for t in traced(load) if t["event"] == "batch" and t["requests"] == [1]]
            given = sum(t["tokens"] for t in batches)
            assert end.prompt_tokens <= given <= end.prompt_tokens + 64

    asyncio.run(main())


def test_more_requests_than_the_queue_holds_are_refused(load: Load) -> None:
    async def main() -> None:
        one_place = replace_load(load, sequences=1)
        hello = ask("Hello", priority=Priority.SIDE)
        async with running(one_place, queue_limit=2) as engine:
            async with engine.generate(ask(long_text(600))):
                await until(lambda: busy(engine))
                # The one that runs does not wait, and what is worse does not stand before.
                background = ask("Hello", priority=Priority.BACKGROUND)
                async with (
                    engine.generate(background),
                    engine.generate(hello),
                    engine.generate(hello),
                ):
                    with pytest.raises(QueueFull, match="2 requests are waiting"):
                        await answer(engine, hello)
                    async with engine.generate(ask("Hello")):
                        pass
            assert (await answer(engine, ask("Hello")))[1].completion_tokens

    asyncio.run(main())


def test_who_waits_in_line_for_too_long_is_told_so_and_leaves_it(load: Load) -> None:
    async def main() -> None:
        one_place = replace_load(load, sequences=1)
        async with running(one_place) as engine:
            async with engine.generate(ask(long_text(600))) as first:
                await until(lambda: busy(engine))
                # Only now: on a slow machine the first one may stand in line for longer.
                engine._settings = replace(engine._settings, queue_s=0.05)
                patient = ask("Hello", priority=Priority.BACKGROUND)
                task = asyncio.create_task(answer(engine, patient))
                with pytest.raises(QueueFull, match=r"waited for 0\.05 seconds"):
                    await answer(engine, ask("Hello", priority=Priority.SIDE))
                assert [type(e) async for e in first][-1] is Finished
            assert (await task)[1].completion_tokens

    asyncio.run(main())


# -- readers that do not keep up -----------------------------------------------------------------

ENDLESS = Sampling(temperature=0.0, logit_bias=((2, -100.0),))
"""The end of an answer is banned."""


def test_who_stops_reading_holds_up_nobody_and_misses_nothing(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNREAD_MOST", 8)
    request = ask("Tell me a story.", max_tokens=40, sampling=ENDLESS)

    async def main() -> None:
        async with running(load) as engine:
            whole, _ = await answer(engine, request)
            async with engine.generate(request) as stream:
                first = [await anext(stream), await anext(stream)]
                await until(lambda: is_held_back(load, 2))
                await asyncio.gather(*(answer(engine, ask(t)) for t in ("Hello", "Good morning")))
                rest = [event async for event in stream]
            texts = [e.text for e in [*first, *rest] if isinstance(e, Delta)]
            assert "".join(texts) == whole
            assert isinstance(rest[-1], Finished)
            assert rest[-1].completion_tokens == 40
        events = [(t["event"], t.get("request")) for t in traced(load)]
        # It may be held back again when it is read on: its state when the others came counts.
        came_at = min(events.index(("request_queued", other)) for other in (3, 4))
        held_at = last_index(events[:came_at], ("request_held_back", 2))
        caught_up_at = events.index(("request_caught_up", 2), held_at)
        for other in (3, 4):
            assert came_at < events.index(("request_done", other)) < caught_up_at

    asyncio.run(main())


def is_held_back(load: Load, request: int) -> bool:
    """Now: where reading is slow, it may have been before, and have caught up."""
    mine = [t["event"] for t in traced(load) if t.get("request") == request]
    told = [event for event in mine if event in ("request_held_back", "request_caught_up")]
    return told[-1:] == ["request_held_back"]


def last_index(events: list[tuple[str, int]], event: tuple[str, int]) -> int:
    return len(events) - 1 - events[::-1].index(event)


@pytest.mark.parametrize("n_read", [0, 1, 2, 3])
def test_who_never_reads_on_is_told_so_and_the_engine_is_free(
    load: Load, monkeypatch: pytest.MonkeyPatch, n_read: int
) -> None:
    monkeypatch.setattr(module, "UNREAD_MOST", 8)
    request = ask("Tell me a story.", max_tokens=None, sampling=ENDLESS)

    async def main() -> None:
        async with running(load, reader_s=0.05) as engine:
            async with engine.generate(request) as stream:
                assert isinstance(await anext(stream), Started)
                texts = [(await anext(stream)).text for _ in range(n_read)]
                await until(lambda: not engine._calls)
                await until(lambda: not busy(engine))
                with pytest.raises(ReaderStalled, match=r"not read for 0\.05 seconds"):
                    async for event in stream:
                        assert isinstance(event, Delta)
                        texts.append(event.text)
                assert len(texts) >= 8, "what came before the error is not lost"
            assert (await answer(engine, ask("Hello")))[1].completion_tokens

    asyncio.run(main())


@pytest.mark.parametrize("worse", [Priority.SIDE, Priority.BACKGROUND])
def test_the_batch_of_a_worse_class_ends_when_a_chat_comes(load: Load, worse: Priority) -> None:
    async def main() -> None:
        async with running(load) as engine:
            task = asyncio.create_task(answer(engine, ask(long_text(600), priority=worse)))
            await until(lambda: busy(engine))
            await answer(engine, ask("Hello"))
            assert not task.done()
            _, end = await task
        events = traced(load)
        came = next(i for i, t in enumerate(events) if t["event"] == "request_queued" and i)
        after = [t["requests"] for t in events[came:] if t["event"] == "batch"]
        assert after[0] == [2], "no batch of the other came in between"
        # What was interrupted is evaluated again, and nothing else.
        mine = [t["tokens"] for t in events if t["event"] == "batch" and t["requests"] == [1]]
        lost = sum(mine) - end.prompt_tokens - max(0, end.completion_tokens - 1)
        assert 0 <= lost <= max(mine)

    asyncio.run(main())


# -- crashes -------------------------------------------------------------------------------------


def replace_load(load: Load, **changes: Any) -> Load:
    return Load(**{name: getattr(load, name) for name in load.__struct_fields__} | changes)


def test_a_crash_ends_the_running_request_and_the_waiting_one_is_answered(load: Load) -> None:
    async def main() -> None:
        async with running(replace_load(load, sequences=1)) as engine:
            ran = asyncio.create_task(answer(engine, ask(long_text(600))))
            await until(lambda: busy(engine))
            waited = asyncio.create_task(answer(engine, ask("Hello")))
            await until(lambda: busy(engine, waiting=True))
            pid = engine.status()["pid"]
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineCrashed):
                await ran
            _, end = await waited
            assert end.completion_tokens
            assert engine.status()["restarts"] == 1
            assert engine.status()["pid"] != pid
            assert (await answer(engine, ask("Hello again")))[1].completion_tokens

    asyncio.run(main())


def test_whoever_comes_while_the_process_starts_again_is_answered(load: Load) -> None:
    async def main() -> None:
        async with running(load) as engine:
            await engine.model()
            os.kill(engine.status()["pid"], signal.SIGKILL)
            await until(lambda: not engine.ready())
            assert engine.status()["pid"] is None
            assert (await engine.count(["Hello"]))[0] == 1
            assert (await answer(engine, ask("Hello")))[1].completion_tokens

    asyncio.run(main())


def test_a_process_that_is_stuck_is_started_again_and_who_waited_is_answered(load: Load) -> None:
    async def main() -> None:
        async with running(replace_load(load, sequences=1), stuck_s=5.0) as engine:
            ran = asyncio.create_task(answer(engine, ask(long_text(600))))
            await until(lambda: busy(engine))
            waited = asyncio.create_task(answer(engine, ask("Hello")))
            await until(lambda: busy(engine, waiting=True))
            os.kill(engine.status()["pid"], signal.SIGSTOP)
            with pytest.raises(EngineCrashed, match=r"stuck \(.+ 5 seconds\)"):
                await ran
            _, end = await waited
            assert end.completion_tokens
            assert engine.status()["restarts"] == 1

    asyncio.run(main())


def test_a_model_that_makes_no_step_is_stuck_though_its_process_lives(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
        import threading
        from proxy.engines.embedded import child
        from proxy.engines.embedded.llama import Llama

        load = Llama.__init__

        def loaded(llama, settings):
            load(llama, settings)
            Llama.decode = lambda *_: threading.Event().wait()

        Llama.__init__ = loaded
        child.main()
    """
    monkeypatch.setattr(module, "CHILD", ("-c", textwrap.dedent(script)))

    async def main() -> None:
        async with running(load, stuck_s=5.0) as engine:
            with pytest.raises(EngineCrashed, match="one step took longer than 5 seconds"):
                await answer(engine, ask("Hello"))
            monkeypatch.undo()
            assert (await answer(engine, ask("Hello")))[1].completion_tokens

    asyncio.run(main())


def test_a_process_that_never_loads_is_started_again(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, "import time; time.sleep(600)")

    async def main() -> None:
        engine = EmbeddedEngine(EmbeddedSettings(load, start_s=0.2, stuck_s=0.2))
        monkeypatch.setattr(module, "TERMINATE_S", 0.05)
        await engine.start()
        await until(lambda: engine.status()["restarts"] >= 1)
        await engine.stop()

    asyncio.run(main())


def test_an_idle_engine_is_not_stuck_and_tells_its_memory(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulses: list[object] = []
    pulse = module.Watch.pulse

    def counted(watch: module.Watch, threads: Any) -> None:
        pulses.append(threads)
        pulse(watch, threads)

    monkeypatch.setattr(module.Watch, "pulse", counted)

    async def main() -> None:
        async with running(load, stuck_s=4.0) as engine:
            await engine.model()
            pid = engine.status()["pid"]
            await until(lambda: engine.status()["memory_bytes"] > 50e6)
            # One comes every second: for longer than one that is stuck may take.
            await until(lambda: len(pulses) >= 6)
            assert engine.status()["pid"] == pid

    asyncio.run(main())


def test_who_waits_for_a_count_learns_of_the_crash(load: Load) -> None:
    async def main() -> None:
        async with running(load) as engine:
            await engine.model()
            pid = engine.status()["pid"]
            os.kill(pid, signal.SIGSTOP)
            count = asyncio.create_task(engine.count(["Hello"]))
            await until(lambda: engine._counts)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineCrashed):
                await count

    asyncio.run(main())


def test_a_file_that_is_no_model_is_told_in_a_sentence(load: Load, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + os.urandom(4096))

    async def main() -> None:
        async with running(replace_load(load, path=str(bad))) as engine:
            for attempt in (engine.model(), engine.count(["a"]), answer(engine, ask("Hello"))):
                with pytest.raises(EngineBroken, match=r"cannot load .*bad\.gguf"):
                    await attempt
            assert not engine.ready()
            assert "bad.gguf" in engine.status()["trouble"]
            assert "bad.gguf" in repr(engine)

    asyncio.run(main())


def test_a_model_that_appears_is_loaded_after_all(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "late.gguf"

    async def main() -> None:
        async with running(replace_load(load, path=str(path))) as engine:
            with pytest.raises(EngineUnavailable):
                await engine.model()
            path.symlink_to(load.path)
            await until(engine.ready)
            assert engine.status()["trouble"] == ""
            assert (await answer(engine, ask("Hello")))[1].completion_tokens

    asyncio.run(main())


# -- model processes that misbehave: scripts in the place of the real one ------------------------


def child(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(module, "CHILD", ("-I", "-S", "-c", textwrap.dedent(script)))


def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The engine's pauses, as it asks for them; none is kept."""
    asked: list[float] = []

    async def sleep(delay_s: float) -> None:
        asked.append(delay_s)
        await real(0)

    real = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return asked


def test_a_process_that_dies_at_once_is_started_again_ever_more_slowly(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(monkeypatch, "raise SystemExit(3)")
    monkeypatch.setattr(module, "BACKOFF_MOST_S", 1.0)

    async def main() -> None:
        asked = pauses(monkeypatch)
        async with running(load) as engine:
            with pytest.raises(EngineUnavailable, match=r"while it loaded the model \(3\)"):
                await engine.model()
            async with asyncio.timeout(PATIENCE_S):
                while len([s for s in asked if s >= 0.1]) < 6:
                    await asyncio.wait([asyncio.create_task(asyncio.sleep(0))])
        assert [s for s in asked if s >= 0.1][:6] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]

    asyncio.run(main())


@pytest.mark.parametrize(
    "script",
    [
        "print('this is no frame at all', flush=True); import time; time.sleep(600)",
        "import os, time; os.write(1, b'\\2\\0\\0\\0\\xc1\\xc1'); time.sleep(600)",
        "import sys; sys.stderr.write('x' * 500_000); sys.stderr.flush(); raise SystemExit(1)",
        "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    ],
    ids=["no frame", "no reply", "one endless line on stderr", "illegal instruction"],
)
def test_a_process_that_makes_no_sense_is_ended_and_tried_again(
    load: Load, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    child(monkeypatch, script)
    monkeypatch.setattr(module, "TERMINATE_S", 0.05)
    monkeypatch.setattr(module, "BACKOFF_FIRST_S", 0.01)

    async def main() -> None:
        async with running(load) as engine:
            with pytest.raises(EngineUnavailable, match="while it loaded the model"):
                await engine.model()
            await until(lambda: engine.status()["restarts"] >= 2)

    asyncio.run(main())


FALLS_OVER_CALLS = """
    from proxy.engines.embedded import child, prompt

    def fault(*args, **kwargs):
        raise RecursionError("a fault that nobody thought of")

    prompt.grammar_of_calls = prompt.Prompter.tools_cost = fault
    child.main()
"""


def test_an_unexpected_error_in_one_request_ends_that_request_alone(
    load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CHILD", ("-c", textwrap.dedent(FALLS_OVER_CALLS)))
    wrong = replace(ask("Hello"), format=CallFormat(("f",)))

    async def main() -> None:
        async with running(load) as engine:
            ran = asyncio.create_task(answer(engine, ask(long_text(400), max_tokens=20)))
            await until(lambda: busy(engine))
            with pytest.raises(EngineError, match="failed over this request") as caught:
                await answer(engine, wrong)
            assert not isinstance(caught.value, EngineCrashed)
            with pytest.raises(EngineError, match="failed over this request"):
                await engine.count_tools("[]")
            assert (await ran)[1].completion_tokens
            assert engine.status()["restarts"] == 0

    asyncio.run(main())
    assert "a fault that nobody thought of" in caplog.text
    assert "Traceback" in caplog.text


def test_no_process_to_be_had_is_trouble_that_heals(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")

    async def main() -> None:
        async with running(load) as engine:
            with pytest.raises(EngineUnavailable, match="cannot be started: No such file"):
                await engine.model()
            monkeypatch.undo()
            await until(engine.ready)

    asyncio.run(main())


# -- the end -------------------------------------------------------------------------------------


def test_stopping_ends_every_request_as_a_shutdown_and_leaves_no_process(load: Load) -> None:
    async def main() -> None:
        async with running(replace_load(load, sequences=1)) as engine:
            tasks = [asyncio.create_task(answer(engine, ask(long_text(600))))]
            await until(lambda: busy(engine))
            tasks += [asyncio.create_task(answer(engine, ask("Hello")))]
            await until(lambda: busy(engine, waiting=True))
            pid = engine.status()["pid"]
            await engine.stop()
            for task in tasks:
                with pytest.raises(EngineUnavailable, match="shutting down"):
                    await task
            assert is_gone(pid)
            with pytest.raises(EngineUnavailable, match="shutting down"):
                await answer(engine, ask("Hello"))

    asyncio.run(main())


@pytest.mark.parametrize(
    "script",
    [
        "import time; time.sleep(600)",
        "import os, time; os.close(0); os.close(1); time.sleep(600)",
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
    ],
    ids=["never loads", "closed its pipes and hangs", "ignores what it is told"],
)
def test_stopping_ends_who_waits_for_a_model_that_never_comes(
    load: Load, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    child(monkeypatch, script)

    async def main() -> None:
        async with running(load) as engine:
            waits = asyncio.create_task(answer(engine, ask("Hello")))
            await until(lambda: engine._process and engine._calls)
            await asyncio.sleep(0.2)  # Long enough for the script to have done what it does.
            monkeypatch.setattr(module, "TERMINATE_S", 0.05)
            await engine.stop()
            with pytest.raises(EngineUnavailable, match="shutting down"):
                await waits
            assert engine._process
            assert is_gone(engine._process.pid)

    asyncio.run(main())


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_the_model_process_goes_when_its_parent_is_killed(load: Load, stopped: bool) -> None:
    script = f"""
        import asyncio
        from proxy.engines.embedded.engine import EmbeddedEngine, EmbeddedSettings
        from proxy.engines.embedded.protocol import Load

        async def main():
            engine = EmbeddedEngine(EmbeddedSettings({load!r}))
            await engine.start()
            await engine.model()
            print(engine.status()["pid"], flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    with parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert not is_gone(pid)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    end = time.monotonic() + PATIENCE_S
    while not is_gone(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert is_gone(pid)


# -- frames --------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=60), max_size=12), st.lists(st.integers(0, 2000)))
def test_frames_cut_anywhere_come_out_whole(bodies: list[bytes], cuts: list[int]) -> None:
    data = b"".join(protocol.LENGTH.pack(len(b)) + b for b in bodies)
    edges = [0, *sorted(c % (len(data) + 1) for c in cuts), len(data)]
    frames, out = protocol.Frames(), []
    for start, end in pairwise(edges):
        out += frames.feed(data[start:end])
    assert out == bodies


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_a_value_error(data: bytes) -> None:
    frames, used = protocol.Frames(), 0
    try:
        for body in frames.feed(data):
            used += protocol.LENGTH.size + len(body)
    except ValueError:
        (length,) = protocol.LENGTH.unpack_from(data, used)
        assert length > protocol.MAX_FRAME_BYTES
    assert used <= len(data)


@given(st.text(), st.integers(0, 2**31), st.lists(st.text(), max_size=4))
def test_commands_and_replies_survive_the_pipe(text: str, id_: int, texts: list[str]) -> None:
    command = protocol.Count(id=id_, texts=tuple(texts))
    reply = protocol.Text(id=id_, text=text)
    (first, second) = protocol.Frames().feed(protocol.encode(command) + protocol.encode(reply))
    assert protocol.command(first) == command
    assert protocol.reply(second) == reply


# -- what llama.cpp cannot be called back from ----------------------------------------------------


@pytest.mark.long
def test_a_schema_that_llama_cpp_is_lost_in_costs_everybody_seconds_and_not_minutes(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    """64 ways to read each bracket, 262,144 to read three, and no flag is looked at."""
    ways = [{"type": "array", "items": {"$ref": "#/$defs/A"}, "minItems": n} for n in range(1, 65)]
    schema = {"$defs": {"A": {"anyOf": ways}}, "$ref": "#/$defs/A"}
    brackets = Llama.for_texts(load).tokenize("[[", markup=False)
    sampling = Sampling(temperature=0.0, logit_bias=tuple((t, 100.0) for t in brackets))
    lost = ask("Nest.", max_tokens=20, sampling=sampling)
    lost = replace(lost, format=JsonFormat(json.dumps(schema)))

    async def main() -> None:
        async with running(load) as engine:
            with pytest.raises(EngineCrashed):
                await answer(engine, lost)
            assert (await answer(engine, ask("Hello")))[1].completion_tokens
            assert engine.status()["restarts"] == 1
        assert "too many ways" in caplog.text

    asyncio.run(main())
