"""How one server, as it was found, is spoken with: one exchange at a time for each call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, aclosing

import anyio
import anyio.lowlevel
import msgspec

from memory.context import SYSTEM
from proxy.engines import remote_wire as wire
from proxy.engines.base import (
    ContextOverflow,
    EngineCrashed,
    EngineError,
    EngineUnavailable,
    Generate,
    Place,
)
from proxy.engines.remote_ahead import Resident, Rotation, steps
from proxy.engines.remote_call import Call
from proxy.engines.remote_count import Counter
from proxy.engines.remote_errors import failure, failure_in_stream
from proxy.engines.remote_http import Answer, Http, bearer
from proxy.engines.remote_limits import refuse_what_is_missing
from proxy.engines.remote_probe import MARK, Found, Probe
from proxy.engines.remote_seats import Seats
from proxy.engines.remote_server import Kind, Server, get
from proxy.engines.remote_settings import RemoteSettings
from proxy.engines.remote_stream import DONE, BadStream, Frames, Timings, piece
from proxy.engines.remote_wire import Message

log = logging.getLogger("chatfold.engine")

TRAILER_S = 2.0
"""For what comes behind the finish_reason: usage, [DONE]."""
DRAIN_S = 0.25
"""For the last bytes behind [DONE], without which the connection cannot be used again."""
COUNT_S = 20.0
"""For the server to count. llama_cpp.server first finishes the prompt it has begun."""
MAX_ANSWER_BYTES = 64 << 20
"""Answers are held for slow readers, so that these do not hold up everybody else's turn."""


class _Completion(msgspec.Struct):
    """llama-server's answer to POST /completion."""

    timings: Timings


class Session:
    """Knows what the server is, and keeps books of what it holds: a new server is a new session."""

    def __init__(
        self, http: Http, found: Found, settings: RemoteSettings, counter: Counter
    ) -> None:
        self._http = http
        self.server: Server = found.server
        self.tokenizer = found.tokenizer
        self._settings = settings
        self._counter = counter
        self.seats = Seats(
            http,
            settings.upstream.root,
            n=found.server.places,
            n_files=settings.slot_files if found.server.saves_slots else 0,
        )
        self.rotation = Rotation()
        self.resident = Resident()
        self._takes_usage = False if self._is(Kind.LLAMA_CPP) else None
        """Whether the server takes `stream_options`; None before it answered for the first time."""

    def _is(self, kind: Kind) -> bool:
        return self.server.kind is kind

    def inherit(self, earlier: Session) -> None:
        """What outlives a restart of the same server: its files, and who speaks after whom."""
        self.seats.inherit(earlier.seats)
        self.rotation = earlier.rotation

    def lost(self) -> None:
        """Nothing is known any more of what the server holds."""
        self.resident.clear()
        self.seats.slots.clear()

    def forget(self, owner: str) -> None:
        """Nothing of this owner's prompts stays in the books. Slots are not emptied here."""
        self.rotation.forget(owner)
        if self.resident.whose[0] == owner:
            self.resident.clear()
        if self.server.saves_slots:
            self.seats.forget(owner)

    async def carry_out(self, call: Call) -> None:
        """One attempt, from the request to the end of the answer. Raises EngineError; the answer's
        parts are in `call`."""
        # What was checked before may have been checked for another server, or for none.
        refuse_what_is_missing(call.request, self.server.kind)
        if not self._is(Kind.LLAMA_SERVER):
            return await self._ask(call, None)
        request = call.request
        async with self.seats.seat(request.conversation, request.owner) as slot:
            try:
                await self._ask(call, slot)
            finally:
                if call.forgotten and slot is not None:
                    self.seats.left_behind(request.conversation, slot)

    def place(self, owner: str, conversation: str) -> Place | None:
        """See KeepsPlaces. llama_cpp.server's sequence is in nobody's books while it is written."""
        if self._is(Kind.LLAMA_SERVER):
            return self.seats.place(owner, conversation)
        whose = self.resident.whose
        if not self._is(Kind.LLAMA_CPP) or not whose[1]:
            return None
        return Place.SEQUENCE if whose == (owner, conversation) else Place.COLD

    def spoke(self, call: Call) -> None:
        """Takes note of whose prompt the server is likely to be asked for next."""
        request = call.request
        if call.forgotten:
            return self.resident.clear()
        if self._is(Kind.LLAMA_CPP) and request.conversation and request.keep:
            if not call.warms:
                self.rotation.spoke(request.conversation)
            said = [_assistant(call.text)] if call.text else []
            messages = [*wire.messages(request.context), *said]
            self.rotation.knows(request.conversation, messages, owner=request.owner)

    async def _ask(self, call: Call, slot: int | None) -> None:
        call.estimate_tokens = await self._estimate(call.request)
        if call.warms and self._is(Kind.LLAMA_SERVER) and await self._warm_slot(call, slot):
            return
        if call.warms and self._is(Kind.LLAMA_CPP):
            messages = wire.messages(call.request.context)
            return await self.warm_in_steps(call, messages, whose=_whose(call))
        await self._stream(call, slot)
        if not call.started and call.request.raw is None:
            await self._hear_why(call)
        call.check_complete()
        if self._is(Kind.LLAMA_CPP):
            await self._count_answer(call)

    # -- an answer -------------------------------------------------------------------------------

    async def _stream(self, call: Call, slot: int | None) -> None:
        """A server that never took one is asked once more without `stream_options` when it
        refuses: it may not know that field."""
        self.resident.clear()
        for with_usage in (True, False) if self._takes_usage is None else (self._takes_usage,):
            body = self._body(call, with_usage=with_usage, slot=slot)
            async with self._post(call, body) as answer:
                if answer.status == 200:
                    self._takes_usage = with_usage
                    return await self._read(call, answer)
                failed = self._failure(answer.status, await answer.body())
            if answer.status not in (400, 422):
                break
        raise failed

    async def _hear_why(self, call: Call) -> None:
        """Asks for one token in one piece after a stream that ended before it began:
        llama_cpp.server says only then what was wrong, a prompt over its window above all."""
        body = wire.body(
            call.request,
            server=self.server,
            messages=wire.conversation(call.request),
            max_tokens=1,
            stream=False,
        )
        async with self._post(call, body) as answer:
            if answer.status != 200:
                raise self._failure(answer.status, await answer.body())

    def _failure(self, status: int, received: bytes) -> EngineError:
        return failure(status, received, window_tokens=self.server.window_tokens)

    def _post(self, call: Call, body: bytes) -> AbstractAsyncContextManager[Answer]:
        upstream = self._settings.upstream
        url = upstream.chat if call.request.raw is None else upstream.texts
        return self._http.exchange("POST", url, body, headers=self._headers(call))

    def _headers(self, call: Call) -> dict[str, str]:
        """A router that knows prefixes may send a conversation to where it was before."""
        request, headers = call.request, {}
        if request.conversation:
            headers[self._settings.conversation_header] = request.conversation
        if self._settings.forwards_key and request.client_key:
            headers |= bearer(request.client_key)
        return headers

    def _body(self, call: Call, *, with_usage: bool, slot: int | None) -> bytes:
        wanted = call.request.max_tokens
        # As far as the window has room for it: servers refuse more.
        room = max(1, self.server.window_tokens - call.estimate_tokens)
        return wire.body(
            call.request,
            server=self.server,
            messages=wire.conversation(call.request),
            max_tokens=None if wanted is None else min(wanted, room),
            with_usage=with_usage,
            slot=slot,
        )

    async def _read(self, call: Call, answer: Answer) -> None:
        """To the answer's end. What breaks off behind it takes nothing away from it."""
        try:
            await self._read_frames(call, answer)
        except BadStream as exc:
            raise EngineError(f"The upstream server's stream cannot be read: {exc}.") from exc
        except EngineUnavailable:
            if not call.finish_reason:
                raise

    async def _read_frames(self, call: Call, answer: Answer) -> None:
        frames, n_bytes = Frames(), 0
        async with aclosing(answer.chunks()) as received:
            async for data in received:
                n_bytes += len(data)
                if n_bytes > MAX_ANSWER_BYTES:
                    raise EngineError("The upstream server's answer has no end.")
                for frame in frames.feed(data):
                    wait_s = self._on_frame(call, frame)
                    call.ticket.scope.deadline = anyio.current_time() + wait_s
                # The reader's turn: what comes in one packet would else be read to its end first.
                await anyio.lowlevel.checkpoint()

    def _on_frame(self, call: Call, frame: bytes) -> float:
        """Returns how long the next one may take, in seconds."""
        if frame == DONE:
            return DRAIN_S
        read = piece(frame)
        if read.failed is not None:
            window_tokens = self.server.window_tokens
            failed = failure_in_stream(read.failed, window_tokens=window_tokens)
            raise _mid_answer(failed, call)
        call.usage = read.usage or call.usage
        call.timings = read.timings or call.timings
        if read.opens and not call.finish_reason:
            call.take(read, anyio.current_time())
        return TRAILER_S if call.finish_reason else self._settings.between_tokens_s

    # -- llama-server: slots ---------------------------------------------------------------------

    async def _warm_slot(self, call: Call, slot: int | None) -> bool:
        """Evaluates a context up to where the next message will stand, and generates nothing. False
        where the server does not say what its prompts look like."""
        prompt = await self._prompt(wire.messages(call.request.context))
        if not prompt:
            return False
        fields = {"prompt": prompt, "n_predict": 0, "stream": False} | wire.on_slot(slot)
        url = self._settings.upstream.root + "/completion"
        body, headers = msgspec.json.encode(fields), self._headers(call)
        async with self._http.exchange("POST", url, body, headers=headers) as answer:
            received = await answer.body()
        if answer.status != 200:
            raise failure(answer.status, received)
        timings = _decoded(received, _Completion).timings
        cached, evaluated = timings.cache_n or 0, timings.prompt_n or 0
        now = anyio.current_time()
        call.warmed(prompt_tokens=cached + evaluated, cached_tokens=cached, now=now)
        if slot is not None:
            conversation = call.request.conversation
            await self.seats.save(slot, conversation, n_tokens=cached + evaluated)
        return True

    async def _prompt(self, messages: list[Message]) -> str:
        """What stands before the next message of the user. "" where that cannot be said."""
        probe = Probe(self._http, self._settings.upstream)
        if not messages or messages[-1]["role"] != "assistant":
            return await probe.rendered(messages)
        whole = await probe.rendered([*messages, _user(MARK)])
        before, mark, _ = whole.rpartition(MARK)
        return before if mark else ""

    # -- llama_cpp.server: one sequence ----------------------------------------------------------

    async def warm_in_steps(
        self, call: Call, messages: list[Message], *, whose: tuple[str, str]
    ) -> None:
        """Evaluates a prompt step by step: a request that comes meanwhile waits for one step, as
        the server does not leave a prompt before its end. Steps that were done stay done."""
        known, total = self.resident.shared_chars(messages), wire.n_chars(messages)
        if not self.resident.holds(messages):
            for step in steps(messages, known_chars=known):
                await self._evaluate(call, step, whose)
        # Not reported: the share of the text that was there already.
        prompt = call.estimate_tokens
        cached = prompt * known // max(1, total)
        call.warmed(prompt_tokens=prompt, cached_tokens=cached, now=anyio.current_time())

    async def _evaluate(self, call: Call, messages: list[Message], whose: tuple[str, str]) -> None:
        wait_s = self._settings.first_token_s
        call.ticket.scope.deadline = anyio.current_time() + wait_s
        body = wire.body(
            call.request, server=self.server, messages=messages, max_tokens=1, stream=False
        )
        # Whoever is interrupted here leaves a server that goes on to the end of this prompt.
        self.resident.clear()
        async with self._post(call, body) as answer:
            received = await answer.body()
        if answer.status != 200:
            raise failure(answer.status, received)
        self.resident.set(messages, whose=whose)
        usage = get(msgspec.json.decode(received), "usage", "prompt_tokens")
        call.estimate_tokens = usage if isinstance(usage, int) else call.estimate_tokens

    async def _count_answer(self, call: Call) -> None:
        """This server reports no usage in a stream. Still in the call's turn: a question in
        somebody else's would break off an answer."""
        said = [_assistant(call.text)]
        self.resident.set([*wire.messages(call.request.context), *said], whose=_whose(call))
        if call.completion_tokens is None and self.tokenizer and not call.warms:
            (call.completion_tokens,) = await self.tokenizer.count([call.text])

    # -- how long a prompt is --------------------------------------------------------------------

    async def count(self, texts: Sequence[str]) -> list[int]:
        """With the server's tokenizer where it has one and answers within COUNT_S; else an
        estimate. Raises EngineUnavailable."""
        if self.tokenizer:
            with anyio.move_on_after(COUNT_S):
                return await self._counter.exact(self.tokenizer, texts)
        return await self._counter.estimate(texts)

    async def _estimate(self, request: Generate) -> int:
        """Tokens of the prompt, as far as can be said from outside."""
        if isinstance(request.raw, tuple):
            return len(request.raw)
        if request.raw is not None:
            return sum(await self.count([request.raw]))
        context, template = request.context, self.server.template
        shape = context.shape
        texts = shape.verbatim_tokens + shape.summary_tokens + shape.system_tokens
        if not texts:
            texts = sum(await self.count([m.text for m in context.messages]))
        with_system = context.messages[:1] != () and context.messages[0].role == SYSTEM
        return texts + template.tokens(messages=len(context.messages), with_system=with_system)

    async def learn(self, call: Call) -> None:
        """From an answer whose usage came with it, where the server counts only then."""
        told = call.usage.prompt_tokens if call.usage else None
        if told and not self.tokenizer and call.request.raw is None:
            await self._counter.learn([m.text for m in call.request.context.messages], told)


def _whose(call: Call) -> tuple[str, str]:
    return call.request.owner, call.request.conversation


def _mid_answer(error: EngineError, call: Call) -> EngineError:
    """An overflow after some text is no reason to begin anew: the reader has the text."""
    return EngineError(str(error)) if call.text and isinstance(error, ContextOverflow) else error


def _decoded(received: bytes, kind: type[_Completion]) -> _Completion:
    try:
        return msgspec.json.decode(received, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise EngineCrashed("The upstream server's answer cannot be read.") from exc


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
