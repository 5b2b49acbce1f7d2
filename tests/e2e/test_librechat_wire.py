"""What LibreChat's clients send, in all their generations, against the running proxy."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from .serving import Event, Proxy, serving

BASES = ("", "/", "/v1", "/v1/", "/v1/chat/completions", "/anything/v1")
"""What may stand in OPENAI_REVERSE_PROXY behind the port."""


def says(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("base", BASES)
def test_every_form_of_the_url_leads_to_chat_and_models(shared: Proxy, base: str) -> None:
    body = {"model": "gpt-3.5-turbo", "messages": says("Hi."), "max_tokens": 1}
    for path in (f"{base}/chat/completions", base.removesuffix("/chat/completions") or "/"):
        answer = shared.post(path, body)
        assert answer.status_code == 200, path
        assert answer.json()["object"] == "chat.completion"
    models = shared.get(f"{base.removesuffix('/chat/completions')}/models")
    assert models.json() == shared.get("/v1/models").json()


def test_a_path_that_nothing_can_mean_names_the_right_url(shared: Proxy) -> None:
    error = shared.post("/v1/chats", {}).json()["error"]
    assert f"OPENAI_REVERSE_PROXY={shared.url}/v1" in error["message"]


# -- titles --------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"language": {"type": "string"}, "title": {"type": "string"}},
    "required": ["language", "title"],
}
TITLE_FIELDS = {"type": "object", "properties": {"title": {"type": "string"}}}


def formatter(fields: dict[str, Any]) -> dict[str, Any]:
    return {"name": "output_formatter", "description": "", "parameters": fields}


def plain_now(user: str, answer: str) -> dict[str, Any]:
    text = (
        "Provide a concise, 5-word-or-less title for the conversation, using title case "
        "conventions. Only return the title itself.\n\nConversation:\n"
    )
    return {"messages": says(f"{text}User: {user}\nAI: {answer}")}


def json_now(user: str, answer: str) -> dict[str, Any]:
    text = (
        "Analyze this conversation and provide:\n1. The detected language of the conversation\n"
        "2. A concise title in the detected language (5 words or less)\n\n"
    )
    wanted = {"type": "json_schema", "json_schema": {"name": "extract", "schema": SCHEMA}}
    body = {"messages": says(f"{text}User: {user}\nAI: {answer}"), "response_format": wanted}
    return body


def tool_now(user: str, answer: str) -> dict[str, Any]:
    body = json_now(user, answer)
    del body["response_format"]
    function = {"name": "extract", "parameters": SCHEMA}
    choice = {"type": "function", "function": {"name": "extract"}}
    return {**body, "tools": [{"type": "function", "function": function}], "tool_choice": choice}


def quote(user: str, answer: str) -> str:
    return f'||>User:\n"{user}"\n||>Response:\n"{json.dumps(answer)}"'


def plain_v0_7(user: str, answer: str) -> dict[str, Any]:
    text = (
        "Please generate a concise, 5-word-or-less title for the conversation, using its same "
        f"language, with no punctuation.\n\n{quote(user, answer)}\n\n||>Title:"
    )
    return {"messages": [{"role": "system", "content": text}], "max_tokens": 16}


def function_v0_6(user: str, answer: str) -> dict[str, Any]:
    text = (
        "Write a concise title for this conversation in the given language. Title in 5 Words or "
        f"Less.\n{quote(user, answer)}"
    )
    return {
        "messages": [{"role": "system", "content": text}, *says("Language: English")],
        "functions": [formatter(TITLE_FIELDS)],
        "function_call": {"name": "output_formatter"},
    }


TITLES = (plain_now, json_now, tool_now, plain_v0_7, function_v0_6)
TitleBody = Callable[[str, str], dict[str, Any]]


def title_in(answer: ChatCompletion) -> str:
    """The title, wherever the form that was asked for puts it."""
    message = answer.choices[0].message
    assert not message.model_extra
    if message.function_call:
        return str(json.loads(message.function_call.arguments)["title"])
    if message.tool_calls:
        call: Any = message.tool_calls[0]
        return str(json.loads(call.function.arguments)["title"])
    text = message.content or ""
    return str(json.loads(text)["title"]) if text.startswith("{") else text


def ask_title(proxy: Proxy, body: dict[str, Any]) -> str:
    options = {"model": "gpt-3.5-turbo", "user": "u1", "stream": False}
    response = proxy.post("/v1/chat/completions", {**options, **body})
    assert response.status_code == 200, response.text
    assert response.headers["x-chatfold-side"] == "title"
    answer = ChatCompletion.model_validate_json(response.text, strict=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24
    return title_in(answer)


class InTheBackground:
    """A title request on its way."""

    def __init__(self, proxy: Proxy, body: dict[str, Any]) -> None:
        self.titles: list[str] = []
        self._thread = threading.Thread(target=lambda: self.titles.append(ask_title(proxy, body)))
        self._thread.start()

    def title(self) -> str:
        self._thread.join(100)
        (title,) = self.titles
        return title


def of_class(events: list[Event], cls: str) -> list[Event]:
    return [e for e in events if e.get("cls") == cls]


def assert_chat_first(events: list[Event]) -> None:
    """Nothing of a side request was evaluated between the chat's arrival and its end. Where the
    machine let the chat wait, a title may have begun before it came."""
    chat = {e["event"]: i for i, e in enumerate(events) if e.get("cls") == "chat"}
    between = events[chat["request_queued"] : chat["request_done"]]
    assert not [e for e in of_class(between, "side") if e["event"] == "batch"]


@pytest.mark.parametrize("body", TITLES)
def test_a_title_before_and_after_the_answer_costs_the_chat_nothing(
    shared: Proxy, body: TitleBody
) -> None:
    shared.wait_idle()
    since, stored = len(shared.events()), len(shared.stored())
    question = f"My name is Ada {uuid4().hex[:6]}. What is a lighthouse?"
    before = InTheBackground(shared, body(question, ""))
    time.sleep(0.004)
    options = {"user": "u1", "max_tokens": 24}
    first = shared.chat(says(question), **options)
    answer = first["choices"][0]["message"]["content"]
    title = before.title()
    assert 0 < len(title) <= 60
    assert (
        first["usage"]["completion_tokens"] == 24 or first["choices"][0]["finish_reason"] == "stop"
    )
    assert_chat_first(shared.events()[since:])
    assert ask_title(shared, body(question, answer))
    known = {"role": "assistant", "content": answer}
    usage = shared.chat([*says(question), known, *says("Why?")], **options)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 1
    shared.wait_idle()
    assert len(shared.stored()) == stored + 4


@pytest.mark.parametrize("body", TITLES)
def test_a_title_during_the_answer_waits_for_its_end(shared: Proxy, body: TitleBody) -> None:
    shared.wait_idle()
    since = len(shared.events())
    question = f"Tell me of the sea. {uuid4().hex[:6]}"
    options = {"user": "u1", "max_tokens": 40, "logit_bias": {"2": -100}}
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(shared.chat(says(question), **options)))
    thread.start()
    shared.wait_for_event(
        "answering", lambda e: e["event"] == "first_token" and e["cls"] == "chat", since=since
    )
    assert 0 < len(ask_title(shared, body(question, ""))) <= 60
    thread.join(100)
    (first,) = answers
    assert first["usage"]["completion_tokens"] == 40
    assert_chat_first(shared.events()[since:])
    # The next turn evaluates its own tokens, as if there had been no title.
    shared.wait_idle()
    chat = [*says(question), first["choices"][0]["message"], *says("Why?")]
    usage = shared.chat(chat, user="u1", max_tokens=4)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 1


def test_a_long_question_gets_its_title_from_the_chat_itself(shared: Proxy) -> None:
    """The chat is in the cache already: only the instruction is evaluated."""
    question = " ".join(f"Station {i} has a keeper." for i in range(60)) + uuid4().hex[:6]
    shared.chat(says(question), user="u1", max_tokens=4)
    body = {"model": "m", "user": "u1", "stream": False, **plain_now(question, "")}
    usage = shared.post("/v1/chat/completions", body).json()["usage"]
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] < 48
    assert usage["prompt_tokens"] > 400


def test_the_language_is_told_without_the_model(shared: Proxy) -> None:
    since = len(shared.events())
    fields = {"properties": {"language": {"type": "string"}}}
    system = {"role": "system", "content": "Detect the language used in the following text."}
    body = {
        "messages": [system, *says("Was ist eine Katze und wie alt wird sie?")],
        "functions": [formatter(fields)],
        "function_call": {"name": "output_formatter"},
    }
    message = shared.chat(body.pop("messages"), **body)["choices"][0]["message"]
    call = message["function_call"]
    assert json.loads(call["arguments"]) == {"language": "German"}
    assert not of_class(shared.events()[since:], "side")


# -- LibreChat's own summaries -------------------------------------------------------------------

CHECKPOINT = (
    "Hold on, before you continue I need you to write me a checkpoint of everything so far. Your "
    "context window is filling up and this checkpoint replaces the messages above."
)


def test_a_checkpoint_comes_from_what_is_stored_and_the_chat_goes_on_as_it_was(
    shared: Proxy,
) -> None:
    shared.wait_idle()
    name, options = f"Wanda{uuid4().hex[:6]}", {"user": "u1", "max_tokens": 16}
    system = {"role": "system", "content": "You are a patient gardener who likes short answers."}
    chat: list[dict[str, Any]] = []
    for text in (f"My name is {name} and I keep bees.", "What do bees eat?", "And in winter?"):
        chat += says(text)
        chat.append(shared.chat([system, *chat], **options)["choices"][0]["message"])
    shared.wait_idle()
    since, stored = len(shared.events()), len(shared.stored())
    asked = {"messages": [*chat, *says(CHECKPOINT)], "user": "u1", "stream": True}
    response = shared.post("/v1/chat/completions", asked)
    assert response.headers["x-chatfold-side"] == "checkpoint"
    lines = response.text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    summary = json.loads(lines[1].removeprefix("data: "))["choices"][0]["delta"]["content"]
    assert name in summary
    assert not of_class(shared.events()[since:], "side")
    assert len(shared.stored()) == stored
    # From now on LibreChat sends its summary, the last turn, and what is new.
    text = f"{system['content']}\n\n## Conversation Summary\n\n{summary}"
    body = {
        "messages": [{"role": "system", "content": text}, *chat[-2:], *says("Who am I?")],
        **options,
    }
    context = shared.post("/api/context", body).json()["context"]
    assert name in context[1]["text"]
    assert "Conversation Summary" not in context[0]["text"]
    usage = shared.post("/v1/chat/completions", body).json()["usage"]
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] < 24


def test_a_summary_of_0_6_comes_at_once_and_keeps_what_was_said(shared: Proxy) -> None:
    since = len(shared.events())
    text = (
        "Summarize the conversation by integrating new lines into the current summary.\n\n"
        "Current summary:\nAda keeps bees.\n\nNew lines:\nUser: My hive number 7 is blue.\n"
        "AI: A fine colour.\n\nNew summary:"
    )
    answer = shared.chat([{"role": "system", "content": text}], user="u1")
    content = answer["choices"][0]["message"]["content"]
    assert content.startswith("Ada keeps bees.")
    assert "hive number 7 is blue" in content
    assert not of_class(shared.events()[since:], "side")


# -- repetitions, silence ------------------------------------------------------------------------

AGENTS = ("langchainjs-openai/1.0.0 ((node/v20.20.2; linux; x64))", "OpenAI/JS 4.20.1")
ENDLESS: dict[str, Any] = {"stream": True, "max_tokens": 400, "logit_bias": {"2": -100}}


@contextmanager
def sent(proxy: Proxy, body: dict[str, Any], *, agent: str, key: str = "x") -> Iterator[Any]:
    """A client that has sent its whole request; gives what it reads, line by line."""
    data = json.dumps(body).encode()
    host, _, port = proxy.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=100) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nuser-agent: %s\r\n"
            b"authorization: Bearer %s\r\ncontent-length: %d\r\n\r\n"
            % (agent.encode(), key.encode(), len(data))
            + data
        )
        with client.makefile("rb") as lines:
            yield lines


def deltas(lines: Any, n: int) -> list[str]:
    """The next `n` pieces of text, empty ones too; the opening, which names the role, is none."""
    found: list[str] = []
    while len(found) < n:
        line = next(lines)
        if line.startswith(b"data: {"):
            delta = json.loads(line[6:])["choices"][0]["delta"]
            if "content" in delta and "role" not in delta:
                found.append(delta["content"])
    return found


def wait_until_stopped(proxy: Proxy, since: int) -> None:
    """Until a chat's answer was cancelled."""
    proxy.wait_for_event(
        "stopped",
        lambda e: e["event"] == "request_cancelled" and e["cls"] == "chat",
        since=since,
    )


def queued(proxy: Proxy, since: int) -> int:
    events = of_class(proxy.events()[since:], "chat")
    return len([e for e in events if e["event"] == "request_queued"])


@pytest.mark.parametrize("agent", AGENTS)
def test_a_repeated_request_joins_the_one_that_runs(shared: Proxy, agent: str) -> None:
    shared.wait_idle()
    since = len(shared.events())
    body = {"messages": says(f"Count to a thousand. {uuid4().hex[:6]}"), **ENDLESS}
    with sent(shared, body, agent=agent) as again:
        with sent(shared, body, agent=agent) as first:
            beginning = deltas(first, 3)
            assert deltas(again, 3) == beginning
        assert len(deltas(again, 3)) == 3
    wait_until_stopped(shared, since)
    assert queued(shared, since) == 1


def test_nobody_joins_anothers_answer_and_no_other_client_is_joined(shared: Proxy) -> None:
    shared.wait_idle()
    since = len(shared.events())
    body = {"messages": says(f"Count to a thousand. {uuid4().hex[:6]}"), **ENDLESS}
    with sent(shared, body, agent=AGENTS[0], key="a") as one:
        deltas(one, 1)
        with sent(shared, body, agent=AGENTS[0], key="b") as other:
            deltas(other, 1)
    shared.wait_idle()
    with sent(shared, body, agent="curl") as one, sent(shared, body, agent="curl") as other:
        deltas(one, 1)
        deltas(other, 1)
    assert queued(shared, since) == 4


def test_an_answer_that_ended_is_not_given_to_who_asks_again(shared: Proxy) -> None:
    since, options = len(shared.events()), {"headers": {"user-agent": AGENTS[0]}}
    body = {"messages": says(f"Hello. {uuid4().hex[:6]}"), "max_tokens": 2, "stream": True}
    for _ in range(2):
        assert shared.post("/v1/chat/completions", body, **options).text.endswith("[DONE]\n\n")
    assert queued(shared, since) == 2


def test_empty_pieces_come_while_the_prompt_is_evaluated(shared: Proxy) -> None:
    """LibreChat 0.6 notices that Stop was pressed when a piece comes."""
    shared.wait_idle()
    since = len(shared.events())
    words = " ".join(str(n) for n in range(700))
    body = {"messages": says(f"{uuid4().hex} {words}"), "stream": True}
    with sent(shared, body, agent=AGENTS[1]) as lines:
        seen: list[str] = []
        while "batch" not in seen:  # Where the machine is slow, it has not come so far yet.
            assert deltas(lines, 1) == [""]
            seen = [e["event"] for e in of_class(shared.events()[since:], "chat")]
        assert "first_token" not in seen
    wait_until_stopped(shared, since)


def test_a_stream_has_its_headers_while_the_model_loads(tmp_path: Path) -> None:
    with serving(tmp_path, "--n-ctx", "512") as proxy:
        os.kill(proxy.status()["engine"]["pid"], signal.SIGKILL)
        proxy.wait("gone", lambda status: status["engine"]["restarts"] or not is_ready(status))
        body = {"messages": says("Hello."), "max_tokens": 2, "stream": True}
        with sent(proxy, body, agent=AGENTS[0]) as lines:
            assert next(lines) == b"HTTP/1.1 200 OK\r\n"
            assert deltas(lines, 1)


def is_ready(status: dict[str, Any]) -> bool:
    return bool(status["engine"]["ready"])


# -- bodies of 0.6 -------------------------------------------------------------------------------

STOPS = ["||>", "\nUser:", "<|diff_marker|>"]
INSTRUCTIONS = {"role": "system", "name": "instructions", "content": "Instructions:\nBe terse."}


def test_the_system_message_that_moves_costs_nothing(shared: Proxy) -> None:
    chat = says(f"What is a cat? {uuid4().hex[:6]}")
    options: dict[str, Any] = {"stop": STOPS, "temperature": 1, "top_p": 1, "user": "u1"}
    # An answer that ends at once would be left out, and its question stand before the next.
    options |= {"max_tokens": 12, "logit_bias": {"2": -100}}
    for _ in range(3):
        messages = [*chat[:-1], INSTRUCTIONS, chat[-1]]
        usage = (answer := shared.chat(messages, **options))["usage"]
        evaluated = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        if len(chat) > 1:
            assert evaluated <= 16
        text = answer["choices"][0]["message"]["content"]
        assert not any(stop in text for stop in STOPS)
        # Trimmed, as it stores answers.
        chat += [{"role": "assistant", "content": text.strip()}, *says("And a dog?")]
        shared.wait_idle()


@pytest.mark.parametrize("path", ["/v1/completions", "/completions", "/v1", "/"])
def test_a_chat_written_as_one_text_is_a_chat(shared: Proxy, path: str) -> None:
    question = f"What is a lamp? {uuid4().hex[:6]}"
    prompt = f"||>Instructions:\nBe terse.\n\n||>User:\n{question}\n||>Assistant:\n"
    body = {"prompt": prompt, "model": "gpt-3.5-turbo", "max_tokens": 12, "stop": STOPS}
    first = shared.post(path, body)
    completion = Completion.model_validate_json(first.text, strict=True)
    text = completion.choices[0].text
    assert text
    assert first.headers["x-chatfold-conversation"]
    again = {**body, "prompt": f"{prompt}{text}\n||>User:\nWho lit it?\n||>Assistant:\n"}
    second = shared.post(path, {**again, "stream": True, "stream_options": {"include_usage": True}})
    *frames, done = [line for line in second.text.split("\n\n") if line.startswith("data: ")]
    assert done == "data: [DONE]"
    chunks = [json.loads(f.removeprefix("data: ")) for f in frames]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] <= 24
    headers = [r.headers["x-chatfold-conversation"] for r in (first, second)]
    assert headers[0] == headers[1]


def test_an_image_is_a_clear_error_that_is_not_tried_again(shared: Proxy) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    parts = [{"type": "text", "text": "What is this?"}, image]
    messages = [{"role": "user", "content": parts}]
    for model in ("gpt-4-vision-preview", "gpt-4o"):
        refused = shared.post("/v1/chat/completions", {"model": model, "messages": messages})
        assert refused.status_code == 400
        assert "cannot see images" in refused.json()["error"]["message"]


def test_two_users_in_a_row_and_an_answer_in_front_are_understood(shared: Proxy) -> None:
    mark = uuid4().hex[:6]
    shared.chat([*says(f"First {mark}."), *says("Second.")], max_tokens=4)
    leading = [{"role": "assistant", "content": f"I said {mark}."}, *says("What did you say?")]
    assert shared.chat(leading, max_tokens=4)["choices"][0]["message"]["content"]


def test_a_name_with_a_long_context_is_offered(tmp_path: Path) -> None:
    names = "gpt-4-1106-preview, mine"
    with serving(tmp_path, "--n-ctx", "512", CHATFOLD_LIBRECHAT_MODEL_NAMES=names) as proxy:
        listed = [model["id"] for model in proxy.get("/models").json()["data"]]
        assert listed[1:] == ["gpt-4-1106-preview", "mine"]


@pytest.mark.parametrize("titles", ["first-words", "off"])
def test_titles_without_the_model(tmp_path: Path, titles: str) -> None:
    with serving(tmp_path, "--n-ctx", "512", CHATFOLD_LIBRECHAT_TITLES=titles) as proxy:
        title = ask_title(proxy, json_now("What is a lighthouse keeper doing all day?", ""))
        assert title == ("New Chat" if titles == "off" else "What is a lighthouse keeper")
        assert not of_class(proxy.events(), "side")


def test_a_title_that_would_have_to_wait_too_long_is_the_first_words(tmp_path: Path) -> None:
    with serving(tmp_path, "--n-ctx", "512", CHATFOLD_LIBRECHAT_TITLE_S="1") as proxy:
        question = "Please count from one to a thousand."
        body = {"messages": says(question), "user": "u1", **ENDLESS}
        with sent(proxy, body, agent="curl", key="") as lines:
            deltas(lines, 1)
            assert ask_title(proxy, plain_now(question, "")) == "Please count from one to"
            assert not of_class(proxy.events(), "side")
            assert deltas(lines, 1)
