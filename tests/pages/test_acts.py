"""What a page changes: pins, corrections, one message forgotten; and what was noted of answers."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from html import unescape

import pytest
from served import START_S, TEXTS, Served

from memory.erasure import FORGOTTEN
from memory.integrity import integrity
from memory.store import Store, StoreUnavailable
from proxy.engines.base import Event, Generate, Priority
from proxy.headers import owner_of
from proxy.tuning.simulation import SimulatedEngine

FACT = "My daughter's name is Ines."


def shown(page: str) -> str:
    """All that stands word for word on a page."""
    found = re.findall(r"<pre>(.*?)</pre>", page, re.S)
    return unescape("".join(re.sub(r"<[^>]+>", "", text) for text in found))


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + START_S
    while not done():
        assert time.monotonic() < end, "still waiting"
        time.sleep(0.01)


def context_text(house: Served, chat: str) -> str:
    return shown(house.page(f"/inspect/c/{chat}/context").text)


def sent_last(house: Served) -> list[str]:
    return [m.text for m in house.engine.chat_calls()[-1].context.messages]


def test_a_pinned_fact_is_in_every_context_from_then_on(fresh: Served) -> None:
    messages = fresh.say(TEXTS[:6])
    fresh.wait_idle()
    base = f"/inspect/c/{fresh.only()}"
    assert fresh.act(f"{base}/pin", {"token": fresh.token(), "text": FACT}).status_code == 303
    fresh.wait_idle()
    assert FACT in context_text(fresh, fresh.only())
    calls = len(fresh.engine.chat_calls())
    for text in TEXTS[6:20]:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": fresh.ask(messages)})
        fresh.wait_idle()
    later = fresh.engine.chat_calls()[calls:]
    assert all(FACT in call.context.messages[0].text for call in later)
    assert "Earlier in this conversation" in later[-1].context.messages[0].text
    # Warm from the first request on: only the new message is evaluated.
    assert all(call.evaluated < 80 for call in later)
    number = re.search(r"/unpin/(\d+)", fresh.page(base).text)
    assert number
    assert fresh.act(f"{base}/unpin/{number[1]}", {"token": fresh.token()}).status_code == 303
    fresh.wait_idle()
    assert FACT not in context_text(fresh, fresh.only())


@pytest.mark.parametrize("text", ["", "  ", "x" * 501])
def test_what_cannot_be_pinned_is_refused(fresh: Served, text: str) -> None:
    fresh.say(["Hello."])
    base = f"/inspect/c/{fresh.only()}"
    assert fresh.act(f"{base}/pin", {"token": fresh.token(), "text": text}).status_code == 400


def test_pins_are_bounded(fresh: Served) -> None:
    fresh.say(["Hello."])
    base, token = f"/inspect/c/{fresh.only()}", fresh.token()
    sent = [{"token": token, "text": f"Fact {i}."} for i in range(21)]
    codes = [fresh.act(f"{base}/pin", fields).status_code for fields in sent]
    assert codes == [303] * 20 + [400]


def test_a_corrected_summary_takes_the_others_place_and_the_old_one_stays(fresh: Served) -> None:
    messages = fresh.say(TEXTS[:14])
    fresh.wait_idle()
    base = f"/inspect/c/{fresh.only()}"
    number = re.search(r'class="card summary active" id="s(\d+)"', fresh.page(base).text)
    assert number
    mine = "They planned a ferry trip; the cat is called Miso <b>."
    done = fresh.act(f"{base}/summary/{number[1]}/correct", {"token": fresh.token(), "text": mine})
    assert done.status_code == 303
    fresh.wait_idle()
    assert mine in context_text(fresh, fresh.only())
    page = fresh.page(done.headers["location"]).text
    assert "corrected by hand" in page and "in use" in page and "<b>." not in page
    fresh.ask([*messages, {"role": "user", "content": "Go on."}])
    assert mine in sent_last(fresh)[0]
    fresh.wait_idle()
    assert fresh.page(f"{base}/summary/{number[1]}").status_code == 200
    old = fresh.act(f"{base}/summary/{number[1]}/correct", {"token": fresh.token(), "text": "x"})
    assert old.status_code == 404


def test_a_forgotten_message_is_gone_and_stays_gone_when_it_is_sent_again(fresh: Served) -> None:
    secret = "The vault opens with 90125."
    messages = fresh.say([TEXTS[0], secret, *TEXTS[1:14]])
    fresh.wait_idle()
    base = f"/inspect/c/{fresh.only()}"
    page = fresh.page(f"{base}/turns?depth=2").text
    asked = re.findall(rf"{base}/message/([0-9a-f]{{40}})/forget", page)[2]
    assert secret in fresh.page(f"{base}/message/{asked}/forget").text
    done = fresh.act(f"{base}/message/{asked}/forget", {"token": fresh.token()})
    assert done.status_code == 303
    fresh.wait_idle()
    data = fresh.app.state.config.data
    assert FORGOTTEN in fresh.page(done.headers["location"]).text
    assert not any(b"90125" in file.read_bytes() for file in data.glob("*.db*"))
    fresh.ask([*messages, {"role": "user", "content": "What opens the vault?"}])
    assert "90125" not in "".join(sent_last(fresh))
    fresh.wait_idle()
    assert not any(b"90125" in file.read_bytes() for file in data.glob("*.db*"))
    assert integrity(next(data.glob("*.db"))) == []
    everything = {"token": fresh.token()}
    assert fresh.act("/inspect/forget", everything).status_code == 303
    assert integrity(next(data.glob("*.db"))) == []


@pytest.mark.parametrize("act", ["conversation", "everything", "page", "message"])
def test_forgetting_ends_the_background_work_before_the_model_forgets(
    fresh: Served, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """What came behind the model's forgetting would be held by it again."""
    told: list[str] = []
    events, forget = SimulatedEngine._events, SimulatedEngine.forget

    async def never_done(engine: SimulatedEngine, request: Generate) -> AsyncIterator[Event]:
        if request.priority == Priority.BACKGROUND:
            told.append("began")
            try:
                await asyncio.Event().wait()
            finally:
                told.append("given up")
        async for event in events(engine, request):
            yield event

    async def noted(engine: SimulatedEngine, owner: str) -> None:
        told.append("forgotten")
        await forget(engine, owner)

    monkeypatch.setattr(SimulatedEngine, "_events", never_done)
    monkeypatch.setattr(SimulatedEngine, "forget", noted)
    fresh.say(["The vault's code is 90125."])
    until(lambda: told == ["began"])
    chat = fresh.only()
    if act == "page":
        fresh.act(f"/inspect/c/{chat}/forget", {"token": fresh.token()})
    elif act == "message":
        page = fresh.page(f"/inspect/c/{chat}/turns?depth=1").text
        path = re.findall(rf"/inspect/c/{chat}/message/[0-9a-f]{{40}}/forget", page)[0]
        fresh.act(path, {"token": fresh.token()})
        # What is left of the chat is warmed anew.
        until(lambda: len(told) > 3)
        assert told == ["began", "given up", "forgotten", "began"]
        return
    else:
        path = "/api/conversations" + (f"/{chat}" if act == "conversation" else "")
        assert fresh.client.delete(fresh.url + path).status_code == 200
    fresh.wait_idle()
    assert told == ["began", "given up", "forgotten"]


def test_the_model_forgets_also_where_the_file_may_still_hold_bytes(
    fresh: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.say(["The vault's code is 90125."])
    fresh.wait_idle()
    assert fresh.engine.resident

    async def busy(store: Store, owner: str) -> int:
        raise StoreUnavailable("deleted, but another program is reading the file")

    monkeypatch.setattr(Store, "forget_owner", busy)
    assert fresh.client.delete(f"{fresh.url}/api/conversations").status_code == 503
    assert not fresh.engine.resident


def test_what_the_model_saw_at_each_turn_is_built_again_to_the_character(fresh: Served) -> None:
    fresh.say(TEXTS[:20])
    fresh.wait_idle()
    base = f"/inspect/c/{fresh.only()}"
    calls = fresh.engine.chat_calls()
    for turn in range(1, 21):
        page = fresh.page(f"{base}/seen/{turn}").text
        assert "equal to what was sent" in page, turn
        # Everything but what is marked as gone stands there as it was sent.
        kept = re.sub(r"<pre><del>.*?</del></pre>", "", page, flags=re.S)
        sent = calls[turn - 1].context.messages
        assert shown(kept) == "".join(m.text for m in sent)
    assert fresh.page(f"{base}/seen/21").status_code == 404
    assert "new" in fresh.page(f"{base}/seen/20").text


def test_charts_tell_what_each_answer_cost(fresh: Served) -> None:
    fresh.say(TEXTS[:8])
    fresh.wait_idle()
    page = fresh.page(f"/inspect/c/{fresh.only()}").text
    for number, call in enumerate(fresh.engine.chat_calls(), start=1):
        told = f"Turn {number}, from the cache {call.cached_tokens:,}, "
        told += f"evaluated {call.evaluated:,}, generated {call.generated:,}"
        assert told in page


@pytest.mark.parametrize("path", ["pin", "unpin/1", "summary/1/correct", "message/00/forget"])
def test_these_acts_too_are_refused_from_elsewhere_and_for_others(fresh: Served, path: str) -> None:
    fresh.say(["Mine."], user="anna")
    fresh.say(["Mine too."], user="bert")

    def be(user: str) -> str:
        token = fresh.token("/inspect/owners")
        fresh.act("/inspect/owner", {"token": token, "owner": owner_of({}, user)})
        return fresh.only()

    annas = be("anna")
    token = fresh.token()
    act, fields = f"/inspect/c/{annas}/{path}", {"token": token, "text": "x"}
    refused = fresh.act(act, fields, origin="http://evil.example")
    assert refused.status_code == 403
    assert fresh.act(act, {"text": "x"}).status_code == 403
    be("bert")
    foreign = fresh.act(act, {"token": fresh.token(), "text": "x"})
    assert foreign.status_code == 404
