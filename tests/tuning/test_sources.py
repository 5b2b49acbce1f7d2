"""Where chats come from: read only, bounded, and wrong files are one sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from memory.policy import Policy
from memory.store import Store
from memory.transcript import ASSISTANT, USER, Message
from proxy.tuning import sources
from proxy.tuning.house import House
from proxy.tuning.replay import Aim, Script, Setting, replay
from proxy.tuning.simulation import Line, SimulatedEngine, Words
from proxy.tuning.sources import SourceError, read_source

pytestmark = pytest.mark.anyio

WINDOW = 400
TURNS = 14


def said(n: int) -> list[Message]:
    return [
        Message(
            (USER, ASSISTANT)[i % 2],
            f"Line {i}: the number {100 + i} belongs to Katrin Oberle and to nobody else at all.",
        )
        for i in range(2 * n)
    ]


async def stored(path: Path, policy: Policy, *, turns: int = TURNS) -> SimulatedEngine:
    """A chat served on this store, with a date in the system prompt that changes once."""
    script = Script()
    engine = SimulatedEngine(WINDOW, script, lambda context: "", Words())
    house = await House.open(path, engine, policy)
    messages = said(turns)
    for i in range(0, 2 * turns, 2):
        script.line = Line(messages[i + 1].text)
        system = f"Be kind.\nToday is {'Monday' if i < 10 else 'Tuesday'}."
        await house.ask("anna", messages[: i + 1], system=system)
        await house.idle()
    await house.close()
    return engine


async def test_a_stored_chat_comes_back_and_the_file_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "chatfold.db"
    await stored(path, Policy())
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    (chat,) = await read_source(path, limit=3)
    assert list(chat.messages) == said(TURNS)
    assert len(chat.exchanges) == TURNS
    assert chat.summaries
    assert chat.systems[0].startswith("Be kind.")
    assert "Tuesday" in chat.systems[-1]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


async def test_a_replay_of_a_stored_chat_costs_what_the_chat_cost(tmp_path: Path) -> None:
    """Under the policy it was served with, call for call: the same prompts, the same prefixes."""
    path, policy = tmp_path / "chatfold.db", Policy()
    served = await stored(path, policy)
    (chat,) = await read_source(path, limit=1)
    script = Script()
    engine = SimulatedEngine(WINDOW, script, lambda context: "", Words())
    turns = [
        turn
        async for turn in replay(
            Aim(chat, {}),
            policy,
            engine,
            script,
            path=tmp_path / "again.db",
            setting=Setting(WINDOW),
        )
    ]
    wanted = [(c.prompt_tokens, c.evaluated) for c in served.chat_calls()]
    assert [(t.chat.prompt_tokens, t.chat.evaluated) for t in turns] == wanted
    everything = sum(c.evaluated for c in served.calls)
    replayed = sum(t.chat.evaluated + sum(w.evaluated for w in t.background) for t in turns)
    assert replayed == everything
    assert sum(t.summaries for t in turns) == len(chat.summaries)


async def test_the_longest_chats_of_all_owners_come_first(tmp_path: Path) -> None:
    path = tmp_path / "chatfold.db"
    await stored(path, Policy(compact=False), turns=3)
    store = await Store.open(path)
    (owner, conversation, _, n_messages) = (await store.longest(limit=9))[0]
    assert (owner, n_messages) == ("anna", 6)
    nodes = await store.nodes("anna", (await store.lineage("anna", (await _last(store)))))
    await store.append("ben", nodes[:4], conversation=None)
    assert [found[0] for found in await store.longest(limit=9)] == ["anna", "ben"]
    assert len(await store.longest(limit=1)) == 1
    await store.close()
    assert conversation
    assert [len(c.exchanges) for c in await read_source(path, limit=9)] == [3, 2]


async def _last(store: Store) -> bytes:
    return (await store.longest(limit=1))[0][2]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("hello", "is not JSON"),
        ('{"a": 1}', "is no export that is understood"),
        ('[{"role": "user", "content": "Hi"}]', "holds no chat of 2 turns or more"),
        ('{"conversation": {"speaker_a": "A", "session_1": [{}]}}', "looks like LoCoMo's"),
        ("SQLite format 3\0 and no more", "cannot be used"),
    ],
)
async def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SourceError, match=told) as caught:
        await read_source(path, limit=1)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


async def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"role": "user", "content": "x" * 100}]))
    monkeypatch.setattr(sources, "MAX_EXPORT_BYTES", 50)
    with pytest.raises(SourceError, match="has more than"):
        await read_source(path, limit=1)
    with pytest.raises(SourceError, match="No such file"):
        await read_source(tmp_path / "none.json", limit=1)
