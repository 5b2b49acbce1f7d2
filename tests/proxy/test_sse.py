"""Frames of an event stream."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from proxy import sse
from proxy.errors import bad_request

words = st.text(st.characters(codec="utf-8"))


@given(words)
def test_a_frame_is_one_line_of_json_whatever_the_text(text: str) -> None:
    frame = sse.data({"text": text})
    assert frame.startswith(b"data: ")
    assert frame.endswith(b"\n\n")
    assert b"\n" not in frame[:-2]
    assert b"\r" not in frame
    assert json.loads(frame[6:]) == {"text": text}


@given(st.text())
def test_a_comment_cannot_break_out_of_its_line(text: str) -> None:
    frame = sse.comment(text)
    assert frame.startswith(b": ")
    assert frame.count(b"\n") == 2
    assert b"\r" not in frame


def test_an_error_frame_is_the_error_object() -> None:
    frame = sse.error(bad_request("No.", param="n").body())
    assert json.loads(frame[6:])["error"]["message"] == "No."
    assert frame != sse.DONE


def test_the_constants() -> None:
    assert (sse.PING, sse.DONE) == (b": ping\n\n", b"data: [DONE]\n\n")
