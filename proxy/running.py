"""Which owners have a chat answer under way, and which chats have just had their first."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from memory.keeper import Job
from memory.transcript import USER, Message, chain

FIRST_TURNS_MOST = 64


class Running:
    """Lives on the event loop; nothing here waits but `quiet`."""

    def __init__(self) -> None:
        self._answers: Counter[str] = Counter()
        self._waiting: list[asyncio.Future[None]] = []
        self._first_turns: OrderedDict[tuple[str, bytes], Job] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Running answers={self._answers.total()} owners={len(self._answers)}>"

    @contextmanager
    def answering(self, owner: str) -> Iterator[None]:
        """Around a chat answer."""
        self._answers[owner] += 1
        try:
            yield
        finally:
            self._answers[owner] -= 1
            if not self._answers[owner]:
                del self._answers[owner]
            self._wake()

    async def quiet(self, owner: str) -> None:
        """Waits until no chat answer of this owner is under way. The caller bounds the wait."""
        while self._answers.get(owner):
            news = asyncio.get_running_loop().create_future()
            self._waiting.append(news)
            await news

    def remember(self, job: Job) -> None:
        """After a chat's first answer: a title may be asked for."""
        self._first_turns[job.owner, job.digests[0]] = job
        while len(self._first_turns) > FIRST_TURNS_MOST:
            self._first_turns.popitem(last=False)

    def first_turn(self, owner: str, question: str) -> Job | None:
        """The chat of this owner that began with this question lately, if it was answered."""
        return self._first_turns.get((owner, chain([Message(USER, question)])[0]))

    def forget(self, owner: str) -> None:
        """Nothing of this owner's chats stays here."""
        for key in [key for key in self._first_turns if key[0] == owner]:
            del self._first_turns[key]

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for news in waiting:
            if not news.done():
                news.set_result(None)
