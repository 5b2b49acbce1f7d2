"""What a user typed -> full-text queries. Pure.

Two indexes: words (unicode61) for scripts with spaces between words, trigrams for those without,
where a "word" of unicode61 is a whole sentence and finds nothing. Whatever was typed, the
expressions built here are valid FTS5: every term is a quoted string.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

MAX_TERMS = 64
MAX_QUERY_CHARS = 4000
GRAM_CHARS = 3

# Thai, Lao, Tibetan, Myanmar; Hangul Jamo; Khmer; Japanese and Chinese; Hangul, whose particles
# cling to the word; compatibility and half-width forms; the supplementary ideographs.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
_RUN = re.compile(f"[{_UNSPACED}]+")
_UNSTORABLE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Query:
    """FTS5 expressions ("": look for nothing), and strings that are too short for trigrams."""

    words: str
    trigrams: str
    fragments: tuple[str, ...]


def storable(text: str) -> str:
    """The text with each lone surrogate as U+FFFD: SQLite keeps UTF-8, which has none."""
    return _UNSTORABLE.sub("\ufffd", text)


def is_unspaced(text: str) -> bool:
    """Whether the text has letters of a script that is written without spaces."""
    return _RUN.search(text) is not None


def parse(typed: str, *, unfinished: bool = False) -> Query:
    """Any term may match; the index ranks what matches more, and rarer, terms first.

    With `unfinished` somebody is still typing: the last word may be the beginning of one.
    """
    typed = storable(typed[:MAX_QUERY_CHARS]).replace("\0", " ")
    runs = _RUN.findall(typed)
    words = [word for word in _RUN.sub(" ", typed).split() if any(map(str.isalnum, word))]
    last = words[-1] if unfinished and words and typed.endswith(words[-1]) else ""
    return Query(
        words=_any_of(words, _quoted(last) + "*" if last else ""),
        trigrams=_any_of(gram for run in runs for gram in _grams(run)),
        fragments=tuple(dict.fromkeys(run for run in runs if len(run) < GRAM_CHARS))[:MAX_TERMS],
    )


def _grams(run: str) -> list[str]:
    return [run[i : i + GRAM_CHARS] for i in range(len(run) - GRAM_CHARS + 1)]


def _any_of(terms: Iterable[str], *further: str) -> str:
    quoted = islice(map(_quoted, dict.fromkeys(terms)), MAX_TERMS)
    return " OR ".join([*quoted, *filter(None, further)])


def _quoted(term: str) -> str:
    return '"' + term.replace('"', '""') + '"'
