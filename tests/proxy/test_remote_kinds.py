"""What the remote engine finds out about a server, and what it then does with it. Scripted servers
over real sockets; the real ones are in tests/engine/test_remote_real.py."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest
from scripted_kinds import SYSTEM, llama_cpp, llama_server, prompt_tokens, render, tokens
from scripted_upstream import DONE, ROLE, STREAM_HEAD, Exchange, Upstream, end, frames, hello, say
from test_remote import BACKGROUND, CHAT, SIDE, ask, asking, finish, serving, text

from memory.context import Context, ContextMessage, Shape
from proxy.config import Config, RemoteConfig
from proxy.engines import remote, remote_count, remote_next
from proxy.engines.base import EngineUnavailable, Generate, Place
from proxy.engines.remote import RemoteEngine
from proxy.engines.remote_count import Counter

pytestmark = pytest.mark.anyio

ANSWER = frames(ROLE, say("Hello"), end()) + DONE


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def saying(*texts: str, **options: Any) -> Generate:
    """A chat of these texts in turn, the user first."""
    roles = ("user", "assistant")
    messages = tuple(ContextMessage(roles[i % 2], (t,)) for i, t in enumerate(texts))
    context = Context(messages, "", False, Shape(1, 0, 0, 0, 0, 0))
    priority = options.pop("priority", CHAT)
    return Generate("me", context, priority, **options)


def warming(*texts: str, conversation: str) -> Generate:
    return saying(*texts, priority=BACKGROUND, max_tokens=0, conversation=conversation)


async def answering(exchange: Exchange) -> None:
    await exchange.stream(ANSWER)


async def until(what: Any) -> None:
    while not what():  # noqa: ASYNC110 - the engine does this by itself, some time later
        await asyncio.sleep(0.01)


# -- what is there -------------------------------------------------------------------------------


async def test_llama_cpp_server_is_known_by_its_routes_and_its_list_of_models() -> None:
    async with serving(llama_cpp(n_ctx=700)) as engine:
        status, model = engine.status(), await engine.model()
    details = status["details"]
    assert (details["server"], details["places"]) == ("llama_cpp.server", 1)
    assert (status["window_tokens"], details["window_from"]) == (700, "refusal")
    assert details["token_counts"] == "/extras/tokenize"
    assert details["cached_tokens"] == "not reported"
    assert model.fingerprint.startswith("llama_cpp.server:tiny:")


async def test_llama_server_tells_its_slots_its_window_and_its_template() -> None:
    async with serving(llama_server(slots=3), remote=RemoteConfig()) as engine:
        status, model = engine.status(), await engine.model()
    details = status["details"]
    assert (details["server"], details["places"]) == ("llama-server", 3)
    assert (details["build"], details["token_counts"]) == ("b1-test", "/tokenize")
    assert not details["slots_saved"]
    assert model.default_system == SYSTEM
    # [ role ] \n text <|im_end|> \n: six around a text; the answer's header has four.
    assert (model.budget.message_tokens, model.budget.base_tokens) == (6, 4)


async def test_any_other_server_is_assumed_to_be_able_to_do_nothing_special() -> None:
    server = llama_cpp(owner="somebody")
    async with serving(server, remote=RemoteConfig()) as engine:
        details = engine.status()["details"]
    assert (details["server"], details["token_counts"]) == ("other", "estimate")
    assert details["places"] == 256


async def test_a_server_that_is_still_loading_is_waited_for() -> None:
    async def loading(exchange: Exchange) -> None:
        await exchange.reply({"error": {"message": "Loading model"}}, status=503)

    server = llama_server()
    server.routes["GET", "/props"] = loading
    async with server.serving():
        engine = RemoteEngine.from_config(Config(upstream=server.url))
        await engine.start()
        try:
            await until(lambda: engine.status()["trouble"])
            assert engine.status()["trouble"] == "Loading model"
            assert not engine.ready()
            del server.routes["GET", "/props"]
            await until(engine.ready)
            assert engine.status()["details"]["server"] == "llama-server"
            assert engine.status()["trouble"] == ""
        finally:
            await engine.stop()


async def test_a_restart_and_another_model_are_noticed_without_a_request() -> None:
    server = llama_server(slots=1)
    async with serving(server, remote=RemoteConfig(recheck_s=0.1)) as engine:
        before = (await engine.model()).fingerprint
        await ask(engine, asking("hi", conversation="a"))
        assert "taken=1/1" in engine.status()["slots"]
        server.props["media_marker"] = "second"
        await until(lambda: engine.status()["times_found"] == 2)
        assert (await engine.model()).fingerprint == before
        assert "taken=0/1" in engine.status()["slots"]
        server.props["model_path"] = "/other.gguf"
        await until(lambda: engine.status()["times_found"] == 3)
        assert (await engine.model()).fingerprint != before
        assert text(await ask(engine)) == "Hello"


async def test_a_server_without_routes_for_tokens_is_used_with_estimates() -> None:
    server = llama_server()
    del server.routes["POST", "/tokenize"]
    async with serving(server, remote=RemoteConfig()) as engine:
        assert engine.status()["details"]["token_counts"] == "estimate"
        assert text(await ask(engine)) == "Hello"
        assert await engine.count(["hello there"]) == [3]


# -- counting ------------------------------------------------------------------------------------

TEXTS = [
    "",
    "one",
    "two words",
    "",
    "three words, and\nmore",
    f"a mark {'<|im_end|>'} inside",
    "日本",
]


@pytest.mark.parametrize("kind", [llama_cpp, llama_server])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:5], TEXTS[5:6], []])
async def test_the_server_counts_each_text_by_itself(kind: Any, texts: list[str]) -> None:
    async with serving(kind()) as engine:
        assert await engine.count(texts) == [len(tokens(t)) for t in texts]


async def test_a_long_history_is_counted_in_one_request() -> None:
    server = llama_cpp()
    async with serving(server) as engine:
        asked = server.log.count("tokenize")
        await engine.count([f"message number {i}" for i in range(500)])
        assert server.log.count("tokenize") == asked + 1


async def test_a_server_that_takes_too_long_to_count_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hangs(exchange: Exchange) -> None:
        await server.note("asked to count")
        await exchange.until_gone()

    server = llama_server()
    async with serving(server, remote=RemoteConfig()) as engine:
        monkeypatch.setattr("proxy.engines.remote_session.COUNT_S", 1.0)
        server.routes["POST", "/tokenize"] = hangs
        assert await engine.count(["hello there"]) == [3]
        assert "asked to count" in server.log


async def test_texts_that_are_pushed_out_while_others_are_counted_are_counted_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_count, "KNOWN_TEXTS", 8)
    counter = Counter()
    (expected,) = await counter.estimate(["kept"])
    # Too long to be counted on the loop: another request runs meanwhile.
    slow = counter.estimate(["kept", "word " * 1000])
    counts, _ = await asyncio.gather(slow, counter.estimate([f"text {i}" for i in range(8)]))
    assert counts[0] == expected


async def test_what_is_known_of_texts_holds_none_of_them() -> None:
    counter = Counter()
    texts = ["secret", "secret", "\ud800", ""]
    first = await counter.estimate(texts)
    assert await counter.estimate(texts) == first
    assert len(counter._known) == 3
    assert "secret" not in repr(vars(counter))
    assert all(len(key) <= 16 for key in counter._known)


async def test_nobody_is_asked_to_count_while_an_answer_runs_on_llama_cpp_server() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n")
        await exchange.chunk(frames(ROLE, say("Hel")))
        await server.noted("go")
        await exchange.chunk(frames(say("lo"), end()) + DONE)
        await exchange.chunk(b"")

    server = llama_cpp(script)
    async with serving(server) as engine:
        await engine.count(["ten words so that something is known of the vocabulary"])
        async with engine.generate(asking("first")) as events:
            await anext(events)
            asked = server.log.count("tokenize")
            (estimated,) = await engine.count(["seven words that come in between answers"])
            assert server.log.count("tokenize") == asked
            await server.note("go")
            assert text([e async for e in events]) == "Hello"
        assert 7 <= estimated <= 9


async def test_nothing_begins_between_counting_a_message_and_asking_for_its_answer() -> None:
    """llama_cpp.server does not leave a prompt that it has begun: the chat would wait for it."""

    async def waits(exchange: Exchange) -> None:
        if exchange.said == "summary" and "asked chat" not in server.log:
            await server.note("summary runs")
            return await exchange.until_gone()
        await answering(exchange)

    server = llama_cpp(waits)
    async with serving(server) as engine:
        summary = asyncio.create_task(ask(engine, saying("summary", priority=BACKGROUND)))
        await server.noted("summary runs")
        await engine.count(["chat"])
        await asyncio.sleep(0)
        await ask(engine, saying("chat"))
        await summary
    order = [line for line in server.log if line.startswith("asked") and "chatfold" not in line]
    assert order == ["asked summary", "asked chat", "asked summary"]


async def test_the_prompt_is_as_long_as_the_server_says_though_it_says_nothing() -> None:
    """llama_cpp.server streams no usage: texts and template are counted by it beforehand."""
    async with serving(llama_cpp(answering)) as engine:
        for request in (
            saying("What is a rose?"),
            saying("What is a rose?", "A flower.", "And a tree?"),
            saying("one", "two", "three", "four", "five"),
        ):
            last = finish(await ask(engine, request))
            exact = prompt_tokens(
                [{"role": m.role, "content": m.text} for m in request.context.messages]
            )
            assert last.prompt_tokens == exact
            assert last.completion_tokens == len(tokens("Hello"))


# -- llama_cpp.server ----------------------------------------------------------------------------


async def test_what_llama_cpp_server_does_not_know_is_not_sent_to_it() -> None:
    server = llama_cpp(answering)
    async with serving(server) as engine:
        await ask(engine, asking("hi"))
    body = server.seen[-1].body
    assert "stream_options" not in body
    assert all(isinstance(m["content"], str) for m in body["messages"])
    assert not {"cache_prompt", "id_slot"} & set(body)


async def test_a_long_prompt_is_warmed_in_steps_that_grow() -> None:
    server = llama_cpp(answering)
    long = ["q" * 900, "a" * 900, "r" * 900]
    async with serving(server) as engine:
        server.log.clear()
        await ask(engine, warming(*long, conversation="a"))
        sizes = [int(line.split()[1]) for line in server.log if line.startswith("evaluate")]
        assert sizes == [1000, 2000, 2700]
        prompts = [e.body["messages"] for e in server.seen[-3:]]
        assert prompts[-1] == [{"role": r, "content": c} for r, c in zip(
            ("user", "assistant", "user"), long, strict=True)]  # fmt: skip
        server.log.clear()
        await ask(engine, warming(*long, conversation="a"))
        assert not [line for line in server.log if line.startswith("evaluate")]


async def test_a_warming_that_is_interrupted_goes_on_where_it_was() -> None:
    server = llama_cpp(answering)
    plain = server.chat

    async def slow(exchange: Exchange) -> None:
        size = sum(len(m["content"]) for m in exchange.body["messages"])
        if size == 2000 and "asked chat" not in server.log:
            await server.note("half way")
            return await exchange.until_gone()
        await plain(exchange)

    server.chat = slow
    async with serving(server) as engine:
        server.log.clear()
        task = asyncio.create_task(ask(engine, warming("x" * 2600, conversation="a")))
        await server.noted("half way")
        await ask(engine, saying("chat"))
        await task
    order = [line for line in server.log if re.match("evaluate|asked chat|half", line)]
    # The chat took the place of what had been evaluated: all of it again, at the end.
    assert order[:3] == ["evaluate 1000", "half way", "asked chat"]
    assert order[-1] == "evaluate 2600"


async def test_what_a_broken_off_warming_left_behind_is_not_taken_for_what_was_there() -> None:
    server = llama_cpp(answering)
    plain = server.chat

    async def slow(exchange: Exchange) -> None:
        if exchange.body["messages"][0]["content"].startswith("other"):
            await server.note("half way")
            return await exchange.until_gone()
        await plain(exchange)

    server.chat = slow
    async with serving(server) as engine:
        await ask(engine, warming("x" * 900, conversation="a"))
        task = asyncio.create_task(ask(engine, warming("other" * 100, conversation="b")))
        await server.noted("half way")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.log.clear()
        await ask(engine, warming("x" * 900, conversation="a"))
        assert "evaluate 900" in server.log


async def test_a_context_that_took_another_ones_place_is_not_replaced_by_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next chat is made ready behind the warming of a shorter context: that is the one."""
    monkeypatch.setattr(remote_next, "AHEAD_S", 0.01)
    server = llama_cpp(answering)
    plain = server.chat

    async def slow(exchange: Exchange) -> None:
        if not exchange.body["stream"]:
            await until(lambda: engine.status()["waiting"]["background"])
        await plain(exchange)

    async with serving(server) as engine:
        await ask(engine, saying("old", conversation="a"))
        server.chat, before = slow, len(server.seen)
        await ask(engine, warming("new", conversation="a"))
        server.chat = plain
        await until(lambda: not engine.status()["ahead"])
    evaluated = [e.body["messages"][0]["content"] for e in server.seen[before:]]
    assert evaluated == ["new"]


async def test_the_chat_that_is_likely_to_be_next_is_made_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote_next, "AHEAD_S", 0.01)
    server = llama_cpp(answering)

    def evaluated() -> list[str]:
        return [e.body["messages"][0]["content"] for e in server.seen if not e.body["stream"]]

    async with serving(server) as engine:
        for conversation in ("a", "b", "a"):
            await ask(engine, saying(conversation, conversation=conversation))
            await until(lambda: not engine.status()["ahead"])
        # After a's first turn b spoke, so it is b's turn now.
        assert evaluated()[-1] == "b"
        assert engine.place("me", "b") is Place.SEQUENCE
        assert engine.place("me", "a") is engine.place("you", "b") is Place.COLD
        before = len(server.seen)
        await ask(engine, saying("b", "Hello", "go on", conversation="b"))
        assert server.seen[before].body["stream"]
        await until(lambda: not engine.status()["ahead"])
        assert evaluated()[-1] == "a"
        # A title takes the sequence; what comes next is made ready again.
        await ask(engine, saying("A title for this?", priority=SIDE, keep=False))
        await until(lambda: not engine.status()["ahead"])
        assert evaluated()[-1] == "a"
        assert evaluated().count("a") >= 2


async def test_a_forgotten_chat_is_not_made_ready_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_next, "AHEAD_S", 0.01)
    server = llama_cpp(answering)
    plain = server.chat

    async def held(exchange: Exchange) -> None:
        if exchange.said == "secret running":
            await server.noted("forgotten")
        await plain(exchange)

    server.chat = held
    title = replace(saying("A title?", priority=SIDE, keep=False), owner="you")
    async with serving(server) as engine:
        await ask(engine, saying("secret", conversation="a"))
        await until(lambda: not engine.status()["ahead"])
        running = asyncio.create_task(ask(engine, saying("secret running", conversation="b")))
        await server.noted("asked secret running")
        await engine.forget("me")
        await server.note("forgotten")
        await running
        before = len(server.seen)
        await ask(engine, title)
        await until(lambda: not engine.status()["ahead"])
        assert [e.said for e in server.seen[before:]] == ["A title?"]
        session = engine._session
        assert session is not None
        assert "secret" not in repr(vars(session.rotation)) + repr(vars(session.resident))


# -- llama-server --------------------------------------------------------------------------------


def slots_of(server: Upstream) -> list[int]:
    return [e.body["id_slot"] for e in server.seen]


async def test_conversations_keep_their_slots_and_the_least_recent_one_leaves() -> None:
    server = llama_server(slots=2)
    async with serving(server, remote=RemoteConfig()) as engine:
        for conversation in ("a", "b", "a", "b", "c", "b", "c", "a"):
            await ask(engine, asking("hi", conversation=conversation))
    a, b, a2, b2, c, b3, c2, a3 = slots_of(server)
    assert {a, b} == {0, 1}
    assert (a2, b2, b3) == (a, b, b)
    assert c == c2 == a
    assert a3 == b  # used longer ago than c's
    assert all(e.body["cache_prompt"] for e in server.seen)


async def test_a_context_is_warmed_up_to_where_the_next_message_will_stand() -> None:
    server = llama_server()
    async with serving(server, remote=RemoteConfig()) as engine:
        await ask(engine, asking("hi", conversation="a"))
        events = await ask(engine, warming("hi", "Hello.", conversation="a"))
    whole = render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."},
                    {"role": "user", "content": "?"}])  # fmt: skip
    assert server.log[-1] == f"warm {slots_of(server)[0]} {whole.partition('?')[0]}"
    assert len(server.seen) == 1
    last = finish(events)
    assert (last.cached_tokens, last.completion_tokens) == (3, 0)
    assert last.prompt_tokens == len(tokens(whole.partition("?")[0]))


async def test_two_answers_of_one_conversation_do_not_wait_for_each_other() -> None:
    async def script(exchange: Exchange) -> None:
        if len(server.seen) == 1:
            await server.noted("asked second")
        await hello(exchange)

    server = llama_server(script)
    async with serving(server, remote=RemoteConfig()) as engine:
        tasks = [asyncio.create_task(ask(engine, asking("first", conversation="a")))]
        await server.noted("asked first")
        tasks.append(asyncio.create_task(ask(engine, asking("second", conversation="a"))))
        await asyncio.gather(*tasks)
        engine.check_integrity()
    assert sorted(slots_of(server)) == [0, 1]


async def test_a_slot_is_saved_after_warming_and_restored_when_its_chat_comes_back() -> None:
    server = llama_server(slots=1, saves=True)
    async with serving(server, remote=RemoteConfig()) as engine:
        assert engine.status()["details"]["slots_saved"]
        await ask(engine, asking("hi", conversation="a"))
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        saves = [line for line in server.log if line.startswith("save chatfold")]
        assert len(saves) == 1
        name = saves[0].removeprefix("save ")
        assert f"restore {name}" not in server.log
        await ask(engine, asking("other", conversation="b"))
        await ask(engine, asking("hi again", conversation="a"))
        assert server.log[-3:] == [f"restore {name}", "restore in 0", "asked hi again"]


async def test_the_books_tell_where_a_conversation_was_left_and_only_its_owner() -> None:
    server = llama_server(slots=1, saves=True)
    async with serving(server, remote=RemoteConfig()) as engine:
        await engine.model()
        assert engine.place("me", "a") is Place.COLD
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        assert engine.place("me", "a") is Place.SLOT
        await ask(engine, replace(asking("other", conversation="b"), owner="you"))
        n_asked = len(server.seen), len(server.log)
        assert engine.place("me", "a") is Place.FILE
        assert engine.place("you", "b") is Place.SLOT
        assert engine.place("me", "b") is engine.place("you", "a") is Place.COLD
        assert (len(server.seen), len(server.log)) == n_asked
        await ask(engine, asking("third", conversation="c"))
        assert engine.place("you", "b") is Place.COLD  # nothing of it was saved


@pytest.mark.parametrize(("fails", "place"), [("refuses", Place.SLOT), ("breaks off", Place.COLD)])
async def test_a_server_that_refuses_one_request_still_holds_the_others(
    fails: str, place: Place
) -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.said == "refuses":
            await exchange.reply({"error": {"message": "Busy."}}, status=503)
        elif exchange.said == "breaks off":
            exchange.hang_up()
        else:
            await hello(exchange)

    async with serving(llama_server(script, slots=2), remote=RemoteConfig()) as engine:
        await ask(engine, asking("hi", conversation="a"))
        with pytest.raises(EngineUnavailable):
            await ask(engine, asking(fails, conversation="b"))
        assert engine.place("me", "a") is place


async def test_the_one_sequence_is_told_to_the_owner_of_what_it_holds() -> None:
    async with serving(llama_cpp(answering)) as engine:
        await engine.model()
        assert engine.place("me", "a") is None
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        assert engine.place("me", "a") is Place.SEQUENCE
        assert engine.place("you", "a") is engine.place("me", "b") is Place.COLD
        await ask(engine, replace(asking("other", conversation="b"), owner="you"))
        assert engine.place("you", "b") is Place.SEQUENCE


async def test_a_slot_that_cannot_be_restored_is_evaluated_again() -> None:
    server = llama_server(slots=1, saves=True)
    async with serving(server, remote=RemoteConfig()) as engine:
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        await ask(engine, asking("other", conversation="b"))
        server.log.clear()
        assert text(await ask(engine, asking("hi again", conversation="a"))) == "Hello"
        await ask(engine, asking("other", conversation="b"))
        await ask(engine, asking("hi again", conversation="a"))
        assert not any(line.startswith("restore") for line in server.log)


async def test_a_conversation_whose_restore_was_broken_off_sits_nowhere() -> None:
    async def hangs(exchange: Exchange) -> None:
        await server.note("restoring")
        await exchange.until_gone()

    server = llama_server(slots=1, saves=True)
    async with serving(server, remote=RemoteConfig()) as engine:
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        await ask(engine, asking("other", conversation="b"))
        plain, server.routes["POST", "/slots/0"] = server.routes["POST", "/slots/0"], hangs
        async with engine.generate(asking("hi again", conversation="a")):
            await server.noted("restoring")
        assert engine.place("me", "a") is Place.FILE
        server.routes["POST", "/slots/0"] = plain
        await ask(engine, asking("hi again", conversation="a"))
        assert server.log[-2:] == ["restore in 0", "asked hi again"]


async def test_forgetting_empties_the_owners_slots_and_files_and_nobody_elses() -> None:
    server = llama_server(slots=2, saves=True)
    async with serving(server, remote=RemoteConfig()) as engine:
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        theirs = replace(warming("hi", "Hello.", conversation="b"), owner="you")
        await ask(engine, theirs)
        (mine, other) = (line for line in server.log if line.startswith("save chatfold"))
        server.log.clear()
        await engine.forget("me")
        await until(lambda: not engine._emptying.at_work)
        emptied = next(line for line in server.log if line.startswith("erase"))
        assert server.log.index(emptied) < server.log.index(mine)
        assert other not in server.log
        server.log.clear()
        await ask(engine, asking("hi", conversation="a"))
        await ask(engine, replace(asking("hi", conversation="b"), owner="you"))
        assert not any(line.startswith("restore") for line in server.log)
        assert "taken=2/2" in engine.status()["slots"]


def on_erase(server: Upstream, script: Any) -> None:
    """`script` gets to see each request that erases a slot; it answers, or says that it did not."""
    for path, plain in list(server.routes.items()):
        if path[1].startswith("/slots/"):

            async def route(exchange: Exchange, plain: Any = plain) -> None:
                if not (exchange.path.endswith("=erase") and await script(exchange)):
                    await plain(exchange)

            server.routes[path] = route


def emptied(server: Upstream) -> list[str]:
    return [line for line in server.log if re.match("erase|save chatfold", line)]


async def test_what_a_running_request_needs_is_emptied_when_it_ends() -> None:
    async def held(exchange: Exchange) -> None:
        await server.noted("forgotten")
        await answering(exchange)

    server = llama_server(slots=2, saves=True)
    async with serving(server, remote=RemoteConfig()) as engine:
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        (file,) = emptied(server)
        server.chat = held
        chats = [asyncio.create_task(ask(engine, asking("mine", conversation="a")))]
        await server.noted("asked mine")
        theirs = replace(asking("theirs", conversation="b"), owner="you")
        chats.append(asyncio.create_task(ask(engine, theirs)))
        await server.noted("asked theirs")
        server.log.clear()
        await engine.forget("me")
        await until(lambda: not engine._emptying.at_work)
        assert emptied(server) == []
        assert "owed=2" in engine.status()["slots"]
        await server.note("forgotten")
        await asyncio.gather(*chats)
        await until(lambda: "owed=0" in engine.status()["slots"])
        assert f"erase {slots_of(server)[0]}" in server.log
        assert file in server.log
        assert engine.place("me", "a") is Place.COLD
        engine.check_integrity()


async def test_what_is_warmed_while_it_is_forgotten_is_not_kept() -> None:
    server = llama_server(slots=1, saves=True)
    plain = server.routes["POST", "/completion"]

    async def held(exchange: Exchange) -> None:
        await engine.forget("me")
        await plain(exchange)

    server.routes["POST", "/completion"] = held
    async with serving(server, remote=RemoteConfig()) as engine:
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        await until(lambda: "owed=0" in engine.status()["slots"])
        (saved, erased, *_) = done = emptied(server)
        assert done[-2:] == [erased, saved]
        assert engine.place("me", "a") is Place.COLD


@pytest.mark.parametrize("fails", ["500", "reset"])
async def test_what_could_not_be_emptied_is_tried_again_behind_the_next_request(
    fails: str,
) -> None:
    server = llama_server(slots=2, saves=True)
    n_failed = 0

    async def failing(exchange: Exchange) -> bool:
        nonlocal n_failed
        n_failed += 1
        if n_failed > 2:
            return False
        exchange.reset() if fails == "reset" else await exchange.reply({}, status=500)
        return True

    on_erase(server, failing)
    async with serving(server, remote=RemoteConfig()) as engine:
        for conversation in "ab":
            await ask(engine, warming("hi", "Hello.", conversation=conversation))
        files = emptied(server)
        server.log.clear()
        await engine.forget("me")
        await until(lambda: not engine._emptying.at_work)
        assert emptied(server) == []
        for n in range(3):
            await ask(engine, replace(asking(f"hi {n}", conversation="c"), owner="you"))
            await until(lambda: not engine._emptying.at_work)
        assert set(emptied(server)) == {*files, "erase 0", "erase 1"}


async def test_who_sits_in_a_slot_that_is_used_to_empty_a_file_sits_there_no_more() -> None:
    server = llama_server(slots=1, saves=True)
    async with serving(server, remote=RemoteConfig()) as engine:
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        (file,) = emptied(server)
        await ask(engine, replace(asking("theirs", conversation="b"), owner="you"))
        server.log.clear()
        assert engine.place("you", "b") is Place.SLOT
        await engine.forget("me")
        await until(lambda: not engine._emptying.at_work)
        assert emptied(server) == ["erase 0", file]
        assert engine.place("you", "b") is Place.COLD


async def test_nobody_takes_a_slot_between_its_emptying_and_the_writing_of_the_file() -> None:
    server = llama_server(slots=1, saves=True)
    asked: list[asyncio.Task[Any]] = []

    async def asking_meanwhile(exchange: Exchange) -> bool:
        theirs = replace(asking("theirs", conversation="b"), owner="you")
        asked.append(asyncio.create_task(ask(engine, theirs)))
        await until(lambda: engine.status()["running"]["chat"])
        await asyncio.sleep(0.05)
        return False

    async with serving(server, remote=RemoteConfig()) as engine:
        await ask(engine, warming("hi", "Hello.", conversation="a"))
        (file,) = emptied(server)
        server.log.clear()
        on_erase(server, asking_meanwhile)
        await engine.forget("me")
        await until(lambda: asked)
        await asyncio.gather(*asked)
        assert server.log.index(file) < server.log.index("asked theirs")
        assert slots_of(server) == [0]


async def test_what_is_still_to_be_emptied_is_emptied_when_the_server_is_found_again() -> None:
    server = llama_server(slots=1, saves=True)
    async with serving(server, remote=RemoteConfig(recheck_s=0.05)) as engine:
        await ask(engine, warming("hi", "Hello.", conversation="a"))

        async def gone(exchange: Exchange) -> bool:
            exchange.reset()
            return True

        routes = dict(server.routes)
        on_erase(server, gone)
        (file,) = emptied(server)
        server.log.clear()
        await engine.forget("me")
        await until(lambda: not engine._emptying.at_work)
        assert emptied(server) == []
        server.routes = routes
        server.props = server.props | {"media_marker": "second"}
        await until(lambda: emptied(server) == ["erase 0", file])


async def test_forgetting_empties_every_slot_of_titles_and_of_second_requests() -> None:
    async def script(exchange: Exchange) -> None:
        await server.noted("asked chat again")
        await answering(exchange)

    server = llama_server(script, slots=3, saves=True)
    async with serving(server, remote=RemoteConfig()) as engine:
        tasks = [asyncio.create_task(ask(engine, asking("chat", conversation="a")))]
        await server.noted("asked chat")
        tasks += [
            asyncio.create_task(ask(engine, asking(f"chat {word}", conversation="a")))
            for word in ("once more", "again")
        ]
        await asyncio.gather(*tasks)
        await engine.forget("me")
        await until(lambda: not engine._emptying.at_work)
        assert {line for line in server.log if line.startswith("erase")} == {
            "erase 0",
            "erase 1",
            "erase 2",
        }


async def test_chats_run_side_by_side_and_a_title_waits_for_them() -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.said.startswith("chat"):
            await server.noted("asked chat 2")
            assert "asked title" not in server.log
        await hello(exchange)

    server = llama_server(script, slots=2)
    async with serving(server, remote=RemoteConfig()) as engine:
        first = asyncio.create_task(ask(engine, asking("chat 1", conversation="a")))
        await server.noted("asked chat 1")
        title = asyncio.create_task(ask(engine, asking("title", SIDE)))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(ask(engine, asking("chat 2", conversation="b")))
        await asyncio.gather(first, title, second)
    assert server.log[-1] == "asked title"


# -- any other -----------------------------------------------------------------------------------


async def test_the_conversation_goes_along_as_a_header_and_the_clients_key_does_not() -> None:
    server = Upstream()
    async with serving(server) as engine:
        await ask(engine, asking("hi", conversation="abc", client_key="sk-client"))
    headers = server.seen[0].headers
    assert headers["x-conversation-id"] == "abc"
    assert set(headers) == {
        "accept", "accept-encoding", "content-length", "content-type", "host", "user-agent",
        "x-conversation-id",
    }  # fmt: skip


async def test_the_operators_key_is_sent_and_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    server = Upstream()
    with caplog.at_level("DEBUG"):
        async with serving(server, remote=RemoteConfig(api_key="sk-operator")) as engine:
            await ask(engine, asking("hi", client_key="sk-client"))
            shown = repr(engine) + repr(engine._settings) + str(engine.status()) + caplog.text
    assert server.seen[0].headers["authorization"] == "Bearer sk-operator"
    assert "sk-" not in shown


async def test_a_clients_key_goes_on_where_it_is_told_to_and_for_its_own_work_only() -> None:
    server = Upstream(models=None)
    remote_config = RemoteConfig(forward_key="always")
    async with serving(server, remote=remote_config) as engine:
        await ask(engine, asking("mine", client_key="sk-mine"))
        await ask(engine, asking("background", BACKGROUND))
        other = Generate("you", asking("yours").context, BACKGROUND)
        await ask(engine, other)
    sent = [e.headers.get("authorization") for e in server.seen]
    assert sent == ["Bearer sk-mine", "Bearer sk-mine", None]


async def test_many_requests_run_at_a_time_where_the_server_is_a_cluster() -> None:
    async def script(exchange: Exchange) -> None:
        if len(server.seen) == 50:
            await server.note("all there")
        await server.noted("all there")
        await hello(exchange)

    server = Upstream(chat=script)
    async with serving(server, remote=RemoteConfig()) as engine:
        results = await asyncio.gather(*(ask(engine, asking(f"{i}")) for i in range(50)))
    assert all(text(events) == "Hello" for events in results)


async def test_a_request_waits_no_longer_than_a_server_takes_to_answer_for_the_first_time() -> None:
    engine = RemoteEngine.from_config(Config(upstream="http://127.0.0.1:9"))
    await engine.start()
    try:
        await until(lambda: engine.status()["trouble"])
        engine._settings = remote.RemoteSettings(engine._settings.upstream, connect_s=0.05)
        with pytest.raises(EngineUnavailable, match="cannot be reached"):
            await ask(engine)
    finally:
        await engine.stop()
