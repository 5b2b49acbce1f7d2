"""The one door to llama.cpp: a loaded model, its KV cache, one batch at a time, and samplers.

Nothing here is for concurrent use but `tokenize` and `Abort.set`: the vocabulary is read-only, and
the abort flag is a byte that llama.cpp reads for itself.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import llama_cpp as C
import numpy as np

from proxy.engines.embedded.files import template_source
from proxy.engines.embedded.loading import (
    load_adapters,
    load_model,
    new_context,
    new_embedding_context,
    set_adapters,
    window,
)
from proxy.engines.embedded.protocol import Load

VOCAB_SPM = 1
"""LLAMA_VOCAB_TYPE_SPM: a tokenizer that puts a space before every text it is given."""

ABORTED = 2
NO_SLOT = 1

PART = C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY

TOKEN_BYTES = 4
"""Width of a token id where ids are stored."""


class DecodeError(Exception):
    """llama_decode failed for good on this batch."""


class Abort:
    """A flag that ends a running llama_decode within one graph node, set from any thread.

    llama.cpp asks a C function of the type `bool (*)(void *)` before each node. A Python function
    there would have to win the interpreter's lock a thousand times a batch; libc's `strlen` on a
    two-byte buffer answers the same question ("is the first byte set?") without it.
    """

    def __init__(self) -> None:
        self._flag = ctypes.create_string_buffer(2)
        self._libc = ctypes.CDLL(None)
        self.callback = ctypes.cast(self._libc.strlen, C.ggml_abort_callback)
        self.address = ctypes.cast(self._flag, ctypes.c_void_p)

    def set(self) -> None:
        self._flag[0] = b"\x01"

    def clear(self) -> None:
        self._flag[0] = b"\x00"


class Llama:
    """A model and one context over a unified KV cache. Raises LoadError and FileError."""

    def __init__(self, load: Load) -> None:
        C.llama_backend_init()
        self._settings = load
        self._model = load_model(load)
        self._template = template_source(load.chat_template)
        self.vocab = C.llama_model_get_vocab(self._model)
        self.window_tokens = window(self._model, load.n_ctx)
        self.cells = max(load.cache_tokens or 2 * self.window_tokens, self.window_tokens)
        self._n_sequences = load.sequences
        self.abort = Abort()
        self._context, self.flash_attention = new_context(self._model, load, self.cells)
        self._adapters = load_adapters(self._model, load)
        set_adapters(self._context, self._adapters)
        self._memory = C.llama_get_memory(self._context)
        self.n_batch = int(C.llama_n_batch(self._context))
        self.n_ubatch = int(C.llama_n_ubatch(self._context))
        self._batch = C.llama_batch_init(self.n_batch, 0, 1)
        self._seq_ids = [self._batch.seq_id[i] for i in range(self.n_batch)]
        self.n_vocab = int(C.llama_vocab_n_tokens(self.vocab))
        self._row = ctypes.c_float * self.n_vocab
        self._pieces: dict[int, bytes] = {}
        self._revealed: frozenset[int] = frozenset()
        self.choosing_since = 0.0
        """When llama.cpp was given a grammar to choose a token by; 0.0 while it is not at it."""
        self._window = int(C.llama_model_n_swa(self._model))
        self.rolls_back, self.keeps_parts, self.part_is_all = True, False, False
        if self._memory:
            self._probe(swa_full=load.swa_full)
        if self.rolls_back:
            # A recurrent state is overwritten as it is read, and llama.cpp moves those of other
            # sequences about while it evaluates a batch: breaking off in there spoils them.
            C.llama_set_abort_callback(self._context, self.abort.callback, self.abort.address)

    @classmethod
    def for_texts(cls, load: Load) -> Llama:
        """One that knows texts and tokens and nothing else: without weights and context. Never
        closed; raises as the other does."""
        llama = cls.__new__(cls)
        llama._model = load_model(load, vocab_only=True)
        llama._template = template_source(load.chat_template)
        llama.vocab = C.llama_model_get_vocab(llama._model)
        llama.n_vocab = int(C.llama_vocab_n_tokens(llama.vocab))
        llama._pieces, llama._revealed = {}, frozenset()
        return llama

    @property
    def context(self) -> C.llama_context_p:
        return self._context

    @property
    def model(self) -> C.llama_model_p:
        return self._model

    @property
    def generates(self) -> bool:
        """Whether it can write: models for embeddings alone have no memory of what they read."""
        return bool(self._memory)

    @property
    def pooling(self) -> int:
        """How the model makes one vector of many; LLAMA_POOLING_TYPE_NONE if it does not."""
        return int(C.llama_pooling_type(self._context))

    @property
    def embedding_size(self) -> int:
        return int(C.llama_model_n_embd_out(self._model))

    @property
    def trained_tokens(self) -> int:
        return int(C.llama_model_n_ctx_train(self._model))

    def embedding_context(self, n_tokens: int) -> C.llama_context_p:
        """A second context, for one text at a time, under the settings of the first. The caller's
        to free. Raises LoadError."""
        context = new_embedding_context(self._model, self._settings, n_tokens)
        set_adapters(context, self._adapters)
        C.llama_set_abort_callback(context, self.abort.callback, self.abort.address)
        return context

    def close(self) -> None:
        """Frees all memory. Nothing else may be called afterwards."""
        C.llama_batch_free(self._batch)
        C.llama_free(self._context)
        C.llama_model_free(self._model)

    # -- the model -------------------------------------------------------------------------------

    def meta(self, key: str) -> str:
        buffer = ctypes.create_string_buffer(1 << 10)
        n = C.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if n >= 0 else ""

    def description(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        C.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    def chat_template(self) -> str:
        """The one that the settings name, else the model's own, else ""."""
        if self._template:
            return self._template
        template = C.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", "replace") if template else ""

    def special_text(self, token: int) -> str:
        return self._piece(token, special=True).decode("utf-8", "replace") if token >= 0 else ""

    @property
    def bos(self) -> int:
        return int(C.llama_vocab_bos(self.vocab))

    @property
    def eos(self) -> int:
        return int(C.llama_vocab_eos(self.vocab))

    @property
    def adds_bos(self) -> bool:
        return bool(C.llama_vocab_get_add_bos(self.vocab))

    def is_end(self, token: int) -> bool:
        return bool(C.llama_vocab_is_eog(self.vocab, token))

    def is_control(self, token: int) -> bool:
        """Whether the token is markup: it has a text for llama.cpp and none for who reads."""
        return bool(self._markup[token])

    @cached_property
    def markup_tokens(self) -> Any:
        """The control tokens that neither end a turn nor are revealed."""
        return np.flatnonzero(self._markup)

    @cached_property
    def _markup(self) -> Any:
        found = np.zeros(self.n_vocab, np.bool_)
        for token in range(self.n_vocab):
            hidden = token not in self._revealed and not self.is_end(token)
            found[token] = hidden and C.llama_vocab_is_control(self.vocab, token)
        return found

    # -- text and tokens -------------------------------------------------------------------------

    def tokenize(self, text: str, *, markup: bool, first: bool = False) -> list[int]:
        """Tokens of a piece of a prompt. `markup`: special tokens written in it count as such."""
        if not first and C.llama_vocab_type(self.vocab) == VOCAB_SPM:
            # The space that this tokenizer puts first belongs to the start of a prompt alone.
            # Behind a newline, which is a token of its own, nothing is put in.
            newline = self._tokenize("\n", markup=markup)
            return self._tokenize("\n" + text, markup=markup)[len(newline) :]
        return self._tokenize(text, markup=markup)

    def tokenize_whole(self, text: str) -> list[int]:
        """A text by itself, with the tokens that the model wants at its ends."""
        return self._tokenize(text, markup=False, ends=True)

    def _tokenize(self, text: str, *, markup: bool, ends: bool = False) -> list[int]:
        data = text.encode("utf-8", "replace")
        room = len(data) + 2
        while True:
            out = (C.llama_token * room)()
            n = C.llama_tokenize(self.vocab, data, len(data), out, room, ends, markup)
            if n >= 0:
                return list(out[:n])
            room = -n

    def piece(self, token: int) -> bytes:
        """The bytes of a generated token. Control tokens are nothing, but for revealed ones."""
        if token not in self._pieces:
            self._pieces[token] = self._piece(token, special=token in self._revealed)
        return self._pieces[token]

    def reveal(self, tags: Sequence[str]) -> None:
        """Of these texts, each that is one token is read as text when it is generated."""
        found = [self.tokenize(tag, markup=True) for tag in tags]
        self._revealed = frozenset(tokens[0] for tokens in found if len(tokens) == 1)
        self._pieces.clear()

    def shown_piece(self, token: int) -> bytes:
        """As `piece`, but control tokens with their names."""
        return self.piece(token) or self._piece(token, special=True)

    def _piece(self, token: int, *, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        n = C.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = C.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:n]

    # -- the KV cache (proxy.engines.embedded.sequences.KV) ----------------------------------------

    def _probe(self, *, swa_full: bool) -> None:
        """Asks the cache what it can do, by two tokens that are put in and taken out."""
        self.decode([(0, 0, [0, 0], False)])
        whole, part = (int(C.llama_state_seq_get_size_ext(self._context, 0, f)) for f in (0, PART))
        self.rolls_back = self.remove(0, 1)
        """Whether the end of a sequence can be removed; a recurrent state has no way back."""
        windowed = self._window > 0 and whole != part and not swa_full
        self.keeps_parts = windowed or not self.rolls_back
        self.part_is_all = not self.rolls_back and whole == part
        if self.part_is_all:
            # Its state takes the same room whatever its length: cells never run short.
            self.cells = max(self.cells, self._n_sequences * self.window_tokens)
        self.remove(0, 0)

    def reaches(self, sequence: int, n: int) -> bool:
        """Whether the sequence, which is longer, can be cut back to `n` tokens."""
        return self._sees_back(int(C.llama_memory_seq_pos_min(self._memory, sequence)), n)

    def saved_reaches(self, length: int, n: int) -> bool:
        """The same of a sequence of `length` tokens that comes back from `save_state`: of a window,
        llama.cpp writes down what the last token saw.
        """
        first = max(0, length - self._window) if self._window else 0
        return n == length or self._sees_back(first if self.rolls_back else length - 1, n)

    def _sees_back(self, first: int, n: int) -> bool:
        """Whether a token at position `n` finds all that it attends to when `first` is the first
        position held. Without a window that is every position: a recurrent state, which holds the
        last one alone, never does. A window of w sees itself and w - 1 before (`is_masked_swa` in
        llama.cpp).
        """
        return first <= (max(0, n - self._window + 1) if self._window else 0)

    def remove(self, sequence: int, start: int) -> bool:
        """False where the state cannot be cut there; `start` 0 always can."""
        return bool(C.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def copy(self, source: int, target: int, end: int) -> None:
        C.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def end(self, sequence: int) -> int:
        return int(C.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def save_part(self, sequence: int) -> bytes:
        """What later tokens destroy: windows, recurrent states."""
        return self._save(sequence, PART)

    def load_part(self, sequence: int, part: bytes) -> bool:
        """Puts it back beside the sequence's other cells."""
        return self._load(sequence, part, PART)

    def save_state(self, sequence: int) -> bytes:
        """The whole sequence, as llama.cpp writes it."""
        return self._save(sequence, 0)

    def load_state(self, sequence: int, state: bytes | memoryview) -> bool:
        """Fills an empty sequence; False if llama.cpp does not take it."""
        return self._load(sequence, state, 0)

    def _save(self, sequence: int, flags: int) -> bytes:
        room = int(C.llama_state_seq_get_size_ext(self._context, sequence, flags))
        buffer = (ctypes.c_uint8 * room)()
        n = int(C.llama_state_seq_get_data_ext(self._context, buffer, room, sequence, flags))
        return ctypes.string_at(buffer, n)

    def _load(self, sequence: int, state: bytes | memoryview, flags: int) -> bool:
        buffer = _array(state)
        n = C.llama_state_seq_set_data_ext(self._context, buffer, len(state), sequence, flags)
        return bool(n)

    # -- one batch -------------------------------------------------------------------------------

    def decode(self, entries: Sequence[tuple[int, int, Sequence[int], bool]]) -> int:
        """Evaluates (sequence, first position, tokens, wants logits of the last) one after another.

        Returns 0, NO_SLOT (nothing was evaluated) or ABORTED (the micro-batches before the abort
        are in the cache: ask `end`). Raises DecodeError. Where the state does not roll back, no
        batch is aborted, and one that fails leaves no sequence, in it or not, that can be relied
        on.
        """
        b, n = self._batch, 0
        # Each look at a field of the struct makes a pointer: once a batch, not once a token.
        ids, positions, n_seq_id, logits = b.token, b.pos, b.n_seq_id, b.logits
        for sequence, start, tokens, wants_logits in entries:
            last = start + len(tokens) - 1 if wants_logits else -1
            for position, token in enumerate(tokens, start):
                ids[n], positions[n], logits[n] = token, position, position == last
                n_seq_id[n], self._seq_ids[n][0] = 1, sequence
                n += 1
        b.n_tokens = n
        status = int(C.llama_decode(self._context, b))
        if status < 0:
            raise DecodeError(f"llama_decode returned {status}")
        return status

    def logits(self, index: int) -> Any:
        """Of batch entry `index`, one number for each token. Good until the next batch."""
        pointer = C.llama_get_logits_ith(self._context, index)
        # What `np.ctypeslib.as_array` would give, which makes a new type of the pointer every time.
        return np.asarray(self._row.from_address(ctypes.addressof(pointer.contents)))


def _array(data: bytes | memoryview) -> ctypes.Array[ctypes.c_uint8]:
    """For C to read: where it lies, if that may be written to, else a copy."""
    kind = ctypes.c_uint8 * len(data)
    if isinstance(data, memoryview) and not data.readonly:
        return kind.from_buffer(data)
    return kind.from_buffer_copy(data)


def to_bytes(tokens: Sequence[int]) -> bytes:
    """Tokens as the store keeps them: little-endian int32."""
    return array("i", tokens).tobytes()


def from_bytes(data: bytes) -> list[int]:
    return array("i", data).tolist()
