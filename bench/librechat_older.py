"""What LibreChat 0.6 and 0.7 send, and a client that speaks as they do.

Where they differ from today's: all content is text, sampling and stops are always set, answers come
back trimmed, and the system message of 0.6 stands second to last and moves with every turn. It did
so until January 2025; 0.7.7 puts it first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from bench.librechat_side import Body, title_in, v0_6_function, v0_7_text

Chat = list[tuple[str, str]]

SAMPLING = {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0}
LABELS = ["||>", "\nUser:", "<|diff_marker|>"]
CHARS_PER_TOKEN = 4
STOP_AFTER_CHARS = 8
ANSWER_S = 120.0


def v0_6(chat: Chat, system: str) -> list[Body]:
    *before, last = _trimmed(chat)
    instructions = {
        "role": "system",
        "name": "instructions",
        "content": f"Instructions:\n{system}",
    }
    return [*before, instructions, last]


def v0_7(chat: Chat, system: str) -> list[Body]:
    return [{"role": "system", "content": f"Instructions:\n{system}"}, *_trimmed(chat)]


def _trimmed(chat: Chat) -> list[Body]:
    return [{"role": role, "content": text.strip()} for role, text in chat]


def pruned(chat: Chat, limit_tokens: int) -> Chat:
    """What all versions send: from the newest back, as long as their limit holds."""
    room = limit_tokens
    kept = 0
    for _, text in reversed(chat):
        room -= len(text) // CHARS_PER_TOKEN + 4
        if room < 0:
            break
        kept += 1
    return chat[-kept:]


@dataclass(frozen=True, slots=True)
class Version:
    """`titles` make the requests for a title, in their order: the last one's answer is it."""

    name: str
    agent: str
    messages: Callable[[Chat, str], list[Body]]
    titles: tuple[Callable[[str, str], Body], ...]


def _language(user: str, _: str) -> Body:
    system = {"role": "system", "content": "Detect the language used in the following text."}
    fields = {"type": "object", "properties": {"language": {"type": "string"}}}
    return {
        "messages": [system, {"role": "user", "content": user}],
        "functions": [{"name": "output_formatter", "parameters": fields}],
        "function_call": {"name": "output_formatter"},
    }


V0_6 = Version("0.6", "OpenAI/JS 4.20.1", v0_6, (_language, v0_6_function))
V0_7 = Version("0.7", "OpenAI/JS 4.47.1", v0_7, (v0_7_text,))


def body_of(version: Version, chat: Chat, system: str, **options: Any) -> Body:
    fixed = {"model": "m", **SAMPLING, "stop": LABELS}
    return {**fixed, **options, "stream": True, "messages": version.messages(chat, system)}


@dataclass(slots=True)
class OlderClient:
    """Takes one turn at a time, as bench.librechat_client.Client does. `base` is what
    OPENAI_REVERSE_PROXY would hold. Beside what these versions send it asks for the usage."""

    version: Version
    base: str
    user: str = "65b0c0ffee65b0c0ffee65b0"

    def turn(
        self,
        messages: list[list[str]],
        *,
        stop_when: Callable[[], object] | None = None,
        **ask: Any,
    ) -> dict[str, Any]:
        whole = [(role, text) for role, text in messages]
        chat = pruned(whole, ask["limit"])
        options = {"max_tokens": ask["maxTokens"], **ask.get("extra", {}), "user": self.user}
        options |= {"stream_options": {"include_usage": True}}
        options |= {"temperature": ask.get("temperature", 0)}
        body = body_of(self.version, chat, ask["instructions"], **options)
        with httpx.Client(timeout=ANSWER_S, trust_env=False) as http:
            said = self._said(http, body, stop_when, in_answer=ask.get("stop") == "answer")
            said["dropped"] = len(whole) - len(chat)
            if ask.get("title") and "error" not in said:
                said["title"] = self._title(http, chat[-1][1], said["text"])
        return said

    def _said(
        self,
        http: httpx.Client,
        body: Body,
        stop_when: Callable[[], object] | None,
        *,
        in_answer: bool,
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"text": "", "stopped": False}
        with self._ask(http, body) as response:
            if response.status_code != httpx.codes.OK:
                return {"error": response.read().decode(), "text": ""}
            if stop_when:
                stop_when()
                return said | {"stopped": True, "aborted_s": time.monotonic()}
            for chunk in _chunks(response):
                if usage := chunk.get("usage"):
                    said["usage"] = _usage(usage)
                if "error" in chunk:
                    said["error"] = chunk["error"]["message"]
                for choice in chunk.get("choices", []):
                    said["text"] += choice["delta"].get("content") or ""
                if in_answer and len(said["text"]) > STOP_AFTER_CHARS:
                    return said | {"stopped": True, "aborted_s": time.monotonic()}
        return said

    def _title(self, http: httpx.Client, user: str, answer: str) -> str:
        title = ""
        for shape in self.version.titles:
            body = {"model": "gpt-3.5-turbo", "user": self.user, "stream": False}
            with self._ask(http, body | shape(user, answer)) as response:
                response.read()
                title = title_in(response)
        return title

    def _ask(self, http: httpx.Client, body: Body) -> Any:
        url = f"{self.base}/chat/completions"
        headers = {"user-agent": self.version.agent, "accept": "application/json"}
        return http.stream("POST", url, json=body, headers=headers)


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """As today's client tells it."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "total_tokens": usage["total_tokens"],
        "input_token_details": {"cache_read": cached},
    }
