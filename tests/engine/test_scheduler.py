"""The scheduler on the real model: whatever happens around a request, it gets the tokens that a
cold run of it alone gives, and the books of the cache balance after every step.

How equal: with micro-batches of fewer than 64 tokens llama.cpp computes a token the same way
whatever else is in the batch (measured: equal to the bit). What is left is the order of the cells:
a sequence that lies in the holes others left is summed up in another order, and its logits move by
up to 0.6. So a first token that differs is accepted only where the cold run saw it within
NEAR_TIE of its best, and tests where cells are in order want none to differ.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxy.engines.embedded import llama as door
from proxy.engines.embedded.batches import BACKGROUND_CHUNK, SHARED_CHUNK
from proxy.engines.embedded.llama import (
    ABORTED,
    NO_SLOT,
    DecodeError,
    Llama,
    from_bytes,
)
from proxy.engines.embedded.protocol import (
    Began,
    Cancelled,
    Ended,
    Failed,
    Load,
    Taken,
    Text,
    Waiting,
)
from proxy.engines.embedded.request import BACKGROUND, CHAT, CLASSES, SIDE, Request
from proxy.engines.embedded.scheduler import Scheduler
from proxy.engines.embedded.snapshots import Snapshot, Snapshots
from tests.engine.submits import greedy

pytestmark = pytest.mark.slow

NEAR_TIE = 1.0
"""Logits. Twice the greatest move seen is 1.2; ties this near are rare, and counted."""

SEQUENCES = 4
MOST_STEPS = 600


def load(model_path: str, **changes: Any) -> Llama:
    settings: dict[str, Any] = dict(n_ctx=512, cache_tokens=1024, sequences=SEQUENCES)
    settings |= dict(n_batch=256, n_ubatch=32, threads=1, gpu_layers=0) | changes
    return Llama(Load(path=model_path, **settings))


@pytest.fixture(scope="module")
def llama(model_path: str) -> Llama:
    return load(model_path)


@pytest.fixture(scope="module")
def oracle(model_path: str) -> Oracle:
    return Oracle(load(model_path, sequences=1))


@pytest.fixture
def rig(llama: Llama) -> Rig:
    return Rig(llama)


class Oracle:
    """Answers each prompt alone, in an empty cache, and remembers how sure it was."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama

    def answer(self, prompt: Sequence[int], n: int) -> list[tuple[int, Any]]:
        """(greedy token, all logits it was chosen from), up to the end of the turn."""
        self._llama.remove(0, 0)
        steps, at, new = [], 0, list(prompt)
        while len(steps) < n:
            assert self._llama.decode([(0, at, new, True)]) == 0
            row = self._row(len(new) - 1)
            token = int(row.argmax())
            if self._llama.is_end(token):
                break
            steps.append((token, row))
            at, new = at + len(new), [token]
        return steps

    def agrees(self, prompt: Sequence[int], got: Sequence[int], n: int) -> bool:
        """Whether `got` is the cold answer. Fails the test if it is more than a near tie away."""
        cold = self.answer(prompt, n)
        for (token, row), other in zip(cold, got, strict=False):
            if token != other:
                assert row[token] - row[other] < NEAR_TIE, "not the cold run's answer"
                return False
        assert len(cold) == len(got)
        return True

    def _row(self, index: int) -> Any:
        pointer = door.C.llama_get_logits_ith(self._llama._context, index)
        return np.ctypeslib.as_array(pointer, (self._llama.n_vocab,)).copy()


class Door:
    """A Llama that counts what it evaluates, may have fewer cells, and fails as it is told to."""

    def __init__(self, llama: Llama, cells: int, window_tokens: int) -> None:
        self._llama = llama
        self.cells = cells
        self.window_tokens = window_tokens
        self.batches: list[list[tuple[int, int, list[int], bool]]] = []
        self.faults: list[Callable[[Any], int] | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    def decode(self, entries: Any) -> int:
        self.batches.append([(s, at, list(t), w) for s, at, t, w in entries])
        fault = self.faults.pop(0) if self.faults else None
        return fault(entries) if fault else self._llama.decode(entries)

    def no_slot(self, entries: Any) -> int:
        return NO_SLOT

    def breaks(self, entries: Any) -> int:
        """A failure in the second half: the first stays in llama.cpp's cache."""
        self._part(entries, sum(len(t) for _, _, t, _ in entries) // 2)
        raise DecodeError("llama_decode returned -3")

    def aborts_after(self, n_tokens: int) -> Callable[[Any], int]:
        def decode(entries: Any) -> int:
            self._part(entries, n_tokens)
            return ABORTED

        return decode

    def _part(self, entries: Any, n_tokens: int) -> None:
        part = []
        for sequence, at, tokens, _ in entries:
            part.append((sequence, at, tokens[:n_tokens], False))
            n_tokens -= len(part[-1][2])
        if part := [e for e in part if e[2]]:
            assert self._llama.decode(part) == 0


@dataclass
class Rig:
    """A scheduler with everything it says recorded. Steps are checked one by one."""

    llama: Llama
    n_sequences: int = SEQUENCES
    cells: int = 0
    window_tokens: int = 0
    sent: list[Any] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)
    ran: list[list[int]] = field(default_factory=list)
    prompts: dict[int, list[int]] = field(default_factory=dict)
    prompt_tokens_evaluated: Counter[int] = field(default_factory=Counter)
    gate_open: bool = True
    snapshots: Snapshots | None = None

    def __post_init__(self) -> None:
        for sequence in range(SEQUENCES):
            self.llama.remove(sequence, 0)
        self.llama.abort.clear()
        llama = self.llama
        self.door = Door(llama, self.cells or llama.cells, self.window_tokens or 512)
        self._ids, self._clock = count(1), count(1)
        self.scheduler = Scheduler(
            self.door,  # type: ignore[arg-type]
            n_sequences=self.n_sequences,
            emit=self.sent.append,
            trace=self,
            gate=lambda priority, requests: self.gate_open,
            snapshots=self.snapshots,
            clock=self.now,
        )

    def now(self) -> float:
        """A clock that only goes on when it is looked at."""
        return float(next(self._clock))

    # -- told by the scheduler -------------------------------------------------------------------

    def request(self, event: str, request: Request) -> None:
        self.events.append((event, request.id))

    def batch(self, requests: Sequence[Request], *, n_tokens: int) -> None:
        self.ran.append([r.id for r in requests])
        assert n_tokens <= self.llama.n_batch

    # -- driving it ------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int | None = 4,
        **fields: Any,
    ) -> int:
        """`fields` are those of `Submit`."""
        unread = {"unread_most": 1000}
        submit = greedy(next(self._ids), max_tokens, **(unread | fields))
        self.prompts[submit.id] = list(prompt)
        self.scheduler.add(Request(submit=submit, tokens=list(prompt), arrived_at=self.now()))
        return submit.id

    def step(self) -> None:
        n_batches = len(self.door.batches)
        self.scheduler.step()
        self.scheduler.check_integrity()
        for ids, entries in zip(self.ran[n_batches:], self.door.batches[n_batches:], strict=True):
            for id_, (_, at, tokens, _) in zip(ids, entries, strict=True):
                inside = min(at + len(tokens), len(self.prompts[id_])) - at
                self.prompt_tokens_evaluated[id_] += max(0, inside)

    def until(self, done: Callable[[], object]) -> None:
        for _ in range(MOST_STEPS):
            if done():
                return
            self.step()
        raise AssertionError(f"still waiting: {self.scheduler!r}, {self.events[-9:]}")

    def finish(self) -> None:
        self.until(lambda: self.scheduler.idle)

    def run(self, prompt: Sequence[int], max_tokens: int | None = 4, **kwargs: Any) -> int:
        """One request from beginning to end."""
        id_ = self.submit(prompt, max_tokens, **kwargs)
        self.finish()
        return id_

    def running(self) -> list[int]:
        return [r.id for r in self.scheduler.running]

    # -- what came of it -------------------------------------------------------------------------

    def of(self, id_: int, kind: type[Any]) -> list[Any]:
        return [frame for frame in self.sent if isinstance(frame, kind) and frame.id == id_]

    def ended(self, id_: int) -> Ended:
        (frame,) = self.of(id_, Ended)
        assert isinstance(frame, Ended)
        return frame

    def text(self, id_: int) -> str:
        return "".join(frame.text for frame in self.of(id_, Text))

    def answer(self, id_: int) -> list[int]:
        token_ids = self.ended(id_).token_ids
        assert token_ids is not None
        return from_bytes(token_ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.llama.piece(t) for t in tokens).decode()


WORDS = """the tower stands near a river and old trains cross it every morning when people walk to
work with coffee while children feed birds under red maple trees in Kyoto or Osaka where small shops
sell paper lamps tea and blue bowls made by hand for guests from far away"""


def prompt_of(llama: Llama, n: int, seed: int) -> list[int]:
    """`n` tokens of likely text, other ones for another seed from the first token on."""
    rng, words = random.Random(seed), WORDS.split()
    text = " ".join(rng.choice(words) for _ in range(n))
    return [1000 + seed, *llama.tokenize(text, markup=False)][:n]


# -- one after another ---------------------------------------------------------------------------


def test_an_answer_is_the_cold_runs_answer(rig: Rig, oracle: Oracle) -> None:
    prompt = prompt_of(rig.llama, 40, seed=1)
    id_ = rig.run(prompt, 12)
    assert oracle.agrees(prompt, rig.answer(id_), 12)
    assert rig.text(id_) == rig.decode(rig.answer(id_))
    assert rig.prompt_tokens_evaluated[id_] == len(prompt)


def test_a_prompt_equal_to_a_cached_one_evaluates_exactly_one_token(
    rig: Rig, oracle: Oracle
) -> None:
    prompt = prompt_of(rig.llama, 40, seed=2)
    first, second = rig.run(prompt, 6), rig.run(prompt, 6)
    assert rig.prompt_tokens_evaluated[second] == 1
    assert rig.ended(second).cached_tokens == len(prompt) - 1
    assert rig.answer(first) == rig.answer(second)
    assert oracle.agrees(prompt, rig.answer(second), 6)


def test_the_next_turn_evaluates_its_new_tokens_only(rig: Rig, oracle: Oracle) -> None:
    prompt, turn = prompt_of(rig.llama, 40, seed=3), prompt_of(rig.llama, 10, seed=4)
    for n_turn in range(3):
        id_ = rig.run(prompt, 5)
        # An answer that ends by its length leaves its last token unevaluated.
        assert rig.prompt_tokens_evaluated[id_] == (40 if n_turn == 0 else len(turn) + 1)
        assert oracle.agrees(prompt, rig.answer(id_), 5)
        prompt = [*prompt, *rig.answer(id_), *turn]
    assert rig.scheduler.stats().sequences_used == 1


def test_an_edited_turn_forks_and_the_old_branch_stays(rig: Rig, oracle: Oracle) -> None:
    base = prompt_of(rig.llama, 30, seed=5)
    one, two = base + prompt_of(rig.llama, 8, seed=6), base + prompt_of(rig.llama, 9, seed=7)
    rig.run(one)
    other = rig.run(two)
    again = rig.run(one)
    assert rig.prompt_tokens_evaluated[other] == len(two) - len(base)
    assert rig.prompt_tokens_evaluated[again] == 1
    assert oracle.agrees(two, rig.answer(other), 4)
    assert oracle.agrees(one, rig.answer(again), 4)


def test_owners_never_share(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 24, seed=8)
    rig.run(prompt, owner="a")
    other = rig.run(prompt, owner="b")
    assert rig.ended(other).cached_tokens == 0
    assert rig.prompt_tokens_evaluated[other] == len(prompt)


def test_the_books_hold_against_the_tokens_given_to_llama_cpp(rig: Rig) -> None:
    base = prompt_of(rig.llama, 20, seed=9)
    ids = [
        rig.run(prompt, n, keep=keep)
        for prompt, n, keep in [
            (base, 3, True),
            ([*base, *prompt_of(rig.llama, 7, seed=10)], 2, False),
            (base[:12], 1, True),
            ([*base, *prompt_of(rig.llama, 5, seed=11)], 0, True),
        ]
    ]
    for id_ in ids:
        end = rig.ended(id_)
        assert end.prompt_tokens - end.cached_tokens == rig.prompt_tokens_evaluated[id_]
        assert rig.of(id_, Began)[0].cached_tokens == end.cached_tokens


# -- warming -------------------------------------------------------------------------------------


def test_after_warming_a_request_evaluates_its_new_tokens_only(rig: Rig, oracle: Oracle) -> None:
    context, new = prompt_of(rig.llama, 70, seed=12), prompt_of(rig.llama, 6, seed=13)
    warm = rig.run(context, 0, priority=BACKGROUND)
    assert rig.prompt_tokens_evaluated[warm] == len(context)
    assert rig.ended(warm).completion_tokens == 0
    chat = rig.run([*context, *new])
    assert rig.prompt_tokens_evaluated[chat] == len(new)
    assert oracle.agrees([*context, *new], rig.answer(chat), 4)


def test_warming_what_is_warm_evaluates_nothing_and_ends_with_honest_figures(rig: Rig) -> None:
    context = prompt_of(rig.llama, 30, seed=14)
    rig.run(context, 0, priority=BACKGROUND)
    for prompt in (context, context[:20]):
        again = rig.run(prompt, 0, priority=BACKGROUND)
        end = rig.ended(again)
        assert rig.prompt_tokens_evaluated[again] == 0
        assert end.cached_tokens == len(prompt)
        assert min(end.queued_s, end.prefill_s, end.decode_s) >= 0
    assert rig.scheduler.stats().sequences_used == 1


def test_warming_beside_the_running_chat_that_holds_it_evaluates_nothing(rig: Rig) -> None:
    context = prompt_of(rig.llama, 30, seed=15)
    chat = rig.submit([*context, *prompt_of(rig.llama, 4, seed=16)], 6)
    rig.until(lambda: rig.of(chat, Began))
    warm = rig.submit(context, 0)
    rig.step()
    assert rig.ended(warm).cached_tokens == len(context)
    rig.finish()
    assert rig.scheduler.stats().sequences_used == 1


def test_warming_what_only_a_passing_request_holds_keeps_a_copy(rig: Rig) -> None:
    context, new = prompt_of(rig.llama, 30, seed=17), prompt_of(rig.llama, 4, seed=18)
    passing = rig.submit([*context, *prompt_of(rig.llama, 5, seed=19)], 6, keep=False)
    rig.until(lambda: rig.of(passing, Began))
    warm = rig.submit(context, 0)
    rig.finish()
    assert rig.prompt_tokens_evaluated[warm] == 0
    chat = rig.run([*context, *new])
    assert rig.prompt_tokens_evaluated[chat] == len(new)


def test_two_warms_and_a_chat_of_one_conversation_at_once_all_end(rig: Rig, oracle: Oracle) -> None:
    context = prompt_of(rig.llama, 40, seed=20)
    warms = [rig.submit(context, 0) for _ in range(2)]
    chat = rig.submit([*context, *prompt_of(rig.llama, 5, seed=21)])
    rig.finish()
    assert all(rig.ended(w).finish_reason == "stop" for w in warms)
    assert oracle.agrees(rig.prompts[chat], rig.answer(chat), 4)


# -- side requests -------------------------------------------------------------------------------


def test_a_side_request_leaves_the_conversations_prefix_as_it_was(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 30, seed=22)
    chat = rig.run(prompt, 3)
    rig.run([*prompt[:20], *prompt_of(rig.llama, 9, seed=23)], 3, priority=SIDE, keep=False)
    stats = rig.scheduler.stats()
    assert (stats.sequences_used, stats.cells_used) == (1, 32)
    following = rig.run([*prompt, *rig.answer(chat), *prompt_of(rig.llama, 4, seed=24)])
    assert rig.prompt_tokens_evaluated[following] == 5


def test_with_one_sequence_a_side_request_gives_back_what_it_was_lent(llama: Llama) -> None:
    rig = Rig(llama, n_sequences=1)
    prompt = prompt_of(llama, 30, seed=25)
    rig.run(prompt, 3)
    side = rig.run([*prompt[:20], *prompt_of(llama, 9, seed=26)], 3, priority=SIDE, keep=False)
    assert rig.prompt_tokens_evaluated[side] == 9
    assert rig.scheduler.stats().cells_used == 20
    again = rig.run(prompt)
    assert rig.prompt_tokens_evaluated[again] == 10


# -- classes and fairness ------------------------------------------------------------------------


def test_chat_goes_before_side_and_side_before_background(rig: Rig) -> None:
    ids = {
        priority: rig.submit(prompt_of(rig.llama, 12, seed=30 + priority), priority=priority)
        for priority in (BACKGROUND, SIDE, CHAT)
    }
    rig.finish()
    order = [i for batch in rig.ran for i in set(batch)]
    assert order == sorted(order, key=[ids[CHAT], ids[SIDE], ids[BACKGROUND]].index)
    assert all(len(batch) == 1 for batch in rig.ran)


def test_background_gives_way_between_two_chunks_and_loses_nothing(
    rig: Rig, oracle: Oracle
) -> None:
    long = prompt_of(rig.llama, 150, seed=33)
    background = rig.submit(long, 3, priority=BACKGROUND)
    rig.step()
    assert rig.prompt_tokens_evaluated[background] == BACKGROUND_CHUNK
    chat = rig.submit(prompt_of(rig.llama, 10, seed=34))
    rig.until(lambda: rig.of(chat, Ended))
    assert rig.prompt_tokens_evaluated[background] == BACKGROUND_CHUNK
    rig.finish()
    assert rig.prompt_tokens_evaluated[background] == len(long)
    assert [e for e, i in rig.events if i == background] == [
        "request_queued",
        "request_started",
        "request_paused",
        "request_resumed",
        "first_token",
        "request_done",
    ]
    assert oracle.agrees(long, rig.answer(background), 3)


def test_background_that_is_interrupted_inside_a_chunk_loses_at_most_that_chunk(
    rig: Rig, oracle: Oracle
) -> None:
    long = prompt_of(rig.llama, 150, seed=35)
    rig.door.faults = [None, rig.door.aborts_after(32)]
    background = rig.submit(long, 3, priority=BACKGROUND)
    rig.step()
    rig.step()
    chat = rig.submit(prompt_of(rig.llama, 10, seed=36))
    rig.finish()
    # The second chunk was given to llama.cpp whole, and half of it stayed.
    assert rig.prompt_tokens_evaluated[background] == len(long) + BACKGROUND_CHUNK // 2
    assert rig.ended(background).cached_tokens == 0
    assert oracle.agrees(long, rig.answer(background), 3)
    assert oracle.agrees(rig.prompts[chat], rig.answer(chat), 4)


def test_chats_that_answer_together_advance_together(rig: Rig, oracle: Oracle) -> None:
    ids = [rig.submit(prompt_of(rig.llama, 16, seed=40 + i), 8) for i in range(3)]
    rig.until(lambda: all(rig.of(i, Began) for i in ids))
    while not rig.scheduler.idle:
        lengths = [len(r.generated) for r in rig.scheduler.running]
        assert max(lengths) - min(lengths) <= 1
        rig.step()
    for id_ in ids:
        assert oracle.agrees(rig.prompts[id_], rig.answer(id_), 8)


def test_a_long_prompt_lets_the_answers_beside_it_go_on(rig: Rig) -> None:
    answering = rig.submit(prompt_of(rig.llama, 10, seed=44), 12)
    rig.until(lambda: rig.of(answering, Began))
    n_batches = len(rig.ran)
    long = rig.submit(prompt_of(rig.llama, SHARED_CHUNK + 40, seed=45), 2)
    rig.until(lambda: rig.of(long, Began))
    assert len(rig.ran) - n_batches == 2
    assert all(answering in batch for batch in rig.ran[n_batches:])
    assert all(
        len(tokens) <= SHARED_CHUNK
        for batch in rig.door.batches[n_batches:]
        for *_, tokens, _ in batch
    )
    rig.finish()


def test_who_came_first_is_served_first(llama: Llama) -> None:
    rig = Rig(llama, n_sequences=2)
    ids = [rig.submit(prompt_of(llama, 8, seed=50 + i), 2, keep=i % 2 == 0) for i in range(6)]
    rig.finish()
    assert [i for event, i in rig.events if event == "request_started"] == ids
    assert all(rig.ended(i).finish_reason == "length" for i in ids)


def test_a_short_prompt_is_in_beside_a_long_one_with_the_next_batch(rig: Rig) -> None:
    long = rig.submit(prompt_of(rig.llama, 400, seed=56), 1)
    rig.step()
    n_batches = len(rig.ran)
    short = rig.submit(prompt_of(rig.llama, 40, seed=57), 1, owner="b")
    rig.step()
    assert rig.ran[n_batches:] == [[long, short]]
    assert rig.of(short, Ended)
    assert not rig.of(long, Began)
    rig.finish()


def test_an_owner_with_a_long_queue_does_not_hold_back_anothers_first(llama: Llama) -> None:
    rig = Rig(llama, n_sequences=2)
    many = [rig.submit(prompt_of(llama, 8, seed=130 + i), 3, owner="a") for i in range(6)]
    rig.step()
    one = rig.submit(prompt_of(llama, 8, seed=137), 3, owner="b")
    rig.finish()
    order = [i for event, i in rig.events if event == "request_started"]
    # The first two end together, and then the third has waited for longer.
    assert order == [*many[:3], one, *many[3:]]


def test_no_batch_is_larger_than_llama_cpps_own(model_path: str) -> None:
    llama = load(model_path, n_batch=1, n_ubatch=1)
    assert llama.n_batch >= 2 * SEQUENCES
    rig = Rig(llama)
    for priority in (CHAT, BACKGROUND):
        for i in range(SEQUENCES):
            rig.submit(prompt_of(llama, 12, seed=60 + i), 3, priority=priority)
    rig.finish()
    sizes = [sum(len(t) for *_, t, _ in batch) for batch in rig.door.batches]
    assert max(sizes) <= llama.n_batch


# -- what is counted -----------------------------------------------------------------------------


def test_the_totals_are_what_the_requests_were_given_whatever_became_of_them(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 40, seed=190)
    rig.run(prompt, 5)
    rig.run(prompt, 3)
    rig.door.faults = [None, rig.door.aborts_after(32)]
    background = rig.submit(prompt_of(rig.llama, 150, seed=191), 2, priority=BACKGROUND)
    rig.step()
    rig.step()
    last = rig.submit(prompt_of(rig.llama, 10, seed=192), 1)
    rig.until(lambda: rig.of(last, Ended))
    rig.scheduler.cancel(background)
    totals = rig.scheduler.stats().totals
    chat, side, cancelled = totals.classes
    assert (chat.evaluated, chat.cached, chat.generated) == (40 + 1 + 10, 39, 5 + 3 + 1)
    assert sum(chat.queue_s.counts) == 3
    assert side.evaluated == sum(side.queue_s.counts) == 0
    assert (cancelled.evaluated, cancelled.cached, cancelled.generated) == (64 + 32, 0, 0)
    assert (totals.interrupted_batches, totals.preemptions, totals.held_back) == (1, 1, 0)
    sizes = [sum(len(t) for *_, t, _ in batch) for batch in rig.door.batches]
    assert sum(totals.batch_tokens.counts) == len(sizes)
    assert totals.batch_tokens.total == sum(sizes)


# -- readers that do not keep up -----------------------------------------------------------------


def test_who_does_not_read_is_left_out_and_the_others_go_on(rig: Rig, oracle: Oracle) -> None:
    slow = rig.submit(prompt_of(rig.llama, 16, seed=180), 10, unread_most=3)
    quick = rig.submit(prompt_of(rig.llama, 16, seed=181), 10)
    rig.until(lambda: rig.of(quick, Ended))
    assert len(rig.of(slow, Text)) == 3
    assert ("request_held_back", slow) in rig.events
    assert rig.running() == [slow]
    assert rig.scheduler.at_rest
    n_batches = len(rig.ran)
    rig.step()
    assert len(rig.ran) == n_batches, "there is nothing to do until it has read"
    rig.scheduler.read(slow, 1)
    rig.until(lambda: rig.scheduler.at_rest)
    assert len(rig.of(slow, Text)) == 4
    rig.scheduler.read(slow, 4)
    rig.until(lambda: rig.scheduler.at_rest)
    rig.scheduler.read(slow, 7)
    rig.finish()
    assert rig.prompt_tokens_evaluated[slow] == 16, "its cells were kept"
    for id_ in (slow, quick):
        assert oracle.agrees(rig.prompts[id_], rig.answer(id_), 10)


def test_background_runs_while_a_chat_waits_for_its_reader_and_gives_way_then(rig: Rig) -> None:
    chat = rig.submit(prompt_of(rig.llama, 10, seed=182), 6, unread_most=2)
    background = rig.submit(prompt_of(rig.llama, 150, seed=183), 2, priority=BACKGROUND)
    rig.until(lambda: rig.ran and rig.ran[-1] == [background])
    assert rig.events.index(("request_held_back", chat)) >= 0
    rig.scheduler.read(chat, 2)
    rig.step()
    assert rig.ran[-1] == [chat]
    rig.scheduler.read(chat, 100)
    rig.until(lambda: rig.of(chat, Ended))
    assert not rig.of(background, Ended)
    rig.finish()


def test_who_waits_for_a_reader_gives_its_place_up_when_there_is_no_other(
    llama: Llama, oracle: Oracle
) -> None:
    rig = Rig(llama, n_sequences=1)
    slow = rig.submit(prompt_of(llama, 16, seed=184), 6, unread_most=2)
    rig.until(lambda: rig.scheduler.at_rest)
    quick = rig.submit(prompt_of(llama, 16, seed=185), 4)
    rig.until(lambda: rig.of(quick, Ended))
    assert ("request_requeued", slow) in rig.events
    assert rig.scheduler.at_rest
    rig.scheduler.read(slow, 100)
    rig.finish()
    assert rig.text(slow) == rig.decode(rig.answer(slow))
    for id_ in (slow, quick):
        oracle.agrees(rig.prompts[id_], rig.answer(id_), rig.ended(id_).completion_tokens)


# -- leaving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("when", ["waiting", "prefill", "decode"])
def test_a_cancelled_request_is_gone_and_its_cells_are_free(
    llama: Llama, when: str, keep: bool
) -> None:
    rig = Rig(llama)
    prompt = prompt_of(llama, 100, seed=70)
    id_ = rig.submit(prompt, 8, priority=BACKGROUND, keep=keep)
    if when == "prefill":
        rig.step()
    elif when == "decode":
        rig.until(lambda: rig.of(id_, Text))
    held = len(rig.scheduler.running[0].sequence.tokens) if rig.running() else 0
    rig.scheduler.cancel(id_)
    rig.scheduler.check_integrity()
    assert rig.sent[-1] == Cancelled(id=id_)
    assert rig.scheduler.idle
    assert rig.scheduler.stats().cells_used == (held if keep else 0)
    n_sent = len(rig.sent)
    rig.step()
    assert not [f for f in rig.sent[n_sent:] if isinstance(f, Text | Began | Ended | Failed)]


def test_what_a_cancelled_conversation_evaluated_serves_its_next_request(
    rig: Rig, oracle: Oracle
) -> None:
    prompt = prompt_of(rig.llama, 100, seed=71)
    gone = rig.submit(prompt, 4, priority=BACKGROUND)
    rig.step()
    rig.scheduler.cancel(gone)
    again = rig.run(prompt)
    assert rig.prompt_tokens_evaluated[again] == len(prompt) - BACKGROUND_CHUNK
    assert oracle.agrees(prompt, rig.answer(again), 4)


def test_cancelling_a_stranger_is_answered_and_changes_nothing(rig: Rig) -> None:
    id_ = rig.submit(prompt_of(rig.llama, 10, seed=72))
    rig.step()
    rig.scheduler.cancel(999)
    assert Cancelled(id=999) in rig.sent
    assert rig.running() == [id_]
    rig.finish()
    assert rig.ended(id_).finish_reason == "length"


def test_news_that_comes_before_a_batch_puts_it_off(rig: Rig) -> None:
    rig.gate_open = False
    id_ = rig.submit(prompt_of(rig.llama, 10, seed=73))
    rig.step()
    assert rig.running() == [id_]
    assert rig.door.batches == []
    rig.gate_open = True
    rig.finish()
    assert rig.prompt_tokens_evaluated[id_] == 10


# -- little room ---------------------------------------------------------------------------------


def test_a_request_put_back_for_want_of_cells_gives_the_same_answer_later(
    llama: Llama, oracle: Oracle
) -> None:
    rig = Rig(llama, cells=72)
    old, young = (rig.submit(prompt_of(llama, 24, seed=80 + i), 20) for i in range(2))
    rig.finish()
    assert ("request_requeued", young) in rig.events
    assert ("request_requeued", old) not in rig.events
    assert rig.scheduler.stats().totals.preemptions >= 1
    for id_ in (old, young):
        oracle.agrees(rig.prompts[id_], rig.answer(id_), 20)
        assert len(rig.of(id_, Began)) == 1
        assert rig.text(id_) == rig.decode(rig.answer(id_))
        assert 0 <= rig.ended(id_).cached_tokens <= 24
    assert len(rig.of(young, Taken)) > 1


def test_a_random_answer_put_back_goes_on_as_it_would_have(llama: Llama) -> None:
    prompt = prompt_of(llama, 24, seed=82)
    alone = Rig(llama)
    undisturbed = alone.run(prompt, 20, temperature=0.9)
    rig = Rig(llama, cells=72)
    rig.submit(prompt_of(llama, 24, seed=83), 20)
    young = rig.submit(prompt, 20, temperature=0.9)
    rig.until(lambda: ("request_requeued", young) in rig.events)
    before = rig.text(young)
    rig.finish()
    assert before
    assert rig.text(young).startswith(before)
    assert alone.text(undisturbed).startswith(before)
    assert rig.ended(young).completion_tokens == 20


def test_a_prompt_larger_than_the_cells_others_leave_waits_for_them(
    llama: Llama, oracle: Oracle
) -> None:
    rig = Rig(llama, cells=100)
    idle = rig.run(prompt_of(llama, 12, seed=84), 1)
    busy = rig.submit(prompt_of(llama, 50, seed=85), 8)
    rig.step()
    large = rig.submit(prompt_of(llama, 60, seed=86), 4)
    rig.until(lambda: rig.of(busy, Ended))
    assert [e for e, i in rig.events if i == large] == ["request_queued"]
    # Waiting costs nobody anything: what lay in the cache is thrown out when it helps.
    assert rig.scheduler.stats().cells_used >= 12 + 50
    rig.finish()
    oracle.agrees(rig.prompts[large], rig.answer(large), 4)
    assert rig.ended(idle).finish_reason == "length"


def test_a_chat_takes_the_cells_of_background_work_that_has_to_begin_again(
    llama: Llama, oracle: Oracle
) -> None:
    rig = Rig(llama, cells=100)
    background = rig.submit(prompt_of(llama, 60, seed=87), 3, priority=BACKGROUND)
    rig.step()
    chat = rig.submit(prompt_of(llama, 60, seed=88), 3)
    rig.until(lambda: rig.of(chat, Ended))
    assert ("request_requeued", background) in rig.events
    rig.finish()
    for id_ in (background, chat):
        oracle.agrees(rig.prompts[id_], rig.answer(id_), 3)


def test_when_only_its_own_source_is_free_the_source_is_cut_back(
    llama: Llama, oracle: Oracle
) -> None:
    rig = Rig(llama, n_sequences=2)
    base = prompt_of(llama, 20, seed=89)
    rig.run([*base, *prompt_of(llama, 10, seed=90)])
    busy = rig.submit(prompt_of(llama, 10, seed=91), 10)
    rig.step()
    edited = [*base, *prompt_of(llama, 6, seed=92)]
    id_ = rig.submit(edited)
    rig.until(lambda: rig.of(id_, Ended))
    assert rig.prompt_tokens_evaluated[id_] == 6
    assert rig.running() == [busy]
    rig.finish()
    assert oracle.agrees(edited, rig.answer(id_), 4)


def test_with_every_sequence_busy_a_request_waits_and_then_runs(llama: Llama) -> None:
    rig = Rig(llama, n_sequences=1)
    first, second = (rig.submit(prompt_of(llama, 10, seed=93 + i), 5) for i in range(2))
    rig.until(lambda: rig.of(first, Ended))
    assert not rig.of(second, Taken)
    rig.finish()
    assert rig.ended(second).finish_reason == "length"


# -- who waits harms nobody ----------------------------------------------------------------------


class CountingSnapshots(Snapshots):
    """Snapshots that count what they do with files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, fingerprint="this build", budget_bytes=1 << 30)
        self.loads = self.saves = 0

    def load(self, snapshot: Snapshot) -> memoryview | None:
        self.loads += 1
        return super().load(snapshot)

    def save(self, owner: str, tokens: Sequence[int], state: bytes) -> bool:
        self.saves += 1
        return super().save(owner, tokens, state)


@pytest.mark.parametrize("cells", [SEQUENCES * 256, 400], ids=["no sequence", "no cells"])
def test_a_snapshot_is_read_once_and_only_when_its_chat_is_let_in(
    llama: Llama, tmp_path: Path, cells: int
) -> None:
    chat = prompt_of(llama, 150, seed=410)
    before = Rig(llama, snapshots=shelf(tmp_path))
    before.run(chat, 1)
    while before.scheduler.save_one():
        pass
    on_disk = CountingSnapshots(tmp_path)
    rig = Rig(llama, n_sequences=2, cells=cells, snapshots=on_disk)
    short, long = (rig.submit(prompt_of(llama, 120, seed=411 + i), 8 + 8 * i) for i in range(2))
    rig.until(lambda: rig.of(short, Began) and rig.of(long, Began))
    waiter = rig.submit([*chat, *prompt_of(llama, 9, seed=413)], 2)
    rig.until(lambda: rig.of(short, Ended))
    assert (on_disk.loads, rig.of(waiter, Taken)) == (0, [])
    rig.step()
    assert on_disk.loads == 1
    assert rig.running() == [long, waiter]
    rig.finish()
    assert on_disk.loads == 1
    assert rig.ended(waiter).cached_tokens == len(chat)


def test_who_finds_no_room_throws_nobody_out(llama: Llama, tmp_path: Path) -> None:
    on_disk = CountingSnapshots(tmp_path)
    rig = Rig(llama, cells=820, snapshots=on_disk)
    chats = [prompt_of(llama, 130, seed=420 + i) for i in range(3)]
    for chat in chats:
        rig.run(chat, 1)
    busy = rig.submit(prompt_of(llama, 400, seed=423), 10)
    rig.until(lambda: rig.of(busy, Began))
    # An edit: the chat that it is of lies in the first sequence, and stays there.
    waiter = rig.submit([*chats[0][:100], *prompt_of(llama, 350, seed=424)], 2)
    rig.until(lambda: rig.of(busy, Ended))
    assert not rig.of(waiter, Taken)
    for chat in chats:
        rig.scheduler.look(0, "a", chat)
        assert rig.sent[-1].in_memory == len(chat)
    assert on_disk.saves == 0
    rig.step()
    assert rig.running() == [waiter]
    rig.finish()
    assert rig.prompt_tokens_evaluated[waiter] == 350


def test_who_waits_is_not_looked_at_again_before_something_has_changed(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, looks = Rig(llama, n_sequences=2, cells=100), 0
    has_room = rig.scheduler._cache.has_room

    def counted(*args: Any, **kwargs: Any) -> bool:
        nonlocal looks
        looks += 1
        return has_room(*args, **kwargs)

    monkeypatch.setattr(rig.scheduler._cache, "has_room", counted)
    rig.submit(prompt_of(llama, 60, seed=430), 20)
    rig.step()
    waiter = rig.submit(prompt_of(llama, 60, seed=431), 2)
    rig.finish()
    assert looks == 1, "when it came; alone it is let in without a look"
    assert rig.ended(waiter).finish_reason == "length"


def test_who_waits_takes_the_place_of_one_that_is_held_back_meanwhile(llama: Llama) -> None:
    rig = Rig(llama, n_sequences=1)
    slow = rig.submit(prompt_of(llama, 16, seed=440), 8, unread_most=3)
    rig.until(lambda: rig.of(slow, Began))
    waiter = rig.submit(prompt_of(llama, 16, seed=441), 2)
    rig.until(lambda: ("request_held_back", slow) in rig.events)
    assert not rig.of(waiter, Taken)
    rig.step()
    assert rig.running() == [waiter]
    rig.scheduler.read(slow, 100)
    rig.finish()


# -- what is told of answers that stand still ----------------------------------------------------


def told(rig: Rig, id_: int) -> list[type[Any]]:
    """What was said of the request, but for its texts, which come in between."""
    kinds = [Taken, Began, Waiting, Ended]
    return [type(f) for f in rig.sent if type(f) in kinds and f.id == id_]


def test_an_answer_that_is_put_back_says_so_until_it_runs_again(llama: Llama) -> None:
    rig = Rig(llama, cells=72)
    old, young = (rig.submit(prompt_of(llama, 24, seed=450 + i), 20) for i in range(2))
    rig.finish()
    assert told(rig, old) == [Taken, Began, Ended]
    assert told(rig, young) == [Taken, Began, Waiting, Taken, Ended]


@pytest.mark.parametrize("priority", [SIDE, BACKGROUND])
def test_an_answer_that_a_better_class_stops_says_so_but_for_background(
    rig: Rig, priority: int
) -> None:
    stopped = rig.submit(prompt_of(rig.llama, 20, seed=453), 8, priority=priority)
    rig.until(lambda: rig.of(stopped, Text))
    chat = rig.submit(prompt_of(rig.llama, 20, seed=454), 4)
    rig.until(lambda: rig.of(chat, Ended))
    assert told(rig, stopped) == [Taken, Began, *([Waiting] if priority == SIDE else [])]
    rig.finish()
    assert told(rig, stopped)[-2:] == [Taken, Ended]


def test_a_prompt_that_stands_still_says_nothing(rig: Rig) -> None:
    prompt = rig.submit(prompt_of(rig.llama, 200, seed=457), 2, priority=SIDE)
    rig.step()
    rig.submit(prompt_of(rig.llama, 20, seed=458), 2)
    rig.finish()
    assert ("request_paused", prompt) in rig.events
    assert told(rig, prompt) == [Taken, Taken, Began, Ended]


def test_a_further_answer_that_is_left_alone_in_the_queue_says_so(llama: Llama) -> None:
    rig = Rig(llama, n_sequences=2)
    other = rig.submit(prompt_of(llama, 20, seed=455), 12)
    rig.until(lambda: rig.of(other, Text))
    many = rig.submit(prompt_of(llama, 20, seed=456), 4, n=2, owner="b")
    rig.finish()
    assert told(rig, many) == [Taken, Began, Waiting, Taken, Ended]


# -- when llama.cpp fails ------------------------------------------------------------------------


def test_no_slot_evicts_what_lies_idle_and_goes_on(rig: Rig, oracle: Oracle) -> None:
    rig.run(prompt_of(rig.llama, 20, seed=100), 1)
    rig.door.faults = [rig.door.no_slot]
    id_ = rig.run(prompt_of(rig.llama, 20, seed=101))
    assert rig.scheduler.stats().sequences_used == 1
    assert oracle.agrees(rig.prompts[id_], rig.answer(id_), 4)


def test_no_slot_puts_the_youngest_back(rig: Rig, oracle: Oracle) -> None:
    old, young = (rig.submit(prompt_of(rig.llama, 20, seed=102 + i)) for i in range(2))
    rig.door.faults = [rig.door.no_slot]
    rig.finish()
    assert [i for e, i in rig.events if e == "request_requeued"] == [young]
    for id_ in (old, young):
        assert oracle.agrees(rig.prompts[id_], rig.answer(id_), 4)


def test_no_slot_puts_paused_background_back_before_the_chat_that_needs_it(rig: Rig) -> None:
    background = rig.submit(prompt_of(rig.llama, 100, seed=104), 2, priority=BACKGROUND)
    rig.step()
    chat = rig.submit(prompt_of(rig.llama, 20, seed=105), 2)
    rig.door.faults = [rig.door.no_slot]
    rig.finish()
    assert [i for e, i in rig.events if e == "request_requeued"] == [background]
    assert rig.ended(chat).finish_reason == rig.ended(background).finish_reason == "length"


def test_no_slot_for_a_request_alone_fails_it_and_the_next_works(rig: Rig, oracle: Oracle) -> None:
    rig.door.faults = [rig.door.no_slot]
    lost = rig.run(prompt_of(rig.llama, 20, seed=106))
    assert [f.kind for f in rig.of(lost, Failed)] == ["engine"]
    works = rig.run(prompt_of(rig.llama, 20, seed=107))
    assert oracle.agrees(rig.prompts[works], rig.answer(works), 4)


def test_a_decode_error_fails_the_batchs_requests_and_nobody_else(rig: Rig, oracle: Oracle) -> None:
    background = rig.submit(prompt_of(rig.llama, 70, seed=108), 3, priority=BACKGROUND)
    rig.step()
    rig.door.faults = [rig.door.breaks]
    lost = [rig.submit(prompt_of(rig.llama, 20, seed=109 + i)) for i in range(2)]
    rig.step()
    for id_ in lost:
        assert [f.kind for f in rig.of(id_, Failed)] == ["engine"]
        assert "-3" in rig.of(id_, Failed)[0].message
    rig.finish()
    assert oracle.agrees(rig.prompts[background], rig.answer(background), 3)
    for id_ in lost:
        again = rig.run(rig.prompts[id_])
        assert rig.prompt_tokens_evaluated[again] == 20
        oracle.agrees(rig.prompts[again], rig.answer(again), 4)


# -- interrupted batches -------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [0, 20, 30, 49])
def test_after_an_abort_in_a_batch_of_two_both_go_on(
    llama: Llama, oracle: Oracle, n_tokens: int
) -> None:
    rig = Rig(llama)
    ids = [rig.submit(prompt_of(llama, n, seed=111 + n)) for n in (20, 30)]
    rig.door.faults = [rig.door.aborts_after(n_tokens)]
    rig.finish()
    for id_ in ids:
        assert oracle.agrees(rig.prompts[id_], rig.answer(id_), 4)


def test_an_abort_while_one_answers_and_one_begins_costs_neither_its_answer(
    rig: Rig, oracle: Oracle
) -> None:
    answering = rig.submit(prompt_of(rig.llama, 20, seed=142), 8)
    rig.until(lambda: rig.of(answering, Began))
    beginning = rig.submit(prompt_of(rig.llama, 30, seed=143))
    rig.door.faults = [rig.door.aborts_after(12)]
    rig.finish()
    assert oracle.agrees(rig.prompts[answering], rig.answer(answering), 8)
    assert oracle.agrees(rig.prompts[beginning], rig.answer(beginning), 4)


def test_a_warm_that_was_all_in_when_its_batch_was_aborted_has_ended(rig: Rig) -> None:
    warm = rig.submit(prompt_of(rig.llama, 20, seed=144), 0, priority=BACKGROUND)
    rig.submit(prompt_of(rig.llama, 30, seed=145), 0, priority=BACKGROUND)
    rig.door.faults = [rig.door.aborts_after(25)]
    rig.step()
    assert rig.ended(warm).finish_reason == "stop"
    rig.finish()
    assert rig.scheduler.stats().cells_used == 50


def test_positions_that_an_aborted_batch_cannot_have_left_are_not_believed(
    rig: Rig, oracle: Oracle
) -> None:
    prompt = prompt_of(rig.llama, 90, seed=147)
    id_ = rig.submit(prompt, 4, priority=BACKGROUND)
    rig.step()

    def loses_too_much(entries: Any) -> int:
        rig.llama.remove(entries[0][0], 10)
        return ABORTED

    rig.door.faults = [loses_too_much]
    rig.step()
    assert ("request_requeued", id_) in rig.events
    rig.finish()
    assert rig.prompt_tokens_evaluated[id_] == BACKGROUND_CHUNK + 26 + 90
    assert oracle.agrees(prompt, rig.answer(id_), 4)


def test_what_llama_cpp_keeps_of_an_aborted_batch_is_as_good_as_evaluated(
    llama: Llama, oracle: Oracle
) -> None:
    prompt = prompt_of(llama, SHARED_CHUNK, seed=146)
    rig = Rig(llama)
    started = time.monotonic()
    rig.run(prompt[:64], 0)
    wait_s = time.monotonic() - started
    for _ in range(40):
        rig = Rig(llama)
        id_ = rig.submit(prompt, 6)
        timer = threading.Timer(wait_s, llama.abort.set)
        timer.start()
        rig.step()
        timer.join()
        llama.abort.clear()
        held = len(prompt) - rig.scheduler.running[0].missing
        if 0 < held < len(prompt) - 1:
            break
        wait_s *= 0.7 if held else 1.3
    assert held % 32 == 0, "whole micro-batches stay"
    assert 0 < held < len(prompt) - 1
    rig.finish()
    assert rig.prompt_tokens_evaluated[id_] == 2 * len(prompt) - held
    assert oracle.agrees(prompt, rig.answer(id_), 6)


# -- how answers end -----------------------------------------------------------------------------


def test_the_end_of_turn_token_ends_the_answer_and_is_no_part_of_it(rig: Rig) -> None:
    eos = rig.llama.eos
    id_ = rig.run(prompt_of(rig.llama, 12, seed=150), 5, logit_bias=((eos, 100.0),))
    end = rig.ended(id_)
    assert (end.finish_reason, end.completion_tokens, end.token_ids) == ("stop", 0, b"")
    assert rig.text(id_) == ""


def test_an_answer_ends_where_the_window_ends(llama: Llama) -> None:
    rig = Rig(llama, window_tokens=40)
    for asked in (None, 4096):
        id_ = rig.run(prompt_of(llama, 35, seed=151), asked)
        assert rig.ended(id_).finish_reason == "length"
        assert rig.ended(id_).completion_tokens == 5
    assert max(at + len(t) for batch in rig.door.batches for _, at, t, _ in batch) < 40


def test_a_stop_string_ends_the_answer_wherever_its_tokens_are_cut(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 30, seed=152)
    whole = rig.text(rig.run(prompt, 12))
    outcomes = set()
    for at in range(1, len(whole) - 3, 2):
        stop = whole[at : at + 3]
        id_ = rig.run(prompt, 12, stop=("never in it", stop))
        end = rig.ended(id_)
        assert rig.text(id_) == whole[: whole.index(stop)]
        assert end.finish_reason == "stop"
        if end.token_ids is not None:
            assert rig.decode(from_bytes(end.token_ids)) == rig.text(id_)
        outcomes.add(end.token_ids is None)
    assert outcomes == {True, False}, "some ends fall between two tokens, some inside one"


def test_half_a_stop_string_at_the_end_is_given_out(rig: Rig) -> None:
    prompt = prompt_of(rig.llama, 30, seed=153)
    whole = rig.text(rig.run(prompt, 6))
    id_ = rig.run(prompt, 6, stop=(whole[-3:] + "\0",))
    assert rig.text(id_) == whole
    assert rig.ended(id_).finish_reason == "length"
    assert rig.decode(rig.answer(id_)) == whole


def test_an_answer_cut_inside_a_character_owns_the_tokens_of_whole_ones_only(rig: Rig) -> None:
    first_of_emoji = rig.llama.tokenize("🗼", markup=False)[0]
    with pytest.raises(UnicodeDecodeError):
        rig.decode([first_of_emoji])
    id_ = rig.run(prompt_of(rig.llama, 12, seed=154), 1, logit_bias=((first_of_emoji, 100.0),))
    assert rig.text(id_) == ""
    assert rig.ended(id_).token_ids == b""
    assert rig.ended(id_).completion_tokens == 1


# -- all of it at random -------------------------------------------------------------------------

ROUNDS = 5
REQUESTS_A_ROUND = 8


@dataclass
class Storm:
    """Chats that grow, fork, warm, are cancelled and interrupted, in too small a cache."""

    rig: Rig
    rng: random.Random
    known: list[list[int]]
    chats: list[int] = field(default_factory=list)

    def prompt(self) -> list[int]:
        """The beginning of something seen before and something new behind it."""
        base = self.rng.choice(self.known)
        cut = self.rng.choice([len(base), self.rng.randint(1, len(base))])
        new = prompt_of(self.rig.llama, self.rng.randint(1, 8), seed=self.rng.randint(200, 999))
        return [*base[: min(cut, 44)], *new]

    def act(self) -> None:
        prompt, priority = self.prompt(), self.rng.choice([CHAT, CHAT, SIDE, BACKGROUND])
        max_tokens = self.rng.choice([0, 2, 4, 6])
        id_ = self.rig.submit(
            prompt, max_tokens, priority=priority, keep=self.rng.random() < 0.7, owner="a"
        )
        if max_tokens:
            self.chats.append(id_)
        self.known.append(prompt)
        for _ in range(self.rng.randint(0, 2)):
            self.disturb()
            self.rig.step()
        if self.rng.random() < 0.15:
            self.rig.scheduler.cancel(self.rng.choice(self.rig.running() or [id_]))

    def disturb(self) -> None:
        if self.rng.random() < 0.2:
            self.rig.door.faults = [self.rig.door.aborts_after(self.rng.randint(0, 20))]

    def answered(self) -> Iterator[int]:
        yield from (i for i in self.chats if self.rig.of(i, Ended))


def test_whatever_happens_around_it_an_answer_is_the_cold_runs(
    llama: Llama, oracle: Oracle
) -> None:
    rng, exact, happened = random.Random(20), [], Counter[str]()
    for n_round in range(ROUNDS):
        rig = Rig(llama, cells=72, window_tokens=64)
        storm = Storm(rig, rng, [prompt_of(llama, 36, seed=160 + n_round)])
        for _ in range(REQUESTS_A_ROUND):
            storm.act()
        rig.finish()
        for id_ in storm.answered():
            asked = rig.ended(id_).completion_tokens
            got = rig.answer(id_)
            exact.append(oracle.agrees(rig.prompts[id_], got, len(got)))
            assert len(got) == asked
            assert len(rig.of(id_, Began)) == 1
        happened.update(event for event, _ in rig.events)
        assert not any(isinstance(frame, Failed) for frame in rig.sent)
    for event in ("request_requeued", "request_paused", "request_cancelled"):
        assert happened[event], f"the storm was too mild: {event} never happened"
    assert len(exact) >= 20
    assert sum(exact) >= 0.8 * len(exact), "near ties are rare"


def test_the_representation_shows_who_runs_and_what_is_held(rig: Rig) -> None:
    rig.submit(prompt_of(rig.llama, 10, seed=170))
    rig.step()
    assert "running=1 waiting=0" in repr(rig.scheduler)
    assert len(CLASSES) == len(rig.scheduler.stats().running)
    rig.finish()


# -- snapshots -----------------------------------------------------------------------------------


def shelf(folder: Path, *, fingerprint: str = "this build") -> Snapshots:
    return Snapshots(folder, fingerprint=fingerprint, budget_bytes=1 << 30)


def test_an_evicted_chat_comes_back_from_disk_and_goes_on_as_if_it_had_stayed(
    llama: Llama, oracle: Oracle, tmp_path: Path
) -> None:
    rig = Rig(llama, cells=512, snapshots=shelf(tmp_path))
    chat = prompt_of(llama, 200, seed=80)
    rig.run(chat, 4)
    rig.run(prompt_of(llama, 400, seed=81), 2)
    turn = [*chat, *prompt_of(llama, 9, seed=82)]
    id_ = rig.run(turn, 6)
    assert rig.prompt_tokens_evaluated[id_] == 9
    assert rig.ended(id_).cached_tokens == 200
    assert oracle.agrees(turn, rig.answer(id_), 6)


def test_after_a_restart_the_next_turn_evaluates_its_new_tokens_only(
    llama: Llama, oracle: Oracle, tmp_path: Path
) -> None:
    before = Rig(llama, snapshots=shelf(tmp_path))
    chat = prompt_of(llama, 180, seed=83)
    chat += before.answer(before.run(chat, 5))
    while before.scheduler.save_one():
        pass
    after = Rig(llama, snapshots=shelf(tmp_path))
    turn = [*chat, *prompt_of(llama, 7, seed=84)]
    id_ = after.run(turn, 6)
    # The last token of an answer that ended by its length was never evaluated.
    assert after.prompt_tokens_evaluated[id_] == 7 + 1
    assert after.scheduler.restored_tokens == len(chat) - 1
    assert after.scheduler.stats().totals.classes[CHAT].restored == len(chat) - 1
    # The cold run evaluates the answer's tokens in one batch, not one by one: a near tie may fall
    # the other way, and anything more fails in there.
    oracle.agrees(turn, after.answer(id_), 6)


def test_a_regenerated_answer_is_restored_up_to_where_it_parts(
    llama: Llama, oracle: Oracle, tmp_path: Path
) -> None:
    before = Rig(llama, snapshots=shelf(tmp_path))
    chat = prompt_of(llama, 180, seed=85)
    before.run(chat, 5)
    while before.scheduler.save_one():
        pass
    after = Rig(llama, snapshots=shelf(tmp_path))
    id_ = after.run(chat, 5)
    assert after.prompt_tokens_evaluated[id_] == 1
    assert oracle.agrees(chat, after.answer(id_), 5)


def test_what_is_on_disk_already_is_not_written_again(llama: Llama, tmp_path: Path) -> None:
    rig = Rig(llama, snapshots=shelf(tmp_path))
    rig.run(prompt_of(llama, 150, seed=86), 2)
    assert rig.scheduler.save_one()
    assert not rig.scheduler.save_one()


def test_no_owner_gets_anothers_snapshot_and_forgetting_removes_it(
    llama: Llama, tmp_path: Path
) -> None:
    rig = Rig(llama, snapshots=shelf(tmp_path))
    prompt = prompt_of(llama, 150, seed=87)
    rig.run(prompt, 2, owner="a")
    while rig.scheduler.save_one():
        pass
    other = Rig(llama, snapshots=shelf(tmp_path))
    id_ = other.run(prompt, 2, owner="b")
    assert other.prompt_tokens_evaluated[id_] == len(prompt)
    other.scheduler.forget("a")
    again = other.run(prompt, 2, owner="a")
    assert other.prompt_tokens_evaluated[again] == len(prompt)
    assert not shelf(tmp_path).match("a", prompt)[0]


def leaves_nothing(rig: Rig, folder: Path) -> bool:
    """Whether what runs and waits ends, and nothing of it is in memory or on disk then."""
    rig.finish()
    return not (rig.scheduler.save_one() or rig.scheduler.stats().cells_used or shelf(folder))


@pytest.mark.parametrize("moment", ["waiting", "evaluating", "answering"])
@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"max_tokens": 0, "priority": BACKGROUND}])
def test_a_request_whose_owner_is_forgotten_goes_on_and_leaves_nothing(
    llama: Llama, tmp_path: Path, moment: str, fields: dict[str, Any]
) -> None:
    rig = Rig(llama, snapshots=shelf(tmp_path))
    prompt = prompt_of(llama, 150, seed=90)
    id_ = rig.submit(prompt, **({"max_tokens": 6} | fields))
    for _ in range({"waiting": 0, "evaluating": 1, "answering": 3}[moment]):
        rig.step()
    rig.scheduler.forget("a")
    assert leaves_nothing(rig, tmp_path)
    again = rig.run(prompt, 6)
    assert rig.prompt_tokens_evaluated[again] == len(prompt)
    if "priority" not in fields:
        assert rig.answer(id_) == rig.answer(again)


def test_a_forgotten_request_that_has_to_wait_again_leaves_nothing(
    llama: Llama, tmp_path: Path
) -> None:
    rig = Rig(llama, cells=72, snapshots=shelf(tmp_path))
    prompts = [prompt_of(llama, 24, seed=91 + i) for i in range(2)]
    old, young = (rig.submit(prompt, 20) for prompt in prompts)
    rig.step()
    rig.scheduler.forget("a")
    rig.until(lambda: ("request_requeued", young) in rig.events)
    assert leaves_nothing(rig, tmp_path)
    assert {rig.ended(i).finish_reason for i in (old, young)} == {"length"}


def test_a_forgotten_request_that_finds_no_room_leaves_nothing(llama: Llama) -> None:
    rig = Rig(llama, cells=100)
    prompt = prompt_of(llama, 60, seed=93)
    rig.submit(prompt, 4)
    rig.step()
    rig.submit([*prompt[:40], *prompt_of(llama, 50, seed=94)], 2)
    rig.scheduler.forget("a")
    rig.finish()
    assert rig.scheduler.stats().cells_used == 0


def test_what_a_forgotten_owners_request_was_lent_goes_with_it(llama: Llama) -> None:
    rig = Rig(llama, n_sequences=1)
    prompt = prompt_of(llama, 30, seed=95)
    rig.run(prompt, 3)
    side = rig.submit([*prompt[:20], *prompt_of(llama, 9, seed=96)], 3, priority=SIDE, keep=False)
    rig.until(lambda: rig.of(side, Began))
    rig.scheduler.forget("a")
    rig.finish()
    assert rig.scheduler.stats().cells_used == 0


def test_what_an_owner_asks_after_being_forgotten_stays_and_so_does_what_others_asked(
    llama: Llama, tmp_path: Path
) -> None:
    rig = Rig(llama, snapshots=shelf(tmp_path))
    chats = {owner: prompt_of(llama, 140, seed=97 + i) for i, owner in enumerate("abc")}
    for owner in "ab":
        rig.submit(chats[owner], 4, owner=owner)
    rig.step()
    rig.scheduler.forget("a")
    rig.submit(chats["c"], 4, owner="a")
    rig.finish()
    while rig.scheduler.save_one():
        pass
    kept = [
        (owner, chat)
        for owner in "ab"
        for chat in "abc"
        if shelf(tmp_path).holds(owner, chats[chat])
    ]
    assert kept == [("a", "c"), ("b", "b")]


def test_a_state_that_llama_cpp_refuses_is_thrown_away_and_the_prompt_evaluated(
    llama: Llama, oracle: Oracle, tmp_path: Path
) -> None:
    prompt = prompt_of(llama, 150, seed=88)
    shelf(tmp_path).save("a", prompt, b"not a state of this or any other model")
    rig = Rig(llama, snapshots=shelf(tmp_path))
    id_ = rig.run(prompt, 4)
    assert rig.prompt_tokens_evaluated[id_] == len(prompt)
    assert oracle.agrees(prompt, rig.answer(id_), 4)
    assert len(shelf(tmp_path)) == 0
