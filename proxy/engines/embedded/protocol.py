"""Frames between the proxy and its model process: msgpack, each behind a 4-byte length. No I/O.

Parent to child: Load first, then the other commands in any order.
Child to parent: Loaded or Fatal first, then events that carry the request's id.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from proxy.engines.embedded.totals import Totals

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 256 << 20


class Load(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Which model, and how: the one place where a setting of the model process stands. A field
    with the name of a key of `[engine]` holds what that key says (`EmbeddedEngine.from_config`
    copies by name) and has the same default. Lengths are tokens.
    """

    path: str
    n_ctx: int = 0
    """The window of one request; 0 is the model's own, bounded."""
    cache_tokens: int = 0
    """All KV cells."""
    sequences: int = 8
    n_batch: int = 512
    n_ubatch: int = 128
    swa_full: bool = False
    threads: int = 0
    threads_batch: int = 0
    gpu_layers: int = 0
    main_gpu: int = 0
    split_mode: str = "layer"
    tensor_split: tuple[float, ...] = ()
    flash_attention: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    mmap: bool = True
    mlock: bool = False
    rope_scaling: str = "auto"
    rope_freq_base: float = 0.0
    rope_freq_scale: float = 0.0
    yarn_orig_ctx: int = 0
    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = -1.0
    yarn_beta_fast: float = -1.0
    yarn_beta_slow: float = -1.0
    lora: tuple[str, ...] = ()
    chat_template: str = ""
    trace_path: str = ""
    snapshots: str = ""
    """Folder for snapshots of sequences; "" keeps none."""
    snapshot_bytes: int = 2**30


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One message: `parts` are tokenized one by one, unless `token_ids` (int32), where they are
    given and the model has such tokens, stand for all of them.
    """

    role: str
    parts: tuple[str, ...]
    token_ids: bytes | None = None


class Submit(msgspec.Struct, frozen=True, tag=True):
    id: int
    owner: str
    priority: int
    messages: tuple[Part, ...]
    continues: bool
    max_tokens: int | None
    keep: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    repeat_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    stop: tuple[str, ...]
    unread_most: int = 256
    """Texts that may be on their way to a reader that has not taken them: with so many of them
    the request is left out of the batches."""
    tools: str = ""
    """A JSON list for the chat template, "" for none."""
    thinks: bool = True
    raw: str | tuple[int, ...] | None = None
    n: int = 1
    logprobs: int | None = None
    grammar: str = ""
    """GBNF that the answer is held to."""
    must_call: tuple[str, ...] = ()
    """Names of tools; the answer is held to calls of them, with `one_call` to one."""
    one_call: bool = False
    tells_progress: bool = False


class Cancel(msgspec.Struct, frozen=True, tag=True):
    id: int


class Read(msgspec.Struct, frozen=True, tag=True):
    """The reader of this request has taken so many texts, all in all. Not sent behind its end."""

    id: int
    priority: int
    n_texts: int


class Count(msgspec.Struct, frozen=True, tag=True):
    id: int
    texts: tuple[str, ...]


class CountTools(msgspec.Struct, frozen=True, tag=True):
    """Answered by Counted with one number: what the tools add to a prompt."""

    id: int
    tools: str


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Texts or token ids, each to become one vector."""

    id: int
    inputs: tuple[str | tuple[int, ...], ...]


class Look(msgspec.Struct, frozen=True, tag=True):
    """How much of this prompt is in the KV cache, or on disk? Answered by Held."""

    id: int
    owner: str
    messages: tuple[Part, ...]
    tools: str = ""


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Everything of this owner leaves the KV cache and the disk. Answered by Forgotten."""

    id: int
    owner: str


Command = Load | Submit | Cancel | Read | Count | CountTools | Embed | Look | Forget


class Loaded(msgspec.Struct, frozen=True, tag=True):
    name: str
    fingerprint: str
    window_tokens: int
    message_tokens: int
    base_tokens: int
    default_system: str
    details: dict[str, str | int | float | bool]
    think_tags: tuple[str, str] = ("<think>", "</think>")
    thinks_first: bool = False
    """The header of an answer opens its reasoning."""
    n_vocab: int = 0


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The model could not be loaded. The process ends after this frame."""

    message: str


class Taken(msgspec.Struct, frozen=True, tag=True):
    """The request left the queue. If the process dies now, this request may be why."""

    id: int


class Reading(msgspec.Struct, frozen=True, tag=True):
    """So much of the prompt is evaluated; for requests that asked for it, twice a second at
    most."""

    id: int
    done: int
    of: int


class Began(msgspec.Struct, frozen=True, tag=True):
    id: int
    prompt_tokens: int
    cached_tokens: int


class Waiting(msgspec.Struct, frozen=True, tag=True):
    """The request had begun to answer, and none of its answers is at work any more though one is
    left: until it is Taken again. Not told of background work.
    """

    id: int


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


class Text(msgspec.Struct, frozen=True, tag=True):
    id: int
    text: str
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


class Ended(msgspec.Struct, frozen=True, tag=True):
    id: int
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    token_ids: bytes | None
    queued_s: float
    prefill_s: float
    decode_s: float
    others: tuple[str, ...] = ()
    """Finish reasons of the choices behind the first."""
    token_ends: bytes = b""
    """Of the first choice: see base.Finished."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`kind` is "overflow" (prompt_tokens and window_tokens hold), "refused" (`param` may hold) or
    "engine". `trace` is for the log: where in the code it failed, if nobody thought of that."""

    id: int
    kind: str
    message: str
    prompt_tokens: int = 0
    window_tokens: int = 0
    param: str = ""
    trace: str = ""


class Cancelled(msgspec.Struct, frozen=True, tag=True):
    """The request is out of the engine: nothing of it runs any more."""

    id: int


class Counted(msgspec.Struct, frozen=True, tag=True):
    id: int
    counts: tuple[int, ...]


class Pulse(msgspec.Struct, frozen=True, tag=True):
    """Sent every second, whatever the process does. For each of its two threads (the model's, and
    the one that reads commands): how many steps it has taken so far, and whether it waits for work.
    `rss_bytes` is the memory of the process.
    """

    threads: tuple[tuple[int, bool], ...]
    rss_bytes: int


class Embedded(msgspec.Struct, frozen=True, tag=True):
    """A vector for each input, as float32."""

    id: int
    vectors: tuple[bytes, ...]
    prompt_tokens: int


class Held(msgspec.Struct, frozen=True, tag=True):
    id: int
    of: int
    in_memory: int
    on_disk: int


class Forgotten(msgspec.Struct, frozen=True, tag=True):
    """What requests that came before still need goes when they end."""

    id: int


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Sent after each change of the queue: who runs, who waits, how full the cache is."""

    running: tuple[int, ...]
    """Requests running, one number a class."""
    waiting: tuple[int, ...]
    sequences_used: int
    cells_used: int
    cells: int
    totals: Totals
    snapshots: int = 0
    snapshot_bytes: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    checkpoint_hits: int = 0


Reply = (
    Loaded
    | Fatal
    | Pulse
    | Taken
    | Reading
    | Began
    | Waiting
    | Text
    | Ended
    | Failed
    | Cancelled
    | Counted
    | Embedded
    | Held
    | Forgotten
    | Stats
)

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def encode(frame: Command | Reply) -> bytes:
    body = _encoder.encode(frame)
    return LENGTH.pack(len(body)) + body


class Frames:
    """Bytes in, frame bodies out. Raises ValueError on a length no honest peer would send."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes")
            end = LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            yield body


def command(body: bytes) -> Command:
    return _commands.decode(body)


def reply(body: bytes) -> Reply:
    return _replies.decode(body)
