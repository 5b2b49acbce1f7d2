"""`chatfold inspect` on a running proxy, on its file beside it, and on the file alone."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from inspected import inspect, on, run, value
from served import TEXTS, Served, served

from memory.integrity import integrity
from proxy.cli import cli
from proxy.engines.embedded.snapshots import Snapshots
from proxy.headers import owner_of
from proxy.inspecting.api import api_routes
from proxy.inspecting.client import ProxySource

ROOT = Path(__file__).parent.parent.parent


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


# -- on a running proxy --------------------------------------------------------------------------

VIEWS = (
    "list",
    "search sandwich harbour",
    "show CHAT --turns 3",
    "timeline CHAT",
    "summaries CHAT",
    "summary CHAT SUMMARY",
    "branches CHAT",
    "show CHAT --leaf LEAF",
    "figures CHAT",
    "export CHAT --as markdown",
    "export CHAT --as openai",
    "export CHAT --as librechat",
    "owners",
)


def words(house: Served, view: str) -> list[str]:
    """The view's words, with a summary and a leaf of the other branch in their places."""
    chat = house.only()
    summary = value(inspect(house, "summaries", chat, "--json"))["summaries"][0]
    found = value(inspect(house, "branches", chat, "--json"))["branches"]
    leaf = next(b["leaf"] for b in found if not b["shown"])
    places = {"CHAT": chat, "SUMMARY": str(summary["id"]), "LEAF": leaf}
    return [places.get(word, word) for word in view.split()]


@pytest.mark.parametrize("view", VIEWS)
def test_a_running_proxy_tells_what_its_file_tells(open_house: Served, view: str) -> None:
    given = words(open_house, view)
    plain = on(open_house, *given)
    assert plain.returncode == 0 and plain.stdout == inspect(open_house, *given).stdout
    if not view.startswith("export"):
        assert value(on(open_house, *given, "--json")) == value(
            inspect(open_house, *given, "--json")
        )


def test_every_view_is_told_in_words(open_house: Served) -> None:
    chat = open_house.only()
    timeline = on(open_house, "timeline", chat).stdout
    assert "rank 0" in timeline and "█" in timeline and "active" in timeline
    figures = on(open_house, "figures", chat).stdout.splitlines()
    starts = {line.index("█") for line in figures if "█" in line}
    assert len(starts) == 1 and "evaluated" in "".join(figures)
    given = words(open_house, "summary CHAT SUMMARY")
    behind = on(open_house, *given).stdout
    assert "They spoke of harbours" in behind and "user #" in behind
    assert "Or by train?" in on(open_house, "branches", chat).stdout
    assert "no summary 999" in on(open_house, "summary", chat, "999").stderr
    assert "no turn 999" in on(open_house, "seen", chat, "999").stderr


def test_figures_are_the_engines_own(fresh: Served) -> None:
    fresh.say(TEXTS[:5])
    fresh.wait_idle()
    told = value(on(fresh, "figures", fresh.only(), "--json"))["figures"]
    for row, call in zip(told, fresh.engine.chat_calls(), strict=True):
        assert row["evaluated_tokens"] == call.evaluated
        assert row["cached_tokens"] == call.cached_tokens
        assert row["generated_tokens"] == call.generated


def test_what_the_model_saw_is_told_with_what_is_new(fresh: Served) -> None:
    fresh.say(TEXTS[:6])
    fresh.wait_idle()
    chat = fresh.only()
    for turn, call in enumerate(fresh.engine.chat_calls(), start=1):
        seen = value(on(fresh, "seen", chat, str(turn), "--json"))
        assert seen["exact"] is True
        sent = "".join(m.text for m in call.context.messages)
        assert "".join(p["text"] for p in seen["pieces"] if p["change"] != "gone") == sent
    assert {"same", "new"} <= {p["change"] for p in seen["pieces"]}
    shown = on(fresh, "seen", chat, "6").stdout
    assert f"+ {TEXTS[5]}" in shown and "equal to what was sent" in shown
    # From the file too, where the tokens are those of the configured model.
    assert value(inspect(fresh, "seen", chat, "6", "--json"))["pieces"] == seen["pieces"]


def test_acts_on_a_running_proxy_change_what_the_model_sees(fresh: Served) -> None:
    fresh.say(TEXTS[:14])
    fresh.wait_idle()
    chat = fresh.only()

    def sees() -> str:
        fresh.wait_idle()
        return "".join(m["text"] for m in value(on(fresh, "context", chat, "--json"))["context"])

    pinned = value(on(fresh, "pin", chat, "My daughter is", "Ines.", "--json"))
    assert "My daughter is Ines." in sees()
    assert "My daughter is Ines." in on(fresh, "show", chat).stdout
    assert on(fresh, "unpin", chat, str(pinned["id"])).returncode == 0
    assert "Ines" not in sees()
    assert "no pinned fact" in on(fresh, "unpin", chat, str(pinned["id"])).stderr
    assert "1 to 500 characters" in on(fresh, "pin", chat, "x" * 501).stderr

    found = value(on(fresh, "summaries", chat, "--json"))["summaries"]
    old = next(s["id"] for s in found if s["state"] == "active")
    done = value(on(fresh, "correct", chat, str(old), "--text", "They met a grey cat.", "--json"))
    assert "They met a grey cat." in sees()
    mine = value(on(fresh, "summary", chat, str(done["id"]), "--json"))["summary"]
    assert mine["made_by"] == "edited" and mine["state"] == "active"
    past = on(fresh, "correct", chat, str(old), "--text", "x")
    assert past.returncode == 2 and "no longer in use" in past.stderr


def test_forgetting_asks_first(fresh: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "The vault opens with 90125."
    fresh.say([secret, *TEXTS[:4]])
    fresh.say(["Another chat."])
    fresh.wait_idle()
    data = fresh.app.state.config.data
    another, chat = [e["id"] for e in value(on(fresh, "list", "--json"))]
    for typed in ("", "n\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        kept = on(fresh, "forget", chat, "--message", "0")
        assert kept.returncode == 2 and "nothing was forgotten" in kept.stderr
        assert "90125" in kept.stderr
    assert "90125" in on(fresh, "show", chat, "--turns", "0").stdout
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert on(fresh, "forget", chat, "--message", "0").returncode == 0
    assert not any(b"90125" in file.read_bytes() for file in data.glob("*.db*"))
    assert value(on(fresh, "forget", chat, "--yes", "--json"))["deleted_messages"] == 10
    assert [e["id"] for e in value(on(fresh, "list", "--json"))] == [another]
    assert on(fresh, "forget", "--everything", "--yes").returncode == 0
    assert value(on(fresh, "list", "--json")) == []
    assert on(fresh, "forget", "--yes").returncode == 2
    assert on(fresh, "forget", chat, "--everything", "--yes").returncode == 2


def test_what_was_exported_is_imported_again(fresh: Served, tmp_path: Path) -> None:
    messages = fresh.say(TEXTS[:3])
    file = tmp_path / "chat.json"
    chat = fresh.only()
    assert on(fresh, "export", chat, "--as", "librechat", "--output", str(file)).returncode == 0
    value(on(fresh, "forget", chat, "--yes", "--json"))
    assert "6 messages of 1 conversations" in on(fresh, "import", str(file)).stdout
    assert fresh.only() == chat
    shown = value(on(fresh, "show", chat, "--turns", "0", "--json"))["messages"]
    assert [m["text"] for m in shown] == [m["content"] for m in messages]
    file.write_text("no export")
    assert "not JSON" in on(fresh, "import", str(file)).stderr


# -- on the file alone ---------------------------------------------------------------------------


def test_the_file_is_changed_only_while_no_proxy_has_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with served(data, window_tokens=900) as house:
        house.say(TEXTS[:14])
        house.wait_idle()
        chat = house.only()
        before = value(inspect(house, "show", chat, "--json"))
        kept = inspect(house, "pin", chat, "The key is under the mat.")
        assert kept.returncode == 2 and "--url" in kept.stderr and "in use" in kept.stderr
        assert value(inspect(house, "show", chat, "--json")) == before
    assert "pinned as" in inspect(house, "pin", chat, "The key is under the mat.").stdout
    old = str(before["summaries"][0]["id"])
    assert inspect(house, "correct", chat, old, "--text", "They met a grey cat.").returncode == 0
    with served(data, window_tokens=900) as again:
        again.ask([*said(before_all(again, chat)), {"role": "user", "content": "Go on."}])
        again.wait_idle()
        context = value(on(again, "context", chat, "--json"))["context"]
        assert "The key is under the mat." in context[0]["text"]
        assert "They met a grey cat." in context[0]["text"]
    snapshots = Snapshots(data / "snapshots", fingerprint="f", budget_bytes=1000)
    assert snapshots.save(owner_of({}), [1, 2, 3], b"state") and snapshots.save(
        "other", [4], b"state"
    )
    assert inspect(house, "forget", chat, "--message", "2", "--yes").returncode == 0
    assert TEXTS[1] not in inspect(house, "show", chat, "--turns", "0").stdout
    assert len(list((data / "snapshots").glob("*/*"))) == 1
    assert inspect(house, "forget", "--everything", "--yes").returncode == 0
    assert not any(b"harbour" in file.read_bytes() for file in data.glob("*.db*"))
    assert integrity(data / "chatfold.db") == []


def before_all(house: Served, chat: str) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = value(on(house, "show", chat, "--turns", "0", "--json"))[
        "messages"
    ]
    return shown


def said(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": m["text"]} for m in messages]


def test_what_only_a_proxy_knows_needs_one(open_house: Served) -> None:
    refused = inspect(open_house, "live")
    assert refused.returncode == 2 and "--url" in refused.stderr


# -- live, and who may ---------------------------------------------------------------------------


def test_live_tells_each_change(fresh: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = {"model": "tiny", "running": {"chat": 1}, "cells": 10, "cells_used": 5}
    busy |= {"sequences_used": 2, "snapshots": 3, "snapshot_bytes": 4_000_000}
    now = value(on(fresh, "live", "--json"))
    assert now["background"] == {"running": 0, "pending": 0}
    assert "chat 0, side 0, background 0" in on(fresh, "live").stdout

    async def follow() -> list[Any]:
        found = []
        async with ProxySource.open(fresh.url, key="", owner="") as source:
            states = source.live()
            async for state in states:
                found.append(state)
                if len(found) == 2:
                    break
                monkeypatch.setattr(type(fresh.engine), "status", lambda engine: busy)
            await states.aclose()
        return found

    first, second = asyncio.run(asyncio.wait_for(follow(), 60))
    assert first == now and second["engine"] == busy
    told = on(fresh, "live").stdout
    assert "chat 1, side 0, background 0" in told and "5 of 10 (50 %)" in told


def test_without_the_key_nothing_is_told(locked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for view in ("list", "owners", "live"):
        refused = on(locked, view)
        assert refused.returncode == 2 and "--api-key" in refused.stderr, view
        assert "--api-key" in on(locked, view, "--api-key", "third").stderr
    first = on(locked, "list", "--api-key", "first").stdout
    assert "plum" in first and "quince" not in first and "apricot" not in first
    monkeypatch.setenv("CHATFOLD_API_KEY", "second")
    second = on(locked, "list").stdout
    assert "quince" in second and "plum" not in second
    anna = on(locked, "list", "--api-key", "first", "--owner", "anna").stdout
    assert "apricot" in anna and "plum" not in anna
    named = owner_of({"authorization": "Bearer first"}, "anna")
    assert on(locked, "list", "--api-key", "first", "--owner", named).stdout == anna
    foreign = on(locked, "list", "--owner", named)
    assert foreign.returncode == 2 and "apricot" not in foreign.stdout


def test_an_owner_sees_and_changes_only_their_own(fresh: Served) -> None:
    fresh.say(["Anna likes plums."], user="anna")
    fresh.say(["Bert likes quinces."], user="bert")
    refused = on(fresh, "list")
    assert "There are 2 owners" in refused.stderr and "inspect owners" in refused.stderr
    chat = value(on(fresh, "list", "--owner", "anna", "--json"))[0]["id"]
    bert = owner_of({}, "bert")
    for given in ("show", "timeline", "context", "export", "pin CHAT x", "unpin CHAT 1"):
        command, *rest = given.replace("CHAT", chat).split()
        foreign = on(fresh, command, *(rest or [chat]), "--owner", bert)
        assert foreign.returncode == 2 and "no conversation" in foreign.stderr
    foreign = on(fresh, "forget", chat, "--yes", "--owner", bert)
    assert foreign.returncode == 2 and "no conversation" in foreign.stderr
    assert "plums" in on(fresh, "show", chat, "--owner", owner_of({}, "anna")).stdout


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "pins"),
        ("DELETE", "pins/1"),
        ("PUT", "summaries/1"),
        ("DELETE", "messages/00"),
        ("POST", "../../import"),
    ],
)
def test_another_sites_page_changes_nothing(open_house: Served, method: str, path: str) -> None:
    url = f"{open_house.url}/api/conversations/{open_house.only()}/{path}"
    body = b'{"text": "x"}'
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        refused = open_house.client.request(method, url, content=body, headers=headers)
        assert refused.status_code == 403 and "message" in refused.json()["error"]


def test_without_a_key_only_the_machine_itself_is_told(open_house: Served) -> None:
    for headers in ({"host": "evil.example"}, {"x-forwarded-for": "10.0.0.1"}):
        for path in ("conversations", "owners", "live", "search?q=cat"):
            refused = open_house.client.get(f"{open_house.url}/api/{path}", headers=headers)
            assert refused.status_code == 403 and "Miso" not in refused.text


@pytest.mark.parametrize(
    ("query", "status"),
    [("limit=x", 400), ("limit=-1", 400), ("offset=99999999999999999999", 400), ("limit=0", 200)],
)
def test_odd_numbers_are_refused(open_house: Served, query: str, status: int) -> None:
    answer = open_house.client.get(f"{open_house.url}/api/conversations?{query}")
    assert answer.status_code == status


def test_what_cannot_be_reached_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    done = run("list", "--url", nobody)
    assert done.returncode == 2 and "cannot be reached" in done.stderr and nobody in done.stderr
    for url in ("127.0.0.1:8080", "ftp://x", "http://user:secret@127.0.0.1"):
        assert "--url must be like" in run("list", "--url", url).stderr


def test_what_is_no_chatfold_is_said_so() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<h1>It works!</h1>")

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = run("list", "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 2 and "no chatfold" in done.stderr


def test_a_terminal_gets_colours_and_a_pager(open_house: Served, tmp_path: Path) -> None:
    """The one test here with a process of its own: a terminal cannot be had without."""
    paged = tmp_path / "paged"
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ncat > {paged}\n")
    pager.chmod(0o755)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "proxy", "inspect", "show", open_house.only(), "--turns", "0"]
    environ = {"PAGER": str(pager), "TERM": "xterm-256color", "PATH": os.environ["PATH"]}
    environ |= {"HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [*command, "--url", open_house.url],
        cwd=ROOT,
        env=environ,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        timeout=90,
        check=False,
    )
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0, done.stderr
    text = paged.read_text("utf-8")
    assert "\x1b[1;36muser #0" in text and "Miso" in text


def test_every_command_and_every_route_is_in_the_documentation() -> None:
    told = (ROOT / "docs/inspect.md").read_text("utf-8")
    commands = cli.commands["inspect"].commands  # type: ignore[attr-defined]
    for name in [*commands, *(f"rewrite {name}" for name in commands["rewrite"].commands)]:
        assert f"chatfold inspect {name}" in told, name
    api = (ROOT / "docs/api.md").read_text("utf-8")
    for route in api_routes():
        path = re.sub(r":\w+}", "}", route.path)
        known = path in api or path.removeprefix("/api/conversations/{conversation}") in api
        assert known, route.path
