"""The trace as it is written and read, also at the same time."""

from __future__ import annotations

from pathlib import Path

from proxy.trace import Trace, read


def test_what_was_written_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert read(path) == []
    trace = Trace(str(path))
    trace("one", request=1)
    trace("two", text="line\nbreak\u2028")
    trace.close()
    trace("three")
    assert [(e["event"], e.get("text")) for e in read(path)] == [
        ("one", None),
        ("two", "line\nbreak\u2028"),
    ]


def test_a_line_that_is_being_written_is_no_event_yet(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = Trace(str(path))
    trace("one")
    trace("two")
    trace.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert [e["event"] for e in read(path)] == ["one", "two"][: whole[:cut].count(b"\n")]


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    trace = Trace("")
    trace("one")
    trace.close()
    assert list(tmp_path.iterdir()) == []
