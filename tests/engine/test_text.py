"""Text leaves the engine in whole characters and never with a piece of a stop string."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from proxy.engines.embedded.text import TextStream


def run(data: bytes, cuts: list[int], stop: tuple[str, ...]) -> tuple[str, list[str], bool]:
    """Feeds `data` in pieces; gives the whole text, the pieces, and whether it stopped."""
    stream, pieces = TextStream(stop), []
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    for start, end in pairwise(edges):
        pieces.append(stream.feed(data[start:end]))
    pieces.append(stream.finish())
    return "".join(pieces), pieces, stream.stopped


def naive(text: str, stop: tuple[str, ...]) -> str:
    """The oracle: everything before the stop string that is complete first."""
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return text[: min(found)[1]] if found else text


@given(st.text(), st.lists(st.integers(0, 500)))
def test_text_cut_anywhere_comes_out_whole(text: str, cuts: list[int]) -> None:
    out, _, stopped = run(text.encode(), cuts, ())
    assert out == text
    assert not stopped


@given(
    st.text(alphabet="ab|>\nUser東🗼:", max_size=60),
    st.lists(st.integers(0, 500)),
    st.lists(st.text(alphabet="ab|>\nUser東🗼:", min_size=1, max_size=6), max_size=3),
)
@example(">::", [2], [":", ">::"])
def test_nothing_of_a_stop_string_is_ever_shown(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    stop = tuple(stops)
    out, pieces, stopped = run(text.encode(), cuts, stop)
    assert out == naive(text, stop)
    assert stopped == any(s in text for s in stop)
    shown = ""
    for piece in pieces:
        shown += piece
        assert naive(text, stop).startswith(shown)


def test_an_emoji_split_over_four_tokens_comes_once() -> None:
    stream = TextStream()
    pieces = [stream.feed(bytes([b])) for b in "🗼".encode()]
    assert pieces == ["", "", "", "🗼"]


def test_half_a_character_at_the_end_is_left_out() -> None:
    stream = TextStream()
    assert stream.feed("a東".encode()[:-1]) == "a"
    assert stream.finish() == ""
    assert stream.pieces_given(["a東".encode()[:-1]]) is None
    assert stream.pieces_given([b"a", "東".encode()[:-1]]) == 1


def test_librechats_stop_strings_span_tokens() -> None:
    stream = TextStream(("||>", "\nUser:"))
    assert [stream.feed(t) for t in (b"Hi |", b"|", b"> more")] == ["Hi ", "", ""]
    assert stream.stopped
    assert stream.feed(b"never") == ""
