"""Where the user's side of the chat comes from: LoCoMo (Maharana et al., ACL 2024), CC BY-NC 4.0,
read from beside the checkout and never copied into it.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

CHAT = Path(__file__).resolve().parents[2] / "shared/data/locomo/conv-26.json"


def user_turns(path: Path, n: int) -> list[str]:
    """The first `n` lines of speaker A, in order, over the sessions. Raises OSError, ValueError."""
    conversation = json.loads(path.read_text(encoding="utf-8"))["conversation"]
    lines = [m["text"] for m in _messages(conversation) if m["speaker"] == _speaker(conversation)]
    if len(lines) < n:
        raise ValueError(f"{path.name} has {len(lines)} lines of one speaker, {n} are wanted")
    return lines[:n]


def _speaker(conversation: dict[str, Any]) -> str:
    return str(conversation["speaker_a"])


def _messages(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for session in count(1):
        if f"session_{session}" not in conversation:
            return found
        found += conversation[f"session_{session}"]
    raise AssertionError("count() does not end")
