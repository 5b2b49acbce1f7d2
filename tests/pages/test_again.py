"""Summaries written again under another policy: beside the ones in use, then in their place."""

from __future__ import annotations

import re
from html import unescape
from itertools import pairwise

import pytest
from served import TEXTS, Served, served

from memory.integrity import integrity
from proxy.headers import owner_of

OTHER = "They spoke of 24 ferries, of pier 3, and of Miso, who is a grey cat."


def again(house: Served, base: str, **fields: str) -> str:
    """The address of a new set."""
    sent = {"token": house.token(), "policy": "balanced", "newest": "9"} | fields
    done = house.act(f"{base}/again", sent)
    assert done.status_code == 303, done.text
    return str(done.headers["location"])


def wait_written(house: Served) -> None:
    house.run(house.app.state.rewriter.idle())
    house.wait_idle()


def in_use(house: Served, base: str) -> str:
    """The system message of the context as it is now."""
    page = house.page(f"{base}/context").text
    found = re.search(r"<pre>(.*?)</pre>", page, re.S)
    assert found
    return unescape(re.sub(r"<[^>]+>", "", found[1]))


@pytest.fixture
def told(fresh: Served) -> tuple[Served, str, list[dict[str, str]]]:
    messages = fresh.say(TEXTS[:18])
    fresh.wait_idle()
    return fresh, f"/inspect/c/{fresh.only()}", messages


Told = tuple[Served, str, list[dict[str, str]]]


def test_a_set_is_written_compared_and_put_in_place(told: Told) -> None:
    house, base, messages = told
    before = in_use(house, base)
    house.engine.summary = lambda context: OTHER
    place = again(house, base)
    wait_written(house)
    # The chat uses what it used.
    assert in_use(house, base) == before and OTHER not in before
    page = house.page(place).text
    assert "ready to compare" in page and OTHER in page
    assert "They spoke of harbours" in page
    assert '<span class="chip active">' in page  # something that one side alone tells
    kept = re.search(r"kept in all</th><td>(\d+) / (\d+).*?</td><td>(\d+) / (\d+)", page)
    assert kept and kept[2] == kept[4]
    done = house.act(f"{place}/use", {"token": house.token()})
    assert done.status_code == 303
    house.wait_idle()
    assert OTHER in in_use(house, base)
    house.ask([*messages, {"role": "user", "content": "Go on."}])
    call = house.engine.chat_calls()[-1]
    assert OTHER in call.context.messages[0].text
    # The new context was warm before it was used: only the message and its header are evaluated.
    assert call.evaluated < 20
    house.wait_idle()
    summaries = house.page(f"{base}/summaries").text
    assert "merged or replaced" in summaries and "They spoke of harbours" in summaries
    assert house.act(f"{place}/use", {"token": house.token()}).status_code == 409
    assert house.act(f"{place}/discard", {"token": house.token()}).status_code == 303
    assert OTHER in in_use(house, base)
    assert house.page(place).status_code == 404
    assert integrity(house.app.state.config.data / "chatfold.db") == []


def test_the_old_ones_are_put_back(told: Told) -> None:
    house, base, messages = told
    old = "They spoke of harbours"
    house.engine.summary = lambda context: OTHER
    place = again(house, base)
    wait_written(house)
    assert house.act(f"{place}/undo", {"token": house.token()}).status_code == 409
    assert house.act(f"{place}/use", {"token": house.token()}).status_code == 303
    house.wait_idle()
    used = in_use(house, base)
    assert OTHER in used and old not in used
    assert "Put the old ones back" in house.page(place).text
    assert house.act(f"{place}/undo", {"token": house.token()}).status_code == 303
    house.wait_idle()
    assert old in in_use(house, base)
    assert "Use these" in house.page(place).text
    house.ask([*messages, {"role": "user", "content": "Go on."}])
    assert house.engine.chat_calls()[-1].evaluated < 20  # warm before it was used
    assert integrity(house.app.state.config.data / "chatfold.db") == []


def test_the_policy_chosen_shapes_the_candidates(told: Told) -> None:
    house, base, _ = told
    asked = len(house.engine.calls)
    place = again(house, base, policy="extractive", summary="40", block="120")
    wait_written(house)
    assert not [c for c in house.engine.calls[asked:] if c.max_tokens]
    page = house.page(place).text
    assert "extractive*" in page and "sentences of the chat" in page
    owner, chat = owner_of({}), house.only()
    (made,) = house.run(house.app.state.store.rewrites(owner, chat))
    spans = [(s.first_depth, s.last_depth) for s in made.candidates if not s.parents]
    assert spans[0][0] == 0 and spans[-1][1] == made.last_depth
    assert all(a[1] + 1 == b[0] for a, b in pairwise(spans))
    assert all(s.n_tokens <= 60 for s in made.blocks)


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "verbatim"},
        {"policy": "../../etc/passwd"},
        {"policy": "balanced", "method": "guess"},
        {"policy": "balanced", "summary": "-3"},
        {"policy": "balanced", "summary": "nan"},
        {"policy": "balanced", "block": "many"},
        {"policy": "balanced", "prompt": "x" * 4001},
    ],
)
def test_what_is_no_policy_is_refused_and_nothing_begins(
    told: Told, fields: dict[str, str]
) -> None:
    house, base, _ = told
    refused = house.act(f"{base}/again", {"token": house.token()} | fields)
    assert refused.status_code == 400
    assert "Written so far" not in house.page(f"{base}/again").text


def test_a_chat_without_summaries_has_nothing_to_write_again(fresh: Served) -> None:
    fresh.say(TEXTS[:2])
    fresh.wait_idle()
    base = f"/inspect/c/{fresh.only()}"
    assert "nothing to compare with" in fresh.page(f"{base}/again").text
    sent = {"token": fresh.token(), "policy": "balanced"}
    assert fresh.act(f"{base}/again", sent).status_code == 400


def test_it_waits_for_the_chat_can_be_stopped_and_gone_on_with(told: Told) -> None:
    house, base, _ = told
    keeper = house.app.state.keeper
    keeper._busy.set()
    keeper._quiet.clear()  # as if it had work
    place = again(house, base, policy="extractive")
    page = house.page(place).text
    assert "waits" in page and 'data-events="' in page and "live.js" in page
    second = house.act(f"{base}/again", {"token": house.token(), "policy": "balanced"})
    assert second.status_code == 409
    assert house.act(f"{place}/stop", {"token": house.token()}).status_code == 303
    page = house.page(place).text
    assert "stopped before its end" in page
    refused = house.act(f"{place}/use", {"token": house.token()})
    assert refused.status_code == 409
    keeper._busy.clear()
    house.app.state.loop.call_soon_threadsafe(keeper._quiet.set)
    assert house.act(f"{place}/go", {"token": house.token()}).status_code == 303
    wait_written(house)
    assert "ready to compare" in house.page(place).text


def test_the_events_of_a_set_end_with_it(told: Told) -> None:
    house, base, _ = told
    keeper = house.app.state.keeper
    keeper._busy.set()
    keeper._quiet.clear()
    place = again(house, base)
    with house.client.stream("GET", f"{house.url}{place}/events") as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data:"))
        assert "messages are summarised" in first
        keeper._busy.clear()
        house.app.state.loop.call_soon_threadsafe(keeper._quiet.set)
        assert any('"over"' in line for line in lines if line.startswith("data:"))


def test_forgetting_takes_the_candidates_along(told: Told) -> None:
    house, base, _ = told
    secret = "They spoke of swordfish and harbours, and of a grey cat called Miso."
    house.engine.summary = lambda context: secret
    again(house, base)
    wait_written(house)
    data = house.app.state.config.data
    assert any(b"swordfish and" in file.read_bytes() for file in data.glob("*.db*"))
    page = house.page(f"{base}/turns?depth=2").text
    message = re.findall(rf"{base}/message/([0-9a-f]{{40}})/forget", page)[2]
    house.engine.summary = lambda context: "They spoke of ferries."
    done = house.act(f"{base}/message/{message}/forget", {"token": house.token()})
    assert done.status_code == 303
    house.wait_idle()
    assert not any(b"swordfish and" in file.read_bytes() for file in data.glob("*.db*"))
    again(house, base)
    wait_written(house)
    assert house.act(f"{base}/forget", {"token": house.token()}).status_code == 303
    assert not any(b"They spoke of ferries" in file.read_bytes() for file in data.glob("*.db*"))
    assert integrity(next(data.glob("*.db"))) == []


def test_exports_hold_nothing_of_a_set_that_is_not_in_use(told: Told) -> None:
    house, base, _ = told
    before = [house.page(base + name).text for name in ("/export.md", "/librechat.json")]
    house.engine.summary = lambda context: OTHER
    again(house, base)
    wait_written(house)
    after = [house.page(base + name).text for name in ("/export.md", "/librechat.json")]
    assert before == after


@pytest.mark.parametrize("act", ["stop", "go", "use", "undo", "discard"])
def test_sets_are_their_owners_alone(fresh: Served, act: str) -> None:
    def be(user: str) -> str:
        token = fresh.token("/inspect/owners")
        fresh.act("/inspect/owner", {"token": token, "owner": owner_of({}, user)})
        return f"/inspect/c/{fresh.only()}"

    fresh.say(TEXTS[:18], user="anna")
    fresh.say(["Mine too."], user="bert")
    fresh.wait_idle()
    annas = be("anna")
    place = again(fresh, annas)
    wait_written(fresh)
    token = fresh.token()
    act_on = f"{place}/{act}"
    assert fresh.act(act_on, {"token": token}, origin="http://evil.example").status_code == 403
    assert fresh.act(act_on, {}).status_code == 403
    berts = be("bert")
    foreign = [place, f"{berts}/again/{place.rpartition('/')[2]}", f"{place}/events"]
    assert [fresh.page(path).status_code for path in foreign] == [404] * 3
    assert fresh.act(act_on, {"token": fresh.token()}).status_code == 404
    assert fresh.act(f"{annas}/again", {"token": fresh.token()}).status_code == 404
    be("anna")
    assert "ready to compare" in fresh.page(place).text


def test_a_set_that_was_begun_before_a_restart_can_be_gone_on_with(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = tmp_path_factory.mktemp("restart") / "data"
    with served(data, window_tokens=900) as house:
        house.say(TEXTS[:18])
        house.wait_idle()
        base = f"/inspect/c/{house.only()}"
        house.app.state.keeper._busy.set()
        house.app.state.keeper._quiet.clear()
        place = again(house, base)
    with served(data, window_tokens=900) as house:
        assert "stopped before its end" in house.page(place).text
        assert house.act(f"{place}/go", {"token": house.token()}).status_code == 303
        wait_written(house)
        assert "ready to compare" in house.page(place).text
