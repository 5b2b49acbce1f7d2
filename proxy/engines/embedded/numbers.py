"""Integers between two bounds as grammar rules: digit by digit. Pure."""

from __future__ import annotations

from proxy.engines.embedded.grammar import Item, Rules, char_class, literal

MOST_DIGITS = 16
"""Of an integer without a bound: what a double still holds, and where a small model stops."""


def is_whole(value: object) -> bool:
    """An integer as JSON Schema has it: 3 and 3.0, but not true."""
    if isinstance(value, float):
        return value.is_integer() and abs(value) < 2**53
    return isinstance(value, int) and not isinstance(value, bool)


def integers(rules: Rules, low: int | None, high: int | None) -> Item:
    """All integers from `low` to `high`; None stands for 16 digits' worth, and for one digit more
    than the other bound has where that has as many.
    """
    digits = MOST_DIGITS
    for bound in (low, high):
        if bound is not None and abs(bound) >= 10 ** (MOST_DIGITS - 1):
            digits = max(digits, len(str(abs(bound))) + 1)
    low = -(10**digits) + 1 if low is None else low
    high = 10**digits - 1 if high is None else high
    ways: list[list[Item]] = []
    if low < 0:
        least, most = max(1, -high), -low
        if least <= most:
            ways += [[*literal("-"), *way] for way in _naturals(rules, least, most)]
    if high >= 0:
        ways += _naturals(rules, max(0, low), high)
    return rules.add(*ways)


def _naturals(rules: Rules, low: int, high: int) -> list[list[Item]]:
    """Split where the number of digits changes: 7..1234 is 7..9, 10..99, 100..999, 1000..1234."""
    ways: list[list[Item]] = []
    while low <= high:
        most = min(high, 10 ** len(str(low)) - 1)
        ways += _between(rules, str(low), str(most))
        low = most + 1
    return ways


def _between(rules: Rules, low: str, high: str) -> list[list[Item]]:
    """Texts of equal length, digit by digit from `low` to `high`."""
    if low == high:
        return [literal(low)]
    rest = len(low) - 1
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        return [[_digit(low[0], high[0]), *_digits(rules, rest)]]
    if low[0] == high[0]:
        return [[*literal(low[0]), *way] for way in _between(rules, low[1:], high[1:])]
    first, last = chr(ord(low[0]) + 1), chr(ord(high[0]) - 1)
    ways = [[*literal(low[0]), *way] for way in _between(rules, low[1:], "9" * rest)]
    if first <= last:
        ways.append([_digit(first, last), *_digits(rules, rest)])
    return ways + [[*literal(high[0]), *way] for way in _between(rules, "0" * rest, high[1:])]


def _digit(low: str, high: str) -> Item:
    return char_class([(ord(low), ord(high))])


def _digits(rules: Rules, n: int) -> list[Item]:
    return rules.repeat(_digit("0", "9"), n, n) if n else []
