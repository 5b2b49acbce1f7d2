"""Warm equals cold: whatever happened to the cache before, an answer is what the model gives alone.

Scripts of random operations run on the real scheduler and the real llama.cpp, in one process. Each
greedy answer is compared, token for token, to that of a second context that evaluates the prompt
in an empty cache. Where a token differs, the logits that it was chosen from are held side by side:
sums of floating-point numbers depend on how tokens were batched and where their cells lie, so they
may differ by up to a tolerance, and only between candidates that the cold run has that near to each
other (a near tie). Anything else is a real difference.

Used by `test_warm_cold.py` (few cases) and `bench/engine_warm.py` (300).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from proxy.engines.embedded import llama as door
from proxy.engines.embedded import scheduler as scheduling
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.protocol import Began, Ended, Failed, Load
from proxy.engines.embedded.request import BACKGROUND, CHAT, SIDE, Request
from proxy.engines.embedded.scheduler import Scheduler
from proxy.engines.embedded.snapshots import Snapshots
from tests.engine import model_files
from tests.engine.submits import greedy

MOST_STEPS = 2000

WORDS = """the tower stands near a river and old trains cross it every morning when people walk to
work with coffee while children feed birds under red maple trees in Kyoto or Osaka where small shops
sell paper lamps tea and blue bowls made by hand for guests from far away"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A model and what its scripts look like; lengths are tokens."""

    model: str
    tolerance: float
    """Largest difference of a logit that is put down to floating-point order: about twice the
    largest seen in 300 cases."""
    beginning: int
    """What all chats of a script begin with."""
    turn: int
    answer: int
    cells: int
    """Too few for everything that a script does: what is used least must leave."""
    window: int
    operations: int
    n_batch: int = 48
    n_ubatch: int = 16
    sequences: int = 4


KINDS = {
    "smollm2": Kind("smollm2", 2.0, 24, 8, 5, cells=150, window=110, operations=5),
    # Longer than its window of 512. With its cells in another order and all else equal its logits
    # moved by up to 3.1, in a full-size cache and in a small one alike: what a window lacks shows
    # in the tiny one below, whose logits move by 0.002.
    "gemma": Kind(
        "gemma", 4.0, 540, 12, 4, cells=1900, window=700, operations=4,
        n_batch=240, n_ubatch=60, sequences=3,
    ),
    "tiny_gemma": Kind("tiny_gemma", 0.01, 60, 12, 8, cells=500, window=300, operations=12),
    "mamba": Kind("mamba", 0.01, 40, 12, 8, cells=500, window=300, operations=12),
    "jamba": Kind("jamba", 0.01, 40, 12, 8, cells=500, window=300, operations=12),
}  # fmt: skip


@dataclass(slots=True)
class Outcome:
    """Of many answers: `differing` says of each real difference where it was."""

    cases: int = 0
    equal: int = 0
    near_ties: int = 0
    worst_logit: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    checkpoint_hits: int = 0
    restored_tokens: int = 0
    differing: list[str] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)

    @property
    def answers(self) -> int:
        return self.equal + self.near_ties + len(self.differing)


class Cold:
    """The model alone. An answer that was asked for before is remembered."""

    def __init__(self, kind: Kind, path: str, *, threads: int) -> None:
        # A full-size cache: the oracle has nothing that could be overwritten.
        self._llama = load(kind, path, threads=threads, sequences=1, swa_full=True)
        self._known: dict[tuple[tuple[int, ...], int], list[tuple[int, Any]]] = {}

    def answer(self, prompt: Sequence[int], n: int) -> list[tuple[int, Any]]:
        """(greedy token, the logits it was chosen from), up to the end of the turn."""
        key = (tuple(prompt), n)
        if key not in self._known:
            self._known[key] = list(self._evaluate(prompt, n))
        return self._known[key]

    def forget(self) -> None:
        self._known.clear()

    def _evaluate(self, prompt: Sequence[int], n: int) -> Iterator[tuple[int, Any]]:
        llama, at, new = self._llama, 0, list(prompt)
        llama.abort.clear()
        llama.remove(0, 0)
        for _ in range(n):
            while len(new) > llama.n_batch:
                assert llama.decode([(0, at, new[: llama.n_batch], False)]) == 0
                at, new = at + llama.n_batch, new[llama.n_batch :]
            assert llama.decode([(0, at, new, True)]) == 0
            row = logits(llama, len(new) - 1)
            token = int(row.argmax())
            yield token, row
            if llama.is_end(token):
                return
            at, new = at + len(new), [token]


class Door:
    """A Llama with fewer cells, that keeps the logits it sampled from and can break a batch off."""

    def __init__(self, llama: Llama, kind: Kind) -> None:
        self._llama = llama
        self.cells, self.window_tokens = kind.cells, kind.window
        self.rows: dict[int, Any] = {}
        """Logits by the sequence they belong to, of the last batch."""
        self.nodes_left: int | None = None
        """Nodes of the graph that the next batch may evaluate before it is aborted."""
        self._abort = door.C.ggml_abort_callback(self._counted)
        self.aborted = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    def decode(self, entries: Any) -> int:
        broken_off = self.nodes_left is not None
        if broken_off and self._llama.rolls_back:
            self._listen(self._abort)
        elif broken_off:
            self._llama.abort.set()  # Heard by nobody, or the state would be spoilt.
        status = int(self._llama.decode(entries))
        if broken_off:
            self._listen(self._llama.abort.callback)
            self._llama.abort.clear()
        self.nodes_left = None
        self.aborted += status == door.ABORTED
        self.rows.clear()
        index = -1
        for sequence, _, tokens, wants_logits in entries if status == 0 else ():
            index += len(tokens)
            if wants_logits:
                self.rows[sequence] = logits(self._llama, index)
        return status

    def _listen(self, callback: Any) -> None:
        if self._llama.rolls_back:
            address = self._llama.abort.address
            door.C.llama_set_abort_callback(self._llama._context, callback, address)

    def _counted(self, address: Any) -> bool:
        assert self.nodes_left is not None
        self.nodes_left -= 1
        return self.nodes_left < 0


@dataclass
class Warm:
    """One scheduler over a cache that may hold anything before; after each step it is checked."""

    llama: Llama
    kind: Kind
    folder: Path | None = None
    prompts: dict[int, list[int]] = field(default_factory=dict)
    rows: dict[int, list[Any]] = field(default_factory=dict)
    ended: dict[int, Ended] = field(default_factory=dict)
    failed: list[Failed] = field(default_factory=list)
    evaluated: Counter[int] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)
    checkpoint_hits: int = 0
    restored_tokens: int = 0

    def __post_init__(self) -> None:
        self._ids, self._clock = count(1), count(1)
        self._places: dict[int, int] = {}
        self.door = Door(self.llama, self.kind)
        self.restart()

    def restart(self) -> None:
        """As if the process had ended and another one begun: the folder is all that is left."""
        if hasattr(self, "scheduler"):
            self.tally()
        for sequence in range(self.kind.sequences):
            self.llama.remove(sequence, 0)
        self.llama.abort.clear()
        snapshots = None
        if self.folder:
            snapshots = Snapshots(self.folder, fingerprint="this", budget_bytes=1 << 30)
        self.scheduler = Scheduler(
            self.door,  # type: ignore[arg-type]
            n_sequences=self.kind.sequences,
            emit=self._heard,
            trace=self,
            gate=lambda priority, requests: True,
            snapshots=snapshots,
            clock=lambda: float(next(self._clock)),
        )

    def tally(self) -> None:
        stats = self.scheduler.stats()
        self.checkpoint_hits += stats.checkpoint_hits
        self.restored_tokens += self.scheduler.restored_tokens

    def request(self, event: str, request: Request) -> None:
        self.happened[event] += 1

    def batch(self, requests: Sequence[Request], *, n_tokens: int) -> None:
        self._places = {r.id: r.sequence.id for r in requests if r.sequence}

    def _heard(self, frame: Any) -> None:
        if isinstance(frame, Ended):
            self.ended[frame.id] = frame
        if isinstance(frame, Failed):
            self.failed.append(frame)
        if isinstance(frame, Began):
            self.evaluated[frame.id] = frame.prompt_tokens - frame.cached_tokens

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        priority: int = CHAT,
        owner: str = "a",
        keep: bool = True,
    ) -> int:
        fields = dict(priority=priority, owner=owner, keep=keep)
        submit = greedy(next(self._ids), max_tokens, **fields)
        self.prompts[submit.id] = list(prompt)
        arrived = float(next(self._clock))
        self.scheduler.add(Request(submit=submit, tokens=list(prompt), arrived_at=arrived))
        return submit.id

    def step(self) -> None:
        self._places.clear()
        self.door.rows.clear()
        self.scheduler.step()
        for id_, place in self._places.items():
            if place in self.door.rows:
                self.rows.setdefault(id_, []).append(self.door.rows[place])
        self.scheduler.check_integrity()

    def until(self, done: Callable[[], object]) -> None:
        for _ in range(MOST_STEPS):
            if done():
                return
            self.step()
        raise AssertionError(f"still waiting: {self.scheduler!r}")

    def finish(self) -> None:
        self.until(lambda: self.scheduler.idle)

    def run(self, prompt: Sequence[int], max_tokens: int, **kwargs: Any) -> int:
        """One request from beginning to end."""
        id_ = self.submit(prompt, max_tokens, **kwargs)
        self.finish()
        return id_

    def answer(self, id_: int) -> list[int]:
        """All that was generated, to the token: text ends where a character does."""
        rows = self.rows.get(id_, [])
        return [int(row.argmax()) for row in rows[: self.ended[id_].completion_tokens]]

    def rest(self) -> None:
        """The quiet moment in which snapshots are written."""
        while self.scheduler.save_one():
            pass


class Script:
    """A random course of things that happen to a cache, and the chats in it."""

    def __init__(self, warm: Warm, rng: random.Random) -> None:
        self.warm, self.rng, self.kind = warm, rng, warm.kind
        self.beginning = self.text(self.kind.beginning)
        self.chats: list[tuple[str, list[int], list[int]]] = []
        """(owner, the last prompt, all up to the end of its answer)"""
        self.asked: list[int] = []

    def run(self) -> None:
        self.new_chat()
        for _ in range(self.kind.operations):
            operation = self.rng.choice(self.OPERATIONS)
            self.warm.happened[operation.__name__] += 1
            operation(self)
        self.warm.finish()
        self.warm.tally()

    def text(self, n: int) -> list[int]:
        """Likely words for a model that knows any: what it makes of noise is noisy itself."""
        llama, words = self.warm.llama, WORDS.split()
        if llama.n_vocab < 1000:
            return [self.rng.randrange(32, 127) for _ in range(n)]
        text = " ".join(self.rng.choice(words) for _ in range(n))
        return llama.tokenize(" " + text, markup=False)[:n]

    def turn(self) -> list[int]:
        return self.text(self.rng.randint(1, self.kind.turn))

    def ask(self, owner: str, prompt: list[int], *, chat: int | None = None) -> None:
        """A chat request to its end, unless something breaks in on the way."""
        prompt = self.fitting(prompt)
        id_ = self.warm.submit(prompt, self.rng.randint(1, self.kind.answer), owner=owner)
        self.asked.append(id_)
        self.disturb()
        self.warm.until(lambda: id_ in self.warm.ended or self.warm.failed)
        whole = [*prompt, *self.warm.answer(id_)]
        if chat is None:
            self.chats.append((owner, prompt, whole))
        else:
            self.chats[chat] = (owner, prompt, whole)

    def fitting(self, prompt: list[int]) -> list[int]:
        """One that the window holds with its answer."""
        return prompt[: self.kind.window - self.kind.answer - 1]

    def disturb(self) -> None:
        """A few batches; perhaps one of them is broken off somewhere in the middle."""
        for _ in range(self.rng.randint(0, 2)):
            if self.rng.random() < 0.5:
                self.warm.door.nodes_left = self.rng.randint(0, 400)
            self.warm.step()
        self.warm.door.nodes_left = None

    def pick(self) -> tuple[int, str, list[int], list[int]]:
        chat = self.rng.randrange(len(self.chats))
        return (chat, *self.chats[chat])

    # -- what can happen -------------------------------------------------------------------------

    def new_chat(self) -> None:
        """Shares the beginning with the owner's others; another owner's shares nothing."""
        self.ask(self.rng.choice("aab"), [*self.beginning, *self.turn()])

    def next_turn(self) -> None:
        chat, owner, _, whole = self.pick()
        self.ask(owner, [*whole, *self.turn()], chat=chat)

    def regenerate(self) -> None:
        chat, owner, prompt, _ = self.pick()
        self.ask(owner, prompt, chat=chat)

    def edit_last(self) -> None:
        chat, owner, prompt, _ = self.pick()
        cut = self.rng.randint(max(1, len(prompt) - self.kind.turn), len(prompt))
        self.ask(owner, [*prompt[:cut], *self.turn()], chat=chat)

    def edit_far_back(self) -> None:
        _, owner, _, whole = self.pick()
        self.ask(owner, [*whole[: self.rng.randint(1, len(whole))], *self.turn()])

    def warm_up(self) -> None:
        """What the keeper does after an answer; a chat request may come while it runs."""
        _, owner, _, whole = self.pick()
        prompt = self.fitting([*whole, *self.text(2)])
        self.warm.submit(prompt, 0, priority=BACKGROUND, owner=owner)
        self.disturb()
        if self.rng.random() < 0.5:
            self.next_turn()

    def summarise(self) -> None:
        """Background work on a chat's own context, which leaves nothing behind."""
        _, owner, _, whole = self.pick()
        prompt = self.fitting([*whole, *self.turn()])
        n = self.rng.randint(1, self.kind.answer)
        id_ = self.warm.submit(prompt, n, priority=BACKGROUND, owner=owner, keep=False)
        self.asked.append(id_)
        self.disturb()
        if self.rng.random() < 0.5:
            self.regenerate()

    def title(self) -> None:
        _, owner, prompt, _ = self.pick()
        asked = self.fitting([*self.text(3), *prompt])
        self.asked.append(self.warm.submit(asked, 2, priority=SIDE, owner=owner, keep=False))

    def several_at_once(self) -> None:
        for _ in range(self.rng.randint(2, 3)):
            _, owner, _, whole = self.pick()
            prompt = self.fitting([*whole, *self.turn()])
            self.asked.append(self.warm.submit(prompt, self.kind.answer, owner=owner))
        self.disturb()
        self.warm.finish()

    def cancel_in_mid_prefill(self) -> None:
        _, owner, _, whole = self.pick()
        id_ = self.warm.submit(self.fitting([*whole, *self.text(self.kind.turn)]), 4, owner=owner)
        self.disturb()
        self.warm.scheduler.cancel(id_)

    def evict(self) -> None:
        """Something long and new: who was not used for longest must leave."""
        n = min(self.kind.beginning, self.kind.window - self.kind.answer - 1)
        self.ask("b", self.text(n))

    def snapshot_and_restart(self) -> None:
        self.warm.finish()
        self.warm.rest()
        self.warm.restart()

    OPERATIONS = (
        new_chat, next_turn, next_turn, regenerate, edit_last, edit_far_back, warm_up, summarise,
        title, several_at_once, cancel_in_mid_prefill, evict, snapshot_and_restart,
    )  # fmt: skip


class Comparison:
    """Runs cases of one kind of model, and keeps count."""

    def __init__(self, name: str, *, threads: int = 1) -> None:
        self.name, self.kind = name, KINDS[name]
        path = model_files.ALL[self.kind.model]()
        self._llama = load(self.kind, path, threads=threads, sequences=self.kind.sequences)
        self._cold = Cold(self.kind, path, threads=threads)
        self.outcome = Outcome()

    def case(self, seed: int, folder: Path) -> None:
        """One script from an empty cache, and all its answers compared."""
        with everything_counts():
            warm = Warm(self._llama, self.kind, folder)
            script = Script(warm, random.Random(seed))
            script.run()
        o = self.outcome
        o.cases += 1
        o.happened.update(warm.happened)
        o.happened["batches_broken_off"] += warm.door.aborted
        o.checkpoint_hits += warm.checkpoint_hits
        o.restored_tokens += warm.restored_tokens
        o.differing += [f"seed {seed}: {f.message}" for f in warm.failed]
        for end in warm.ended.values():
            o.prompt_tokens += end.prompt_tokens
            o.cached_tokens += end.cached_tokens
        for id_ in script.asked:
            if id_ in warm.ended:
                self._compare(warm, id_, f"{self.name}, seed {seed}, request {id_}")
        self._cold.forget()

    def _compare(self, warm: Warm, id_: int, where: str) -> None:
        o, rows, got = self.outcome, warm.rows.get(id_, []), warm.answer(id_)
        end = warm.ended[id_]
        told = door.from_bytes(end.token_ids or b"")
        if len(rows) < max(1, end.completion_tokens) or told != got[: len(told)]:
            o.differing.append(f"{where}: {len(rows)} rows of logits, {end.completion_tokens} told")
            return
        got = [int(row.argmax()) for row in rows]
        cold = self._cold.answer(warm.prompts[id_], max(1, end.completion_tokens))
        for at, ((token, row), mine) in enumerate(zip(cold, rows, strict=False)):
            difference = float(np.abs(row - mine).max())
            o.worst_logit = max(o.worst_logit, difference)
            if difference > self.kind.tolerance:
                o.differing.append(f"{where}, token {at}: logits differ by {difference:.3g}")
                return
            if token != got[at]:
                # Both runs have the two candidates within the tolerance, or it would not differ.
                assert row[token] - row[got[at]] <= 2 * self.kind.tolerance
                o.near_ties += 1
                return
        o.equal += 1


def load(kind: Kind, path: str, *, threads: int, **changes: Any) -> Llama:
    settings: dict[str, Any] = dict(n_ctx=kind.window, cache_tokens=kind.cells)
    settings |= dict(n_batch=kind.n_batch, n_ubatch=kind.n_ubatch, threads=threads) | changes
    return Llama(Load(path=path, **settings))


def logits(llama: Llama, index: int) -> Any:
    pointer = door.C.llama_get_logits_ith(llama._context, index)
    return np.ctypeslib.as_array(pointer, (llama.n_vocab,)).copy()


@contextmanager
def everything_counts() -> Iterator[None]:
    """Short sequences, too, are written to disk and get checkpoints where they part."""
    names = ("SNAPSHOT_TOKENS_LEAST", "BRANCH_TOKENS_LEAST")
    before = {name: getattr(scheduling, name) for name in names}
    try:
        for name in names:
            setattr(scheduling, name, 8)
        yield
    finally:
        for name, value in before.items():
            setattr(scheduling, name, value)
