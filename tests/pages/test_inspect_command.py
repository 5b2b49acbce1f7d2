"""`chatfold inspect` on a file that a proxy has open."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest
from served import Served

from proxy.cli import main
from proxy.headers import owner_of


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def inspect(house: Served, *arguments: str) -> Done:
    """In this very process: a start of Python for each would be most of the time."""
    given = ["inspect", *arguments, "--data", str(house.app.state.config.data)]
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(given)
    return Done(int(end.value.code or 0), told(out), told(err))


def told(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


@pytest.fixture(autouse=True)
def only_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CHATFOLD_")]:
        monkeypatch.delenv(name)


def test_the_terminal_shows_what_the_pages_show(open_house: Served) -> None:
    listed = json.loads(inspect(open_house, "list", "--json").stdout)
    chat = max(listed, key=lambda entry: entry["n_messages"])
    assert chat["n_summaries"] > 0
    shown = json.loads(inspect(open_house, "show", chat["id"], "--json", "--turns", "2").stdout)
    assert shown["ends"] == 2 and len(shown["messages"]) == 4
    assert {s["state"] for s in shown["summaries"]} >= {"active"}
    text = inspect(open_house, "show", chat["id"]).stdout
    assert "They spoke of harbours" in text and "in use" in text
    found = inspect(open_house, "search", "sandwich")
    assert chat["id"] in found.stdout
    exported = json.loads(inspect(open_house, "export", chat["id"], "--as", "librechat").stdout)
    assert len(exported["messages"]) == chat["n_messages"]


def test_the_context_is_counted_without_loading_the_model(open_house: Served) -> None:
    chat = open_house.only()
    found = json.loads(inspect(open_house, "context", chat, "--json").stdout)
    assert found["context"][-1]["role"] == "assistant"
    assert found["shape"]["verbatim_tokens"] > 0


def test_owners_are_named_and_one_is_shown_at_a_time(fresh: Served) -> None:
    fresh.say(["Anna likes plums."], user="anna")
    fresh.say(["Bert likes \x1b[31mquinces."], user="bert")
    anna, bert = owner_of({}, "anna"), owner_of({}, "bert")
    named = inspect(fresh, "owners").stdout
    assert anna in named and bert in named
    assert "choose one with --owner" in inspect(fresh, "list").stderr
    listed = inspect(fresh, "list", "--owner", bert).stdout
    assert "quinces" in listed and "plums" not in listed and "\x1b" not in listed
    theirs = json.loads(inspect(fresh, "list", "--owner", anna, "--json").stdout)[0]["id"]
    for command in ("show", "context", "export"):
        refused = inspect(fresh, command, theirs, "--owner", bert)
        assert refused.returncode != 0 and "no conversation" in refused.stderr


@pytest.mark.parametrize("arguments", [("show", "nothing"), ("search",), ("wash",)])
def test_mistakes_are_one_line(open_house: Served, arguments: tuple[str, ...]) -> None:
    done = inspect(open_house, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
