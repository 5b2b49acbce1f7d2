"""What is said in the simulated chats, and the summaries that a careful model would write of it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from memory.context import SYSTEM, Context
from memory.language import sentences
from proxy.tuning.simulation import words

LOCOMO = Path(__file__).resolve().parents[2] / "shared/data/locomo"
"""LoCoMo (Maharana et al., ACL 2024), CC BY-NC 4.0: read from beside the checkout, never copied."""

_SPOKEN = re.compile(r"\b(?:I|I'\w+|you|your|yours|my|me)\b", re.IGNORECASE)
_ADDRESSED = re.compile(r"^(?:User:|Assistant:|\[\d+\])\s*")
SENTENCE_CHARS = range(30, 200)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the user says and what the model answers."""

    question: str
    answer: str


def exchanges(n: int, *, answer_lines: int = 2) -> list[Exchange]:
    """`n` exchanges of LoCoMo's lines in their order (over again where they do not suffice), or of
    made ones where it is not there."""
    return exchanges_of(lines(), n, answer_lines=answer_lines)


def exchanges_of(texts: Sequence[str], n: int, *, answer_lines: int = 1) -> list[Exchange]:
    source = cycle(texts)
    return [Exchange(next(source), " ".join(islice(source, answer_lines))) for _ in range(n)]


def lines() -> list[str]:
    """LoCoMo's, or where it is not there made ones."""
    return locomo_lines() or made_lines(3000)


def locomo_lines() -> list[str]:
    return [line for path in sorted(LOCOMO.glob("conv-*.json")) for line in _lines(path)]


def _lines(path: Path) -> Iterator[str]:
    chat = json.loads(path.read_text(encoding="utf-8"))["conversation"]
    for session in range(1, len(chat)):
        for line in chat.get(f"session_{session}", []):
            yield line["text"]


def made_lines(n: int, *, seed: int = 7) -> list[str]:
    """Four plain sentences each, in the third person, hardly two the same."""
    chance = random.Random(seed)
    return [" ".join(_sentence(chance) for _ in range(4)) for _ in range(n)]


_ADJECTIVES = ("old", "quiet", "broken", "yellow", "heavy", "narrow", "warm", "empty", "wooden")
_NOUNS = (
    *("lantern", "harbour", "kitchen", "engine", "garden", "letter", "bridge", "violin", "market"),
    *("window", "carpet", "basket", "teacher", "doctor", "sailor", "painter", "library", "river"),
)
_VERBS = ("repaired", "carried", "painted", "measured", "counted", "borrowed", "cleaned", "sold")


def _sentence(chance: random.Random) -> str:
    adjective, noun, verb = map(chance.choice, (_ADJECTIVES, _NOUNS, _VERBS))
    return f"The {adjective} {noun} was {verb} for {chance.randint(2, 99)} coins."


def careful_summary(max_tokens: int) -> Callable[[Context], str]:
    """A model that summarises in sentences of what it was shown, spread over all of it: text that
    passes the checks. Sentences with "I" and "you" are left out, as a summary speaks of others."""

    def write(context: Context) -> str:
        # Behind a cached prefix the last message is the instruction; a fresh prompt is one message.
        chat = [m.text for m in context.messages if m.role != SYSTEM]
        shown = chat[:-1] or [chat[0].rpartition("\n====")[0]]
        return _excerpt(list(_statements(shown)), max_tokens)

    return write


def _statements(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for _, sentence in sentences(text):
            bare = _ADDRESSED.sub("", sentence.strip()).strip()
            if len(bare) in SENTENCE_CHARS and bare.endswith(".") and not _SPOKEN.search(bare):
                yield bare


def _excerpt(found: Sequence[str], max_tokens: int) -> str:
    """As many of them as there is room for, at equal distances."""
    if not found:
        return ""
    each = sum(len(words(s)) + 1 for s in found) / len(found)
    n = max(1, min(len(found), int(max_tokens * 0.8 / each)))
    chosen = [found[i * len(found) // n] for i in range(n)]
    while len(chosen) > 1 and sum(len(words(s)) + 1 for s in chosen) > max_tokens:
        chosen.pop()
    return " ".join(dict.fromkeys(chosen))
