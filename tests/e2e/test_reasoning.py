"""Reasoning kept apart, over a real socket. The model is the real one; what it says is given to it
by a grammar that holds one text, because it would not think by itself."""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from msgspec import structs
from openai import OpenAI

from bench.librechat_client import Chat, librechat, missing
from bench.librechat_client import evaluated as used
from proxy.app import DATABASE, create_app
from proxy.config import load
from proxy.engines.base import Generate, Priority
from proxy.engines.embedded import engine as door
from proxy.engines.embedded import translation
from proxy.engines.embedded.grammar import literal
from proxy.engines.embedded.protocol import Submit

READY_S = 60

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}OPENED{% endif %}"
)
QWEN3 = CHATML.replace("OPENED", "")
R1 = CHATML.replace("OPENED", "{{ '<think>\n' }}")
"""The header of an answer opens the reasoning, and no later prompt holds it."""

MARKUP_TOKENS = 16
"""At most, of a question: its header and end, and the header of the answer."""


class Server:
    def __init__(self, url: str, script: list[str]) -> None:
        self.url = url
        self.script = script
        """What the model will say, answer by answer."""

    def post(self, **body: Any) -> dict[str, Any]:
        response = httpx.post(
            f"{self.url}/v1/chat/completions", json=body, timeout=60, trust_env=False
        )
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def wait_idle(self) -> None:
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            status = httpx.get(f"{self.url}/api/status", timeout=60, trust_env=False).json()
            busy = (*status["engine"]["running"].values(), *status["engine"]["waiting"].values())
            if status["background"] == {"running": 0, "pending": 0} and not any(busy):
                return
            time.sleep(0.02)
        raise AssertionError(f"never idle: {status}")


@contextmanager
def thinking(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    script: list[str] = []
    submitted = translation.submit

    def submit(id_: int, request: Generate, **options: Any) -> Submit:
        sent = submitted(id_, request, **options)
        if request.priority is not Priority.CHAT:
            return sent
        (text,) = literal(script.pop(0))
        return structs.replace(sent, grammar=f"root ::= {text}", must_call=("these words",))

    monkeypatch.setattr(translation, "submit", submit)
    monkeypatch.setattr(door, "CHILD", ("-m", "tests.e2e.scripted_child"))
    environ = {
        "CHATFOLD_ENGINE_CHAT_TEMPLATE": template,
        "CHATFOLD_ENGINE_THREADS": "1",
        "CHATFOLD_N_CTX": "1024",
        "CHATFOLD_DATA": str(tmp_path),
    }
    app = create_app(load(environ=environ))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            _wait_ready(url)
            yield Server(url, script)
        finally:
            server.should_exit = True
            thread.join(READY_S)
    assert not thread.is_alive()


def _wait_ready(url: str) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=60, trust_env=False).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError("the model was never ready")


def stored(folder: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(f"file:{folder / DATABASE}?mode=ro", uri=True)) as db:
        return db.execute("SELECT role, text FROM messages ORDER BY id").fetchall()


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def message(answer: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = answer["choices"][0]["message"]
    return found


def evaluated(answer: dict[str, Any]) -> int:
    usage = answer["usage"]
    tokens: int = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    return tokens


THOUGHT = "The user asks for a colour, and I know which one it is. " * 4


@pytest.mark.parametrize(
    ("template", "opening"), [(R1, ""), (QWEN3, "<think>\n")], ids=["in-prompt", "by-the-model"]
)
def test_reasoning_is_told_apart_and_costs_the_next_turn_nothing(
    tmp_path: Path, template: str, opening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with thinking(tmp_path, template, monkeypatch) as server:
        sent: list[dict[str, Any]] = []
        for i in range(3):
            sent.append(user(f"What colour is the sea on day {i}?"))
            server.script.append(f"{opening}{THOUGHT}\n</think>\n\nIt is blue on day {i}.")
            answer = server.post(messages=sent, temperature=0)
            assert message(answer)["content"] == f"It is blue on day {i}."
            assert message(answer)["reasoning_content"].strip() == THOUGHT.strip()
            details = answer["usage"]["completion_tokens_details"]
            assert 40 < details["reasoning_tokens"] < answer["usage"]["completion_tokens"] - 5
            if i:
                words = len(sent[-1]["content"].split()) + 2
                assert evaluated(answer) <= words + MARKUP_TOKENS
            # Clients that send the reasoning back change nothing by it.
            extra = {"reasoning_content": THOUGHT} if i else {}
            sent.append({"role": "assistant", "content": message(answer)["content"], **extra})
            server.wait_idle()
        texts = [text for role, text in stored(tmp_path) if role == "assistant"]
        assert texts == [m["content"] for m in sent if m["role"] == "assistant"]


def test_a_stream_of_reasoning_and_an_answer_that_ends_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        thinking(tmp_path, R1, monkeypatch) as server,
        httpx.Client(trust_env=False, timeout=60) as http,
        OpenAI(
            base_url=f"{server.url}/v1",
            api_key="x",
            max_retries=0,
            http_client=http,
            _strict_response_validation=True,
        ) as client,
    ):
        ask: Any = {"model": "any", "messages": [user("What colour is the sea?")], "stream": True}
        server.script.append(f"{THOUGHT}\n</think>\n\nIt is blue.")
        chunks = list(client.chat.completions.create(**ask))
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        thoughts = [getattr(d, "reasoning_content", None) or "" for d in deltas]
        assert "".join(thoughts).strip() == THOUGHT.strip()
        assert "".join(d.content or "" for d in deltas) == "It is blue."
        assert chunks[-1].choices[0].finish_reason == "stop"
        # Cut off in its thoughts: no answer, and nothing of it is kept.
        before = stored(tmp_path)
        server.script.append(f"{THOUGHT}\n</think>\n\nIt is grey.")
        cut = server.post(messages=[user("And the sky?")], max_tokens=20)
        assert cut["choices"][0]["finish_reason"] == "length"
        assert message(cut)["content"] == ""
        assert cut["usage"]["completion_tokens_details"]["reasoning_tokens"] == 20
        assert stored(tmp_path) == before


def test_a_call_behind_reasoning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = '<tool_call>\n{"name":"weather","arguments":{"city":"Paris"}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "weather"}}]
    with thinking(tmp_path, R1, monkeypatch) as server:
        sent = [user("The weather in Paris?")]
        server.script.append(f"{THOUGHT}\n</think>\n\nLet me look.\n{call}")
        calling = server.post(messages=sent, tools=tools, temperature=0)
        assert message(calling)["content"] == "Let me look."
        assert message(calling)["reasoning_content"]
        (made,) = message(calling)["tool_calls"]
        assert json.loads(made["function"]["arguments"]) == {"city": "Paris"}
        server.wait_idle()
        sent += [message(calling), {"role": "tool", "tool_call_id": made["id"], "content": "rain"}]
        server.script.append("Rain.\n</think>\n\nIt rains.")
        spoken = server.post(messages=sent, tools=tools, temperature=0)
        assert message(spoken)["content"] == "It rains."
        # The result and the words around it: the call and its tools are in the cache already.
        assert evaluated(spoken) <= 24 + MARKUP_TOKENS


def test_an_answer_that_is_continued_is_past_its_thoughts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with thinking(tmp_path, R1, monkeypatch) as server:
        server.script.append(" blue, as ever.")
        begun = {"role": "assistant", "content": "It is"}
        answer = server.post(messages=[user("What colour is the sea?"), begun])
        assert message(answer)["content"] == " blue, as ever."
        assert "reasoning_content" not in message(answer)
        assert ("assistant", "It is blue, as ever.") in stored(tmp_path)


@pytest.mark.node
@pytest.mark.skipif(bool(missing()), reason=missing() or "it can run")
@pytest.mark.parametrize(
    ("template", "opening"), [(R1, ""), (QWEN3, "<think>\n")], ids=["in-prompt", "by-the-model"]
)
def test_librechat_shows_the_thoughts_and_sends_the_chat_on_without_them(
    tmp_path: Path, template: str, opening: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LibreChat keeps an answer with its thoughts and leaves them out of later requests, in which
    that answer is a plain text among lists of parts."""
    with thinking(tmp_path, template, monkeypatch) as server, librechat(server) as client:
        chat = Chat(client, {"instructions": "You are terse.", "limit": 30_400})
        for i in range(3):
            question = f"What colour is the sea on day {i}?"
            server.script.append(f"{opening}{THOUGHT}\n</think>\n\nIt is blue on day {i}.")
            answer = chat.say(question)
            assert "error" not in answer, answer
            assert answer["text"] == f"It is blue on day {i}."
            assert answer["reasoning"].strip() == THOUGHT.strip()
            assert answer["usage"]["output_token_details"]["reasoning"] > 40
            if i:
                assert used(answer) <= len(question.split()) + 2 + MARKUP_TOKENS
            server.wait_idle()
        # Every answer has its thoughts in LibreChat, none in the store, none in a later prompt.
        assert all(len(said) == 3 for said in chat.history if said[0] == "assistant")
        assert stored(tmp_path) == [(role, text) for role, text, *_ in chat.history]
        assert answer["usage"]["input_tokens"] < 3 * 40
        server.script.append(f"{opening}{THOUGHT}\n</think>\n\nIt is grey.")
        again = chat.regenerate()
        assert again["text"] == "It is grey."
        assert used(again) <= 1


def test_a_client_may_do_without_reasoning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with thinking(tmp_path, R1, monkeypatch) as server:
        server.script += ["It is blue.", f"{THOUGHT}\n</think>\n\nIt is grey."]
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        answer = server.post(messages=[user("What colour is the sea?")], **off)
        assert message(answer)["content"] == "It is blue."
        assert "reasoning_content" not in message(answer)
        sent = [user("What colour is the sea?"), message(answer), user("And the sky?")]
        server.wait_idle()
        answer = server.post(messages=sent)
        assert message(answer)["content"] == "It is grey."
        assert evaluated(answer) <= 4 + MARKUP_TOKENS
