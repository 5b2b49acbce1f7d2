"""The model process: `python -m proxy.engines.embedded.child`, spoken to over stdin and stdout.

Three threads. The reader takes commands, renders and tokenizes prompts, answers counts, and raises
the abort flag when something arrives that must not wait for the batch at hand. The main thread
owns the model and does nothing but run the scheduler. The process ends when stdin ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from proxy.engines.embedded import protocol
from proxy.engines.embedded.embedding import Embedder, Embeddings, Job
from proxy.engines.embedded.files import FileError
from proxy.engines.embedded.inbox import End, Glance, Inbox, Item
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.loading import LoadError, chosen, fingerprint, state_fingerprint
from proxy.engines.embedded.outbox import Outbox
from proxy.engines.embedded.prompt import Prompter
from proxy.engines.embedded.protocol import Cancel, Forget, Load, Pulse, Read
from proxy.engines.embedded.reader import Reader
from proxy.engines.embedded.request import BACKGROUND, CLASSES, Request
from proxy.engines.embedded.sampling import GRAMMAR_MOST_S, TOO_SLOW
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


class EngineTrace:
    """The scheduler's events in the trace file."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def request(self, event: str, request: Request) -> None:
        cls, most = CLASSES[request.priority], request.submit.max_tokens
        self._trace(event, request=request.id, cls=cls, prompt=request.n_prompt, most=most)

    def batch(self, requests: Sequence[Request], *, n_tokens: int) -> None:
        if self._trace:
            ids, cls = [r.id for r in requests], CLASSES[requests[0].priority]
            self._trace("batch", requests=ids, cls=cls, tokens=n_tokens)


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
    pulse = threading.Thread(
        target=_pulse, args=(inbox, reader, outbox, llama), name="pulse", daemon=True
    )
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
    at_rest = True
    while True:
        items = inbox.take(wait_s=wait_s if at_rest else 0)
        for item in items:
            _handle(scheduler, embeddings, item)
        if embeddings and (scheduler.at_rest or scheduler.active_class() == BACKGROUND):
            embeddings.step()
        elif items or not at_rest:
            scheduler.step()
            wait_s = IDLE_SAVE_S
        else:
            # One at a time, so that who comes meanwhile does not wait for all of them.
            wait_s = 0.001 if scheduler.save_one() else IDLE_WAIT_S
            scheduler.report()
        at_rest = scheduler.at_rest and not embeddings
        if at_rest or embeddings:
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
        case Forget(id=id_, owner=owner):
            scheduler.forget(owner, asked=id_)
        case Glance(id=id_, owner=owner, tokens=tokens):
            scheduler.look(id_, owner, tokens)
        case End():
            while scheduler.save_one():
                pass
            os._exit(0)


def _pulse(inbox: Inbox, reader: Reader, outbox: Outbox, llama: Llama) -> None:
    """A thread of its own: a prompt of megabytes keeps the reader busy for a minute."""
    with suppress(BrokenPipeError):
        while True:
            threads = tuple((t.steps, t.idle) for t in (inbox, reader))
            outbox.send(Pulse(threads, _rss_bytes()))
            if (since := llama.choosing_since) and time.monotonic() - since > GRAMMAR_MOST_S:
                print(f"{TOO_SLOW} {GRAMMAR_MOST_S:g} s", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(PULSE_S)


def _snapshots(load: Load, llama: Llama) -> Snapshots | None:
    if not load.snapshots:
        return None
    snapshots = Snapshots(
        Path(load.snapshots),
        fingerprint=state_fingerprint(load, cells=llama.cells),
        budget_bytes=load.snapshot_bytes,
    )
    # Without a budget none is kept, and those of a time with one are gone now.
    return snapshots if load.snapshot_bytes else None


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
        n_vocab=llama.n_vocab,
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
