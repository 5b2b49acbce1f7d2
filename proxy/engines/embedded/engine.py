"""The parent's side of the embedded engine: starts the model process, watches it, talks to it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from msgspec.structs import replace

from memory.context import Context
from proxy.config import Config, EngineConfig, model_file
from proxy.engines import base
from proxy.engines.base import (
    Embeddings,
    EngineBroken,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    Event,
    Generate,
    ModelInfo,
    QueueFull,
    ReaderStalled,
    Reading,
    Started,
    Waiting,
    Warmth,
)
from proxy.engines.embedded import protocol, translation
from proxy.engines.embedded.protocol import Cancel, Count, Load, Submit
from proxy.engines.embedded.replies import Replies
from proxy.engines.embedded.snapshots import forget_files
from proxy.engines.embedded.totals import Totals, to_json
from proxy.engines.embedded.watch import Watch

log = logging.getLogger("chatfold.engine")

T = TypeVar("T")

CHILD = ("-m", "proxy.engines.embedded.child")
"""Arguments to the interpreter that make it the model process."""

READ_BYTES = 1 << 16
BACKOFF_FIRST_S = 0.1
BACKOFF_MOST_S = 30.0
HEALTHY_S = 60.0
"""A process that lived this long, or evaluated a prompt to its end, did not fail at once: the next
restart does not wait long."""
TERMINATE_S = 5.0
LAST_WORDS_S = 1.0
COUNT_S = 30.0
LOOK_S = 5.0
EMBEDDINGS_MOST = 16
"""Requests for embeddings that may wait."""
STDERR_LINES = 40
UNREAD_MOST = 256
"""Texts (about as many tokens) that the model may be ahead of who reads them."""


@dataclass(frozen=True, slots=True)
class EmbeddedSettings:
    """What the model process is started with, and this side's own settings. Waits are seconds; a
    field with the name of a key of `[engine]` holds what that key says."""

    load: Load
    start_s: float = 120.0
    queue_limit: int = 64
    queue_s: float = 300.0
    embeddings_s: float = 300.0
    """Longest time for the embeddings of one request: they wait for every chat."""
    reader_s: float = 120.0
    stuck_s: float = 300.0


@dataclass(slots=True, eq=False)
class _Call:
    """A request on its way. `sent` counts the processes it was given to; `taken` once it left the
    queue of the last one, and `put_back` while it stands in it again with half an answer.

    `texts` came from the process, `read` of them were taken by the reader, of which the process
    knows `told`.
    """

    submit: Submit
    replies: asyncio.Queue[protocol.Reply | EngineError] = field(default_factory=asyncio.Queue)
    sent: int = 0
    taken: bool = False
    put_back: bool = False
    texts: int = 0
    read: int = 0
    told: int = 0
    ended: bool = False
    """The process has said its last word about it."""
    reader_timer: asyncio.TimerHandle | None = None
    queue_timer: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        return not self.ended and (self.put_back or not self.taken)

    def stop_reader_timer(self) -> None:
        if self.reader_timer:
            self.reader_timer.cancel()
            self.reader_timer = None

    def stop_queue_timer(self) -> None:
        if self.queue_timer:
            self.queue_timer.cancel()
            self.queue_timer = None

    def close(self) -> None:
        self.stop_reader_timer()
        self.stop_queue_timer()


class EmbeddedEngine:
    """Engine over a child process that may crash: it is started again, and who waited stays in
    line.

    A request that ran when the process died ends with EngineCrashed; one that still waited is
    handed to the next process.
    """

    def __init__(self, settings: EmbeddedSettings) -> None:
        self._settings = settings
        self._ids = count(1)
        self._calls: dict[int, _Call] = {}
        self._counts: dict[int, asyncio.Future[list[int]]] = {}
        self._embeddings: dict[int, asyncio.Future[Embeddings]] = {}
        self._glances: dict[int, asyncio.Future[Warmth]] = {}
        self._forgotten: dict[str, int] = {}
        """Owners to forget, each with the command that no process has answered yet."""
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        """Set while it is known how loading went: the model is there, or `_trouble` says why
        not.
        """
        self._ready = False
        self._worked = False
        """Whether the process has evaluated a prompt."""
        self._loaded = asyncio.Event()
        """Set once the process at hand has loaded the model."""
        self._watch: Watch | None = None
        self._killed_for = ""
        self._rss_bytes = 0
        self.info: ModelInfo | None = None
        self._stats: protocol.Stats | None = None
        self._before = Totals()
        """What the processes before this one have done."""
        self._trouble = ""
        self._broken = False
        self._grammars = translation.Grammars()
        self._restarts = 0
        self._stopping = False
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)

    @classmethod
    def from_config(cls, config: Config, *, trace_path: str = "") -> EmbeddedEngine:
        """Keys of `[engine]` go where a field has their name. Raises ConfigError."""
        load = Load(
            path=str(model_file(config)),
            n_ctx=config.n_ctx,
            trace_path=trace_path,
            snapshots=str(config.data / "snapshots"),
            **_named(config.engine, Load.__struct_fields__),
        )
        own = [f.name for f in fields(EmbeddedSettings)]
        rest = _named(config.engine, own) | {
            "queue_limit": config.queue_limit,
            "queue_s": config.timeouts.queue_s,
            "embeddings_s": config.timeouts.embeddings_s,
            "reader_s": config.timeouts.reader_s,
        }
        return cls(EmbeddedSettings(load, **rest))

    def __repr__(self) -> str:
        state = "ready" if self.ready() else self._trouble or "loading"
        return f"<EmbeddedEngine {state} calls={len(self._calls)} restarts={self._restarts}>"

    # -- Engine ----------------------------------------------------------------------------------

    async def start(self) -> None:
        self._supervisor = asyncio.create_task(self._supervise(), name="embedded-engine")

    async def stop(self) -> None:
        self._stopping = True
        # First, so that nobody is told of a crash, and who waits for the model waits no longer.
        self._give_up("The proxy is shutting down.")
        if self._supervisor:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
        await self._forget_files()

    def ready(self) -> bool:
        return self._ready

    async def model(self) -> ModelInfo:
        await self._until_loaded()
        assert self.info is not None
        return self.info

    async def count(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        return await self._counted(Count(id=next(self._ids), texts=tuple(texts)))

    async def count_tools(self, tools: str) -> int:
        (cost,) = await self._counted(protocol.CountTools(id=next(self._ids), tools=tools))
        return cost

    async def _counted(self, command: Count | protocol.CountTools) -> list[int]:
        await self._until_loaded()
        return await self._reply(self._counts, command)

    async def embed(self, inputs: Sequence[str | tuple[int, ...]]) -> Embeddings:
        self._check_embeddings()
        await self._until_loaded()
        self._check_embeddings()  # So many may have waited for the model.
        texts = tuple(translation.printable(x) if isinstance(x, str) else x for x in inputs)
        command = protocol.Embed(id=next(self._ids), inputs=texts)
        try:
            return await self._reply(
                self._embeddings,
                command,
                limit_s=self._settings.embeddings_s,
                late="The model found no time for embeddings.",
            )
        except (asyncio.CancelledError, EngineUnavailable):
            self._send(Cancel(id=command.id))
            raise

    def _check_embeddings(self) -> None:
        if len(self._embeddings) >= EMBEDDINGS_MOST:
            raise QueueFull("Too many requests for embeddings wait already; try again shortly.")

    async def _reply(
        self,
        waiting: dict[int, asyncio.Future[T]],
        command: Count | protocol.CountTools | protocol.Embed | protocol.Look,
        *,
        limit_s: float = COUNT_S,
        late: str = "The model process does not answer.",
    ) -> T:
        """What the process says to a command that gets one reply. Raises EngineError, `late` after
        `limit_s` seconds.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        waiting[command.id] = future
        try:
            self._send(command)
            async with asyncio.timeout(limit_s):
                return await future
        except TimeoutError as exc:
            raise EngineUnavailable(late) from exc
        finally:
            waiting.pop(command.id, None)

    @property
    def tells_warmth(self) -> bool:
        return True

    async def warmth(self, owner: str, context: Context) -> Warmth:
        await self._until_loaded()
        parts = translation.parts(context)
        look = protocol.Look(next(self._ids), owner, parts, context.tools)
        return await self._reply(self._glances, look)

    def check(self, request: Generate) -> None:
        translation.check_biases(request, self.info)
        self._grammars.of(request)

    @asynccontextmanager
    async def generate(self, request: Generate) -> AsyncIterator[AsyncIterator[Event]]:
        self._check_queue(request.priority)
        grammar = self._grammars.of(request)
        submit = translation.submit(
            next(self._ids), request, unread_most=UNREAD_MOST, grammar=grammar
        )
        call = _Call(submit)
        self._calls[call.submit.id] = call
        try:
            await self._until_loaded()
            translation.check_biases(request, self.info)
            self._hand_over(call)
            yield self._events(call)
        finally:
            call.close()
            if self._calls.pop(call.submit.id, None):
                self._send(Cancel(id=call.submit.id))

    def _check_queue(self, priority: base.Priority) -> None:
        """Raises QueueFull. Those count that wait and would go before this one."""
        ahead = [c for c in self._calls.values() if c.waits and c.submit.priority <= priority]
        if len(ahead) >= self._settings.queue_limit:
            raise QueueFull(f"{len(ahead)} requests are waiting already; try again shortly.")

    async def forget(self, owner: str) -> None:
        for call in self._calls.values():
            if call.submit.owner == owner:  # it may go to a process yet that knows of nothing
                call.submit = replace(call.submit, keep=False)
        self._forgotten[owner] = id_ = next(self._ids)
        self._send(protocol.Forget(id_, owner))
        if not self._ready:
            await self._forget_files()

    def status(self) -> dict[str, Any]:
        stats, info, totals = self._stats, self.info, self._totals()
        classes = [p.name.lower() for p in base.Priority]
        return {
            "kind": "embedded",
            "ready": self.ready(),
            "trouble": self._trouble,
            "restarts": self._restarts,
            "pid": self._process.pid if self._process and self.ready() else None,
            "model": info.name if info else None,
            "window_tokens": info.budget.window_tokens if info else None,
            "details": info.details if info else {},
            "running": dict(zip(classes, stats.running if stats else (0, 0, 0), strict=True)),
            "waiting": dict(zip(classes, stats.waiting if stats else (0, 0, 0), strict=True)),
            "sequences_used": stats.sequences_used if stats else 0,
            "cells_used": stats.cells_used if stats else 0,
            "cells": stats.cells if stats else 0,
            "preemptions": totals.preemptions,
            "memory_bytes": self._rss_bytes,
            "snapshots": stats.snapshots if stats else 0,
            "snapshot_bytes": stats.snapshot_bytes if stats else 0,
            "restored_tokens": sum(own.restored for own in totals.classes),
            "totals": to_json(totals, classes),
            "checkpoints": stats.checkpoints if stats else 0,
            "checkpoint_bytes": stats.checkpoint_bytes if stats else 0,
            "checkpoint_hits": stats.checkpoint_hits if stats else 0,
        }

    def _totals(self) -> Totals:
        return self._before + self._stats.totals if self._stats else self._before

    # -- one request -----------------------------------------------------------------------------

    async def _events(self, call: _Call) -> AsyncIterator[Event]:
        while True:
            reply = await call.replies.get()
            match reply:
                case EngineError():
                    raise reply
                case protocol.Failed():
                    self._calls.pop(call.submit.id, None)
                    raise translation.error(reply)
                case protocol.Reading(done=done, of=of):
                    yield Reading(done, of)
                case protocol.Began():
                    yield Started(reply.prompt_tokens, reply.cached_tokens)
                case protocol.Waiting():
                    yield Waiting()
                case protocol.Text():
                    yield translation.delta(reply)
                    self._on_read(call)
                case protocol.Ended():
                    self._calls.pop(call.submit.id, None)
                    yield translation.finished(reply)
                    return

    def _on_text(self, call: _Call) -> None:
        call.texts += 1
        self._time_reader(call)

    def _time_reader(self, call: _Call) -> None:
        """The reader's time runs while the process waits for it: as far as the process was told."""
        held_back = call.texts - call.told >= UNREAD_MOST and not call.ended
        if held_back and not call.reader_timer:
            loop = asyncio.get_running_loop()
            call.reader_timer = loop.call_later(
                self._settings.reader_s, self._on_reader_stalled, call
            )

    def _on_read(self, call: _Call) -> None:
        """The process is told now and then, and no more once the request has ended there."""
        call.stop_reader_timer()
        call.read += 1
        if call.read - call.told >= UNREAD_MOST // 4 and not call.ended:
            call.told = call.read
            id_, priority = call.submit.id, call.submit.priority
            self._send(protocol.Read(id=id_, priority=priority, n_texts=call.read))
        self._time_reader(call)

    def _on_reader_stalled(self, call: _Call) -> None:
        if self._calls.get(call.submit.id) is call and not call.ended:
            self._send(Cancel(id=call.submit.id))
            sentence = f"The answer was not read for {self._settings.reader_s:g} seconds."
            self._fail(call, ReaderStalled(sentence))

    async def _until_loaded(self) -> None:
        try:
            async with asyncio.timeout(self._settings.start_s):
                while not self._ready:
                    await self._settled.wait()
                    if self._trouble:
                        raise self._unavailable()
        except TimeoutError as exc:
            raise EngineUnavailable("The model is still loading; try again shortly.") from exc

    def _on_taken(self, call: _Call) -> None:
        call.taken, call.put_back = True, False
        call.stop_queue_timer()

    def _on_put_back(self, call: _Call) -> None:
        if not call.put_back:
            call.put_back = True
            call.replies.put_nowait(protocol.Waiting(call.submit.id))
            self._time_queue(call)

    def _time_queue(self, call: _Call) -> None:
        loop = asyncio.get_running_loop()
        call.queue_timer = loop.call_later(self._settings.queue_s, self._on_queue_timeout, call)

    def _on_queue_timeout(self, call: _Call) -> None:
        if self._calls.get(call.submit.id) is call and call.waits:
            self._send(Cancel(id=call.submit.id))
            waited_s = self._settings.queue_s
            self._fail(
                call, QueueFull(f"The request waited for {waited_s:g} seconds in the queue.")
            )

    def _hand_over(self, call: _Call) -> None:
        # Background work waits for as long as there is something better to do.
        if not call.sent and call.submit.priority != base.Priority.BACKGROUND:
            self._time_queue(call)
        call.sent += 1
        self._send(call.submit)

    async def _forget_files(self) -> None:
        """Also where no process may ever come. One that does is told as well: it may have looked
        through the folder before."""
        for owner in list(self._forgotten) if self._settings.load.snapshots else ():
            try:
                await asyncio.to_thread(forget_files, Path(self._settings.load.snapshots), owner)
            except OSError as exc:
                log.warning("what is forgotten is still on disk: %s", exc)

    def _send(self, command: protocol.Command) -> None:
        # A process that just died: the supervisor sees to the calls, there is nobody to tell here.
        if self._process and self._process.stdin and not self._process.stdin.is_closing():
            self._process.stdin.write(protocol.encode(command))

    # -- the process -----------------------------------------------------------------------------

    async def _supervise(self) -> None:
        backoff_s, clock = BACKOFF_FIRST_S, asyncio.get_running_loop().time
        while True:
            started = clock()
            try:
                await self._run_process()
            except OSError as exc:
                log.error("the model process cannot be started: %s", exc)
                trouble = f"The model process cannot be started: {exc.strerror}."
                self._give_up(trouble, broken=True)
            await self._forget_files()
            if self._worked or clock() - started > HEALTHY_S:
                backoff_s = BACKOFF_FIRST_S
            self._restarts += 1
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MOST_S)

    async def _run_process(self) -> None:
        """Starts a process, serves it until it ends, leaves nothing of it behind."""
        replies = Replies(self._dispatch)
        process = await _start(replies)
        self._process, self._worked, self._killed_for = process, False, ""
        self._loaded = asyncio.Event()
        listener = asyncio.create_task(self._drain_stderr(process), name="embedded-stderr")
        watcher = asyncio.create_task(self._watch_over(process), name="embedded-watch")
        try:
            self._send(self._settings.load)
            for owner, id_ in self._forgotten.items():
                self._send(protocol.Forget(id_, owner))
            await replies.ended
        finally:
            watcher.cancel()
            loaded, self._ready = self._ready, False
            if not self._trouble:
                self._settled.clear()
            try:
                await _end(process)
                replies.close()
                await asyncio.wait([listener], timeout=LAST_WORDS_S)
            finally:
                listener.cancel()
                self._after_death(process, loaded=loaded)
                await asyncio.wait([watcher, listener], timeout=LAST_WORDS_S)

    async def _watch_over(self, process: asyncio.subprocess.Process) -> None:
        """Kills the process when it is stuck; its end is then seen like any other."""
        s = self._settings
        try:
            async with asyncio.timeout(s.start_s + s.stuck_s):
                await self._loaded.wait()
        except TimeoutError:
            self._kill(process, f"it did not load within {s.start_s + s.stuck_s:g} seconds")
            return
        every_s = min(LOOK_S, s.stuck_s / 4)
        self._watch = watch = Watch(every_s=every_s, stuck_s=s.stuck_s)
        trouble = ""
        while not trouble:
            await asyncio.sleep(every_s)
            trouble = watch.look()
        self._kill(process, trouble)

    def _kill(self, process: asyncio.subprocess.Process, why: str) -> None:
        log.error("the model process is stuck: %s; it is started again", why)
        self._killed_for = f"The model process was stuck ({why}); it is started again."
        with suppress(ProcessLookupError):
            process.kill()

    def _dispatch(self, reply: protocol.Reply) -> None:
        if isinstance(reply, protocol.Failed) and reply.trace:
            log.error("a request failed in the model process:\n%s", reply.trace)
        match reply:
            case protocol.Loaded():
                self._on_loaded(reply)
            case protocol.Fatal(message=message):
                if message != self._trouble:  # told once, however often it is tried again
                    log.error("the model cannot be loaded: %s", message)
                self._give_up(message, broken=True)
            case protocol.Stats():
                self._stats = reply
            case protocol.Pulse(threads=threads, rss_bytes=rss_bytes):
                self._rss_bytes = rss_bytes
                if self._watch:
                    self._watch.pulse(threads)
            case protocol.Counted(id=id_, counts=counts):
                _settle(self._counts.get(id_), list(counts))
            case protocol.Embedded(id=id_):
                vectors = Embeddings(reply.vectors, reply.prompt_tokens)
                _settle(self._embeddings.get(id_), vectors)
            case protocol.Held(id=id_):
                _settle(self._glances.get(id_), Warmth(reply.of, reply.in_memory, reply.on_disk))
            case protocol.Failed(id=id_) if future := self._future(id_):
                if not future.done():
                    future.set_exception(translation.error(reply))
            case protocol.Taken(id=id_):
                if call := self._calls.get(id_):
                    self._on_taken(call)
            case protocol.Waiting(id=id_):
                if call := self._calls.get(id_):
                    self._on_put_back(call)
            case protocol.Forgotten(id=id_):
                self._forgotten = {o: i for o, i in self._forgotten.items() if i != id_}
            case protocol.Cancelled():
                pass
            case protocol.Began() if not self._worked:
                self._worked = True
                self._dispatch(reply)
            case _:
                if call := self._calls.get(reply.id):
                    call.replies.put_nowait(reply)
                    if isinstance(reply, protocol.Text):
                        self._on_text(call)
                    call.ended = isinstance(reply, protocol.Ended | protocol.Failed)

    def _on_loaded(self, reply: protocol.Loaded) -> None:
        self.info = translation.model_info(reply)
        self._trouble = ""
        log.info("model %s loaded, window %d tokens", reply.name, reply.window_tokens)
        if warning := reply.details.get("warning"):
            log.warning("%s", warning)
        self._ready = True
        self._loaded.set()
        self._settled.set()
        # Those who waited in the last process's queue; who was never sent waits for `_settled`.
        for call in [c for c in self._calls.values() if c.sent and not c.taken]:
            self._hand_over(call)

    def _after_death(self, process: asyncio.subprocess.Process, *, loaded: bool) -> None:
        code = process.returncode
        self._before = self._totals()
        self._stats, self._watch, self._rss_bytes = None, None, 0
        if not self._trouble and not self._stopping:
            log.error("the model process ended (%s); last words: %s", code, list(self._stderr)[-3:])
            if not loaded:
                self._give_up(_loading_ended(code))
        sentence = "The model process ended while it worked on this request."
        crashed = EngineCrashed(self._killed_for or sentence)
        for call in list(self._calls.values()):
            # Twice in the queue of a process that died is once too often to be chance.
            if call.taken or call.sent > 1:
                self._fail(call, crashed)
        for future in self._futures():
            if not future.done():
                future.set_exception(EngineCrashed("The model process ended."))

    def _give_up(self, trouble: str, *, broken: bool = False) -> None:
        """There is no model for now: ends all requests and whoever waits for it to load. `broken`
        says that it will not come by itself.
        """
        self._trouble, self._broken, self._ready = trouble, broken, False
        self._settled.set()
        error = self._unavailable()
        for call in list(self._calls.values()):
            self._fail(call, error)
        for future in self._futures():
            if not future.done():
                future.set_exception(error)

    def _unavailable(self) -> EngineUnavailable:
        return (EngineBroken if self._broken else EngineUnavailable)(self._trouble)

    def _future(self, id_: int) -> asyncio.Future[Any] | None:
        """Who waits for the one reply to this command."""
        return self._counts.get(id_) or self._embeddings.get(id_) or self._glances.get(id_)

    def _futures(self) -> list[asyncio.Future[Any]]:
        return [*self._counts.values(), *self._embeddings.values(), *self._glances.values()]

    def _fail(self, call: _Call, error: EngineError) -> None:
        """Ends a call that its process will not: no later one may be handed it again."""
        self._calls.pop(call.submit.id, None)
        call.replies.put_nowait(error)

    async def _drain_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        # Not `readline`: it raises on a line longer than its buffer, and who then drains the pipe?
        while data := await process.stderr.read(READ_BYTES):
            for text in data.decode("utf-8", "replace").splitlines():
                self._stderr.append(text)
                log.debug("llama.cpp: %s", text)


def _settle(future: asyncio.Future[T] | None, value: T) -> None:
    """For whoever still waits."""
    if future and not future.done():
        future.set_result(value)


async def _start(replies: Replies) -> asyncio.subprocess.Process:
    """A model process that speaks to `replies`. Raises OSError."""
    ear, mouth = os.pipe()
    try:
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: replies, os.fdopen(ear, "rb", buffering=0))
        return await asyncio.create_subprocess_exec(
            *(sys.executable, *CHILD),
            stdin=asyncio.subprocess.PIPE,
            stdout=mouth,
            stderr=asyncio.subprocess.PIPE,
        )
    finally:
        os.close(mouth)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Closing stdin is the polite way; after a bounded wait there is no other word."""
    if process.stdin:
        process.stdin.close()
    try:
        async with asyncio.timeout(TERMINATE_S):
            await process.wait()
    except (TimeoutError, asyncio.CancelledError) as exc:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(exc, asyncio.CancelledError):
            raise


def _loading_ended(code: int | None) -> str:
    if code == -signal.SIGKILL:
        # Nobody but the kernel does that.
        return (
            "The model process was killed while it loaded the model, most likely for want of "
            "memory: a smaller n_ctx or engine.cache_tokens needs less."
        )
    return f"The model process ended while it loaded the model ({code})."


def _named(engine: EngineConfig, names: Collection[str]) -> dict[str, Any]:
    return {f.name: getattr(engine, f.name) for f in fields(engine) if f.name in names}
