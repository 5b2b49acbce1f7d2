"""When what the model process has to say goes out: one write wakes the parent once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from proxy.engines.embedded import protocol
from proxy.engines.embedded.outbox import TEXT_WAITS_S, Outbox
from proxy.engines.embedded.protocol import Taken, Text


class Line:
    """An outbox on a pipe, with a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self._out, into = os.pipe()
        os.set_blocking(self._out, False)
        self.outbox = Outbox(into, clock=lambda: self.now)
        self._fds = (self._out, into)

    def step(self, *texts: str, takes_s: float) -> list[str]:
        """One step of the engine; what the parent reads right behind it."""
        self.now += takes_s
        for text in texts:
            self.outbox.post(Text(id=1, text=text))
        self.outbox.flush_due()
        return self.read()

    def read(self) -> list[str]:
        try:
            data = os.read(self._out, 1 << 16)
        except BlockingIOError:
            return []
        frames = [protocol.reply(body) for body in protocol.Frames().feed(data)]
        return [f.text if isinstance(f, Text) else type(f).__name__ for f in frames]

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def line() -> Iterator[Line]:
    it = Line()
    yield it
    it.close()


def test_quick_texts_go_together_and_none_waits_longer_than_it_may(line: Line) -> None:
    posted: dict[str, float] = {}
    waits = []
    for i in range(50):
        posted[str(i)] = line.now + 0.005
        waits += [line.now + 0.005 - posted[text] for text in line.step(str(i), takes_s=0.005)]
    assert 40 <= len(waits) <= 50
    assert max(waits) <= TEXT_WAITS_S + 1e-9
    assert sum(w > 0 for w in waits) > len(waits) / 2, "nothing ever went together"


def test_a_slow_models_texts_do_not_wait(line: Line) -> None:
    for i in range(5):
        assert line.step(str(i), takes_s=TEXT_WAITS_S) == [str(i)]


def test_what_is_no_text_takes_along_what_waited(line: Line) -> None:
    assert line.step("a", takes_s=0.001) == []
    line.outbox.post(Taken(id=2))
    assert line.outbox.urgent
    assert line.step("b", takes_s=0.001) == ["a", "Taken", "b"]
    assert not line.outbox.urgent


def test_a_flush_leaves_nothing_behind(line: Line) -> None:
    assert line.step("a", takes_s=0.001) == []
    line.outbox.flush()
    assert line.read() == ["a"]
