"""Summaries: the words that ask for one, the checks on what came back, and the block made of it.

One door to the pure parts: `prompts` (asking), `checks` (judging), `extract` (doing without a
model), `facts` and `standing` (what no summary may lose). Nothing here reads a clock, a file or a
model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from memory.checks import check
from memory.extract import cut, extractive
from memory.facts import exact_facts
from memory.language import JAPANESE, script, sentences
from memory.prompts import (
    PROMPT_VERSION,
    Style,
    fresh_messages,
    instruction,
    merge_messages,
    prose,
)
from memory.standing import standing_instructions
from memory.transcript import Message

__all__ = [
    "EXTRA_SHARE",
    "PROMPT_VERSION",
    "Style",
    "check",
    "clean",
    "exact_facts",
    "extractive",
    "finish",
    "fresh_messages",
    "instruction",
    "merge_messages",
    "standing_instructions",
]

EXTRA_SHARE = 0.25
"""What the exact list may take beyond the summary's own length: a block has at most
`max_tokens * (1 + EXTRA_SHARE)` tokens. The list may also use what the summary leaves."""

LIST_SHARE = 0.5
"""But the list itself has at most this share of `max_tokens`: a short summary is not padded out."""

LIST_CHARS_PER_TOKEN = 6
"""Facts are gathered for this many characters to a token of room, then counted one by one. English
has about 4; what is gathered too much is dropped again."""

_LABELS = {True: ("ユーザーの指示: ", "正確な値: "), False: ("User's instructions: ", "Exact: ")}
_QUOTES = {True: ("「", "」"), False: ('"', '"')}

_TITLE = re.compile(
    r"\A[\s#*_>-]*(?:(?:here(?:'s| is| are)|below is)[^\n:：]{0,80}[:：]"
    r"|(?:(?:the|a|short|brief|conversation|chat) )*(?:summary|notes|要約|会話の要約|メモ|まとめ)"
    r"(?: of [^\n:：]{0,60})?[*_]*\s*[:：\n])[\s*_]*",
    re.IGNORECASE,
)
_FENCED = re.compile(r"\A\s*```[\w-]*\n(.*?)\n?(?:```\s*)?\Z", re.DOTALL)
_PAIRS = {'"': '"', "“": "”", "'": "'", "「": "」", "『": "』", "«": "»"}
_ENDS = ".!?…。！？.\"”'’)）」』»]}`"
_STOP = re.compile(r"[.!?…。！？](?:[\"”'’)）」』»\]*_]*)(?=\s|$)|[。！？][」』）]*")
_ORPHAN_MARK = re.compile(r"\n\s*(?:[-*+•・]|\(?\d{1,3}[.)])?\s*\Z")
_ITEM = re.compile(r"\s*(?:[-*+•・]|\(?\d{1,3}[.)])\s")

KEPT_SHARE = 0.4
"""An unfinished last sentence goes only where at least this share of the text stays."""


def clean(text: str) -> str:
    """The text without what models wrap around it: titles ("Summary:"), quotes, code fences, and a
    last sentence that was cut off. Cleaning twice changes nothing more.
    """
    while (cleaned := _finished(_unwrapped(text.strip()))) != text:
        text = cleaned
    return text


def finish(
    text: str, source: Sequence[Message], *, style: Style, count: Callable[[str], int]
) -> str:
    """The block's final text: the summary, the user's standing instructions, and the exact facts it
    lost.

    Has at most `max_tokens * (1 + EXTRA_SHARE)` tokens by `count`; the summary in it at most
    `max_tokens` (whole sentences are dropped from its end; the first is cut where it is too long).
    """
    body = _fitting(prose(text), max_tokens=style.max_tokens, count=count)
    total = int(style.max_tokens * (1 + EXTRA_SHARE))
    room = min(total - count(body), int(style.max_tokens * LIST_SHARE))
    facts = exact_facts(source, body, limit_chars=room * LIST_CHARS_PER_TOKEN)
    orders = frozenset(standing_instructions(source))
    japanese = script(body or "\n".join(facts)) == JAPANESE
    chosen = _affordable(facts, room=room, count=count)
    # Tokens of facts by themselves need not add up to the tokens of the whole.
    while chosen and count(_block(body, chosen, orders, japanese=japanese)) > total:
        chosen.pop()
    return _block(body, chosen, orders, japanese=japanese)


def _affordable(facts: Sequence[str], *, room: int, count: Callable[[str], int]) -> list[str]:
    chosen = []
    for fact in facts:
        cost = count(f'; "{fact}"')
        if cost <= room:
            chosen.append(fact)
            room -= cost
    return chosen


def _block(body: str, facts: Sequence[str], orders: frozenset[str], *, japanese: bool) -> str:
    opening, closing = _QUOTES[japanese]
    told, exact = _LABELS[japanese]
    quoted = [f"{opening}{fact}{closing}" for fact in facts if fact in orders]
    plain = [fact for fact in facts if fact not in orders]
    lines = [body] if body else []
    lines += [told + " ".join(quoted)] if quoted else []
    lines += [exact + "; ".join(plain)] if plain else []
    return "\n".join(lines)


def _fitting(text: str, *, max_tokens: int, count: Callable[[str], int]) -> str:
    if count(text) <= max_tokens:
        return text
    stops = [offset + len(sentence) for offset, sentence in sentences(text)]
    for stop in reversed(stops[:-1]):
        if count(text[:stop]) <= max_tokens:
            return text[:stop]
    return cut(text, max_tokens=max_tokens, count=count)


def _unwrapped(text: str) -> str:
    if fenced := _FENCED.match(text):
        text = fenced.group(1)
    text = _TITLE.sub("", text, count=1).strip()
    closing = _PAIRS.get(text[:1])
    inside = text[1:-1]
    # "A" and "B" is not one quotation.
    if closing and len(text) > 1 and text.endswith(closing) and closing not in inside:
        text = inside
    return text.strip()


def _finished(text: str) -> str:
    """Without a last sentence that has no end. List items need none."""
    text = _ORPHAN_MARK.sub("", text)
    if not text or text[-1] in _ENDS or _ITEM.match(text.rsplit("\n", 1)[-1]):
        return text
    stops = [match.end() for match in _STOP.finditer(text)]
    if stops and stops[-1] >= KEPT_SHARE * len(text):
        return text[: stops[-1]].rstrip()
    return text
