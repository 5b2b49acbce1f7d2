"""A run with the model goes on from where it stopped, and no figure tells that it stopped."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from memory.policy import Policy
from memory.transcript import ASSISTANT, USER, Message
from proxy.tuning.chats import Chat
from proxy.tuning.planning import planned
from proxy.tuning.progress import Progress, measured, name_of
from proxy.tuning.replay import Aim, Script, Setting, Turn, replay
from proxy.tuning.replayed import ReplayedEngine
from proxy.tuning.simulation import SimulatedEngine, Words, words

pytestmark = pytest.mark.anyio

WINDOW = 400
TURNS = 14
SETTING = Setting(WINDOW)
POLICY = Policy()
CHAT = Chat(
    "x",
    tuple(
        Message((USER, ASSISTANT)[i % 2], f"Line {i}: {100 + i} letters came for Katrin Oberle.")
        for i in range(2 * TURNS)
    ),
)
N_ANSWER = len(words(CHAT.messages[1].text))
SUMMARY = "Letters came for Katrin Oberle, and they were counted one by one."


async def engine() -> SimulatedEngine:
    """What stands for the model here: its own answers are never heard."""
    made = SimulatedEngine(WINDOW, lambda context: "Never heard.", lambda context: SUMMARY)
    await made.start()
    return made


def untimed(turns: list[Turn]) -> list[Turn]:
    """Without what a clock said."""
    return [
        replace(
            turn,
            chat=replace(turn.chat, seconds=None),
            background=tuple(replace(w, seconds=None) for w in turn.background),
        )
        for turn in turns
    ]


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


async def whole(directory: Path) -> list[Turn]:
    return await measured(Aim.of(CHAT), POLICY, await engine(), SETTING, directory=directory)


async def test_every_turn_is_timed_and_the_answers_are_those_that_were_given(
    tmp_path: Path,
) -> None:
    turns = await whole(tmp_path)
    assert len(turns) == TURNS
    assert all(turn.chat.seconds is not None for turn in turns)
    assert sum(turn.summaries for turn in turns) > 0
    told = turns[-1].kept
    assert told is not None
    assert told["names"].value == 1.0
    # The question and its markup, as if the answer before it had been generated.
    assert {turn.chat.evaluated for turn in turns[1:]} == {turns[1].chat.evaluated}


@pytest.mark.parametrize("stop_after", [1, 6, 9, TURNS - 1])
async def test_a_run_that_was_stopped_ends_with_the_same_figures(
    tmp_path: Path, stop_after: int
) -> None:
    wanted = untimed(await whole(tmp_path / "whole"))
    aim, model = Aim.of(CHAT), await engine()
    assert model.info is not None
    name = name_of(aim, POLICY, SETTING, model.info.fingerprint)
    progress, script = Progress(tmp_path, name), Script()
    assert progress.begin(TURNS) == []
    replayed = ReplayedEngine(model, script)
    rest = replay(aim, POLICY, replayed, script, path=progress.store, setting=SETTING)
    async with aclosing(rest) as turns:
        async for turn in turns:
            progress.add(turn)
            if len(progress.turns()) == stop_after:
                break
    told: list[int] = []
    fresh = await engine()
    found = await measured(aim, POLICY, fresh, SETTING, directory=tmp_path, tell=told.append)
    assert untimed(found) == wanted
    assert told == [stop_after, *[1] * (TURNS - stop_after)]
    assert not progress.store.exists()


async def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    first = await whole(tmp_path)
    idle = await engine()
    assert await measured(Aim.of(CHAT), POLICY, idle, SETTING, directory=tmp_path) == first
    assert idle.calls == []


async def test_no_text_of_the_chat_is_left_behind(tmp_path: Path) -> None:
    await whole(tmp_path)
    left = files(tmp_path)
    assert [path.suffix for path in left] == [".jsonl"]
    assert b"Katrin" not in left[0].read_bytes()


async def test_a_limit_leaves_the_last_token_of_an_answer_to_be_read() -> None:
    """As in a real engine: what is written last is not evaluated until somebody reads on."""
    settings = SETTING, Setting(WINDOW, max_tokens=N_ANSWER)
    aim = Aim(CHAT.first(2), {})
    unbounded, bounded = [await planned(aim, POLICY, Words(), setting) for setting in settings]
    assert [t.chat.evaluated for t in bounded] == [t.chat.evaluated for t in unbounded]
    more = [
        sum(w.evaluated for w in b.background) - sum(w.evaluated for w in a.background)
        for a, b in zip(unbounded, bounded, strict=True)
    ]
    assert more[0] == 1
