"""LibreChat's own current client against the proxy: what a user does, turn by turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from bench.librechat_client import Chat, Client, evaluated, librechat, missing
from bench.librechat_run import ACTS, LIMIT_TOKENS, OPTIONS, SAY, Run, amplification, note

from .serving import Proxy, serving

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(bool(missing()), reason=missing() or "it can run"),
]

N_CTX = 1536
AMPLIFICATION_MOST = 1.10
BRIEF: dict[str, Any] = dict(OPTIONS)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("librechat")
    with serving(folder, "--n-ctx", str(N_CTX), "--policy", "extractive") as it:
        yield it


@pytest.fixture(scope="module")
def client(proxy: Proxy) -> Iterator[Client]:
    with librechat(proxy) as it:
        yield it


def answered(answer: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in answer, answer
    assert answer["text"].strip(), answer
    return answer


@pytest.mark.timeout(600)
def test_forty_turns_with_everything_that_a_user_does(proxy: Proxy, client: Client) -> None:
    """A title at once, regenerate, edit, continue, Stop in the prefill and in mid-answer, all of it
    before LibreChat's window slides and again behind that. With its summarisation: bench."""
    run = Run(client, proxy.wait_idle, proxy.trace_path, LIMIT_TOKENS, summarise=False, sentences=3)
    run.go()
    assert [r for r in run.requests if not r.answered] == []
    assert [r.act for r in run.requests if r.act != SAY] == list(ACTS.values())
    (title,) = run.titles
    assert 0 < len(title) <= 60
    # 1.0 here, and 22-fold where the prefix is lost with every slide.
    assert amplification(run.requests) <= AMPLIFICATION_MOST, run.requests
    slid = [r.act for r in run.requests if r.dropped]
    assert {SAY, *list(ACTS.values())[5:8]} <= set(slid)
    assert max(r.prompt for r in run.requests) < N_CTX
    # LibreChat had long stopped to send the first turn: it is in the store.
    assert ("user", note(0, 3)) in proxy.stored()
    assert [e for e in proxy.events() if e["event"] == "activated"]


def test_regenerate_edit_and_continue_evaluate_what_is_new(proxy: Proxy, client: Client) -> None:
    chat = Chat(client, BRIEF)
    for n in range(3):
        answered(chat.say(f"{uuid4().hex[:4]} {note(n, 5)}"))
    proxy.wait_idle()
    *before, question, last = chat.history
    again = answered(chat.ask([*before, question]))
    assert evaluated(again) <= 1
    edited = answered(chat.ask([*before, ["user", "Who writes?"]]))
    assert evaluated(edited) <= 12
    going_on = answered(chat.ask([*before, question, last]))
    assert evaluated(going_on) <= 4
    # The chat goes on from the first answer, as if nothing had been.
    assert evaluated(answered(chat.say("And then?"))) <= 16


@pytest.mark.parametrize("where", ["prefill", "answer"])
def test_stop_frees_the_engine_and_the_chat_goes_on(
    proxy: Proxy, client: Client, where: str
) -> None:
    chat = Chat(client, BRIEF)
    answered(chat.say(f"{uuid4().hex[:4]} {note(1, 5)}"))
    proxy.wait_idle()
    since = len(proxy.events())
    if where == "prefill":
        text = uuid4().hex + "".join(f" {n}" for n in range(400))
        stopped = chat.say(
            text,
            stop_when=lambda: proxy.wait_for_event(
                "evaluated", lambda e: e["event"] == "batch" and e["cls"] == "chat", since=since
            ),
        )
    else:
        stopped = chat.say("Go on.", stop="answer", maxTokens=400)
    assert stopped["stopped"]
    assert bool(stopped["text"]) == (where == "answer")
    gone = proxy.wait_for_event(
        "cancelled",
        lambda e: e["event"] == "request_cancelled" and e["cls"] == "chat",
        since=since,
    )
    proxy.wait_idle()
    events = proxy.events()
    later = events[events.index(gone) + 1 :]
    assert gone["t"] > stopped["aborted_s"]
    assert not [e for e in later if gone["request"] in e.get("requests", [])]
    # What the user saw of the answer is in the history now; of the rest nothing is read again. The
    # question that got no answer is written anew.
    if where == "prefill":
        chat.history.pop()
    assert evaluated(answered(chat.say("Well?"))) <= 32


@pytest.mark.parametrize("method", ["completion", "structured"])
@pytest.mark.parametrize("model", ["local-model", "gpt-3.5-turbo", "gpt-4o-mini"])
def test_titles_beside_the_first_answer(
    proxy: Proxy, client: Client, method: str, model: str
) -> None:
    """Structured ones come as a JSON schema or as a tool, depending on the model's name."""
    proxy.wait_idle()
    since = len(proxy.events())
    chat = Chat(client, {**BRIEF, "model": model})
    answer = answered(chat.say(f"What is a lamp? {uuid4().hex[:4]}", title=method))
    assert 0 < len(answer["title"]) <= 60
    proxy.wait_idle()
    events = [
        e for e in proxy.events()[since:] if e["event"] in ("request_started", "request_done")
    ]
    order = [(e["event"], e["cls"]) for e in events if e["cls"] != "background"]
    assert order[:2] == [("request_started", "chat"), ("request_done", "chat")]
    assert order[2:] == [("request_started", "side"), ("request_done", "side")]
    assert evaluated(answered(chat.say("Who lights it?"))) <= 16


@pytest.mark.parametrize("named", [True, False], ids=["with-its-id", "without"])
def test_its_own_summarisation_costs_nothing_and_loses_nothing(
    proxy: Proxy, client: Client, named: bool
) -> None:
    """The request after a summary holds one short answer of all that was said: where no id comes
    with it, the summary's own sentences name the chat."""
    headers = {"headers": {"x-conversation-id": uuid4().hex}} if named else {}
    chat = Chat(client, {**BRIEF, "limit": 600, "summarise": True, **headers})
    proxy.wait_idle()
    since, summaries = len(proxy.events()), 0
    mark = uuid4().hex[:4]
    for n in range(9):
        text = " ".join(f"On watch {n} keeper {mark} lit lamp {i} of the pier." for i in range(6))
        answer = answered(chat.say(text))
        summaries += bool(answer.get("summary"))
        if n > 0:
            assert evaluated(answer) <= 120, n
        proxy.wait_idle()
    assert summaries >= 1
    assert not answer.get("summary")
    assert not [e for e in proxy.events()[since:] if e.get("cls") == "side"]


@pytest.mark.parametrize("path", ["", "/", "/v1/", "/v1/chat/completions", "/anything/v1"])
def test_any_url_will_do(proxy: Proxy, path: str) -> None:
    with librechat(proxy, path) as client:
        answer = answered(client.turn([["user", "Hello."]], title="completion", **BRIEF))
        assert answer["title"]


def test_a_fault_that_lasts_is_shown_at_once_and_not_tried_again(
    proxy: Proxy, client: Client
) -> None:
    refused = 'chatfold_requests_total{route="chat_completions",status="400"} '
    before = proxy.get("/metrics").text.partition(refused)[2].partition("\n")[0]
    assert "`temperature`" in client.turn([["user", "Hello."]], temperature=9)["error"]
    assert f"{refused}{float(before or 0) + 1}\n" in proxy.get("/metrics").text
