"""The model process: `python -m proxy.engines.embedded.child`, spoken to over stdin and stdout.

Three threads. The reader takes commands, renders and tokenizes prompts, answers counts, and raises
the abort flag when something arrives that must not wait for the batch at hand. The main thread
owns the model and does nothing but run the scheduler. The process ends when stdin ends.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, assert_never

from proxy.engines.embedded import protocol
from proxy.engines.embedded.embedding import Embedder, Embeddings, Job
from proxy.engines.embedded.files import FileError
from proxy.engines.embedded.grammar import GrammarError
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.loading import LoadError, chosen, fingerprint, state_fingerprint
from proxy.engines.embedded.prompt import Prompter, UnknownToken
from proxy.engines.embedded.protocol import (
    Cancel,
    Command,
    Count,
    CountTools,
    Embed,
    Forget,
    Load,
    Pulse,
    Read,
    Reply,
    Submit,
    Text,
)
from proxy.engines.embedded.request import BACKGROUND, CLASSES, Request
from proxy.engines.embedded.sampling import Grammar
from proxy.engines.embedded.scheduler import Scheduler
from proxy.engines.embedded.snapshots import Snapshots
from proxy.engines.embedded.template import TemplateError
from proxy.trace import Trace

READ_BYTES = 1 << 16
IDLE_WAIT_S = 60.0
IDLE_SAVE_S = 30.0
"""Quiet time after which sequences are written to disk: most chats have come to rest by then."""
PULSE_S = 1.0
PR_SET_PDEATHSIG = 1
LAST_SAVE_S = 4.0
"""How long the process may write snapshots once its parent has gone or told it to end."""


TEXT_WAITS_S = 0.04
"""Longest time that a piece of an answer may wait for the next one, to go in one write with it.
Each write wakes the parent, and where the model's threads fill the machine that costs them 0.2 ms:
4 % of a token of a small model. A model that takes longer for a token waits for nothing."""


class Outbox:
    """Frames to the parent, whole ones, from either thread."""

    def __init__(self, fd: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fd = fd
        self._clock = clock
        self._lock = threading.Lock()
        self._posted: list[bytes] = []
        self.urgent = False
        """Whether anything but text was posted: that does not wait."""
        self._flushed_at = self._stepped_at = clock()

    def send(self, frame: Reply) -> None:
        """Now."""
        self._write(protocol.encode(frame))

    def post(self, frame: Reply) -> None:
        """With the next `flush`; the engine thread only. Eight answers a batch in one write instead
        of eight: each wakes the parent, which takes its time from the model's threads.
        """
        self._posted.append(protocol.encode(frame))
        self.urgent = self.urgent or not isinstance(frame, Text)

    def flush(self) -> None:
        """What was posted, in that order."""
        self.urgent, self._flushed_at = False, self._clock()
        if self._posted:
            data, self._posted = b"".join(self._posted), []
            self._write(data)

    def flush_due(self) -> None:
        """After a step that is followed by another: text waits while the next one will be in time,
        if it takes as long as the last.
        """
        now = self._clock()
        step_s, self._stepped_at = now - self._stepped_at, now
        if self.urgent or now + step_s > self._flushed_at + TEXT_WAITS_S:
            self.flush()

    def _write(self, data: bytes) -> None:
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]


class EngineTrace:
    """The scheduler's events in the trace file."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def request(self, event: str, request: Request) -> None:
        cls, most = CLASSES[request.priority], request.submit.max_tokens
        self._trace(event, request=request.id, cls=cls, prompt=request.n_prompt, most=most)

    def batch(self, requests: Sequence[Request], *, n_tokens: int) -> None:
        ids, cls = [r.id for r in requests], CLASSES[requests[0].priority]
        self._trace("batch", requests=ids, cls=cls, tokens=n_tokens)


class End:
    """The parent has gone, or wants the process to end."""


Item = Request | Job | Cancel | Read | Forget | End


class Inbox:
    """Commands on their way to the engine thread, and what that thread is doing meanwhile."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._batch: tuple[int, frozenset[int]] | None = None
        self.steps = 0
        """How often the engine thread has come by here: it grows as long as that thread lives."""
        self.idle = False

    def put(self, item: Item) -> None:
        with self._changed:
            self._items.append(item)
            if self._must_interrupt(item):
                self._llama.abort.set()
            self._changed.notify()

    def take(self, *, wait_s: float) -> list[Item]:
        with self._changed:
            self.steps += 1
            if wait_s and not self._items:
                self.idle = True
                self._changed.wait(wait_s)
                self.idle = False
            items = list(self._items)
            self._items.clear()
            return items

    def enter(self, priority: int, requests: Sequence[int]) -> bool:
        """The engine thread is about to evaluate this batch; false if there is news to read first.

        What arrives after this finds the batch here and can raise the flag: none slips through.
        """
        with self._changed:
            self.steps += 1
            self._llama.abort.clear()
            self._batch = (priority, frozenset(requests)) if not self._items else None
            return self._batch is not None

    def leave(self) -> None:
        with self._changed:
            self.steps += 1
            self._batch = None

    def _must_interrupt(self, item: Item) -> bool:
        if self._batch is None or isinstance(item, Forget):
            return False
        if isinstance(item, End):
            return True
        priority, requests = self._batch
        if isinstance(item, Cancel):
            return requests == {item.id}
        if isinstance(item, Job):
            return False
        return item.priority < priority


class Gate:
    """Right before a batch: what may not wait is not held back for as long as that takes."""

    def __init__(self, inbox: Inbox, outbox: Outbox) -> None:
        self._inbox = inbox
        self._outbox = outbox

    def __call__(self, priority: int, requests: Sequence[int]) -> bool:
        if self._outbox.urgent:
            self._outbox.flush()
        return self._inbox.enter(priority, requests)


def main() -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides
    _wake_when_orphaned()
    frames, outbox = _own_stdio()
    load = protocol.command(next(frames))
    if not isinstance(load, Load):
        raise SystemExit("the first frame must be Load")
    try:
        llama = Llama(load)
        prompter = Prompter(llama)
        outbox.send(_loaded(load, llama, prompter))
    except (LoadError, FileError) as exc:
        outbox.send(protocol.Fatal(message=str(exc)))
        return
    except TemplateError as exc:
        setting = "engine.chat_template: " if load.chat_template else ""
        outbox.send(protocol.Fatal(message=f"{setting}{exc}"))
        return
    inbox = Inbox(llama)
    embedder = Embedder(llama)
    embeddings = Embeddings(embedder, emit=outbox.send, gate=inbox.enter)
    reader = Reader(frames, inbox, outbox, llama, prompter, embedder)
    threading.Thread(target=reader.run, name="reader", daemon=True).start()
    pulse = threading.Thread(target=_pulse, args=(inbox, reader, outbox), name="pulse", daemon=True)
    pulse.start()
    trace = EngineTrace(Trace(load.trace_path))
    scheduler = Scheduler(
        llama,
        n_sequences=load.sequences,
        emit=outbox.post,
        trace=trace,
        gate=Gate(inbox, outbox),
        snapshots=_snapshots(load, llama),
    )
    try:
        _serve(scheduler, embeddings, inbox, outbox)
    except BrokenPipeError:
        os._exit(0)


def _serve(scheduler: Scheduler, embeddings: Embeddings, inbox: Inbox, outbox: Outbox) -> NoReturn:
    check = bool(os.environ.get("CHATFOLD_CHECK_INTEGRITY"))
    wait_s = IDLE_SAVE_S
    scheduler.report()  # the cells and the snapshots that are there, before anybody asks
    outbox.flush()
    while True:
        items = inbox.take(wait_s=0 if embeddings or not scheduler.at_rest else wait_s)
        for item in items:
            _handle(scheduler, embeddings, item)
        if embeddings and (scheduler.at_rest or scheduler.active_class() == BACKGROUND):
            embeddings.step()
            inbox.leave()
        elif items or not scheduler.at_rest:
            scheduler.step()
            inbox.leave()
            wait_s = IDLE_SAVE_S
        else:
            # One at a time, so that who comes meanwhile does not wait for all of them.
            wait_s = 0.001 if scheduler.save_one() else IDLE_WAIT_S
            scheduler.report()
        if scheduler.at_rest or embeddings:
            outbox.flush()
        else:
            outbox.flush_due()
        if check:
            scheduler.check_integrity()


def _handle(scheduler: Scheduler, embeddings: Embeddings, item: Item) -> None:
    match item:
        case Request():
            scheduler.add(item)
        case Cancel(id=id_):
            scheduler.cancel(id_)
            embeddings.cancel(id_)
        case Job():
            embeddings.add(item)
        case Read(id=id_, n_texts=n_texts):
            scheduler.read(id_, n_texts)
        case Forget(owner=owner):
            scheduler.forget(owner)
        case End():
            while scheduler.save_one():
                pass
            os._exit(0)


def _pulse(inbox: Inbox, reader: Reader, outbox: Outbox) -> None:
    """A thread of its own: a prompt of megabytes keeps the reader busy for a minute."""
    with suppress(BrokenPipeError):
        while True:
            threads = tuple((t.steps, t.idle) for t in (inbox, reader))
            outbox.send(Pulse(threads, _rss_bytes()))
            time.sleep(PULSE_S)


class Reader:
    """Turns commands into work for the engine thread."""

    def __init__(
        self,
        frames: Iterator[bytes],
        inbox: Inbox,
        outbox: Outbox,
        llama: Llama,
        prompter: Prompter,
        embedder: Embedder,
    ) -> None:
        self._frames = frames
        self._inbox = inbox
        self._outbox = outbox
        self._llama = llama
        self._prompter = prompter
        self._embedder = embedder
        self.steps = 0
        """Commands that were handled."""
        self.idle = True

    def run(self) -> NoReturn:
        # Whatever ends this loop ends the process: without its parent it has no purpose, and a
        # frame that cannot be read means that the two no longer understand each other.
        try:
            for body in self._frames:
                self.idle = False
                self._handle(protocol.command(body))
                self.steps, self.idle = self.steps + 1, True
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        # Should no thread get to run any more, the kernel ends the process.
        signal.alarm(math.ceil(LAST_SAVE_S) + 1)
        self._inbox.put(End())
        time.sleep(LAST_SAVE_S)
        os._exit(0)

    def _handle(self, command: Command) -> None:
        match command:
            case Submit():
                self._submit(command)
            case Cancel() | Read() | Forget():
                self._inbox.put(command)
            case Count(id=id_, texts=texts):
                counts = tuple(self._prompter.count(t) for t in texts)
                self._outbox.send(protocol.Counted(id=id_, counts=counts))
            case CountTools():
                self._count_tools(command)
            case Embed(id=id_, inputs=inputs):
                self._embed(id_, inputs)
            case Load():
                raise ValueError("a second Load")
            case _:
                assert_never(command)

    def _count_tools(self, command: CountTools) -> None:
        try:
            cost = self._prompter.tools_cost(command.tools)
        except TemplateError:
            # The request itself will be refused for the same reason, with a sentence.
            cost = self._prompter.count(command.tools)
        self._outbox.send(protocol.Counted(id=command.id, counts=(cost,)))

    def _embed(self, id_: int, inputs: Sequence[str | Sequence[int]]) -> None:
        most = self._embedder.window_tokens
        if not self._embedder.possible:
            self._refuse(id_, "refused", "This model makes no embeddings.", param="model")
            return
        texts = []
        for text in inputs:
            tokens = self._embedder.tokens(text) if isinstance(text, str) else list(text)
            if not tokens or len(tokens) > most:
                sentence = f"Each input must have 1 to {most} tokens, and one has {len(tokens)}."
                self._refuse(id_, "refused", sentence, param="input")
                return
            if any(not 0 <= t < self._llama.n_vocab for t in tokens):
                self._refuse(id_, "refused", "The model has no such token.", param="input")
                return
            texts.append(tokens)
        self._inbox.put(Job(id_, texts))

    def _submit(self, submit: Submit) -> None:
        if not self._llama.generates:
            sentence = "This model makes embeddings and nothing else: it cannot answer."
            self._refuse(submit.id, "refused", sentence, param="model")
            return
        try:
            tokens = self._tokens(submit)
        except (TemplateError, UnknownToken) as exc:
            self._refuse(submit.id, "refused", str(exc))
            return
        # One more token must fit behind the prompt, or there is nothing to answer with.
        if len(tokens) >= self._llama.window_tokens:
            self._refuse(submit.id, "overflow", "", prompt_tokens=len(tokens))
            return
        if not tokens:
            self._refuse(submit.id, "refused", "The request holds no text.")
            return
        try:
            grammar = self._grammar(submit)
        except GrammarError as exc:
            param = "tool_choice" if submit.must_call else "response_format"
            self._refuse(submit.id, "refused", str(exc), param=param)
            return
        arrived_at = time.monotonic()
        self._inbox.put(Request(submit, tokens, arrived_at, grammar=grammar))

    def _grammar(self, submit: Submit) -> Grammar | None:
        if submit.must_call:
            return Grammar(self._llama, self._prompter.call_grammar(submit))
        if not submit.grammar:
            return None
        template = self._prompter.template
        thinks = template.thinks_first and submit.thinks and submit.raw is None
        thinks = thinks and not submit.continues
        return Grammar(self._llama, submit.grammar, after=template.think_tags[1] if thinks else "")

    def _tokens(self, submit: Submit) -> list[int]:
        if submit.raw is not None:
            return self._prompter.raw(submit.raw)
        return self._prompter.tokens(
            submit.messages,
            answer_header=submit.max_tokens != 0,
            continues=submit.continues,
            tools=submit.tools,
            thinks=submit.thinks,
        )

    def _refuse(
        self, id_: int, kind: str, message: str, *, prompt_tokens: int = 0, param: str = ""
    ) -> None:
        self._outbox.send(
            protocol.Failed(
                id=id_,
                kind=kind,
                message=message,
                prompt_tokens=prompt_tokens,
                window_tokens=self._llama.window_tokens,
                param=param,
            )
        )


def _snapshots(load: Load, llama: Llama) -> Snapshots | None:
    if not load.snapshots or not load.snapshot_bytes:
        return None
    return Snapshots(
        Path(load.snapshots),
        fingerprint=state_fingerprint(load, cells=llama.cells),
        budget_bytes=load.snapshot_bytes,
    )


def _wake_when_orphaned() -> None:
    """A process that is stopped does not see that its stdin has ended: so it is to be woken when
    its parent dies. Linux only; elsewhere it stays stopped.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


def _rss_bytes() -> int:
    """Memory of this process, 0 where the system does not tell."""
    with suppress(OSError):
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _own_stdio() -> tuple[Iterator[bytes], Outbox]:
    """Frames in and out on the original stdin and stdout; prints of native code go to stderr."""
    out = os.dup(1)
    os.dup2(2, 1)
    return _read_frames(0), Outbox(out)


def _read_frames(fd: int) -> Iterator[bytes]:
    frames = protocol.Frames()
    while data := os.read(fd, READ_BYTES):
        yield from frames.feed(data)


def _loaded(load: Load, llama: Llama, prompter: Prompter) -> protocol.Loaded:
    each, once = prompter.overhead()
    return protocol.Loaded(
        name=llama.meta("general.name") or os.path.basename(load.path),
        fingerprint=fingerprint(load.path),
        window_tokens=llama.window_tokens,
        message_tokens=each,
        base_tokens=once,
        default_system=prompter.default_system(),
        think_tags=prompter.template.think_tags,
        thinks_first=prompter.template.thinks_first,
        details={
            "architecture": llama.meta("general.architecture"),
            "description": llama.description(),
            "kv_cells": llama.cells,
            "sequences": load.sequences,
            "can_cut": not llama.keeps_parts,
            **chosen(load, flash_attention=llama.flash_attention),
        },
    )


if __name__ == "__main__":
    main()
