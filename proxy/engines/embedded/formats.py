"""Formats of strings that JSON Schema knows and answers are held to, as patterns."""

from __future__ import annotations

from typing import NamedTuple

DAY = r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
HEX = "[0-9a-fA-F]"


class Format(NamedTuple):
    regex: str
    shortest: int
    """In characters."""
    longest: int


FORMATS = {
    "date": Format(f"^{DAY}$", 10, 10),
    "time": Format(f"^{TIME}$", 9, 21),
    "date-time": Format(f"^{DAY}T{TIME}$", 20, 32),
    "uuid": Format(f"^{HEX}{{8}}-{HEX}{{4}}-{HEX}{{4}}-{HEX}{{4}}-{HEX}{{12}}$", 36, 36),
}
