"""Names of properties that are none of those that a schema knows, as grammar rules. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.engines.embedded import pattern
from proxy.engines.embedded.grammar import Item, Rules, char_class, literal


def other_than(rules: Rules, names: Iterable[str]) -> Item:
    """Texts without escapes, which could spell a name, that are none of the names: off the tree of
    their letters somewhere.
    """
    letters, ends = _tree(name for name in names if not any(map(_is_escaped, name)))
    anything = rules.repeat(char_class(pattern.NOT_RAW, but=True), 0, None)
    spelled: dict[int, Item] = {}
    for node in reversed(range(len(letters))):  # what hangs on a node has a higher number
        taken = [(ord(c), ord(c)) for c in letters[node]]
        ways = [[char_class([*pattern.NOT_RAW, *taken], but=True), *anything]]
        ways += [[*literal(c), spelled[to]] for c, to in letters[node].items()]
        spelled[node] = rules.add(*ways, *([[]] if node not in ends else []))
    return spelled[0]


def _tree(names: Iterable[str]) -> tuple[list[dict[str, int]], set[int]]:
    """(where each letter leads, node by node from the root, 0; the nodes at which a name ends)."""
    letters: list[dict[str, int]] = [{}]
    ends = set()
    for name in names:
        node = 0
        for c in name:
            if c not in letters[node]:
                letters[node][c] = len(letters)
                letters.append({})
            node = letters[node][c]
        ends.add(node)
    return letters, ends


def _is_escaped(char: str) -> bool:
    return any(low <= ord(char) <= high for low, high in pattern.NOT_RAW)
