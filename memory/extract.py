"""Summaries made of the source's own sentences: what is used when a model's text is not good. Pure.

The score grows out of SumBasic's (Nenkova and Vanderwende 2005, "The impact of frequency on
summarization"), which is Luhn's idea of 1958 ("The automatic creation of literature abstracts")
with probabilities: a sentence is worth the mean probability of its content words, and once it is
taken the probability of each of its words is squared, so that the next sentence says something
else. Here the mean is of square roots, and the factors below come on top. Extracts of a quarter
of each of 128 LoCoMo sessions (Maharana et al. 2024) hold 63 % of the words of the answers to its
questions; with plain probabilities 61 %, sentences at random 40 %, the last quarter of the
session 28 % (all with USER_FACTOR 1, for both speakers there are users).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from math import sqrt

from memory.calls import split_calls
from memory.language import JAPANESE, code_blocks, script, sentences, words
from memory.transcript import ASSISTANT, TOOL, USER, Message

USER_FACTOR = 1.5
"""The user's statements before the assistant's chatter: they cannot be asked for again."""

TOOL_FACTOR = 0.5
"""For what tools returned: long, and what mattered of it is in the answer behind it."""

FACT_FACTOR = 2.0
"""For a sentence with a number, a name inside it, or a quotation."""

FIRST_FACTOR = 1.2
"""For the first mention of a word that comes back later."""

QUESTION_FACTOR = 0.4
"""For questions: mostly what the next sentence answers."""

SMOOTHING_WORDS = 8
"""Added to the number of words when the mean is taken, lest "Kyoto!" beat each sentence on it."""

LONGEST_CODE_CHARS = 400
"""Code blocks up to this length can be taken, whole; longer ones are skipped."""

TRIES = 40
"""How many sentences in a row may be too long for the room left, before it is called full."""

_LABELS = {
    True: {USER: "ユーザー: ", ASSISTANT: "アシスタント: ", TOOL: "ツール: "},
    False: {USER: "User: ", ASSISTANT: "Assistant: ", TOOL: "Tool: "},
}
SPEAKERS = tuple(label for labels in _LABELS.values() for label in labels.values())
"""What a line of an extract may begin with that is no part of the source."""

_WORD = re.compile(
    r"[A-Za-z\u00c0-\u024f][\w'’-]{2,}|\d[\d.,:]*|[\u0370-\u1fff]{3,}|[\uac00-\ud7af]{2,}"
    r"|[\u30a1-\u30faー]{2,}|[\u4e00-\u9fff々]+"
)
_FACTUAL = re.compile(
    r"\d|[a-z,] [A-Z][a-z]|[\"“「『`]|[〇二三四五六七八九十百千万]+[円人月日時分個本泊]"
)
_QUESTION = re.compile(r"[?？][\"”'’)）」』]*$|(?:です|ます|でしょう)か。?$")
_STOP_WORDS = words(
    "the and for are was were with that this have has had not you your yours they them their"
    " there here"
    " what when where which who whom how why can could would should will shall may might must"
    " does did"
    " doing done been being but about into over under after before than then too very just also"
    " only some"
    " any all each both more most much many such other another own same let lets get got getting"
    " its it's"
    " i'm i've i'll i'd you're you've you'll don't doesn't didn't can't won't isn't that's"
    " there's she her"
    " hers him his our ours out off our from because while until during really yeah yes okay sure"
    " thanks"
    " thank hello hey wow great good nice cool awesome amazing please well like one two know"
    " think want"
    " going make made see say said tell still even though lot things thing way bit glad happy help"
    " der die das und ist nicht ein eine mit auf für sie wir auch dem les est pas une des dans"
    " pour vous"
    " que qui nous avec sur los las por con una del para pero como più che per non sono"
    " della"
)


@dataclass(frozen=True, slots=True)
class _Unit:
    """A sentence or code block: where it stands, who said it, its content words, its factor."""

    message: int
    offset: int
    role: str
    text: str
    words: frozenset[str]
    factor: float


def extractive(source: Sequence[Message], *, max_tokens: int, count: Callable[[str], int]) -> str:
    """The best sentences of the source in its order, one a line, within `max_tokens` by `count`.

    A line at which the speaker changes begins with who it is. The same source gives the same text.
    Where not even one sentence fits, the beginning of the best one; "" where nothing fits at all.
    Time is linear in the source but for a logarithm; `count` is called once a sentence tried.
    """
    units = _units(source)
    labels = _labels(source, units)
    taken: list[_Unit] = []
    room, misses = max_tokens, 0
    for unit in _best_first(units):
        cost = count(labels[unit.role] + unit.text + "\n")
        if cost <= room:
            taken.append(unit)
            room -= cost
        misses = 0 if cost <= room else misses + 1
        if misses >= TRIES:
            break
    # Tokens of lines by themselves need not add up to the tokens of the whole.
    while taken and count(_joined(taken, labels)) > max_tokens:
        taken.pop()
    if taken or not units:
        return _joined(taken, labels)
    return cut(next(_best_first(units)).text, max_tokens=max_tokens, count=count)


def cut(text: str, *, max_tokens: int, count: Callable[[str], int]) -> str:
    """The longest beginning of the text found by bisection that has at most `max_tokens`."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if count(text[:middle].rstrip()) <= max_tokens:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip()


def _units(source: Sequence[Message]) -> list[_Unit]:
    seen: set[str] = set()
    early: set[str] = set()
    units = []
    for i, message in enumerate(source):
        spoken = split_calls(message.text)[0] if message.role == ASSISTANT else message.text
        for offset, text, code in _pieces(spoken):
            if text not in seen:
                seen.add(text)
                words = frozenset(_content_words(text))
                if not words:
                    continue
                factor = _factor(message.role, text, code=code)
                factor *= 1.0 if words <= early else FIRST_FACTOR
                early |= words
                units.append(_Unit(i, offset, message.role, text, words, factor))
    return units


def _pieces(text: str) -> Iterator[tuple[int, str, bool]]:
    for offset, sentence in sentences(text):
        yield offset, sentence, False
    for offset, block in code_blocks(text):
        if len(block) <= LONGEST_CODE_CHARS:
            yield offset, block, True


def _factor(role: str, text: str, *, code: bool) -> float:
    factor = {USER: USER_FACTOR, TOOL: TOOL_FACTOR}.get(role, 1.0)
    if code:
        return factor
    if _FACTUAL.search(text):
        factor *= FACT_FACTOR
    return factor * (QUESTION_FACTOR if _QUESTION.search(text) else 1.0)


def _content_words(text: str) -> Iterator[str]:
    for word in _WORD.findall(text):
        lower = word.lower().replace("’", "'").removesuffix("'s")
        if lower not in _STOP_WORDS:
            yield lower


def _best_first(units: Sequence[_Unit]) -> Iterator[_Unit]:
    """By score after all that was taken before.

    Scores only fall, so a unit whose fresh score still leads the heap is the best of all (the lazy
    greedy of Minoux 1978). Every unit handed out counts as taken, whether it fitted or not.
    """
    counts = Counter(word for unit in units for word in unit.words)
    total = sum(counts.values()) or 1
    weight = {word: n / total for word, n in counts.items()}
    heap = [(-_score(unit, weight), i) for i, unit in enumerate(units)]
    heapify(heap)
    while heap:
        stale, i = heap[0]
        fresh = -_score(units[i], weight)
        if fresh > stale:
            heapreplace(heap, (fresh, i))
            continue
        heappop(heap)
        yield units[i]
        for word in units[i].words:
            weight[word] *= weight[word]


def _score(unit: _Unit, weight: dict[str, float]) -> float:
    # In a fixed order: a set's order changes with the hash seed, and so would the sum.
    total = sum(sorted(sqrt(weight[word]) for word in unit.words))
    return unit.factor * total / (len(unit.words) + SMOOTHING_WORDS)


def _labels(source: Sequence[Message], units: Sequence[_Unit]) -> dict[str, str]:
    if len({unit.role for unit in units}) < 2:
        return dict.fromkeys(_LABELS[False], "")
    japanese = script("\n".join(message.text for message in source)) == JAPANESE
    return _LABELS[japanese]


def _joined(taken: Sequence[_Unit], labels: dict[str, str]) -> str:
    lines = []
    speaker = ""
    for unit in sorted(taken, key=lambda unit: (unit.message, unit.offset)):
        lines.append(unit.text if unit.role == speaker else labels[unit.role] + unit.text)
        speaker = unit.role
    return "\n".join(lines)
