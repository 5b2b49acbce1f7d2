"""LibreChat's own summaries: what asks for one, and requests that carry one. Pure.

Since 0.8.5 LibreChat summarises by itself unless told not to. From then on it sends

    system: PROMPT, blank line, ## Conversation Summary, blank line, TEXT     next request and later
    user:   <summary> TEXT </summary> This is your own checkpoint ...         within the same run

and none of the turns that the summary stands for. They are in the store all the same.
"""

from __future__ import annotations

import re
from dataclasses import replace

from memory.transcript import ASSISTANT, USER, Message, Transcript

IN_SYSTEM = "## Conversation Summary\n\n"
IN_MESSAGE = "<summary>\n"
OUT_OF_MESSAGE = "\n</summary>"

_CURRENT = "\nCurrent summary:\n"
_NEW_LINES = "\n\nNew lines:\n"
_NEW_SUMMARY = "\n\nNew summary:"
_CUT_OFF = re.compile(r"The following text is cut-off:\n(?P<lines>.*?)\n\nSummarize the", re.DOTALL)
_SPEAKER = re.compile(r"^(?P<who>[^\s:][^\n:]{0,40}): ", re.MULTILINE)
_USERS = ("user", "human")


def without_summary(transcript: Transcript) -> Transcript | None:
    """The transcript without LibreChat's own summary, or None where it has none."""
    front, found, _ = transcript.system.rpartition(IN_SYSTEM)
    if found:
        return replace(transcript, system=front.rstrip())
    first = transcript.messages[0] if transcript.messages else None
    if first and first.role == USER and first.text.startswith(IN_MESSAGE):
        return replace(transcript, messages=transcript.messages[1:])
    return None


def summary_of(transcript: Transcript) -> str:
    """LibreChat's own summary in this request, "" where it has none."""
    _, found, text = transcript.system.rpartition(IN_SYSTEM)
    if found:
        return text.strip()
    first = transcript.messages[0] if transcript.messages else None
    if first and first.role == USER and first.text.startswith(IN_MESSAGE):
        return first.text.removeprefix(IN_MESSAGE).partition(OUT_OF_MESSAGE)[0].strip()
    return ""


def without_instruction(transcript: Transcript) -> Transcript:
    """What a checkpoint is asked of: all but the last message."""
    before = replace(transcript, messages=transcript.messages[:-1])
    return without_summary(before) or before


def to_summarise(text: str) -> tuple[str, tuple[Message, ...]]:
    """What a request of 0.6 wants summarised: its current summary, "" if none, and the messages."""
    if buffer := _buffer(text.rstrip()):
        return buffer[0].strip(), _messages(buffer[1])
    found = _CUT_OFF.match(text)
    return "", _messages(found["lines"]) if found else (Message(USER, text),)


def _buffer(text: str) -> tuple[str, str] | None:
    """The summary and the lines behind the examples. Linear: no expression that goes back."""
    if not text.endswith(_NEW_SUMMARY):
        return None
    text = text.removesuffix(_NEW_SUMMARY)
    front, found, _ = text[: max(0, text.rfind(_NEW_LINES))].rpartition(_CURRENT)
    summary, _, lines = text[len(front) + len(found) :].partition(_NEW_LINES)
    return (summary, lines) if found else None


def _messages(lines: str) -> tuple[Message, ...]:
    marks = list(_SPEAKER.finditer(lines))
    if not marks:
        return (Message(USER, lines),)
    ends = [*(mark.start() for mark in marks[1:]), len(lines)]
    return tuple(
        Message(_role(mark["who"]), lines[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    )


def _role(who: str) -> str:
    return USER if who.lower() in _USERS else ASSISTANT
