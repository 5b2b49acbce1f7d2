"""LoCoMo's conversations as chats (Maharana et al. 2024, "Evaluating Very Long-Term Conversational
Memory of LLM Agents"): the first speaker is the user, the second the assistant. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from typing import Any

from memory.transcript import ASSISTANT, USER, Message
from proxy.tuning.chats import Chat, Question

ADVERSARIAL = 5
"""Questions of this category have no answer in the chat."""

_EVIDENCE = re.compile(r"D(\d+):(\d+)")
"""A few fields hold several ids, or an id among other letters."""


def is_locomo(value: Any) -> bool:
    chat = value.get("conversation") if isinstance(value, dict) else None
    return isinstance(chat, dict) and "speaker_a" in chat


def parse_locomo(value: dict[str, Any], *, name: str) -> Chat:
    """Each session begins with its date, which many questions are about. Raises KeyError,
    TypeError, ValueError or AttributeError for what only looks like one."""
    chat = value["conversation"]
    said: list[tuple[str, str]] = []
    lines: dict[str, str] = {}
    for session in _sessions(chat):
        date = f"[{chat[f'session_{session}_date_time']}]\n"
        for line in chat[f"session_{session}"]:
            role = USER if line["speaker"] == chat["speaker_a"] else ASSISTANT
            lines[_id(line["dia_id"])] = str(line["text"])
            said.append((role, date + str(line["text"])))
            date = ""
    questions = tuple(_questions(value.get("qa", []), lines))
    return Chat(name, _merged(said), questions=questions)


def _sessions(chat: dict[str, Any]) -> Iterator[int]:
    for session in count(1):
        if f"session_{session}" not in chat:
            return
        yield session


def _merged(said: list[tuple[str, str]]) -> tuple[Message, ...]:
    """One message where the same speaker goes on."""
    out: list[Message] = []
    for role, text in said:
        if out and out[-1].role == role:
            out[-1] = Message(role, f"{out[-1].text}\n{text}")
        else:
            out.append(Message(role, text))
    return tuple(out)


def _questions(qa: list[dict[str, Any]], lines: dict[str, str]) -> Iterator[Question]:
    for one in qa:
        ids = _EVIDENCE.findall(" ".join(map(str, one.get("evidence", []))))
        evidence = tuple(
            lines[f"D{int(s)}:{int(n)}"] for s, n in ids if f"D{int(s)}:{int(n)}" in lines
        )
        if evidence and one.get("category") != ADVERSARIAL and "answer" in one:
            yield Question(str(one["answer"]), evidence)


def _id(dia_id: str) -> str:
    session, line = _EVIDENCE.findall(dia_id)[0]
    return f"D{int(session)}:{int(line)}"
