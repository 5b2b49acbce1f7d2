"""LibreChat 0.6 and 0.7 through what the current client is put through: a chat with a title,
regenerate, edit, continue, Stop in the prefill and in mid-answer, and a window that slides."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.librechat_older import LABELS, V0_6, V0_7, OlderClient, Version, body_of
from bench.librechat_run import (
    CONTINUE,
    EDIT,
    REGENERATE,
    SAY,
    STOP_IN_ANSWER,
    STOP_IN_PREFILL,
    Run,
    amplification,
    note,
)

from .conftest import WINDOW_TOKENS
from .serving import ROOT, Proxy

RECORDED = ROOT / "tests/data/librechat/v0_6_9.json"
ACTS = {5: REGENERATE, 6: EDIT, 7: CONTINUE, 8: STOP_IN_PREFILL, 9: STOP_IN_ANSWER}
TURNS = 11
LIMIT_TOKENS = 280
"""The window slides from turn 5 on: all of this happens in one whose beginning is gone. 40 turns of
it: bench."""

AMPLIFICATION_MOST = 1.10


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", [V0_6, V0_7], ids=["0.6", "0.7"])
def test_a_chat_with_everything_that_a_user_does(shared: Proxy, version: Version) -> None:
    shared.wait_idle()
    client = OlderClient(version, f"{shared.url}/v1", user=f"librechat-{version.name}")
    run = Run(
        client,
        shared.wait_idle,
        shared.trace_path,
        LIMIT_TOKENS,
        summarise=False,
        sentences=3,
        turns=TURNS,
        acts=ACTS,
    )
    since = len(shared.events())
    run.go()
    assert [r for r in run.requests if not r.answered] == []
    assert [r.act for r in run.requests if r.act != SAY] == list(ACTS.values())
    assert {SAY, REGENERATE, EDIT, CONTINUE} <= {r.act for r in run.requests if r.dropped}
    (title,) = run.titles
    assert 0 < len(title) <= 60
    assert amplification(run.requests) <= AMPLIFICATION_MOST, run.requests
    assert max(r.prompt for r in run.requests) < WINDOW_TOKENS
    assert ("user", note(0, 3)) in shared.stored()
    # The language is told without the model.
    queued = [e for e in shared.events()[since:] if e["event"] == "request_queued"]
    assert len([e for e in queued if e["cls"] == "side"]) == 1


def test_the_bodies_are_those_that_were_recorded() -> None:
    recorded = [entry["body"] for entry in json.loads(RECORDED.read_text())]
    chats = [body for body in recorded if body["stream"]]
    assert len(chats) == 3
    for body in chats:
        said = [(m["role"], m["content"]) for m in body["messages"] if m["role"] != "system"]
        fields: dict[str, Any] = {"model": body["model"], "user": body["user"]}
        assert body_of(V0_6, said, "You are terse.", **fields) == body
        # What 0.7.7 changed is where the system message stands.
        newer = body_of(V0_7, said, "You are terse.", **fields)
        assert newer["messages"][0] == {
            "role": "system",
            "content": "Instructions:\nYou are terse.",
        }
        assert [(m["role"], m["content"]) for m in newer["messages"][1:]] == said
        assert newer["stop"] == LABELS
