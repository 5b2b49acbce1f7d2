"""The exact facts of a source that a summary lost. Pure.

Small models blur numbers, dates and names first; these are short, so they can simply be listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log2
from unicodedata import normalize

from memory import names, numbers
from memory.language import without_code, words
from memory.standing import standing_instructions
from memory.transcript import USER, Message

SEPARATOR_CHARS = 4
"""What a fact costs beside its own letters: "; " and, for quoted ones, the quotes."""

SHORTEST_FACT_CHARS = 2

MISSES_MOST = 100
"""Facts in a row of importance that may be too long for the room that is left: a paste of tens of
thousands is not gone through for a few letters."""

LONGEST_FACT_CHARS = 120
"""Longer matches (data URLs, minified code) are no facts anyone will ask for."""

USER_WEIGHT = 2.0
"""A fact the user said counts as two of the assistant's: it is about the user's own life."""

WEIGHTS = {"date": 3.0, "name": 2.5, "number": 2.5, "url": 2.0, "file": 2.0, "code": 1.5}
"""What kind of fact comes first where all else is equal. Chosen by hand: dates and amounts cannot
be guessed back from the rest of a chat, identifiers usually stand in the code."""

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?"
    r"|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_DAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_CJK = r"[\u4e00-\u9fff々\u30a1-\u30faー]"
_COUNTER = (
    r"(?:円|人分?|名|日間|時間|分間?|秒|週間|か月|ヶ月|年間?|個|本|枚|台|歳|泊|回|度|番|点|冊|丁"
    r"|杯|匹|列|行|件"
    r"|階|倍|ドル|ユーロ|キロ|グラム|メートル|リットル|パーセント)"
)
_KANJI_DIGIT = "[〇一二三四五六七八九十百千万億]"
# (?a:...) keeps \w and \b to ASCII: in 「report.pyのload_all」 there are two facts. Every repeat is
# bounded, so that a page of one letter is scanned once for each of its letters and no more.
_KINDS = {
    "url": r"https?://[^\s<>\"'）」、。]{1,200}"
    r"|(?a:(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}(?:\.[\w-]{2,64}){1,4})",
    "file": r"(?a:(?<![\w/])~?(?:/[\w.@-]{1,60}){2,12}|(?<![\w/.-])[\w-][\w./-]{0,80}\."
    r"(?:py|js|ts|tsx|jsx|json|toml|ya?ml|md|txt|csv|pdf|docx?|xlsx?|html?|css|sql|sh|c|cc|cpp|h"
    r"|rs|go"
    r"|java|rb|php|log|conf|cfg|ini|env|lock|zip|gz|png|jpe?g|gif|svg|mp[34]|db|gguf)\b)",
    "code": r"(?a:`[^`\n]{2,80}`|(?<![\w-])--[a-z][\w-]{0,40}(?:[= ][\w./:]{1,40})?"
    r"|\b[A-Za-z]\w{0,60}\(\)|\b[A-Za-z][A-Za-z0-9]{0,40}(?:_[A-Za-z0-9]{1,40}){1,10}\b"
    r"|\b[a-z][a-z0-9]{0,40}[A-Z]\w{0,60}\b|\bv\d{1,6}(?:\.\d{1,6}){1,4}\b)",
    "date": rf"(?a:(?:\b{_DAY},? )?\b{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?\b(?:,? \d{{4}}\b)?"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH}(?:,? \d{{4}}\b)?|\b{_MONTH} \d{{4}}\b"
    rf"|\b\d{{4}}-\d{{2}}-\d{{2}}\b|\b\d{{1,2}}/\d{{1,2}}/\d{{2,4}}\b"
    rf"|\b(?:next |this |every )?{_DAY}s?\b"
    r"|\b(?:January|February|April|June|July|August|September|October|November|December)\b"
    r"|\b\d{1,2}:\d{2}(?: ?[apAP]\.?[mM]\b\.?)?|\b\d{1,2} ?[apAP]\.?[mM]\b)"
    r"|(?:午前|午後)?(?<!\d)\d{1,2}時(?:\d{1,2}分|半)?(?!間)"
    r"|(?:(?<!\d)\d{4}年)?(?:(?<!\d)\d{1,2}月)?(?<!\d)\d{1,2}日(?!間)(?:[(（][月火水木金土日][)）])?"
    r"|(?<!\d)\d{4}年(?:\d{1,2}月)?|(?<!\d)\d{1,2}月|[月火水木金土日]曜日?",
    "number": rf"{_CJK}{{0,6}}(?:[$€£¥₹] ?)?(?<![\d.,])\d+(?:[.,'’]\d+)*(?:[万千億]\d*)*"
    rf"(?:{_COUNTER}| ?%| ?°[CF]?)?|{_KANJI_DIGIT}{{2,12}}{_COUNTER}",
}
_FACT = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _KINDS.items()))
_NEXT = re.compile(r"(?:[ -]|(?<=\d)(?=[A-Za-z]))([A-Za-z\u00c0-\u024f]{1,20})(?![A-Za-z0-9_])")
_BEFORE = re.compile(r"((?:[A-Za-z\u00c0-\u024f]{2,20} )?[A-Za-z\u00c0-\u024f]{1,20})(?::? | = )$")
_LINKS = words(
    "is are was were be of at to about around for in on by from with and or but the a an than"
    " over under"
    " until till per my your our so if that it i as up only costs cost spend then not this when"
    " will can into"
    " there here means return could instead now say says said see us no yes"
    " earn has have had you we they he she bei um für und oder mit von zu der die das le la les"
    " de du et"
    " ou à en el los y o por con"
)
_SINGLE_LETTER_UNITS = frozenset("g l m h s C F K W V A")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact: its kind, how it is written, whether the user said it, and where it came first."""

    kind: str
    text: str
    by_user: bool
    order: int
    mentions: int = 1

    @property
    def rank(self) -> tuple[float, int]:
        weight = WEIGHTS[self.kind] * (USER_WEIGHT if self.by_user else 1.0)
        if self.text.isdigit():
            weight /= 2  # the same number may stand elsewhere with the word that explains it
        return -(weight + log2(self.mentions)), self.order


def exact_facts(source: Sequence[Message], summary: str, *, limit_chars: int) -> tuple[str, ...]:
    """What of the source the summary lost, most important first, in at most `limit_chars`.

    First the user's standing instructions word for word, then dates, numbers with the word beside
    them, names, URLs, files and identifiers. Each counts its letters and SEPARATOR_CHARS. Fenced
    code is not read.
    """
    chosen: list[str] = []
    room = limit_chars
    orders = [order for order in standing_instructions(source) if order not in summary]
    told = Told.of("\n".join((summary, *orders)))
    facts = sorted(all_facts(source), key=lambda fact: fact.rank)
    entries: list[str | Fact] = [*orders, *facts]
    misses = 0
    for entry in entries:
        text = entry if isinstance(entry, str) else entry.text
        if room < SHORTEST_FACT_CHARS + SEPARATOR_CHARS or misses == MISSES_MOST:
            break
        if isinstance(entry, Fact) and told.holds(entry):
            continue
        if len(text) + SEPARATOR_CHARS > room:
            misses += 1
            continue
        chosen.append(text)
        room -= len(text) + SEPARATOR_CHARS
        if isinstance(entry, Fact):
            told = told.plus(entry)
    return tuple(chosen)


@dataclass(frozen=True, slots=True)
class Told:
    """What can be read in a text and in the facts listed behind it so far."""

    text: str
    numbers: frozenset[str]
    known: names.Known
    listed: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> Told:
        return cls(_key(text), numbers.readings(text), names.known(text))

    def plus(self, fact: Fact) -> Told:
        held = self.numbers | numbers.readings(fact.text)
        return Told(self.text, held, self.known, (*self.listed, _key(fact.text)))

    def holds(self, fact: Fact) -> bool:
        """Whether it can be read there: as written, inside a listed fact, or all its numbers and
        words one by one.

        A number of three digits or more is found without its neighbour: it is rare enough.
        """
        key = _key(fact.text)
        if key in self.text or any(key in listed for listed in self.listed):
            return True
        if fact.kind not in ("date", "number", "name"):
            return False
        if any(c.isdigit() for c in key) and numbers.unsupported(fact.text, self.numbers):
            return False
        words = re.findall(r"[^\W\d_]{2,}", fact.text)
        large = fact.kind == "number" and re.search(r"\d\D?\d\D?\d", fact.text)
        return bool(large) or (
            bool(words) and all(self.known.holds(w) for w in words if w not in _LINKS)
        )


def all_facts(source: Sequence[Message]) -> list[Fact]:
    """Every fact once, with all its mentions; the user's when the user said it at all."""
    found: dict[str, Fact] = {}
    for message in source:
        by_user = message.role == USER
        for kind, text in _in_text(without_code(message.text)):
            key = _key(text)
            old = found.get(key)
            found[key] = Fact(
                kind,
                old.text if old else text,
                by_user or bool(old and old.by_user),
                old.order if old else len(found),
                old.mentions + 1 if old else 1,
            )
    return list(found.values())


def _in_text(text: str) -> Iterator[tuple[str, str]]:
    taken = []
    for match in _FACT.finditer(text):
        taken.append(match.span())
        kind = match.lastgroup or ""
        fact = (
            _number(text, match) if kind == "number" else match.group().strip("`").rstrip(".,;:!?")
        )
        if fact and SHORTEST_FACT_CHARS <= len(fact) <= LONGEST_FACT_CHARS:
            yield kind, fact
    for start, written in (*names.runs(text), *names.titled(text)):
        name = re.sub("['’]s?$", "", written)
        if SHORTEST_FACT_CHARS <= len(name) <= LONGEST_FACT_CHARS and not _inside(start, taken):
            yield "name", name


def _inside(start: int, spans: Sequence[tuple[int, int]]) -> bool:
    low, high = 0, len(spans)
    while low < high:
        middle = (low + high) // 2
        if spans[middle][1] <= start:
            low = middle + 1
        else:
            high = middle
    return low < len(spans) and spans[low][0] <= start


def _number(text: str, match: re.Match[str]) -> str:
    """The number with its unit or the word beside it; "" for one that says nothing by itself."""
    number = match.group()
    after = _NEXT.match(text, match.end())
    if after and _is_unit(after.group(1)):
        return number + after.group()
    if not number[-1].isdigit() or not number[0].isdigit():
        return number
    before = _word_before(text[max(0, match.start() - 44) : match.start()])
    return before + number if before or len(number) >= 3 else ""


def _word_before(text: str) -> str:
    """ "Ubuntu " or "rent is ", as written; "" when only linking words stand there."""
    match = _BEFORE.search(text)
    words = match.group(1).split() if match else []
    while words and words[0].lower() in _LINKS:
        words = words[1:]
    return text[text.rindex(words[0]) :] if words else ""


def _is_unit(word: str) -> bool:
    return (len(word) > 1 and word.lower() not in _LINKS) or word in _SINGLE_LETTER_UNITS


def _key(text: str) -> str:
    text = normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"(?<=\d),(?=\d{3})", "", text).split())
