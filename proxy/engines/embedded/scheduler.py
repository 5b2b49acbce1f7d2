"""Who runs next: one batch at a time out of all requests, best class first.

A request waits until the classes above it have nothing to do, then takes a sequence, evaluates
what of its prompt is not in the cache, and generates. Requests of one class run together:
each batch holds the next token of every answer and a chunk of the prompts still to evaluate.
A request of a better class stops the others between two batches (and inside one, through the
abort flag); they keep what they have and go on when it is done. A request whose reader does not
keep up is held back: it keeps its cells, unless they run short, and no one waits for it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from proxy.engines.embedded.batches import admission_order, room_for_prompts, shares
from proxy.engines.embedded.llama import (
    ABORTED,
    NO_SLOT,
    DecodeError,
    Llama,
    to_bytes,
)
from proxy.engines.embedded.protocol import (
    Began,
    Cancelled,
    Ended,
    Failed,
    Forgotten,
    Held,
    Reading,
    Reply,
    Stats,
    Taken,
    Text,
    TokenLogprob,
    Waiting,
)
from proxy.engines.embedded.request import BACKGROUND, Request, by_class
from proxy.engines.embedded.sampling import SEEDS, CannotGoOn, Sampler, logprob
from proxy.engines.embedded.sequences import Sequence as KVSequence
from proxy.engines.embedded.sequences import SequenceCache
from proxy.engines.embedded.snapshots import Snapshot, Snapshots
from proxy.engines.embedded.tally import Tally, Trace
from proxy.engines.embedded.text import ends_of

SNAPSHOT_TOKENS_LEAST = 128
"""Shorter sequences are evaluated again sooner than they are read."""

CHECKPOINT_BYTES = 512 << 20
"""Memory for places to go back to, of models that need them: 60 prompts of Gemma 3 270M."""

BRANCH_TOKENS_LEAST = 32
"""Where prompts part this far behind what could be reused, the next one will find a checkpoint."""


PROGRESS_S = 0.5
"""From one word on a prompt's progress to the next."""


class Gate(Protocol):
    """Asked right before a batch is evaluated; false when something arrived that comes first."""

    def __call__(self, priority: int, requests: Sequence[int]) -> bool: ...


class Scheduler:
    """Owned by the engine thread; every method is called there."""

    def __init__(
        self,
        llama: Llama,
        *,
        n_sequences: int,
        emit: Callable[[Reply], None],
        trace: Trace,
        gate: Gate,
        snapshots: Snapshots | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._llama = llama
        self._cache = SequenceCache(
            llama,
            n_sequences=n_sequences,
            n_cells=llama.cells,
            leaving=self._save,
            checkpoint_bytes=CHECKPOINT_BYTES,
        )
        self._snapshots = snapshots
        self._n_sequences = n_sequences
        self._emit = emit
        self._trace = self._tally = Tally(trace, restored=lambda: self.restored_tokens)
        self._gate = gate
        self._clock = clock
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.restored_tokens = 0
        self._reported: object = None

    def __repr__(self) -> str:
        return (
            f"<Scheduler running={len(self.running)} waiting={len(self.waiting)} {self._cache!r}>"
        )

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting)

    @property
    def at_rest(self) -> bool:
        """Whether there is nothing to do until something arrives."""
        return self.active_class() is None

    # -- in and out ------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a request whose prompt is known to fit the window."""
        submit = request.submit
        request.n_prompt = len(request.tokens)
        room = self._llama.window_tokens - request.n_prompt
        request.max_new = room if submit.max_tokens is None else min(room, submit.max_tokens)
        self.waiting.append(request)
        self._trace.request("request_queued", request)

    def cancel(self, request_id: int) -> None:
        for request in [*self.waiting, *self.running]:
            if request.id == request_id:
                self._leave(request, keep=request.keep)
                self._trace.request("request_cancelled", request)
        self._emit(Cancelled(id=request_id))

    def read(self, request_id: int, n_texts: int) -> None:
        """The reader has taken `n_texts` of the request's texts."""
        for request in [*self.running, *self.waiting]:
            if request.id == request_id:
                was_held_back, request.choices[0].read = request.held_back, n_texts
                if was_held_back and not request.held_back:
                    self._trace.request("request_caught_up", request)
                return

    def stats(self) -> Stats:
        cache = self._cache
        return Stats(
            running=by_class(self.running),
            waiting=by_class(self.waiting),
            sequences_used=cache.sequences_used,
            cells_used=cache.cells_used,
            cells=cache.n_cells,
            totals=self._tally.totals,
            snapshots=len(self._snapshots) if self._snapshots is not None else 0,
            snapshot_bytes=self._snapshots.n_bytes if self._snapshots is not None else 0,
            checkpoints=len(cache.checkpoints),
            checkpoint_bytes=cache.checkpoints.n_bytes,
            checkpoint_hits=cache.checkpoints.hits,
        )

    def look(self, asked: int, owner: str, tokens: Sequence[int]) -> None:
        """Tells how much of a prompt would not have to be evaluated. Changes nothing."""
        on_disk = 0
        if self._snapshots is not None:
            on_disk = self._snapshots.match(owner, tokens, reach=self._llama.saved_reaches)[1]
        in_memory = self._cache.match_prefix(owner, tokens).n
        self._emit(Held(id=asked, of=len(tokens), in_memory=in_memory, on_disk=on_disk))

    def check_integrity(self) -> None:
        """Raises AssertionError when the books of the cache do not balance."""
        self._cache.check_integrity()

    # -- one step --------------------------------------------------------------------------------

    def step(self) -> None:
        """Admits what may run, evaluates one batch, hands out what came of it."""
        self._admit()
        batch = self._compose()
        # Before the batch too: it may take seconds, and its requests are running all the while.
        self.report()
        if batch and self._gate(batch[0][0].priority, [r.id for r, _ in batch]):
            self._evaluate(batch)
            self.report()

    def report(self) -> None:
        """Sends the numbers when somebody came or went."""
        counts = (by_class(self.running), by_class(self.waiting))
        if counts != self._reported:
            self._reported = counts
            self._emit(self.stats())

    def active_class(self) -> int | None:
        """The best class that has anything to do: no other is in the next batch."""
        best = None
        for r in (*self.running, *self.waiting):
            if (best is None or r.priority < best) and not r.held_back:
                best = r.priority
        return best

    def _admit(self) -> None:
        if not self.waiting:
            return
        best = self.active_class()
        ready = [r for r in self.waiting if r.priority == best and not r.held_back]
        for request in admission_order(ready, self.running):
            if not self._start(request):
                return

    def _start(self, request: Request) -> bool:
        if request.warms and self._cache.holds(request.submit.owner, request.tokens):
            request.began_at = request.began_at or self._clock()
            self._finish(request, "stop")
            return True
        sequence = self._acquire(request)
        if sequence is None:
            return False
        self.waiting.remove(request)
        self._run(request, sequence)
        request.stops = self._stops(request, sequence)
        self._mark(request)
        if not request.missing:
            # Warming what only a passing request holds: the shared copy is all there was to do.
            self._finish(request, "stop")
        return True

    def _run(self, request: Request, sequence: KVSequence) -> None:
        request.sequence = sequence
        request.began_at = request.began_at or self._clock()
        request.sampler = request.sampler or self._sampler(request)
        self.running.append(request)
        self._trace.request("request_started", request)
        self._emit(Taken(id=request.id))

    def _acquire(self, request: Request) -> KVSequence | None:
        """A sequence with room behind it for the prompt, taken from worse classes if need be."""
        while True:
            if self._has_room(request):
                self._restore(request)
                # The cache leaves the last token out.
                wanted = [*request.reusable, 0]
                sequence = self._cache.acquire(request.owner, wanted, in_place=request.keep)
                if sequence:
                    missing = len(request.tokens) - len(sequence.tokens)
                    if self._cache.make_room(missing) or not self.running:
                        return sequence
                    # What it should begin with could not be copied after all.
                    self._cache.release(sequence, keep=request.keep)
            request.refused_at = self._cache.openings
            worse = [r for r in self.running if r.held_back or r.priority > request.priority]
            if not worse:
                return None
            self._requeue(max(worse, key=_goes_first))

    def _has_room(self, request: Request) -> bool:
        """Asked before each batch while the request waits: what was refused is looked at again
        only when it can have changed, and nothing is moved for it before it is let in.
        """
        if not self.running:
            return True
        return request.refused_at != self._cache.openings and self._cache.has_room(
            request.owner, request.reusable, n_tokens=len(request.tokens)
        )

    def _stops(self, request: Request, sequence: KVSequence) -> tuple[int, ...]:
        """Where evaluation stops to make a checkpoint, for models that need them: at the end of the
        prompt, for who asks again, and where this prompt parts from the owner's others.
        """
        if not self._llama.keeps_parts or not request.submit.keep:
            return ()
        # The last token of a prompt that is answered is always evaluated again, for its logits.
        end = request.n_prompt if request.warms else request.n_prompt - 1
        branch = self._cache.shared_prefix(request.owner, request.tokens[:end])
        if branch < len(sequence.tokens) + BRANCH_TOKENS_LEAST:
            return (end,)
        return (branch, end)

    def _mark(self, request: Request) -> None:
        if request.sequence and len(request.sequence.tokens) in request.stops:
            self._cache.checkpoint(request.sequence)

    # -- snapshots -------------------------------------------------------------------------------

    def save_one(self) -> bool:
        """Saves an idle sequence that is not on disk yet. False when there is none left."""
        for sequence in self._cache.idle():
            if self._save(sequence):
                self._reported = None
                return True
        return False

    def forget(self, owner: str, *, asked: int = 0) -> None:
        """Nothing of the owner stays, but what their requests still need: that goes with them."""
        for request in (*self.running, *self.waiting):
            if request.owner == owner:
                request.forget()
        self._cache.forget(owner)
        if self._snapshots is not None:
            self._snapshots.forget(owner)
        self._reported = None
        self._emit(Forgotten(id=asked))

    def _save(self, sequence: KVSequence) -> bool:
        """Whether there was anything to write. What a snapshot holds already is not written
        again.
        """
        tokens = sequence.tokens
        if self._snapshots is None or len(tokens) < SNAPSHOT_TOKENS_LEAST:
            return False
        held = self._snapshots.match(sequence.owner, tokens, reach=self._llama.saved_reaches)[1]
        if len(tokens) in (sequence.n_saved, held):
            return False
        state = self._llama.save_state(sequence.id)
        self._snapshots.save(sequence.owner, tokens, state)
        # Also when it could not be written: trying again with every turn would help nobody.
        sequence.n_saved = len(tokens)
        return True

    def _restore(self, request: Request) -> None:
        """Brings a snapshot back if it holds much more of the prompt than what is resident, and
        leaves room for the rest of it.
        """
        if self._snapshots is None:
            return
        owner, tokens = request.owner, request.reusable
        snapshot, n = self._snapshot(owner, tokens)
        resident = self._cache.match_prefix(owner, tokens).n
        if snapshot is None or n < resident + SNAPSHOT_TOKENS_LEAST:
            return
        most = max(len(snapshot.tokens), len(request.tokens))
        if not self._cache.has_room(owner, (), n_tokens=most):
            return
        # Read first: a sequence that makes room is saved, and may take this very snapshot's place.
        state = self._snapshots.load(snapshot)
        if state is None:
            return
        target = self._cache.vacant()
        if target is None or not self._cache.make_room(len(snapshot.tokens)):
            return
        if not self._llama.load_state(target.id, state):
            self._llama.remove(target.id, 0)
            self._snapshots.discard(snapshot, "llama.cpp does not take it")
            return
        self._cache.adopt(target, owner, snapshot.tokens)
        self._cache.truncate(target, n)
        self.restored_tokens += len(target.tokens)

    def _snapshot(self, owner: str, tokens: Sequence[int]) -> tuple[Snapshot | None, int]:
        """The snapshot that saves evaluating most of these tokens, and how many."""
        assert self._snapshots is not None
        best = self._snapshots.match(owner, tokens, reach=self._llama.saved_reaches)
        checkpoint = self._cache.checkpoints.match(owner, tokens)
        if checkpoint is None or len(checkpoint.tokens) <= best[1]:
            return best
        # A checkpoint that outlived its sequence: a snapshot that holds its tokens brings it back.
        longer, n = self._snapshots.match(owner, checkpoint.tokens)
        return (longer, n) if n == len(checkpoint.tokens) else best

    def _compose(self) -> list[tuple[Request, list[int]]]:
        """(request, its next tokens): answers first, then prompts, which share what room is
        left.
        """
        best = self.active_class()
        able = [r for r in self.running if not r.held_back]
        for r in able:
            self._mark_paused(r, paused=r.priority != best)
        ready = [r for r in able if r.priority == best]
        decoding = [r for r in ready if r.decodes]
        prefilling = [r for r in ready if not r.decodes]
        batch = [(r, r.tokens[-1:]) for r in decoding]
        if prefilling:
            batch += self._chunks(prefilling, best, beside=len(decoding))
        return self._fit(batch)

    def _chunks(
        self, prefilling: Sequence[Request], best: int | None, *, beside: int
    ) -> list[tuple[Request, list[int]]]:
        """Each prompt's share of the room that the answers leave."""
        n_batch, n_ubatch = self._llama.n_batch, self._llama.n_ubatch
        room = room_for_prompts(best, beside=beside, n_batch=n_batch, n_ubatch=n_ubatch)
        given = shares([r.missing for r in prefilling], room)
        return [(r, r.next_tokens(n)) for r, n in zip(prefilling, given, strict=True) if n]

    def _fit(self, batch: list[tuple[Request, list[int]]]) -> list[tuple[Request, list[int]]]:
        """Makes room for the batch: idle sequences go first, then the youngest request waits."""
        while batch and not self._cache.make_room(sum(len(t) for _, t in batch)):
            # Who is held back or paused goes before one that is about to run.
            victim = max(self.running, key=_goes_first)
            if len(self.running) == 1:
                self._fail(victim, "engine", "The KV cache has no room for this request.")
                return []
            self._requeue(victim)
            batch = [(r, t) for r, t in batch if r is not victim]
        return batch

    def _evaluate(self, batch: Sequence[tuple[Request, list[int]]]) -> None:
        requests = [r for r, _ in batch]
        self._trace.batch(requests, n_tokens=sum(len(t) for _, t in batch))
        entries = [
            (r.sequence.id, len(r.sequence.tokens), tokens, self._wants_logits(r, tokens))
            for r, tokens in batch
            if r.sequence
        ]
        try:
            status = self._llama.decode(entries)
        except DecodeError as exc:
            self._drop_batch(requests, str(exc))
            return
        if status == NO_SLOT:
            self._no_slot()
        elif status == ABORTED:
            self._resync(batch)
        else:
            self._advance(batch)

    def _advance(self, batch: Sequence[tuple[Request, list[int]]]) -> None:
        index = -1
        for request, tokens in batch:
            index += len(tokens)
            if request.reason:
                continue  # One of its answers before it in the batch failed, and all with it.
            self._account(request, tokens)
            if request.missing:
                continue
            if request.warms:
                self._finish(request, "stop")
            else:
                self._next_token(request, index)

    def _account(self, request: Request, tokens: Sequence[int]) -> None:
        assert request.sequence is not None
        start = len(request.sequence.tokens)
        request.evaluated_prompt += max(0, min(start + len(tokens), request.n_prompt) - start)
        self._cache.extend(request.sequence, tokens)
        self._mark(request)
        self._tell_progress(request)

    def _tell_progress(self, request: Request) -> None:
        if not request.submit.tells_progress or not request.missing:
            return
        now = self._clock()
        if now - request.told_at >= PROGRESS_S:
            assert request.sequence is not None
            done = len(request.sequence.tokens)
            if done < request.n_prompt:
                request.told_at = now
                self._emit(Reading(id=request.id, done=done, of=request.n_prompt))

    def _next_token(self, request: Request, index: int) -> None:
        """Chooses from the logits of batch entry `index`; at a prompt's end for every answer."""
        requests = [request]
        if not request.first_token_at:
            requests += self._fork(request)
        for r in requests:
            if not r.reason:
                self._choose(r, index)

    def _fork(self, request: Request) -> list[Request]:
        """The prompt is evaluated: its further answers, each with all of it for its own.

        One that finds no free sequence, or others waiting for one, waits with them.
        """
        if request.choice:
            return []
        assert request.sequence is not None
        forks = []
        for _ in range(1, request.submit.n):
            other = request.another()
            self._trace.request("request_queued", other)
            alone = all(r.priority > request.priority for r in self.waiting)
            sequence = self._cache.fork(request.sequence) if alone else None
            if sequence is None:
                self.waiting.append(other)
            else:
                self._run(other, sequence)
                forks.append(other)
        return forks

    def _choose(self, request: Request, index: int) -> None:
        assert request.sampler is not None
        if not request.first_token_at:
            self._begin(request)
        if request.max_new <= 0:
            self._finish(request, "length")
            return
        try:
            token = request.sampler.next(index)
        except CannotGoOn as exc:
            param = "tool_choice" if request.submit.must_call else "response_format"
            self._fail(request, "refused", str(exc), param=param)
            return
        if self._llama.is_end(token):
            self._finish(request, "stop")
            return
        request.tokens.append(token)
        text = request.text.feed(self._llama.piece(token))
        if request.submit.logprobs is not None:
            entry = logprob(self._llama, index, token, top=request.submit.logprobs)
            request.logprobs.add(entry)
        self._say(request, text, request.logprobs.due())
        if request.text.stopped:
            self._finish(request, "stop")
        elif request.n_generated >= request.max_new:
            self._finish(request, "length")

    # -- the ends of a request -------------------------------------------------------------------

    def _begin(self, request: Request) -> None:
        request.first_token_at = self._clock()
        self._trace.request("first_token", request)
        if request.choice:
            return
        self._emit(
            Began(
                id=request.id,
                prompt_tokens=request.n_prompt,
                cached_tokens=request.cached_tokens,
            )
        )

    def _say(self, request: Request, text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
        if text or logprobs:
            request.choices[0].said += 1
            frame = Text(id=request.id, text=text, choice=request.choice, logprobs=logprobs)
            self._emit(frame)
            if request.held_back:
                self._trace.request("request_held_back", request)

    def _finish(self, request: Request, reason: str) -> None:
        if not request.first_token_at:
            self._begin(request)
        self._say(request, request.text.finish(), request.logprobs.rest())
        request.reason = reason
        self._leave(request, keep=request.keep)
        self._trace.request("request_done", request)
        if all(r.reason for r in request.choices):
            self._emit(self._ended(request.choices))
        else:
            self._tell_waiting(request)

    def _ended(self, choices: Sequence[Request]) -> Ended:
        first = choices[0]
        return Ended(
            id=first.id,
            finish_reason=first.reason,
            prompt_tokens=first.n_prompt,
            cached_tokens=first.cached_tokens,
            completion_tokens=sum(r.n_generated for r in choices),
            token_ids=self._token_ids(first),
            queued_s=first.began_at - first.arrived_at,
            prefill_s=first.first_token_at - first.began_at,
            decode_s=self._clock() - first.first_token_at,
            others=tuple(r.reason for r in choices[1:]),
            token_ends=to_bytes(ends_of([self._llama.piece(t) for t in first.generated])),
        )

    def _token_ids(self, request: Request) -> bytes | None:
        """The tokens of the text as it was given out, if it ends where a token ends."""
        tokens = request.generated
        n = request.text.pieces_given([self._llama.piece(t) for t in tokens])
        return None if n is None else to_bytes(tokens[:n])

    def _fail(self, request: Request, kind: str, message: str, *, param: str = "") -> None:
        """Ends all answers of the request: the client is told once, and takes none of them."""
        if request.reason == "failed":
            return
        for r in request.choices:
            r.reason = "failed"
            # What was asked was wrong, not the prompt: it stays for the next try.
            self._leave(r, keep=r.keep and kind == "refused")
        self._trace.request("request_failed", request)
        self._emit(Failed(id=request.id, kind=kind, message=message, param=param))

    def _leave(self, request: Request, *, keep: bool) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
        if request.sequence:
            self._cache.release(request.sequence, keep=keep)
            request.sequence = None
        if request.sampler:
            request.sampler.close()
            request.sampler = None
        if request.grammar:
            request.grammar.close()
            request.grammar = None

    # -- when it does not go to plan -------------------------------------------------------------

    def _requeue(self, request: Request) -> None:
        """Gives its cells up and waits again; what was generated stays and is evaluated anew."""
        assert request.sequence is not None
        self._cache.release(request.sequence, keep=False)
        request.sequence = None
        self.running.remove(request)
        self.waiting.append(request)
        self._trace.request("request_requeued", request)
        self._tell_waiting(request)

    def _tell_waiting(self, request: Request) -> None:
        """Says so when text has come and for now none will: an answer is left, none at work."""
        if request.priority == BACKGROUND or not request.choices[0].first_token_at:
            return
        left = [r for r in request.choices if not r.reason]
        if left and not any(r.sequence and not r.paused for r in left):
            self._emit(Waiting(id=request.id))

    def _resync(self, batch: Sequence[tuple[Request, list[int]]]) -> None:
        """After an abort: whole micro-batches stayed in the cache, and no logits did."""
        for r, tokens in batch:
            assert r.sequence is not None
            self._trace.request("request_interrupted", r)
            have = len(r.sequence.tokens)
            held = self._llama.end(r.sequence.id)
            if not have <= held <= have + len(tokens):
                # Positions that this batch cannot have left: nothing of it can be relied on.
                self._cache.truncate(r.sequence, 0)
                r.sequence.base = 0
                self._requeue(r)
                continue
            self._account(r, r.tokens[have:held])
            if not r.missing and r.warms:
                self._finish(r, "stop")
            elif not r.missing:
                self._cache.truncate(r.sequence, len(r.tokens) - 1)

    def _no_slot(self) -> None:
        """The books said there was room and llama.cpp found none: free more, or give up the
        last.
        """
        if self._cache.make_room(self._cache.n_cells - self._cache.cells_used + 1):
            return
        victim = max(self.running, key=_goes_first)
        if len(self.running) > 1:
            self._requeue(victim)
        else:
            self._fail(victim, "engine", "The KV cache has no room for this request.")

    def _drop_batch(self, batch: Sequence[Request], why: str) -> None:
        for r in batch:
            self._fail(r, "engine", f"The model could not evaluate this request ({why}).")
        if not self._llama.rolls_back:
            # States of others were in motion: what is resident cannot be relied on.
            for r in list(self.running):
                assert r.sequence is not None
                r.sequence.base = 0
                self._requeue(r)
            self._cache.clear()

    def _mark_paused(self, request: Request, *, paused: bool) -> None:
        if paused == request.paused:
            return
        request.paused = paused
        if paused:
            self._trace.request("request_paused", request)
            self._tell_waiting(request)
        else:
            self._trace.request("request_resumed", request)
            self._emit(Taken(id=request.id))

    def _wants_logits(self, request: Request, tokens: Sequence[int]) -> bool:
        return not request.warms and len(tokens) == request.missing

    def _sampler(self, request: Request) -> Sampler:
        seed = request.submit.seed
        seed = secrets.randbelow(SEEDS) if seed is None else seed + request.choice
        return Sampler(
            self._llama,
            request.submit,
            seed=seed % SEEDS,
            history=request.tokens,
            grammar=request.grammar,
        )


def _goes_first(request: Request) -> tuple[bool, int, float]:
    """The greatest gives up its cells when they run short: who waits for a reader, then the worst
    class, then the youngest.
    """
    return (request.held_back, request.priority, request.arrived_at)
