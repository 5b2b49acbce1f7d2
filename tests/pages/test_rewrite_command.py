"""`chatfold inspect rewrite`: a policy is tried from the terminal, on a running proxy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from inspected import inspect, on, value
from served import TEXTS, Served, served

from proxy.headers import owner_of

OTHER = "They spoke of 24 ferries, of pier 3, and of Miso, who is a grey cat."
SIDES = ("before", "again")
ACTS = ("use", "undo", "stop", "go", "discard", "follow")


@pytest.fixture(autouse=True)
def only_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CHATFOLD_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def told(fresh: Served) -> Served:
    fresh.say(TEXTS[:18])
    fresh.wait_idle()
    return fresh


def begun(house: Served, chat: str, *arguments: str) -> str:
    given = ("--newest", "9", *arguments, "--json")
    return str(value(on(house, "rewrite", "begin", chat, *given))["id"])


def state(house: Served, chat: str, number: str) -> str:
    found = value(on(house, "rewrite", "list", chat, "--json"))["rewrites"]
    return next(str(one["state"]) for one in found if str(one["id"]) == number)


def sees(house: Served, chat: str) -> str:
    house.wait_idle()
    return "".join(m["text"] for m in value(on(house, "context", chat, "--json"))["context"])


def hold_keeper(house: Served) -> None:
    """As if it had work: a set waits for it."""
    house.app.state.keeper._busy.set()
    house.app.state.keeper._quiet.clear()


def let_keeper_go(house: Served) -> None:
    house.app.state.keeper._busy.clear()
    house.app.state.loop.call_soon_threadsafe(house.app.state.keeper._quiet.set)


def test_a_set_is_written_followed_compared_and_used(told: Served) -> None:
    chat = told.only()
    told.engine.summary = lambda context: OTHER
    done = on(told, "rewrite", "begin", chat, "--newest", "9", "--follow")
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == "set 1, balanced" and last.startswith("done, ")
    of = last.split()[3]
    assert last == f"done, {of} of {of} messages"
    assert OTHER not in sees(told, chat)

    assert "balanced" in on(told, "rewrite", "list", chat).stdout
    shown = on(told, "rewrite", "compare", chat, "1").stdout
    assert "They spoke of harbours" in shown and OTHER in shown
    heads = [line.split() for line in shown.splitlines()]
    assert ["turns", "before", "again"] in heads and "only here: " in shown
    found = value(on(told, "rewrite", "compare", chat, "1", "--json"))["compared"]
    assert found["before"]["kept_in_all"]["of"] == found["again"]["kept_in_all"]["of"] > 0
    sides = [[s["text"] for r in found["rows"] for s in r[side]["summaries"]] for side in SIDES]
    assert [any(OTHER in text for text in side) for side in sides] == [False, True]
    # The file beside it lists and compares the same.
    for given in (("list", chat), ("compare", chat, "1")):
        assert inspect(told, "rewrite", *given).stdout == on(told, "rewrite", *given).stdout
        assert value(inspect(told, "rewrite", *given, "--json")) == value(
            on(told, "rewrite", *given, "--json")
        )

    assert on(told, "rewrite", "use", chat, "1").stdout == "set 1, balanced: used\n"
    assert OTHER in sees(told, chat)
    twice = on(told, "rewrite", "use", chat, "1")
    assert twice.returncode == 2 and "Traceback" not in twice.stderr
    assert "They spoke of harbours" not in sees(told, chat)
    assert on(told, "rewrite", "undo", chat, "1").stdout == "set 1, balanced: done\n"
    assert "They spoke of harbours" in sees(told, chat)
    assert on(told, "rewrite", "undo", chat, "1").returncode == 2
    assert on(told, "rewrite", "use", chat, "1").returncode == 0
    assert OTHER in sees(told, chat)
    assert "discarded" in on(told, "rewrite", "discard", chat, "1").stdout
    assert OTHER in sees(told, chat)
    gone = on(told, "rewrite", "compare", chat, "1")
    assert gone.returncode == 2 and "no set 1" in gone.stderr


def test_it_is_stopped_and_gone_on_with(told: Served) -> None:
    chat = told.only()
    hold_keeper(told)
    number = begun(told, chat, "--policy", "extractive", "--knob", "summary=40")
    assert state(told, chat, number) == "waiting"
    listed = value(inspect(told, "rewrite", "list", chat, "--json"))["rewrites"]
    assert listed[0]["state"] == "unfinished" and listed[0]["policy"] == "extractive*"
    busy = on(told, "rewrite", "begin", chat)
    assert busy.returncode == 2 and "already" in busy.stderr
    assert "stopped" in on(told, "rewrite", "stop", chat, number).stdout
    early = on(told, "rewrite", "follow", chat, number)
    assert early.returncode == 2 and "stopped before its end" in early.stderr
    assert on(told, "rewrite", "use", chat, number).returncode == 2
    assert on(told, "rewrite", "go", chat, number).returncode == 0
    let_keeper_go(told)
    last = on(told, "rewrite", "follow", chat, number, "--json").stdout.splitlines()[-1]
    assert json.loads(last)["state"] == "done"
    shown = value(on(told, "rewrite", "compare", chat, number, "--json"))
    assert (
        shown["rewrite"]["state"] == "done" and shown["rewrite"]["done"] == shown["rewrite"]["of"]
    )
    assert shown["knobs"]["summary"] == 40


def test_what_is_no_policy_begins_nothing(told: Served) -> None:
    chat = told.only()
    for given, why in (
        (("--policy", "verbatim"), "no policy 'verbatim'"),
        (("--knob", "method=guess"), "cannot be used"),
        (("--knob", "window=3"), "cannot be chosen here"),
        (("--knob", "summary"), "--knob must be like"),
    ):
        refused = on(told, "rewrite", "begin", chat, *given)
        assert refused.returncode == 2 and why in refused.stderr, given
    url = f"{told.url}/api/conversations/{chat}/rewrites"
    for body in ("", "[]", '{"policy": 3}', '{"policy": "balanced", "newest": 0}', '{"polcy": ""}'):
        assert told.client.post(url, content=body).status_code == 400, body
    assert value(on(told, "rewrite", "list", chat, "--json"))["rewrites"] == []
    assert "no conversation" in on(told, "rewrite", "begin", "nothing").stderr


def test_on_the_file_alone_nothing_is_written(tmp_path: Path) -> None:
    with served(tmp_path / "data", window_tokens=900) as house:
        house.say(["Hello."])
        house.wait_idle()
        chat = house.only()
    for given in (("begin", chat), *((act, chat, "1") for act in ACTS)):
        refused = inspect(house, "rewrite", *given)
        assert refused.returncode == 2 and "--url" in refused.stderr, given
    listed = inspect(house, "rewrite", "list", chat)
    assert listed.returncode == 0 and "balanced" in listed.stdout


def test_sets_are_their_owners_alone(fresh: Served) -> None:
    fresh.say(TEXTS[:18], user="anna")
    fresh.say(["Mine too."], user="bert")
    fresh.wait_idle()
    anna, bert = (("--owner", owner_of({}, user)) for user in ("anna", "bert"))
    chat = value(on(fresh, "list", *anna, "--json"))[0]["id"]
    berts = value(on(fresh, "list", *bert, "--json"))[0]["id"]
    hold_keeper(fresh)
    number = begun(fresh, chat, *anna)
    for act in ("compare", *ACTS):
        for conversation in (chat, berts):
            foreign = on(fresh, "rewrite", act, conversation, number, *bert)
            assert foreign.returncode == 2 and "there is no set" in foreign.stderr.lower(), act
    for given in (("begin", chat), ("list", chat)):
        assert "no conversation" in on(fresh, "rewrite", *given, *bert).stderr
    listed: Any = value(on(fresh, "rewrite", "list", chat, *anna, "--json"))["rewrites"]
    assert [one["state"] for one in listed] == ["waiting"]
    let_keeper_go(fresh)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", ""),
        ("DELETE", "/1"),
        *(("POST", f"/1/{act}") for act in ("use", "undo", "stop", "go")),
    ],
)
def test_another_sites_page_writes_nothing_again(
    open_house: Served, method: str, path: str
) -> None:
    url = f"{open_house.url}/api/conversations/{open_house.only()}/rewrites{path}"
    body = b'{"policy": "balanced"}'
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        refused = open_house.client.request(method, url, content=body, headers=headers)
        assert refused.status_code == 403
