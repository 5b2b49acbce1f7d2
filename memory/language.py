"""Scripts, languages and sentences of plain text, by code points and word lists. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

JAPANESE = "japanese"
LATIN = "latin"

# Unicode blocks (Blocks.txt), as character classes. Kana includes the half-width forms.
_KANA = re.compile(r"[\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9f]+")
_HAN = re.compile(r"[\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_BLOCKS = {
    LATIN: re.compile(r"[A-Za-z\u00aa-\u024f\u1e00-\u1eff\uff21-\uff5a]+"),
    "cyrillic": re.compile(r"[\u0400-\u052f]+"),
    "greek": re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]+"),
    "hebrew": re.compile(r"[\u0590-\u05ff]+"),
    "arabic": re.compile(r"[\u0600-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufefc]+"),
    "devanagari": re.compile(r"[\u0900-\u097f]+"),
    "thai": re.compile(r"[\u0e00-\u0e7f]+"),
    "korean": re.compile(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+"),
}

DENSE_WEIGHT = 3
"""A Japanese, Chinese or Korean letter counts as this many Latin ones: English translations of
Japanese text have about that many letters for each character."""

KANA_SHARE = 0.05
"""Text whose CJK letters hold at least this share of kana is Japanese, else Chinese. Japanese prose
is about half kana; headlines go down to a tenth."""

# The commonest function words that the other languages here do not share.
_FUNCTION_WORDS = {
    "english": "the and is are was of with that this have for you not they what it's i'm would how",
    "german": "der das und ist nicht ich ein eine mit zu den auf für sie wir auch dem wird bitte",
    "french": "le les et est pas je une des dans pour vous que qui nous avec sur ce du au",
    "spanish": "el los y es por una para con las pero está del muy más como mi yo al hay",
    "italian": "il di che è per una sono con gli della non ma anche mi si della più nel ho",
    "portuguese": "o os é um uma para com não mas por do da em você muito mais ao na no",
    "dutch": "de het een en van ik niet dat met voor zijn op te er maar ook naar wij",
}
_LANGUAGE_OF = {name: frozenset(listed.split()) for name, listed in _FUNCTION_WORDS.items()}

LANGUAGE_SHARE = 0.12
"""A text is in a language when at least this share of its words are that language's function words
above, and no other language reaches half as many. In English prose they are about a quarter."""

LONGEST_SENTENCE_CHARS = 300
"""Longer pieces are cut at clauses: a paste without full stops must not become one sentence."""

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)
_BULLET = re.compile(r"\s*(?:#{1,6}\s+|>\s+|[-*+•・]\s+|\(?\d{1,3}[.)]\s+)+")
# A full stop ends a sentence when white space follows; 。！？ do so without it, but not before
# a closing bracket that goes on: 「行きます。」と言った is one sentence.
# Each alternative begins at the start of a run, so that a page of dots is scanned once.
_END = re.compile(
    r"""(?<![.!?…])[.!?…]++["'”’)\]*_]*+(?=\s)"""
    r"|(?<![。！？])[。！？]++(?![」』）)])"
    r"|(?<![。！？])[。！？]++[」』）)]++(?=\s|$)"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[A-Za-z]|[Mm]rs?|[Mm]s|[Dd]r|[Pp]rof|[Ss]t|vs|approx|e\.g|i\.e|ca|cf|etc"
    r"|[Nn]o|[Vv]ol"
    r"|[Ff]ig|Jr|Sr|z\.B|bzw)\.$"
)
_CLAUSE = re.compile(r"[,;:、，；]\s*|\s+")


def words(text: str) -> frozenset[str]:
    """A list of words as a set."""
    return frozenset(text.split())


def script(text: str) -> str:
    """The script most of the text's letters are in; "" when it has none. Code does not count."""
    prose = _CODE.sub(" ", text)
    weights = {name: _letters(block, prose) for name, block in _BLOCKS.items()}
    weights["korean"] *= DENSE_WEIGHT
    kana, han = _letters(_KANA, prose), _letters(_HAN, prose)
    east = JAPANESE if kana and kana >= KANA_SHARE * (kana + han) else "chinese"
    weights[east] = DENSE_WEIGHT * (kana + han)
    best = max(weights, key=lambda name: weights[name])
    return best if weights[best] else ""


def language(text: str) -> str:
    """The language of text in Latin letters, by its function words; "" when in doubt."""
    found = [word.lower() for word in _WORD.findall(_CODE.sub(" ", text))]
    hits = sorted(
        ((sum(w in known for w in found), name) for name, known in _LANGUAGE_OF.items()),
        reverse=True,
    )
    (best, name), (second, _) = hits[0], hits[1]
    sure = best >= max(2, LANGUAGE_SHARE * len(found)) and second * 2 <= best
    return name if sure else ""


def has_word_spaces(text: str) -> bool:
    """Whether words are parted by spaces in the script of this text."""
    return script(text) not in (JAPANESE, "chinese", "thai")


def without_code(text: str) -> str:
    """The text with fenced code blocks taken out."""
    return _FENCE.sub("\n", text)


def code_blocks(text: str) -> list[tuple[int, str]]:
    """Fenced code blocks, fences included, each with its offset."""
    return [(match.start(), match.group()) for match in _FENCE.finditer(text)]


def sentences(text: str) -> list[tuple[int, str]]:
    """The sentences of the text, each with its offset; no bullets, code blocks or table rules.

    Every sentence is a piece of the text, letter for letter, on one line, with no white space at
    its ends, and at most LONGEST_SENTENCE_CHARS long.
    """
    blanked = _FENCE.sub(lambda match: "\n" * len(match.group()), text)
    found: list[tuple[int, str]] = []
    offset = 0
    for line in blanked.splitlines(keepends=True):
        found.extend(_of_line(line, offset))
        offset += len(line)
    return found


def _letters(block: re.Pattern[str], text: str) -> int:
    return sum(map(len, block.findall(text)))


def _of_line(line: str, offset: int) -> Iterator[tuple[int, str]]:
    bullet = _BULLET.match(line)
    start = bullet.end() if bullet else 0
    for stop in _ends(line, start):
        piece = line[start:stop]
        lead = len(piece) - len(piece.lstrip())
        body = piece.strip()
        if any(char.isalnum() for char in body):
            yield from _short_pieces(body, offset + start + lead)
        start = stop


def _ends(line: str, start: int) -> Iterator[int]:
    for match in _END.finditer(line, start):
        # Long enough for every abbreviation in the list.
        if not _ABBREVIATION.search(line[max(start, match.end() - 8) : match.end()]):
            yield match.end()
    yield len(line)


def _short_pieces(sentence: str, offset: int) -> Iterator[tuple[int, str]]:
    start = 0
    while len(sentence) - start > LONGEST_SENTENCE_CHARS:
        limit = start + LONGEST_SENTENCE_CHARS
        cuts = [m.end() for m in _CLAUSE.finditer(sentence, start, limit) if m.end() > start]
        stop = cuts[-1] if cuts else limit
        if piece := sentence[start:stop].rstrip():
            yield offset + start, piece
        start = stop
    if rest := sentence[start:]:
        yield offset + start, rest
