"""`chatfold inspect --datasette`: the real Datasette on a store that a proxy writes."""

from __future__ import annotations

import asyncio
import html
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from served import Served

from memory.catalogue import HIDDEN, LABELS, QUERIES, TABLES
from memory.store import Store
from proxy.cli import main
from proxy.headers import owner_of

ROOT = Path(__file__).parent.parent.parent
END_S = 60
INDEXES = ("message_words", "message_trigrams")


@pytest.fixture(scope="module")
def house(open_house: Served) -> Served:
    """Rows in every table: a named chat, a system prompt, a pinned fact, a rewritten summary."""
    headers = {"x-conversation-id": "the-client's-own"}
    chat = [{"role": "system", "content": "You are a pilot."}]
    for text in ("Which way to the islands?", "And from there?"):
        chat.append({"role": "user", "content": text})
        url, sent = f"{open_house.url}/v1/chat/completions", {"messages": chat}
        answer = open_house.client.post(url, json=sent, headers=headers).json()
        chat.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    open_house.wait_idle()
    pins = f"{open_house.url}/api/conversations/{open_house.only()}/pins"
    assert open_house.client.post(pins, json={"text": "Ines."}).status_code == 200
    sent = {"token": open_house.token(), "policy": "balanced", "newest": "9"}
    done = open_house.act(f"/inspect/c/{longest(open_house)}/again", sent)
    assert done.status_code == 303, done.text
    open_house.run(open_house.app.state.rewriter.idle())
    return open_house


@pytest.fixture(scope="module")
def browsed(house: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    data = str(house.app.state.config.data)
    command = [sys.executable, "-u", "-m", "proxy", "inspect", "--datasette", "--port", "0"]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CHATFOLD_")}
    # A file: what Datasette says of errors would fill a pipe that nobody reads.
    said = tmp_path_factory.mktemp("datasette") / "said"
    with (
        said.open("w") as out,
        subprocess.Popen([*command, "--data", data], cwd=ROOT, env=environ, stdout=out) as process,
    ):
        try:
            url = address(said, process)
            with httpx.Client(base_url=url, trust_env=False, timeout=END_S) as client:
                yield client
        finally:
            process.terminate()
            process.wait(END_S)


def address(said: Path, process: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + END_S
    while time.monotonic() < end and process.poll() is None:
        if found := re.match(r"(http://127\.0\.0\.1:\d+)/chatfold\n", said.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"Datasette did not start: {said.read_text()}")


def database(house: Served) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{house.app.state.config.data}/chatfold.db?mode=ro", uri=True)


def schema(conn: sqlite3.Connection) -> dict[str, list[str]]:
    rows = conn.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
    names = [name for (name,) in rows]
    shown = [name for name in names if name not in HIDDEN and not name.startswith(INDEXES)]
    return {n: [row[1] for row in conn.execute(f"PRAGMA table_xinfo({n})")] for n in shown}


def test_every_table_view_and_column_is_told_of(house: Served) -> None:
    with closing(database(house)) as conn:
        found = schema(conn)
    assert {name: sorted(columns) for name, columns in found.items()} == {
        name: sorted(columns) for name, (_, columns) in TABLES.items()
    }


def test_every_table_can_be_browsed_and_its_references_have_names(
    house: Served, browsed: httpx.Client
) -> None:
    expanded = set()
    for name in TABLES:
        page = browsed.get(f"/chatfold/{name}")
        assert page.status_code == 200 and TABLES[name][0] in _text(page.text), name
        value = browsed.get(f"/chatfold/{name}.json?_labels=on&_shape=objects&_size=20").json()
        assert value["rows"] and value.get("error") is None, name
        for reference in value["expandable_columns"]:
            column, target = reference[0]["column"], reference[0]["other_table"]
            cells = [row[column] for row in value["rows"] if row[column] is not None]
            for cell in cells:
                assert cell["label"] and cell["label"] != str(cell["value"]), (name, column)
            expanded.add((name, column)) if cells else None
            assert target in LABELS
    assert expanded == {
        ("conversations", "owner"),
        ("messages", "owner"),
        ("messages", "conversation"),
        ("messages", "parent"),
        ("messages", "front"),
        ("summaries", "owner"),
        ("summaries", "conversation"),
        ("rewrites", "owner"),
        ("rewrites", "conversation"),
        ("candidates", "owner"),
        ("candidates", "rewrite"),
        ("answers", "owner"),
        ("answers", "message"),
        ("pins", "owner"),
        ("pins", "conversation"),
        ("system_prompts", "owner"),
        ("client_ids", "owner"),
        ("client_ids", "conversation"),
    }


def _text(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def test_rows_are_called_by_words(house: Served, browsed: httpx.Client) -> None:
    url = f"/chatfold/messages.json?_labels=on&_shape=objects&depth=1&conversation={longest(house)}"
    row = browsed.get(url).json()["rows"][0]
    assert row["parent"]["label"].startswith("#0 user: Message 0: the ferry")
    assert row["conversation"]["label"].startswith("Message 0: the ferry")
    assert row["owner"]["label"] == f"key {owner_of({})[:8]}"
    home = _text(browsed.get("/chatfold").text)
    assert "Begin with the overviews" in home and "Tokens evaluated per turn" in home
    assert "sqlite" not in home.partition("Tables")[2].partition("hidden tables")[0]


def longest(house: Served) -> str:
    chats = house.client.get(f"{house.url}/api/conversations").json()["conversations"]
    found: str = max(chats, key=lambda c: c["n_messages"])["id"]
    return found


@pytest.mark.parametrize("name", QUERIES)
def test_the_queries_find_something(house: Served, browsed: httpx.Client, name: str) -> None:
    chat = longest(house)
    found = browsed.get(f"/chatfold/{name}.json?conversation={chat}&_shape=objects").json()
    assert found["rows"] and not found.get("error"), found
    assert browsed.get(f"/chatfold/{name}?conversation={chat}").status_code == 200


def test_turns_and_tokens_are_the_ones_of_the_pages(house: Served, browsed: httpx.Client) -> None:
    chat = longest(house)
    branches = house.client.get(f"{house.url}/api/conversations/{chat}/branches").json()
    told = {}
    for branch in branches["branches"]:
        url = f"{house.url}/api/conversations/{chat}/figures?leaf={branch['leaf']}"
        for row in house.client.get(url).json()["figures"]:
            told[row["turn"], row["evaluated_tokens"], row["cached_tokens"]] = True
    url = f"/chatfold/answer_overview.json?conversation={chat}&_shape=objects&_size=max"
    rows = browsed.get(url).json()["rows"]
    assert {(r["turn"], r["evaluated_tokens"], r["cached_tokens"]) for r in rows} == told.keys()


def test_it_follows_what_the_proxy_writes_and_keeps_nothing_back(
    house: Served, browsed: httpx.Client
) -> None:
    house.say(["The lighthouse keeper is called Aino."])
    url = "/chatfold/messages.json?_search=lighthouse&_shape=objects"
    assert "user" in [row["role"] for row in browsed.get(url).json()["rows"]]
    chat = house.only()
    gone = house.client.delete(f"{house.url}/api/conversations/{chat}?owner=")
    assert gone.status_code == 200, gone.text
    assert browsed.get(url).json()["rows"] == []
    data = house.app.state.config.data
    assert not any(b"lighthouse" in file.read_bytes() for file in data.glob("*.db*"))


def test_nothing_can_be_written_and_nobody_else_may_ask(
    house: Served, browsed: httpx.Client
) -> None:
    with closing(database(house)) as conn:
        before = conn.execute("SELECT count(*) FROM messages").fetchone()
    for sql in ("DELETE FROM messages", "PRAGMA query_only=0", "ATTACH '/tmp/x' AS x"):
        refused = browsed.get("/chatfold.json", params={"sql": sql})
        assert refused.status_code == 400, sql
    assert browsed.post("/chatfold/messages", data={"x": "y"}).status_code == 405
    foreign = browsed.get("/chatfold/messages.json", headers={"host": "evil.example"})
    assert foreign.status_code == 400 and "ferry" not in foreign.text
    with closing(database(house)) as conn:
        assert conn.execute("SELECT count(*) FROM messages").fetchone() == before


def test_what_it_needs_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["inspect", *arguments])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "unable to open" in run("--datasette", "--data", str(tmp_path))
    assert "behind it" in run("--data", str(tmp_path), "list")
    asyncio.run(made(tmp_path / "chatfold.db"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "cannot listen" in run("--datasette", "--data", str(tmp_path), "--port", port)
    monkeypatch.setitem(sys.modules, "datasette.app", None)
    said = run("--datasette", "--data", str(tmp_path))
    assert "not installed" in said and "requirements-datasette.lock" in said


async def made(path: Path) -> None:
    store = await Store.open(path)
    await store.close()
