"""A restart between two turns costs nothing but the restart."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.e2e.serving import serving

SYSTEM = {"role": "system", "content": "You are a patient guide to the old town. " * 14}


def test_the_turn_after_a_restart_evaluates_its_new_tokens_only(tmp_path: Path) -> None:
    messages = [SYSTEM, {"role": "user", "content": "Where should a visitor begin?"}]
    with serving(tmp_path, "--n-ctx", "1024") as proxy:
        answer = proxy.chat(messages, max_tokens=12, temperature=0)
        messages.append(answer["choices"][0]["message"])
        messages.append({"role": "user", "content": "And where does one eat well?"})
        proxy.wait_idle()
        context = proxy.post("/api/context", {"messages": messages}).json()
    with serving(tmp_path, "--n-ctx", "1024") as proxy:
        assert proxy.post("/api/context", {"messages": messages}).json() == context
        usage = proxy.chat(messages, max_tokens=12, temperature=0)["usage"]
        new = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        assert usage["prompt_tokens"] > 150
        assert new <= 20, "more than the new message was evaluated"
        assert proxy.status()["engine"]["restored_tokens"] > 150


def test_forgetting_removes_the_snapshots_too(tmp_path: Path) -> None:
    messages = [SYSTEM, {"role": "user", "content": "Where should a visitor begin?"}]
    folder = tmp_path / "data" / "snapshots"
    with serving(tmp_path, "--n-ctx", "1024") as proxy:
        proxy.chat(messages, max_tokens=4)
        proxy.wait_idle()
    assert list(folder.glob("*/*.kv"))
    with serving(tmp_path, "--n-ctx", "1024") as proxy:
        gone = httpx.delete(f"{proxy.url}/api/conversations", timeout=60, trust_env=False)
        assert gone.json()["deleted_messages"] == 2
        proxy.wait("forgotten", lambda status: not list(folder.glob("*/*.kv")))
