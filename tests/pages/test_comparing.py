"""Two sets of summaries side by side. Pure."""

from __future__ import annotations

from dataclasses import replace

from memory.records import MODEL, Node, Summary
from memory.transcript import ASSISTANT, USER
from proxy.pages.comparing import aligned, compare

EMPTY = Summary(
    0, "c", 0, 0, b"", b"", 0, (), "", 10, "words", MODEL, "tiny", "p", "1", (), 2.0, 1.0
)


def block(id_: int, first: int, last: int, text: str = "") -> Summary:
    return replace(EMPTY, id=id_, first_depth=first, last_depth=last, text=text)


def said(*texts: str) -> list[Node]:
    roles = (USER, ASSISTANT)
    return [Node(b"", b"", i, roles[i % 2], text, 5, "words") for i, text in enumerate(texts)]


def test_rows_end_where_both_sides_end() -> None:
    left = [block(1, 0, 3), block(2, 4, 7), block(3, 8, 11)]
    right = [block(4, 0, 1), block(5, 2, 7), block(6, 8, 11)]
    rows = [([s.id for s in a], [s.id for s in b]) for a, b in aligned(left, right)]
    assert rows == [([1, 2], [4, 5]), ([3], [6])]
    assert aligned(left, right[:2])[-1][0][-1].id == 2
    assert aligned([], right) == []


def test_what_one_side_alone_tells_is_named() -> None:
    nodes = said(
        "The train to Kyoto leaves at 7:45 on 3 March. Always answer in French.",
        "Noted: Kyoto, 7:45.",
        "Anna pays 4,200 yen.",
        "Good.",
    )
    left = [block(1, 0, 3, "They take a train to Kyoto on 3 March.")]
    right = [
        block(2, 0, 1, "A train at 7:45. Always answer in French."),
        block(3, 2, 3, "Anna pays 4,200 yen."),
    ]
    found = compare(left, right, nodes, all_right=[*right, block(9, 0, 3)])
    (row,) = found.rows
    assert (row.first, row.last) == (0, 3)
    assert "Kyoto" in row.only_left and "Kyoto" not in row.only_right
    assert {"7:45", "4,200 yen"} <= set(row.only_right)
    assert found.left.kept["instructions"].kept == 0
    assert found.right.kept["instructions"].kept == found.right.kept["instructions"].of == 1
    assert found.left.share.of == found.right.share.of
    assert found.right.share.kept > found.left.share.kept
    assert (found.right.n_summaries, found.right.n_tokens, found.right.seconds) == (2, 20, 6.0)
    assert "instructions" in found.kinds and "identifiers" not in found.kinds
