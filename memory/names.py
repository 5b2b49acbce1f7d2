"""Names in a text: what is written like one, and whether a source knows it. Pure.

Spelling is all there is to go by, so this leans towards silence: words that begin a sentence,
German nouns and kanji without a title count as names only where something else says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from unicodedata import combining, normalize

from memory.language import language, words

_NOT_NAMES = words(
    "i ok okay ai pm am tv pc id us uk eu usa usd eur jpy gbp api url html http https json csv"
    " pdf cpu gpu"
    " ram usb mb gb kb tb kg km hz btw lol omg faq diy asap todo note notes summary user users"
    " assistant assistants chatbot bot chat"
    " conversation system internet web mr mrs ms dr prof god earth christmas easter halloween"
    " january february march april may june july august september october november december"
    " jan feb mar apr jun jul aug sep sept oct nov dec"
    " monday tuesday wednesday thursday friday saturday sunday mon tue wed thu fri sat sun"
    " english japanese german french spanish italian portuguese dutch chinese korean russian arabic"
    " hindi polish turkish greek swedish american british european asian indian western"
    " summarize decided open keep third person only"
)
"""Words, in lower case, that get a capital without naming anybody, or that the prompt says."""

HEADING_SHARE = 0.6
"""A sentence of three or more words is a heading when at least this share of those after the first
is capitalised."""

STEM_CHARS = 4
"""Two words are forms of one name (Italy, Italian) when they share all but the last letter of the
shorter one, and at least this many letters."""

SUBSTRING_CHARS = 5
"""From this length on a name may stand inside a word of the source (GitHub in github.com)."""

_CJK = r"\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uff66-\uff9f"
_WORD = re.compile(
    rf"[^\W\d_{_CJK}][^\W{_CJK}'’&]*(?:['’&][^\W{_CJK}]+)*(?:[-.][^\W_{_CJK}]+(?:['’][^\W{_CJK}]+)*)*"
)
_CAPITAL_INSIDE = re.compile(r"[^\W\d_].*[A-Z]")
_TITLED = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St)\.\s*$")
_OPENERS = frozenset(".!?…:;\"“”'‘([{*#-–—•|>/。！？「『（，、：\n")
_SUBJECT = re.compile(
    r"(?:^|[.!?\n]\s{0,3})([A-Z][^\W\d_]+)(?: [A-Z][^\W\d_]+)? (?:asked|asks|wants|wanted|said"
    r"|says|told"
    r"|tells|prefers|decided|decides|agreed|mentioned|mentions|plans|planned|lives|works"
    r"|suggests)\b"
)
"""Who begins a sentence and does what only people do."""
_PRONOUNS = words(
    "he she they it we you i this that these those who one both everyone everybody someone somebody"
    " nobody neither either all some people"
)
_PIECE_END = re.compile(
    r"(?<=[.!?])(?<!\bDr\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bSt\.)(?<!Mrs\.)(?<!Prof\.)\s(?=\s*[A-Z])|\n"
)
_WITH_HONORIFIC = re.compile(
    r"(?<![\u4e00-\u9fff々])([\u4e00-\u9fff々]{1,4}|(?<![\u30a1-\u30faー])[\u30a1-\u30faー]{2,8})"
    r"(?:さん|ちゃん|くん|君|様|さま|氏|先生)"
)
_DOTTED_KATAKANA = re.compile(r"[\u30a1-\u30faー]{2,}(?:・[\u30a1-\u30faー]{2,})+")
_NOT_NAMED = words(
    "ユーザー アシスタント 皆 お客 客 奥 母 父 兄 姉 娘 息子 嫁 婿 祖父 祖母 叔父 叔母 伯父 伯母"
    " 子 "
    "赤 神 王 店員 担当 担当者 医者 読者 利用者 友人 関係者 患者 業者 屋 本屋 各 同 貴 両"
)


@dataclass(frozen=True, slots=True)
class Known:
    """The words of a source, ready to be asked for a name."""

    text: str
    words: frozenset[str]
    capitalises_nouns: bool

    def holds(self, name: str) -> bool:
        """Whether the source has this word: in another case or form, or inside a longer word."""
        word = _folded(name)
        forms = {word.replace("-", ""), *_bare(word)}
        if forms & self.words or (len(word) >= SUBSTRING_CHARS and word in self.text):
            return True
        parts = [part for part in re.split(r"[-.&]", word) if len(part) > 1]
        if len(parts) > 1 and all(part in self.words for part in parts):
            return True
        return any(_same_stem(form, word) for form in self.words if form[:3] == word[:3])


def known(text: str) -> Known:
    """Reads a source once."""
    # Split before folding, as `unknown` does: folding can move a word's ends (² is 2, ŉ is ʼn).
    found = _WORD.findall(normalize("NFKC", text))
    words = frozenset(form for word in found for form in _bare(_folded(word)))
    parts = frozenset(part for word in words for part in re.split(r"[-.&]", word))
    return Known(_folded(text), words | parts, capitalises_nouns=language(text) == "german")


def unknown(text: str, source: Known) -> tuple[str, ...]:
    """The names in `text` that the source does not hold, in the order of the text."""
    text = normalize("NFKC", text)
    found = [
        name
        for name in _japanese_names(text)
        if name not in _NOT_NAMED and _folded(name) not in source.text
    ]
    if not source.capitalises_nouns:
        written = (*capitalised(text), *_subjects(text))
        found += [word for word in written if not source.holds(word)]
    return tuple(dict.fromkeys(found))


def capitalised(text: str) -> tuple[str, ...]:
    """Words written like names: capitals inside a sentence, or inside a word anywhere (ClamAV)."""
    return tuple(match.group() for _, match in _capitalised(text))


def runs(text: str) -> tuple[tuple[int, str], ...]:
    """Names of one or more words ("Kyoto Station"), each with its offset in the text."""
    found: list[tuple[int, str]] = []
    for offset, match in _capitalised(text):
        start, word = offset + match.start(), match.group()
        if found and start == found[-1][0] + len(found[-1][1]) + 1 and text[start - 1] == " ":
            found[-1] = found[-1][0], f"{found[-1][1]} {word}"
        else:
            found.append((start, word))
    return tuple(found)


def titled(text: str) -> tuple[tuple[int, str], ...]:
    """Japanese names that a title follows (田中さん), title included, each with its offset."""
    return tuple(
        (match.start(), text[match.start() : match.end()])
        for match in _WITH_HONORIFIC.finditer(text)
        if match.group(1) not in _NOT_NAMED
    )


def _common(word: str) -> bool:
    return not _bare(_folded(word)).isdisjoint(_NOT_NAMES)


def _subjects(text: str) -> Iterator[str]:
    for match in _SUBJECT.finditer(text):
        if not _common(match.group(1)) and _folded(match.group(1)) not in _PRONOUNS:
            yield match.group(1)


def _capitalised(text: str) -> Iterator[tuple[int, re.Match[str]]]:
    """The words that `capitalised` tells of, as matches within the sentence at that offset."""
    start = 0
    for stop in (*(m.end() for m in _PIECE_END.finditer(text)), len(text)):
        for match in _of_sentence(text[start:stop]):
            if not _common(match.group()):
                yield start, match
        start = stop


def _of_sentence(sentence: str) -> Iterator[re.Match[str]]:
    found = list(_WORD.finditer(sentence))
    upper = sum(match.group()[0].isupper() for match in found[1:])
    heading = len(found) >= 3 and upper >= HEADING_SHARE * (len(found) - 1)
    for match in found:
        word = match.group()
        if _CAPITAL_INSIDE.match(word):
            yield match
        elif heading or not word[0].isupper() or len(word) < 2:
            continue
        elif not _opens(sentence, match.start()):
            yield match


def _opens(sentence: str, start: int) -> bool:
    """Whether a word stands where any word gets a capital."""
    before = sentence[max(0, start - 40) : start]
    if _TITLED.search(before):
        return False
    before = before.rstrip()
    return not before or before[-1] in _OPENERS


def _japanese_names(text: str) -> Iterator[str]:
    for match in _WITH_HONORIFIC.finditer(text):
        yield match.group(1)
    for match in _DOTTED_KATAKANA.finditer(text):
        yield from match.group().split("・")


def _folded(text: str) -> str:
    """Without case, accents and typographic apostrophes: Zürich is zurich."""
    text = normalize("NFKD", text).replace("’", "'")
    return normalize(
        "NFC", "".join(c for c in text if not combining(c) or c in "\u3099\u309a")
    ).casefold()


def _bare(word: str) -> frozenset[str]:
    """The word with and without a possessive or plural ending."""
    stem = word.removesuffix("'s").removesuffix("'")
    return frozenset(
        (word, stem, stem.removesuffix("s"), stem.removesuffix("es"), stem.split("'")[0])
    )


def _same_stem(one: str, other: str) -> bool:
    need = max(STEM_CHARS, min(len(one), len(other)) - 1)
    return one[:need] == other[:need] and min(len(one), len(other)) >= need
