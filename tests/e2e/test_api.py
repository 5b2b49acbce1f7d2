"""The API as clients see it: over a real socket, with the real model."""

from __future__ import annotations

import json
import re
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

from proxy.app import DATABASE, create_app
from proxy.config import Config
from proxy.headers import owner_of

from .serving import Proxy, serving

Messages = list[dict[str, Any]]

STORY = "Tell me a short story about a lighthouse keeper and her cat."
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
OPEN_PATHS = ("/healthz", "/readyz")


def says(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def cached(answer: dict[str, Any]) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def frames(proxy: Proxy, messages: Messages, **options: Any) -> list[str]:
    """The payloads of a stream's frames, as they came."""
    body = {"messages": messages, "stream": True, **options}
    response = proxy.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in response.text.splitlines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def streamed_text(payloads: list[str]) -> str:
    chunks = [json.loads(p) for p in payloads if p != "[DONE]"]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


@pytest.fixture
def client(shared: Proxy) -> Iterator[OpenAI]:
    with openai_client(shared) as it:
        yield it


@contextmanager
def openai_client(proxy: Proxy) -> Iterator[OpenAI]:
    with (
        httpx.Client(trust_env=False, timeout=60) as http,
        OpenAI(base_url=f"{proxy.url}/v1", api_key="x", max_retries=0, http_client=http) as client,
    ):
        yield client


# -- the objects ---------------------------------------------------------------------------------


def test_a_completion_is_exactly_the_object_that_openai_defines(shared: Proxy) -> None:
    raw = shared.post("/v1/chat/completions", {"messages": says("Hello."), **GREEDY}).text
    completion = ChatCompletion.model_validate_json(raw, strict=True)
    assert not completion.model_extra
    assert completion.id.startswith("chatcmpl-")
    assert completion.object == "chat.completion"
    (choice,) = completion.choices
    assert not choice.model_extra
    assert not choice.message.model_extra
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    usage = completion.usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_every_chunk_is_exactly_the_object_that_openai_defines(shared: Proxy) -> None:
    options = {"stream_options": {"include_usage": True}}
    *payloads, done = frames(shared, says("Hello."), **GREEDY, **options)
    assert done == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(p, strict=True) for p in payloads]
    assert not any(chunk.model_extra for chunk in chunks)
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert all(c.choices[0].finish_reason is None for c in (first, *middle))
    assert last.choices[0].finish_reason == "length"
    assert last.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == GREEDY["max_tokens"]
    assert all(c.usage is None for c in chunks[:-1])


def test_usage_comes_in_a_stream_only_when_asked_for(shared: Proxy) -> None:
    payloads = frames(shared, says("Hello."), **GREEDY)
    assert all("usage" not in json.loads(p) for p in payloads[:-1])


def test_openai_python_gathers_a_stream_with_its_own_helper(client: OpenAI) -> None:
    messages: Any = says("Name two fruits.")
    ask: dict[str, Any] = {"model": "any", "messages": messages, "temperature": 0, "stop": " "}
    with client.chat.completions.stream(**ask) as stream:
        choice = stream.get_final_completion().choices[0]
    assert choice.message.content
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("name", ["gpt-3.5-turbo", "gpt-4-vision-preview", "私のモデル"])
def test_any_model_name_is_taken_and_given_back(shared: Proxy, name: str) -> None:
    answer = shared.chat(says("Hello."), model=name, max_tokens=1)
    assert answer["model"] == name


def test_the_models_are_listed(shared: Proxy, client: OpenAI) -> None:
    listed = client.models.list().data
    assert [type(m) for m in listed] == [Model]
    assert shared.get("/models").json() == shared.get("/v1/models").json()
    assert shared.get("/models").json()["object"] == "list"


# -- the prefix cache as the client sees it --------------------------------------------------------


def test_the_second_turn_evaluates_only_what_is_new(shared: Proxy) -> None:
    messages = says("My name is Wanda and I keep bees.")
    first = shared.chat(messages, **GREEDY)
    messages += [{"role": "assistant", "content": text_of(first)}, *says("What do I keep?")]
    second = shared.chat(messages, **GREEDY)
    known = first["usage"]["total_tokens"]
    assert known - 1 <= cached(second) < second["usage"]["prompt_tokens"]


def test_a_list_of_text_parts_is_the_same_conversation_as_a_string(shared: Proxy) -> None:
    question = "Which rivers flow through Vienna and Budapest?"
    plain = shared.post("/v1/chat/completions", {"messages": says(question), **GREEDY})
    parts = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    listed = shared.post("/v1/chat/completions", {"messages": parts, **GREEDY})
    conversation = "x-chatfold-conversation"
    assert listed.headers[conversation] == plain.headers[conversation]
    prompt = plain.json()["usage"]["prompt_tokens"]
    assert listed.json()["usage"]["prompt_tokens"] == prompt
    assert cached(listed.json()) == prompt - 1


# -- sampling --------------------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Proxy]:
    """A proxy whose KV cache has no gaps yet.

    Where cells were freed, the next tokens lie in another order, sums are rounded differently, and
    a sampled token may be another one: measured up to 5 % in a token's probability.
    """
    with serving(tmp_path, "--n-ctx", "1024") as proxy:
        yield proxy


def test_temperature_0_gives_the_same_text_cold_and_warm(fresh: Proxy) -> None:
    cold, warm = (fresh.chat(says(STORY), **GREEDY) for _ in range(2))
    assert cached(cold) < cached(warm)
    assert text_of(cold) == text_of(warm)


def test_openai_python_reads_the_same_answer_streamed_and_not(fresh: Proxy) -> None:
    messages: Any = says("Name two fruits.")
    ask: dict[str, Any] = {"model": "any", "messages": messages, **GREEDY}
    with openai_client(fresh) as client:
        whole = client.chat.completions.create(**ask).choices[0].message.content
        stream = client.chat.completions.create(**ask, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
    assert whole


def test_the_same_seed_gives_the_same_text(fresh: Proxy) -> None:
    one, other = (fresh.chat(says(STORY), seed=7, temperature=1, max_tokens=16) for _ in "12")
    assert text_of(one) == text_of(other)


def test_other_seeds_give_other_texts(shared: Proxy) -> None:
    options = {"temperature": 1, "max_tokens": 16}
    texts = {text_of(shared.chat(says(STORY), seed=seed, **options)) for seed in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_an_answer_has_no_more_tokens_than_allowed(shared: Proxy, limit: str) -> None:
    answer = shared.chat(says(STORY), **{limit: 5})
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_that_spans_tokens_ends_the_answer_before_it(fresh: Proxy) -> None:
    whole = text_of(fresh.chat(says(STORY), **GREEDY))
    # From the middle of one word to the middle of the next.
    space = whole.index(" ", 8)
    stop = whole[space - 2 : space + 3]
    expected = whole[: whole.index(stop)]
    answer = fresh.chat(says(STORY), **GREEDY, stop=stop)
    assert text_of(answer) == expected
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert streamed_text(frames(fresh, says(STORY), **GREEDY, stop=["||>", stop])) == expected


def test_a_banned_token_does_not_come(fresh: Proxy) -> None:
    question = says("Say something nobody has ever said before.")
    free = text_of(fresh.chat(question, **GREEDY))
    token = _first_token(fresh, free)
    banned = text_of(fresh.chat(question, **GREEDY, logit_bias={str(token): -100}))
    forced = fresh.chat(question, max_tokens=3, logit_bias={str(token): 100})
    piece = text_of(forced)[: len(text_of(forced)) // 3]
    assert free.startswith(piece)
    assert not banned.startswith(piece)


def _first_token(proxy: Proxy, answer: str) -> int:
    """The first of the tokens that were kept of a stored answer."""
    proxy.wait_idle()
    with closing(sqlite3.connect(f"file:{proxy.data / DATABASE}?mode=ro", uri=True)) as db:
        find = "SELECT token_ids FROM messages WHERE role = 'assistant' AND text = ?"
        token: int = struct.unpack_from("<i", db.execute(find, [answer]).fetchone()[0])[0]
    return token


# -- headers, status, numbers ----------------------------------------------------------------------


def test_the_turns_of_a_chat_have_one_conversation_and_other_chats_another(shared: Proxy) -> None:
    def send(messages: Messages) -> httpx.Response:
        return shared.post("/v1/chat/completions", {"messages": messages, **GREEDY})

    messages = says("I am planning a trip to Norway.")
    first = send(messages)
    messages += [{"role": "assistant", "content": text_of(first.json())}, *says("In winter.")]
    second, other = send(messages), send(says("I am planning a trip to Sweden."))
    names = [r.headers["x-chatfold-conversation"] for r in (first, second, other)]
    assert names[0] == names[1] != names[2]
    assert "verbatim_turns=1; " in first.headers["x-chatfold-context"]
    assert "verbatim_turns=2; " in second.headers["x-chatfold-context"]
    assert "summaries=0; summary_tokens=0; " in second.headers["x-chatfold-context"]


def test_chats_that_begin_alike_keep_their_own_system_prompts(shared: Proxy) -> None:
    """Also when the first message is known already, from the other chat or from a first try."""
    for prompt in ("You are a pirate.", "Answer as a lawyer would.", "You are a pirate."):
        messages = [{"role": "system", "content": prompt}, *says("Hi, who are you?")]
        shared.chat(messages, **GREEDY)
        context = shared.post("/api/context", {"messages": messages}).json()["context"]
        assert prompt in "".join(message["text"] for message in context)


def test_a_stream_has_the_same_headers(shared: Proxy) -> None:
    body = {"messages": says("I am planning a trip to Norway."), **GREEDY}
    whole = shared.post("/v1/chat/completions", body).headers
    stream = shared.post("/v1/chat/completions", body | {"stream": True}).headers
    for name in ("x-chatfold-conversation", "x-chatfold-context"):
        assert stream[name] == whole[name]


def test_asking_for_the_context_writes_nothing_and_gives_the_same_bytes(shared: Proxy) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *says("Never asked before.")]
    before = shared.wait_idle()["store"]
    one, other = (shared.post("/api/context", {"messages": messages}) for _ in range(2))
    assert one.status_code == 200
    assert one.content == other.content
    assert [m["role"] for m in one.json()["context"]] == ["system", "user"]
    assert one.json()["shape"]["verbatim_turns"] == 1
    assert shared.status()["store"] == before


def test_status_tells_what_the_house_is_doing(shared: Proxy) -> None:
    status = shared.wait_idle()
    classes = {"chat": 0, "side": 0, "background": 0}
    assert status["background"] == {"running": 0, "pending": 0}
    assert status["queue"] == classes
    assert status["engine"]["ready"] is True
    assert status["engine"]["running"] == status["engine"]["waiting"] == classes
    assert status["engine"]["window_tokens"] == 2048
    assert status["engine"]["cells_used"] <= status["engine"]["cells"]
    assert status["policy"] == "balanced"
    assert status["store"]["degraded"] is False
    assert {"owners", "conversations", "messages", "summaries"} <= status["store"].keys()


def test_it_says_that_it_is_alive_and_ready(shared: Proxy) -> None:
    assert shared.get("/healthz").json() == {"status": "ok"}
    assert shared.get("/readyz").json() == {"status": "ready"}


def test_the_metrics_count_what_a_request_cost(shared: Proxy) -> None:
    shared.wait_idle()
    before = _samples(shared)
    usage = shared.chat(says("Count me."), **GREEDY)["usage"]
    after = _samples(shared)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    saved = usage["prompt_tokens_details"]["cached_tokens"]
    assert grown('chatfold_tokens_generated_total{"work": "chat"}') == usage["completion_tokens"]
    assert grown('chatfold_tokens_cached_total{"work": "chat"}') == saved
    evaluated = usage["prompt_tokens"] - saved
    assert grown('chatfold_tokens_evaluated_total{"work": "chat"}') == evaluated
    assert grown("chatfold_first_token_seconds_count{}") == 1


def _samples(proxy: Proxy) -> dict[str, float]:
    families = text_string_to_metric_families(proxy.get("/metrics").text)
    samples = (sample for family in families for sample in family.samples)
    return {f"{s.name}{json.dumps(s.labels)}": s.value for s in samples}


# -- whose it is -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy of two keys."""
    path = tmp_path_factory.mktemp("locked")
    keys = "alpha-key,beta-key"
    with serving(path, "--n-ctx", "1024", key="alpha-key", CHATFOLD_API_KEY=keys) as proxy:
        yield proxy


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
def test_without_its_key_nothing_but_health_is_open(
    locked: Proxy, headers: dict[str, str], tmp_path: Path
) -> None:
    for method, path in _doors(tmp_path):
        if _is_page(path):
            continue
        response = _knock(locked, method, path, headers)
        if path in OPEN_PATHS:
            assert response.status_code == 200
        else:
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
def test_without_its_key_every_page_leads_to_the_login(
    locked: Proxy, headers: dict[str, str], tmp_path: Path
) -> None:
    pages = [(method, path) for method, path in _doors(tmp_path) if _is_page(path)]
    assert len(pages) > 10
    for method, path in pages:
        response = _knock(locked, method, path, headers | {"accept": "text/html"})
        if path.startswith("/inspect/files/"):
            assert response.status_code == 404  # The names of files are no secret; this is none.
        elif path == "/inspect/login":
            assert response.status_code == (200 if method == "GET" else 403)
        else:
            found = response.status_code, response.headers.get("location")
            assert found == (303, "/inspect/login"), (method, path)


def _doors(tmp_path: Path) -> Iterator[tuple[str, str]]:
    for route in create_app(Config(data=tmp_path)).routes:
        (method,) = route.methods - {"HEAD"}  # type: ignore[attr-defined]
        yield method, route.path  # type: ignore[attr-defined]


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith("/inspect/")


def _knock(proxy: Proxy, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    path = re.sub(r"{\w+:int}", "1", path)
    body = {"json": {"messages": says("Let me in.")}} if method == "POST" else {}
    return httpx.request(
        method, proxy.url + path, headers=headers, trust_env=False, timeout=60, **body
    )


def test_two_keys_share_no_cache_and_no_store(locked: Proxy) -> None:
    question = says("What is the tallest tree in the park?")
    first = locked.chat(question, **GREEDY)
    again = locked.chat(question, **GREEDY)
    foreign = _as_beta(locked, {"messages": question, **GREEDY})
    assert cached(again) == first["usage"]["prompt_tokens"] - 1
    assert cached(foreign.json()) == 0
    assert locked.wait_idle()["store"]["owners"] == 2


def _as_beta(proxy: Proxy, body: dict[str, Any]) -> httpx.Response:
    headers = {"authorization": "Bearer beta-key"}
    return proxy.post("/v1/chat/completions", body, headers=headers)


def test_two_users_of_one_key_share_no_cache(locked: Proxy) -> None:
    question = says("Where is the oldest bridge of the town?")
    mine = [locked.chat(question, user="ada", **GREEDY) for _ in range(2)]
    foreign = locked.chat(question, user="grace", **GREEDY)
    assert cached(mine[1]) == mine[0]["usage"]["prompt_tokens"] - 1
    assert cached(foreign) == 0


def test_an_owner_is_not_told_of_anothers_conversation(locked: Proxy) -> None:
    """The same text under another key is another conversation: its name gives nothing away."""
    body = {"messages": says("A secret about the lighthouse."), **GREEDY}
    mine = locked.post("/v1/chat/completions", body).headers["x-chatfold-conversation"]
    assert _as_beta(locked, body).headers["x-chatfold-conversation"] != mine
    assert owner_of(locked.headers) != owner_of({"authorization": "Bearer beta-key"})
