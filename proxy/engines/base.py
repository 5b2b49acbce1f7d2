"""The Engine protocol: what the rest may ask of a model, whatever runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Protocol, runtime_checkable

from memory.context import Context
from memory.ports import Budget, ModelGone


# EngineError
# ├── EngineUnavailable     not there now: starting, crashed, unreachable; heals by itself
# │   ├── EngineCrashed     it went away under this very request
# │   └── EngineBroken      it cannot start as it is set up: somebody must see to it
# ├── QueueFull             too many requests wait; try again later
# ├── ReaderStalled         nobody took the answer for too long
# ├── ContextOverflow       the prompt does not fit the window (carries the exact count)
# └── RequestRefused        the engine cannot do what was asked (permanent)
#
# EngineUnavailable and QueueFull are memory's ModelGone too: background work tries again later.
class EngineError(Exception):
    """Anything an engine raises. `str()` is one sentence that a user may read."""


class EngineUnavailable(EngineError, ModelGone):
    """The engine is not there now: starting, restarting or unreachable. Heals by itself."""


class EngineCrashed(EngineUnavailable):
    """The engine went away while it served this request."""


class EngineBroken(EngineUnavailable):
    """The engine cannot start as it is set up. It is tried again all the same, ever more slowly."""


class QueueFull(EngineError, ModelGone):
    """The bounded queue is full."""


class ReaderStalled(EngineError):
    """Whoever asked did not read the answer for so long that the engine gave it up."""


class ContextOverflow(EngineError):
    """The prompt is longer than the window allows. Nothing was evaluated."""

    def __init__(self, *, prompt_tokens: int, window_tokens: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens, the model's window holds {window_tokens}."
        )
        self.prompt_tokens = prompt_tokens
        self.window_tokens = window_tokens


class RequestRefused(EngineError):
    """The engine cannot do what was asked, now or later. `param` names the field to blame, if one
    is.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Priority(IntEnum):
    """Who goes first. Lower runs before higher; a lower class interrupts a higher one."""

    CHAT = 0
    SIDE = 1
    BACKGROUND = 2


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Names and meanings as in the OpenAI API, top_k, min_p and
    repeat_penalty as in llama.cpp. `temperature` 0 is greedy. `seed` None draws a fresh one.
    `logprobs` None gives none; a number gives those of each token and of that many others."""

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class JsonFormat:
    """The answer is JSON: any object, or what a JSON schema (as text) allows."""

    schema: str = ""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """The answer calls tools of these names (of Context.tools), with `one_call` exactly one."""

    names: tuple[str, ...]
    one_call: bool = False


@dataclass(frozen=True, slots=True)
class Generate:
    """One request to an engine.

    `max_tokens` None means as many as the window holds; 0 evaluates the prompt and generates
    nothing (warming): then the prompt ends after the last message, without an answer's header.
    `keep` says that the evaluated tokens are worth keeping for a later request (a conversation's
    own context); without it the engine frees them at the end. `conversation` is a stable name of
    the conversation whose context this is, "" for a request that is of none. `client_key` is the
    key that the client sent to the proxy; it goes on to a server only where that is asked for.

    `n` answers are given to one prompt, which is evaluated once; the first one is what is kept. A
    seed is that of the first, the next ones count up from it. `raw`, a text or token ids, takes the
    place of the context: no template, and special tokens written in the text count as such.
    Without `thinks` a model that would reason first is asked for its answer at once.
    """

    owner: str
    context: Context
    priority: Priority
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    keep: bool = True
    conversation: str = ""
    n: int = 1
    format: JsonFormat | CallFormat | None = None
    raw: str | tuple[int, ...] | None = None
    client_key: str = field(default="", repr=False)
    thinks: bool = True
    tells_progress: bool = False
    """Whether Reading is wanted, where the engine can tell."""


@dataclass(frozen=True, slots=True)
class Started:
    """First event: the prompt is evaluated, the first token is about to be chosen."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Before Started, now and then: `done` of the prompt's `of` tokens are evaluated or were in the
    cache. Only where the request asked for it."""

    done: int
    of: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """Between Started and Finished: the answer stands still, for its cells or its turn are
    another's. It goes on without a word; its next token may take as long as its first one. Not told
    of background work.
    """


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's bytes, its log probability, and the likeliest tokens at its place with theirs.

    The model's own probabilities: before bias, penalties, temperature and cuts.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """Some more text of answer number `index`. Never half a character, never a part of a stop
    string.

    `logprobs` holds, in order, the tokens whose last character is in the text given out by now; a
    token that a stop string cuts comes last of all, and tokens behind it never.
    """

    text: str
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event. `finish_reason` is "stop" or "length"; `others` holds those of the answers
    behind the first. `completion_tokens` counts all answers.

    `token_ids` are the tokens of the answer's text as generated (without the end-of-turn token),
    little-endian int32, or None where the engine does not know them or where a stop string cut the
    text in the middle of a token. Times are seconds on the engine's own clock.
    """

    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    token_ids: bytes | None
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    others: tuple[str, ...] = ()
    token_ends: bytes = b""
    """For each token generated, how many characters of the text are whole behind it (int32), -1
    where it ends inside one."""
    reasoning_tokens: int = 0


Event = Reading | Started | Waiting | Delta | Finished


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors as little-endian float32, one an input; of length 1 where the model runs here."""

    vectors: tuple[bytes, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Warmth:
    """How much of a prompt needs no evaluation: of its `of` tokens the first `in_memory` are in the
    KV cache, the first `on_disk` in a snapshot that a copy brings back."""

    of: int
    in_memory: int
    on_disk: int


class Place(StrEnum):
    """Where a conversation was left on another program's server, by the books kept of it here."""

    SLOT = "slot"
    FILE = "file"
    SEQUENCE = "sequence"
    COLD = "cold"


@runtime_checkable
class KeepsPlaces(Protocol):
    """An engine that cannot tell how much is warm, but where each conversation was left."""

    def place(self, owner: str, conversation: str) -> Place | None:
        """Without asking the server. None where the books say nothing; of another owner's
        conversation they say COLD."""
        ...


@dataclass(frozen=True, slots=True)
class Thinking:
    """How the model sets its reasoning apart. With `first` an answer begins inside of it: the
    prompt ends with the opening tag."""

    opening: str = "<think>"
    closing: str = "</think>"
    first: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known about the model once it is loaded.

    `fingerprint` names model and tokenizer: token ids and counts are valid under the same one only.
    `default_system` is the system prompt that the chat template puts in when there is none.
    """

    name: str
    fingerprint: str
    budget: Budget
    default_system: str
    details: dict[str, Any] = field(default_factory=dict)
    thinking: Thinking = Thinking()
    n_vocab: int = 0
    """Its token ids are the numbers below; 0 where that is not known."""


class Engine(Protocol):
    """A model behind a door. One instance serves the whole proxy."""

    @property
    def info(self) -> ModelInfo | None:
        """The model as last seen, None before it was loaded for the first time."""
        ...

    async def start(self) -> None:
        """Begins to load; returns at once. `ready` tells when it is done."""
        ...

    async def stop(self) -> None:
        """Ends every request with EngineUnavailable and frees all resources."""
        ...

    async def model(self) -> ModelInfo:
        """Waits (bounded) until the model is loaded. Raises EngineUnavailable."""
        ...

    def ready(self) -> bool:
        """Whether a request would be taken up now."""
        ...

    async def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself. Raises EngineUnavailable."""
        ...

    async def embed(self, inputs: Sequence[str | tuple[int, ...]]) -> Embeddings:
        """A vector for each text or list of token ids; behind every chat. Raises EngineError."""
        ...

    async def count_tools(self, tools: str) -> int:
        """Tokens that these tools (Context.tools) add to a prompt. Raises EngineUnavailable."""
        ...

    @property
    def tells_warmth(self) -> bool:
        """Whether `warmth` can be asked: not where the cache is another program's."""
        ...

    async def warmth(self, owner: str, context: Context) -> Warmth:
        """Of this owner's cache. Answered between two batches; changes nothing. The caller bounds
        the wait. Raises EngineError."""
        ...

    def check(self, request: Generate) -> None:
        """Raises RequestRefused if it is known at once that this cannot be done."""
        ...

    def generate(self, request: Generate) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """`async with engine.generate(r) as events: async for event in events`.

        Leaving the block, however it is left, stops the work. Raises EngineError, from the
        iterator too.
        """
        ...

    async def forget(self, owner: str) -> None:
        """Nothing of this owner's prompts stays in the engine, in memory or on disk. Returns before
        it is done; what a running request needs goes when it ends.
        """
        ...

    def status(self) -> dict[str, Any]:
        """Facts for /api/status: plain JSON values."""
        ...
