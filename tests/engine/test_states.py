"""Models whose state cannot be cut back, on llama.cpp itself: what is evaluated and what not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.engines.embedded.llama import DecodeError, Llama
from proxy.engines.embedded.request import BACKGROUND
from tests.engine import model_files
from tests.engine.warm_cold import KINDS, Cold, Kind, Warm, load

pytestmark = pytest.mark.slow

TINY = {
    name: replace(KINDS[name], cells=2000, window=900, n_batch=128, n_ubatch=32)
    for name in ("tiny_gemma", "mamba", "jamba")
}


class Model:
    """One of them, warm and cold."""

    def __init__(self, kind: Kind, **changes: Any) -> None:
        self.kind, path = kind, model_files.ALL[kind.model]()
        self.llama: Llama = load(kind, path, threads=1, sequences=kind.sequences, **changes)
        self.cold = Cold(kind, path, threads=1)

    def warm(self, folder: Path | None = None) -> Warm:
        return Warm(self.llama, self.kind, folder)

    def agrees(self, warm: Warm, id_: int) -> bool:
        got = warm.answer(id_)
        cold = [token for token, _ in self.cold.answer(warm.prompts[id_], max(1, len(got)))]
        return got == cold[: len(got)]


@pytest.fixture(scope="module", params=TINY)
def model(request: pytest.FixtureRequest) -> Model:
    return Model(TINY[request.param])


@pytest.fixture
def warm(model: Model) -> Iterator[Warm]:
    warm = model.warm()
    yield warm
    assert warm.failed == []


def text(n: int, *, seed: int) -> list[int]:
    return [32 + (seed * 7919 + i * i * 31 + i) % 95 for i in range(n)]


def test_the_next_turn_evaluates_its_new_tokens_only(model: Model, warm: Warm) -> None:
    chat = text(300, seed=1)
    for n_turn in range(4):
        id_ = warm.run(chat, 5)
        assert model.agrees(warm, id_)
        # The last token of an answer that ended by its length was never evaluated.
        assert warm.evaluated[id_] <= (300 if n_turn == 0 else 11)
        chat = [*chat, *warm.answer(id_), *text(10, seed=2 + n_turn)]


def test_asking_again_evaluates_one_token(model: Model, warm: Warm) -> None:
    chat = text(400, seed=3)
    first = warm.run(chat, 60)
    again = warm.run(chat, 8)
    assert warm.evaluated[again] == 1
    assert warm.answer(again) == warm.answer(first)[:8]
    assert model.agrees(warm, again)


def test_an_edited_last_message_evaluates_that_message(model: Model, warm: Warm) -> None:
    chat = text(350, seed=4)
    chat += warm.answer(warm.run(chat, 40))
    between = [*chat, *text(3, seed=5)]
    warm.run(between, 0, priority=BACKGROUND)
    warm.run([*between, *text(20, seed=6)], 40)
    edited = warm.run([*between, *text(15, seed=7)], 8)
    assert warm.evaluated[edited] == 15
    assert model.agrees(warm, edited)


def test_where_two_prompts_parted_the_third_goes_on(model: Model, warm: Warm) -> None:
    system = text(250, seed=8)
    evaluated = []
    for seed in (10, 11, 12):
        id_ = warm.run([*system, *text(40, seed=seed)], 50)
        assert model.agrees(warm, id_)
        evaluated.append(warm.evaluated[id_])
    assert evaluated[2] == 40


def test_after_a_restart_the_next_turn_evaluates_its_new_tokens_only(
    model: Model, tmp_path: Path
) -> None:
    warm = model.warm(tmp_path)
    chat = text(400, seed=13)
    chat += warm.answer(warm.run(chat, 30))
    warm.rest()
    warm.restart()
    turn = [*chat, *text(12, seed=14)]
    id_ = warm.run(turn, 8)
    assert warm.evaluated[id_] <= 12 + 1
    assert model.agrees(warm, id_)


def test_a_checkpoint_outlives_the_sequence_that_a_snapshot_brings_back(
    model: Model, tmp_path: Path
) -> None:
    warm = model.warm(tmp_path)
    chat = text(500, seed=15)
    warm.run(chat, 60)
    for seed in range(16, 20):
        warm.run(text(600, seed=seed), 2, owner="b")
    id_ = warm.run(chat, 8)
    assert warm.evaluated[id_] == 1
    assert model.agrees(warm, id_)


def test_forgetting_an_owner_forgets_where_it_could_go_back_to(model: Model, warm: Warm) -> None:
    for owner in "ab":
        warm.run(text(200, seed=20), 4, owner=owner)
    held = warm.scheduler.stats()
    assert held.checkpoints >= 2
    assert held.checkpoint_bytes > 0
    warm.scheduler.forget("a")
    assert warm.scheduler.stats().checkpoints == held.checkpoints // 2
    id_ = warm.run(text(200, seed=20), 4, owner="a")
    assert warm.evaluated[id_] == 200


def test_a_request_under_way_leaves_no_place_to_go_back_to_once_its_owner_is_forgotten(
    model: Model, warm: Warm
) -> None:
    chat = text(400, seed=23)
    warm.run(chat[:200], 4)
    id_ = warm.submit(chat, 4)
    warm.step()
    warm.scheduler.forget("a")
    waits = warm.submit(chat[:300], 0, priority=BACKGROUND)
    warm.scheduler.forget("a")
    warm.until(lambda: {id_, waits} <= set(warm.ended))
    stats = warm.scheduler.stats()
    assert (stats.checkpoints, stats.cells_used) == (0, 0)


def test_any_number_of_forks_finds_room(model: Model, warm: Warm) -> None:
    """Sequences that part again and again from one chat, and each goes far past the window."""
    chat = text(150, seed=21)
    warm.run(chat, 4)
    for n_round in range(6):
        ids = [
            warm.submit([*chat, *text(40, seed=30 + 4 * n_round + i)], 30, keep=i == 0)
            for i in range(4)
        ]
        warm.finish()
        assert all(model.agrees(warm, i) for i in ids)
        chat = [*warm.prompts[ids[0]], *warm.answer(ids[0])]
    assert "request_requeued" not in warm.happened


def test_a_batch_that_fails_costs_its_requests_and_nobody_elses_answer(model: Model) -> None:
    warm = model.warm()
    background = warm.submit(text(200, seed=40), 8, priority=BACKGROUND)
    warm.step()

    def breaks(entries: Any) -> int:
        half = [(s, at, tokens[: len(tokens) // 2], False) for s, at, tokens, _ in entries]
        assert model.llama.decode(half) == 0
        del warm.door.decode  # type: ignore[method-assign]
        raise DecodeError("llama_decode returned -3")

    warm.door.decode = breaks  # type: ignore[method-assign]
    lost = warm.submit(text(100, seed=41), 4)
    warm.finish()
    assert [f.id for f in warm.failed] == [lost]
    again = warm.run(text(100, seed=41), 4)
    assert model.agrees(warm, background)
    assert model.agrees(warm, again)


@pytest.mark.parametrize("name", TINY)
def test_64_sequences(name: str) -> None:
    kind = replace(TINY[name], sequences=64, cells=6000, n_batch=256, n_ubatch=64)
    model = Model(kind)
    warm = model.warm()
    ids = [warm.submit(text(30 + i, seed=100 + i), 6) for i in range(64)]
    warm.until(lambda: len(warm.scheduler.running) == 64)
    warm.finish()
    assert sum(model.agrees(warm, i) for i in ids) >= 62, "near ties are rare"
    assert warm.failed == []


def test_a_full_size_window_cache_can_be_cut_anywhere() -> None:
    model = Model(TINY["tiny_gemma"], swa_full=True)
    assert not model.llama.keeps_parts
    warm = model.warm()
    chat = text(500, seed=50)
    warm.run(chat, 20)
    edited = [*chat[:200], *text(10, seed=51)]
    id_ = warm.run(edited, 8)
    assert warm.evaluated[id_] == 10
    assert model.agrees(warm, id_)
    assert warm.scheduler.stats().checkpoints == 0


def test_but_what_comes_back_from_disk_holds_its_last_window_alone(tmp_path: Path) -> None:
    model = Model(TINY["tiny_gemma"], swa_full=True)
    warm = model.warm(tmp_path)
    chat = text(500, seed=52)
    warm.run(chat, 20)
    warm.rest()
    warm.restart()
    edited = [*chat[:200], *text(10, seed=53)]
    id_ = warm.run(edited, 8)
    assert warm.evaluated[id_] == 210
    assert model.agrees(warm, id_)


def test_gemma_asks_again_and_goes_on_past_its_window(tmp_path: Path) -> None:
    kind = replace(KINDS["gemma"], cells=1600, n_batch=256, n_ubatch=60)
    model = Model(kind)
    assert model.llama.keeps_parts
    warm = model.warm(tmp_path)
    chat = model.llama.tokenize(Path(__file__).read_text(), markup=False)[:560]
    first = warm.run(chat, 12)
    again = warm.run(chat, 12)
    assert warm.evaluated[again] == 1
    assert warm.answer(again) == warm.answer(first)
    warm.rest()
    warm.restart()
    turn = warm.run([*chat, *warm.answer(first), *chat[:9]], 4)
    assert warm.evaluated[turn] == 9 + 1
