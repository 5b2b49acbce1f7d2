"""When the database cannot be used the chat goes on, says so, and heals by itself."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

from proxy.config import Config, model_file
from tests.e2e.serving import ROOT, serving


def ask(proxy, messages):  # type: ignore[no-untyped-def]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0}
    return proxy.post("/v1/chat/completions", body)


def test_a_locked_database_costs_memory_but_no_answer(tmp_path: Path) -> None:
    with serving(tmp_path, "--n-ctx", "512") as proxy:
        messages = [{"role": "user", "content": "Hello there, who are you?"}]
        first = ask(proxy, messages)
        assert "x-chatfold-memory" not in first.headers
        answer = first.json()["choices"][0]["message"]["content"]
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "And what can you do?"},
        ]
        proxy.wait_idle()
        lock = sqlite3.connect(tmp_path / "data" / "chatfold.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        try:
            while_locked = ask(proxy, messages)
            assert while_locked.status_code == 200
            after = ask(proxy, messages)
            assert after.status_code == 200
            assert after.headers["x-chatfold-memory"] == "degraded"
            assert "chatfold_memory_degraded_total 0.0" not in proxy.get("/metrics").text
        finally:
            lock.execute("ROLLBACK")
            lock.close()
        assert ask(proxy, messages).status_code == 200
        healed = ask(proxy, messages)
        assert "x-chatfold-memory" not in healed.headers
        # Two turns, and the answers of the last question that differ are its branches.
        assert proxy.status()["store"]["messages"] >= 4


def test_a_damaged_database_is_set_aside_and_the_start_says_so(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "chatfold.db").write_bytes(b"this was a database once" * 400)
    with serving(tmp_path, "--n-ctx", "512") as proxy:
        assert ask(proxy, [{"role": "user", "content": "Hello"}]).status_code == 200
        assert "set aside" in proxy.log_path.read_text()
        (aside,) = [p for p in data.glob("chatfold.db.damaged-*") if not p.name.endswith("-wal")]
        assert aside.read_bytes().startswith(b"this was a database once")


def test_a_database_of_a_newer_version_stops_the_start_untouched(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    path = data / "chatfold.db"
    with sqlite3.connect(path) as db:
        db.execute(
            "CREATE TABLE _sqlite_migrations "
            "(id INTEGER PRIMARY KEY, migration_set TEXT, name TEXT, applied_at TEXT)"
        )
        db.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name) VALUES ('chatfold', 'm9999_next')"
        )
    db.close()
    before = path.read_bytes()
    started = subprocess.run(
        [sys.executable, "-m", "proxy", "serve", "--port", "0", "--data", str(data)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert started.returncode == 2
    assert "newer chatfold" in started.stderr
    assert "Traceback" not in started.stderr
    assert path.read_bytes() == before


def test_forgetting_over_http_is_the_owners_own_business(tmp_path: Path) -> None:
    with serving(tmp_path, "--n-ctx", "512", "--api-key", "key-a,key-b") as proxy:
        mine, other = ({"authorization": f"Bearer key-{k}"} for k in "ab")
        body = {"messages": [{"role": "user", "content": "Remember the heron."}], "max_tokens": 3}
        answer = proxy.post("/v1/chat/completions", body, headers=mine)
        path = f"/api/conversations/{answer.headers['x-chatfold-conversation']}"
        assert delete(proxy.url + path, {}).status_code == 401
        assert delete(proxy.url + path, other).status_code == 404
        assert delete(proxy.url + path, mine).json() == {"deleted_messages": 2}
        assert delete(proxy.url + path, mine).status_code == 404
        files = (tmp_path / "data").iterdir()
        assert not any(b"heron" in f.read_bytes() for f in files if f.is_file())


def delete(url: str, headers: dict[str, str]):  # type: ignore[no-untyped-def]
    import httpx

    return httpx.delete(url, headers=headers, timeout=60, trust_env=False)


def test_a_model_that_cannot_be_loaded_is_told_by_readyz_the_log_and_every_chat(
    tmp_path: Path,
) -> None:
    no_adapter = str(model_file(Config()))
    with serving(tmp_path, "--lora", no_adapter, ready=False) as proxy:
        told = proxy.wait("given up", lambda status: status["engine"]["trouble"])
        trouble = told["engine"]["trouble"]
        assert trouble.startswith("engine.lora: the adapter ")
        ready = proxy.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": trouble})
        answer = ask(proxy, [{"role": "user", "content": "Hello"}])
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, trouble)
        assert proxy.get("/healthz").status_code == 200
        assert proxy.log_path.read_text().count(trouble) == 1


def test_a_server_that_is_away_is_a_503_to_ask_again_but_to_librechat_an_error_at_once(
    tmp_path: Path,
) -> None:
    with socket.socket() as nobody:  # Bound and not listening: nobody else gets the port.
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        fast = {"CHATFOLD_TIMEOUTS_CONNECT_S": "0.5"}
        with serving(tmp_path, "--upstream", url, ready=False, **fast) as proxy:
            question = [{"role": "user", "content": "Hello"}]
            later = ask(proxy, question)
            assert (later.status_code, later.headers["retry-after"]) == (503, "1")
            agent = {"user-agent": "langchainjs-openai/1.0.0 ((node/v20.20.2; linux; x64))"}
            now = proxy.post("/v1/chat/completions", {"messages": question}, headers=agent)
            assert (now.status_code, now.headers.get("retry-after")) == (400, None)
            for error in (later.json()["error"], now.json()["error"]):
                assert error["code"] == "engine_unavailable"
                assert "cannot be reached" in error["message"]
