"""One streamed chat request, as a chat UI sends it, with the times and counts that matter."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx

TIMEOUT = httpx.Timeout(connect=5.0, read=300.0, write=30.0, pool=5.0)
ERROR_CHARS = 200

Messages = list[dict[str, str]]


@dataclass
class Answer:
    """What came back. Counts are None where the server did not tell them.

    Times are seconds; `sent_at` and `ended_at` are on the machine's monotonic clock.
    """

    status: int = 0
    text: str = ""
    error: str = ""
    finish_reason: str = ""
    context: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    first_content_s: float | None = None
    sent_at: float = 0.0
    ended_at: float = 0.0

    @property
    def ok(self) -> bool:
        return self.status == 200 and bool(self.text) and not self.error

    @property
    def total_s(self) -> float:
        return self.ended_at - self.sent_at

    @property
    def trouble(self) -> str:
        """What a user would see in place of an answer; "" when there was one."""
        if self.error or self.ok:
            return self.error
        return f"status {self.status}, an empty answer"

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self) | {"ok": self.ok, "total_s": self.total_s}
        # What was said about the data set's texts stays out: its licence is not ours.
        del fields["text"]
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}


def open_client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=TIMEOUT, trust_env=False)


def ask(client: httpx.Client, messages: Messages, *, max_tokens: int) -> Answer:
    """Never raises for what the server does wrong: that is what is measured."""
    answer = Answer(sent_at=time.monotonic())
    try:
        with client.stream("POST", "/v1/chat/completions", json=body(messages, max_tokens)) as r:
            _read(r, answer)
    except httpx.HTTPError as exc:
        answer.error = f"{type(exc).__name__}: {exc}"[:ERROR_CHARS]
    answer.ended_at = time.monotonic()
    return answer


def body(messages: Messages, max_tokens: int) -> dict[str, Any]:
    return {
        "model": "default",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _read(response: httpx.Response, answer: Answer) -> None:
    answer.status = response.status_code
    answer.context = response.headers.get("x-chatfold-context", "")
    if response.status_code != 200:
        response.read()
        answer.error = response.text[:ERROR_CHARS]
        return
    for event in _events(response):
        _take(event, answer)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        field, _, value = line.partition(":")
        if field == "data" and value.strip() != "[DONE]":
            yield json.loads(value)


def _take(event: dict[str, Any], answer: Answer) -> None:
    if "error" in event:
        answer.error = str(event["error"].get("message", event["error"]))[:ERROR_CHARS]
    for choice in event.get("choices", []):
        _take_choice(choice, answer)
    if usage := event.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.completion_tokens = usage["completion_tokens"]
        answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


def _take_choice(choice: dict[str, Any], answer: Answer) -> None:
    text = choice["delta"].get("content") or ""
    if text and answer.first_content_s is None:
        answer.first_content_s = time.monotonic() - answer.sent_at
    answer.text += text
    answer.finish_reason = choice["finish_reason"] or answer.finish_reason
