"""Regular expressions of JSON schemas (ECMA-262's common part) as grammar rules. Pure.

What is matched is a JSON string as it is written: a quotation mark in the pattern is `\\"` in the
text. Look-around and back references have no grammar and are refused.
"""

from __future__ import annotations

import string

from proxy.engines.embedded.grammar import GrammarError, Item, Rules, char_class, literal

Ranges = list[tuple[int, int]]

LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
MAX_PATTERN_CHARS = 512
MAX_GROUPS_DEEP = 32
MAX_REPEATS_DEEP = 3
"""Of a group that repeats a group that repeats, llama.cpp follows every way to divide a text among
them: with thirty of `(a){1,9}` around each other the third letter took longer than 5 s."""

DIGITS: Ranges = [(0x30, 0x39)]
WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
SPACE: Ranges = [(0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x2028, 0x2029), (0x3000, 0x3000)]
LINE_ENDS: Ranges = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
SETS = {"d": DIGITS, "w": WORD, "s": SPACE}
CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
HEX_DIGITS = {"x": 2, "u": 4}

NOT_RAW: Ranges = [(0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C), SURROGATES]
"""What a JSON string cannot hold as it is."""
ESCAPES = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r", 0x22: '\\"', 0x5C: "\\\\"}


def any_char(rules: Rules) -> Item:
    """One character of a JSON string, escaped or not."""
    hex_digit = Item("[0-9a-fA-F]")
    # Half a surrogate pair is no character, and JSON readers differ in what they make of it.
    codes = rules.add(
        [Item("[0-9a-ce-fA-CE-F]"), Item(hex_digit.text, low=3, high=3)],
        [Item("[dD]"), Item("[0-7]"), Item(hex_digit.text, low=2, high=2)],
    )
    return rules.add(
        [char_class(NOT_RAW, but=True)],
        [*literal("\\"), Item(r'["\\/bfnrt]')],
        [*literal("\\u"), codes],
    )


def matching(rules: Rules, pattern: str) -> list[Item]:
    """What stands between the quotation marks. Raises GrammarError."""
    if len(pattern) > MAX_PATTERN_CHARS:
        raise GrammarError(f"A pattern of more than {MAX_PATTERN_CHARS} characters.")
    return [_Parser(rules, pattern).whole()]


class _Parser:
    def __init__(self, rules: Rules, pattern: str) -> None:
        self._rules = rules
        self._pattern = pattern
        self._at = 0
        self._depth = 0
        self._repeats = 0
        """How deep repeats of varying number lie inside each other in what was read last."""

    def whole(self) -> Item:
        alternatives = [self._anchored()]
        while self._take("|"):
            alternatives.append(self._anchored())
        if self._at < len(self._pattern):
            raise self._error("an unbalanced parenthesis")
        return self._rules.add(*alternatives)

    def _anchored(self) -> list[Item]:
        """One alternative of the whole pattern: without ^ and $ anything may stand around it."""
        anything = self._rules.repeat(any_char(self._rules), 0, None)
        before = [] if self._take("^") else anything
        items = self._sequence()
        after = [] if self._take("$") else anything
        return [*before, *items, *after]

    def _sequence(self) -> list[Item]:
        items: list[Item] = []
        deepest = 0
        while self._at < len(self._pattern) and self._peek() not in "|)$":
            self._repeats = 0
            items += self._quantified(self._atom())
            deepest = max(deepest, self._repeats)
        self._repeats = deepest
        return items

    def _quantified(self, item: Item) -> list[Item]:
        low, high = self._quantifier()
        if self._take("?"):
            pass  # A lazy one matches the same texts.
        if self._peek() in ("*", "+", "?", "{"):
            raise self._error("two quantifiers in a row")
        self._repeats += low != high
        if self._repeats > MAX_REPEATS_DEEP:
            raise self._error("repeats inside repeats, too many of them")
        return [item] if (low, high) == (1, 1) else self._rules.repeat(item, low, high)

    def _quantifier(self) -> tuple[int, int | None]:
        if self._take("*"):
            return 0, None
        if self._take("+"):
            return 1, None
        if self._take("?"):
            return 0, 1
        if not self._take("{"):
            return 1, 1
        inside = self._until("}")
        low, comma, high = inside.partition(",")
        if not _is_count(low) or (high and not _is_count(high)):
            raise self._error("a quantifier that is none")
        most = int(high) if high else None if comma else int(low)
        if most is not None and most < int(low):
            raise self._error("a quantifier with its bounds the wrong way round")
        return int(low), most

    def _atom(self) -> Item:
        if self._take("("):
            return self._group()
        if self._take("["):
            return self._chars(self._class())
        if self._take("."):
            return self._chars(complement(LINE_ENDS))
        if self._take("\\"):
            return self._chars(self._escape())
        char = self._next()
        if char in "^*+?{":
            raise self._error(f"{char!r} in a place where it has no meaning")
        return self._chars([(ord(char), ord(char))])

    def _group(self) -> Item:
        if self._take("?") and not self._take(":"):
            raise self._error("look-around or a named group")
        self._depth += 1
        if self._depth > MAX_GROUPS_DEEP:
            raise self._error("groups nested too deeply")
        alternatives, repeats = [self._sequence()], self._repeats
        while self._take("|"):
            alternatives.append(self._sequence())
            repeats = max(repeats, self._repeats)
        self._depth, self._repeats = self._depth - 1, repeats
        if not self._take(")"):
            raise self._error("an unbalanced parenthesis, or $ inside one")
        return self._rules.add(*alternatives)

    def _class(self) -> Ranges:
        negated = self._take("^")
        ranges: Ranges = []
        while not self._take("]"):
            first = self._class_member()
            if self._peek() == "-" and self._peek(1) not in ("]", ""):
                self._next()
                last = self._class_member()
                if not (_is_one(first) and _is_one(last) and first[0][0] <= last[0][0]):
                    raise self._error("a range of characters that is none")
                first = [(first[0][0], last[0][0])]
            ranges += first
        return complement(ranges) if negated else ranges

    def _class_member(self) -> Ranges:
        if self._take("\\"):
            return [(8, 8)] if self._take("b") else self._escape()
        char = self._next()
        return [(ord(char), ord(char))]

    def _escape(self) -> Ranges:
        char = self._next()
        if found := SETS.get(char.lower()):
            return found if char.islower() else complement(found)
        if char in CONTROLS:
            return [(CONTROLS[char], CONTROLS[char])]
        if char in HEX_DIGITS:
            return self._hex(HEX_DIGITS[char])
        if char.isalnum():
            raise self._error(f"the escape \\{char}")
        return [(ord(char), ord(char))]

    def _hex(self, n: int) -> Ranges:
        digits = self._pattern[self._at : self._at + n]
        if len(digits) < n or any(c not in string.hexdigits for c in digits):
            raise self._error("an escape of a character without its number")
        self._at += n
        return [(int(digits, 16), int(digits, 16))]

    def _chars(self, ranges: Ranges) -> Item:
        """One of these characters, each as a JSON string writes it."""
        raw = complement([*complement(ranges), *NOT_RAW])
        written = [
            literal(text)
            for code, text in ESCAPES.items()
            if any(low <= code <= high for low, high in ranges)
        ]
        if not raw and not written:
            raise self._error("a class without a character that JSON can write")
        return self._rules.add(*([[char_class(raw)]] if raw else []), *written)

    def _peek(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._pattern[at] if at < len(self._pattern) else ""

    def _take(self, char: str) -> bool:
        found = self._peek() == char
        self._at += found
        return found

    def _next(self) -> str:
        char = self._peek()
        if not char:
            raise self._error("an end in the middle")
        self._at += 1
        return char

    def _until(self, end: str) -> str:
        start, at = self._at, self._pattern.find(end, self._at)
        if at < 0:
            raise self._error(f"a missing {end!r}")
        self._at = at + 1
        return self._pattern[start:at]

    def _error(self, what: str) -> GrammarError:
        shown = self._pattern if len(self._pattern) <= 60 else self._pattern[:60] + "…"
        return GrammarError(f"The pattern {shown!r} has {what}, which is not supported.")


def complement(ranges: Ranges) -> Ranges:
    """All other code points, in order and without overlap."""
    found, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, LAST)] if start <= LAST else found


def _is_one(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 6
