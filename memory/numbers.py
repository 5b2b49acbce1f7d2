"""The numbers a text holds, however they are written. Pure.

A source is read generously: "3:30 pm" holds 3, 30, 3:30 and 15:30. A summary's number is supported
when one way to read it is among the source's readings: 1,000 for 1000, 1万4千 for 14000, twelve for
12, 2 for 2nd, 04/03 for April 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from itertools import accumulate
from unicodedata import normalize

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
_UNITS += " fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
SPELLED = {word: value for value, word in enumerate(_UNITS.split())}
SPELLED |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_LOOSE = {word: value for value, word in enumerate(_ORDINALS.split(), 1)}
_LOOSE |= {"once": 1, "single": 1, "twice": 2, "both": 2, "couple": 2, "pair": 2, "double": 2}
_LOOSE |= {"triple": 3, "dozen": 12, "fortnight": 14, "hundred": 100, "thousand": 1000}
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")

SMALLEST_SPELLED_CLAIM = 4
"""A summary may count what it lists: "one", "two" and "three" written as words are not checked."""

_KANJI_DIGITS = {char: value for value, char in enumerate("〇一二三四五六七八九")} | {"零": 0}
_KANJI_TENS = {"十": 10, "百": 100, "千": 1000}
_KANJI_MYRIADS = {"万": 10**4, "億": 10**8}
_SCALES = {"k": 1000, "thousand": 1000, "m": 10**6, "million": 10**6, "billion": 10**9}

LONGEST_SCALED = 15
"""Digits up to which a number is multiplied out; longer ones are compared as written. int() itself
refuses 4,300 digits."""

# Each pattern begins where a run begins, so that a page of digits is scanned once.
_MIXED = re.compile(
    r"(?<![\d.,〇零一二三四五六七八九十百千万億])"
    r"[\d.,〇零一二三四五六七八九十百千万億]*[〇零一二三四五六七八九十百千万億][\d十百千万億]*"
)
_COUNTED = re.compile(
    r"(?<![\d.〇零一二三四五六七八九十百千万億])([〇零一二三四五六七八九十百千万億]+)"
    r"(?=円|人|名|日|月|年|時|週|個|本|枚|台|歳|泊|回|度|階|番|点|冊|匹|杯|丁|ドル|キロ|メートル"
    r"|パーセント)"
)
_TIME = re.compile(r"(?<![\d:])(\d{1,2})[:：](\d{2})(?!\d)")
_TIME_JAPANESE = re.compile(r"(?<!\d)(\d{1,2})時(半|\d{1,2}(?=分))?")
_HOUR = re.compile(r"(?<![\d:])(\d{1,2})\s?([ap])\.?m\b")
_NUMBER = re.compile(r"\d+(?:[.,:/'’\-]\d+)*")
_SPACED = re.compile(r"(?<!\d)\d{1,3}(?:[ \u00a0\u202f]\d{3})+(?!\d)")
_SCALED = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)[\s-]?(k|m|thousand|million|billion)\b")
_THOUSANDS = re.compile(r"\d{1,3}(?:[.,'’]\d{3})+(?:[.,]\d+)?")
# 45,000 and 45.000 are thousands and nothing else; 1.500 may be one and a half.
_ONLY_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3}|\.000)")
_SPELLED_WORD = re.compile(r"[a-z]+(?:-[a-z]+)?")
_MONTH = f"({'|'.join(_MONTHS)})[a-z]{{0,6}}"
_DAY_OF_MONTH = re.compile(
    rf"\b{_MONTH}\.? {{1,2}}\d|\d(?:st|nd|rd|th)?,? {{1,2}}(?:of )?{_MONTH}\b"
)
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
_LIST_MARK = re.compile(r"^[ \t]*\(?\d{1,3}[.)、)][ \t]+", re.MULTILINE)


def readings(text: str) -> frozenset[str]:
    """Every number the text can be said to hold, in plain digits ("1000", "3.5", "15:30")."""
    text = _plain(text)
    found: set[str] = set()
    for match in _NUMBER.finditer(text):
        found.update(*_ways(match.group()))
        if not _THOUSANDS.fullmatch(match.group()):
            found.update(map(_stripped, re.findall(r"\d+", match.group())))
        found.update(_prefixes(match.group()))
    found.update(_scaled(text), _clock(text), _mixed(text), _words(text), _month_numbers(text))
    found.update(_stripped(re.sub(r"\s", "", m.group())) for m in _SPACED.finditer(text))
    return frozenset(found)


def unsupported(text: str, source: frozenset[str]) -> tuple[str, ...]:
    """The numbers of `text`, as written, that `source` (what `readings` gave) does not hold.

    Numbers of a list's items are not claims, nor are "one", "two" and "three" as words.
    """
    text = _LIST_MARK.sub("", _plain(text))
    missing = [number for number, ways in _claims(text) if not any(w <= source for w in ways)]
    return tuple(dict.fromkeys(missing))


def _claims(text: str) -> Iterator[tuple[str, list[set[str]]]]:
    """Each number with the ways to read it; a way is good when all its parts are in the source."""
    for match in _COUNTED.finditer(text):
        value = _kanji(match.group(1))
        if value.isdigit() and int(value) >= SMALLEST_SPELLED_CLAIM:
            yield match.group(), [{value}]
    mixed = [m for m in _MIXED.finditer(text) if re.search(r"\d", m.group())]
    scaled = {m.start(): m for m in _SCALED.finditer(text)}
    covered = {i for m in mixed for i in range(*m.span())}
    for m in mixed:
        yield m.group(), [{_kanji(m.group())}]
    for match in _NUMBER.finditer(text):
        if match.start() not in covered:
            ways = _ways(match.group())
            if scale := scaled.get(match.start()):
                ways.append({_times(*scale.groups())})
            yield match.group(), ways
    for match in _SPELLED_WORD.finditer(text):
        spelled = _spelled(match.group())
        if spelled is not None and spelled >= SMALLEST_SPELLED_CLAIM:
            yield match.group(), [{str(spelled)}]


def _plain(text: str) -> str:
    """Lower case, full-width and other scripts' digits as ASCII, ½ as 1/2."""
    text = normalize("NFKC", text).lower().replace("\u2044", "/")
    return _FOREIGN_DIGIT.sub(lambda match: str(int(match.group())), text)


def _ways(token: str) -> list[set[str]]:
    """The ways to read one run of digits and separators."""
    parts = [_stripped(part) for part in re.findall(r"\d+", token)]
    if time := re.fullmatch(r"(\d{1,2}):(\d{2})", token):
        hour = {parts[0]} if time.group(2) == "00" else set()
        return [{f"{parts[0]}:{time.group(2)}"}, *([hour] if hour else [])]
    ways = [{"0.5"}] if token == "1/2" else []
    if _THOUSANDS.fullmatch(token):
        ways.append({_stripped(re.sub(r"[,'’](?=\d{3})|\.(?=\d{3}(?:\D|$))", "", token))})
    if re.fullmatch(r"\d+[.,]\d+", token) and not _ONLY_THOUSANDS.fullmatch(token):
        ways.append({_stripped(token.replace(",", "."))})
    elif re.fullmatch(r"\d+(?:\.\d+)+", token):
        ways.append({token})
    if "." not in token and not (ways and "," in token):
        ways.append(set(parts))
    return ways or [{token}]


def _prefixes(token: str) -> Iterator[str]:
    """2.4.1 is also 2.4: a summary may shorten a version."""
    if token.count(".") > 1 and len(token) < 40:
        yield from (p for p in accumulate(token.split("."), "{}.{}".format) if "." in p)


def _stripped(number: str) -> str:
    whole, dot, part = number.partition(".")
    part = part.rstrip("0") if "." not in part else part
    return (whole.lstrip("0") or "0") + (dot + part if part else "")


def _scaled(text: str) -> Iterator[str]:
    return (_times(*match.groups()) for match in _SCALED.finditer(text))


def _times(number: str, scale: str) -> str:
    if len(number) > LONGEST_SCALED:
        return number
    return _stripped(format(Decimal(number) * _SCALES[scale], "f"))


def _clock(text: str) -> Iterator[str]:
    for hour, minute in _TIME.findall(text):
        yield from _times_of_day(int(hour), minute)
    for hour, _ in _HOUR.findall(text):
        yield from _times_of_day(int(hour), "00")
    for hour, minute in _TIME_JAPANESE.findall(text):
        yield from _times_of_day(int(hour), "30" if minute == "半" else minute.zfill(2))


def _times_of_day(hour: int, minute: str) -> Iterator[str]:
    """On both clocks: who wrote 3:30 may have meant 15:30."""
    for h in (hour, hour + 12, hour - 12):
        if 0 <= h <= 24:
            yield f"{h}:{minute}"
            yield minute
            if minute == "00":
                yield str(h)


def _mixed(text: str) -> Iterator[str]:
    return (_kanji(match.group()) for match in _MIXED.finditer(text))


def _kanji(run: str) -> str:
    """1万4千 and 一万四千 -> 14000, 二〇二四 -> 2024. What is no number comes back as it is."""
    run = run.replace(",", "").strip(".")
    if len(run) > LONGEST_SCALED or run.count(".") > 1:
        return run
    total, section, digits = Decimal(0), Decimal(0), ""
    for char in run:
        if char in _KANJI_MYRIADS:
            total += (section + _digits(digits, empty=0 if section else 1)) * _KANJI_MYRIADS[char]
            section, digits = Decimal(0), ""
        elif char in _KANJI_TENS:
            section += _digits(digits, empty=1) * _KANJI_TENS[char]
            digits = ""
        else:
            digits += str(_KANJI_DIGITS.get(char, char))
    return _stripped(format(total + section + _digits(digits, empty=0), "f"))


def _digits(digits: str, *, empty: int) -> Decimal:
    return Decimal(digits) if digits.strip(".") else Decimal(empty)


def _words(text: str) -> Iterator[str]:
    for match in _SPELLED_WORD.finditer(text):
        word = match.group()
        for part in (word, *word.split("-")):
            value = _spelled(part)
            if value is None:
                value = _LOOSE.get(part.removesuffix("s"))
            if value is not None:
                yield str(value)
    if "half" in text:
        yield from ("0.5", "30")
        yield from (f"{n}.5" for n in range(1, 10) if f"{_UNITS.split()[n]} and a half" in text)


def _spelled(word: str) -> int | None:
    """twelve, thirty, twenty-five; None for other words."""
    if word in SPELLED:
        return SPELLED[word]
    tens, _, unit = word.partition("-")
    both = SPELLED.get(tens), SPELLED.get(unit)
    if both[0] is not None and both[1] is not None and both[0] >= 20 and 0 < both[1] < 10:
        return both[0] + both[1]
    return None


def _month_numbers(text: str) -> Iterator[str]:
    for match in _DAY_OF_MONTH.finditer(text):
        yield str(_MONTHS.index((match.group(1) or match.group(2))[:3]) + 1)
