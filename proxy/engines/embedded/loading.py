"""From settings to a loaded model and its context: each setting of `Load` becomes a parameter of
llama.cpp here, and only here. And what the settings are called by: two fingerprints.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp as C
import msgspec

from proxy.engines.embedded.files import adapters, template_source
from proxy.engines.embedded.protocol import Load

Value = str | int | float | bool

CACHE_TYPES = {
    "f32": C.GGML_TYPE_F32,
    "f16": C.GGML_TYPE_F16,
    "bf16": 30,  # The bindings leave it out.
    "q8_0": C.GGML_TYPE_Q8_0,
    "q5_1": C.GGML_TYPE_Q5_1,
    "q5_0": C.GGML_TYPE_Q5_0,
    "q4_1": C.GGML_TYPE_Q4_1,
    "q4_0": C.GGML_TYPE_Q4_0,
}
FLASH = {"auto": -1, "off": 0, "on": 1}
"""llama_flash_attn_type."""
SPLIT = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
"""llama_split_mode."""
ROPE = {"auto": -1, "none": 0, "linear": 1, "yarn": 2, "longrope": 3}
"""llama_rope_scaling_type."""
LOAD_MODE = {(False, False): 0, (True, False): 1, (False, True): 2, (True, True): 3}
"""llama_load_mode for (mmap, mlock)."""

CONTEXT_SETTINGS = (
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_orig_ctx",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
)
"""Fields of Load that llama_context_params has under the same name."""

CELL_SETTINGS = (
    "cache_type_k",
    "cache_type_v",
    "flash_attention",
    "rope_scaling",
    "swa_full",
    *CONTEXT_SETTINGS,
)
"""Fields of Load that decide what a cell of the KV cache holds, or how it lies there (without flash
attention the values are transposed), or which cells there are (those before a sliding window)."""

GGML_LOG_DEBUG = 1
GGML_LOG_ERROR = 4

NO_FLASH = re.compile("flash.attention not supported|flash_attn is not compatible", re.IGNORECASE)
"""What llama.cpp says when `auto` was taken for off, or `on` could not be had; it has no other way
to tell."""


class LoadError(Exception):
    """The model cannot be loaded. `str()` says why in a sentence."""


def fingerprint(path: str | Path) -> str:
    """Names a GGUF file by size, head and tail: a changed vocabulary or weights changes it.

    For the model's file this is what token ids and counts in the store are kept under: they
    depend on the vocabulary alone. An adapter, a chat template, or the KV cache's type change
    what is answered and what a prompt looks like, never which text a stored token stands for.
    """
    digest = hashlib.blake2b(digest_size=12)
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        digest.update(size.to_bytes(8, "little"))
        for start in (0, max(0, size - (1 << 20))):
            file.seek(start)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def state_fingerprint(load: Load, *, cells: int) -> str:
    """Names what the cells of a KV cache mean: states saved under another one must not be used.

    That is the model's file and the build (another one may lay states out otherwise); the types
    and layout of the cells; what goes into each (adapters with their scales, RoPE); and the size
    of the cache, since models with two sets of RoPE factors choose by it. The chat template makes
    tokens and not cells, so its states would be right; but no prompt will match them any more.
    Raises FileError.
    """
    facts = {
        "build": f"llama-cpp-python-{C.__version__}",
        "cells": cells,
        "lora": [(fingerprint(a.path), a.scale) for a in adapters(load.lora)],
        "chat_template": template_source(load.chat_template),
    }
    facts |= {name: getattr(load, name) for name in CELL_SETTINGS}
    digest = hashlib.blake2b(msgspec.json.encode(facts, order="deterministic"), digest_size=12)
    return f"{fingerprint(load.path)} {digest.hexdigest()}"


def chosen(load: Load, *, flash_attention: bool) -> dict[str, Value]:
    """The settings as they came out, for people to look at."""
    details: dict[str, Value] = {
        "threads": _threads(load.threads),
        "threads_batch": load.threads_batch or _threads(load.threads),
        "gpu_layers": load.gpu_layers if C.llama_supports_gpu_offload() else 0,
        "flash_attention": flash_attention,
        "cache_type_k": load.cache_type_k,
        "cache_type_v": load.cache_type_v,
        "mmap": load.mmap,
        "mlock": load.mlock,
        "rope_scaling": load.rope_scaling,
        "lora": ", ".join(f"{a.path.name}:{a.scale:g}" for a in adapters(load.lora)),
        "chat_template": "given" if load.chat_template else "the model's own",
    }
    if load.gpu_layers and not details["gpu_layers"]:
        details["warning"] = "gpu_layers has no effect: llama.cpp was built without GPU support"
    return details


def load_model(load: Load, *, vocab_only: bool = False) -> C.llama_model_p:
    """With `vocab_only` no weights: a tenth of a second, and nothing can be evaluated. Raises
    LoadError."""
    params = C.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = load.gpu_layers
    params.main_gpu = load.main_gpu
    params.split_mode = SPLIT[load.split_mode]
    params.load_mode = LOAD_MODE[load.mmap, load.mlock]
    shares = (ctypes.c_float * C.LLAMA_MAX_DEVICES)(*load.tensor_split[: C.LLAMA_MAX_DEVICES])
    if load.tensor_split:
        params.tensor_split = shares
    with _listening() as log:
        model: C.llama_model_p | None = C.llama_model_load_from_file(load.path.encode(), params)
    if not model:
        raise LoadError(f"llama.cpp cannot load the model {load.path}: {_reason(log)}")
    return model


def window(model: C.llama_model_p, n_ctx: int) -> int:
    return n_ctx or min(int(C.llama_model_n_ctx_train(model)), 8192)


def new_context(model: C.llama_model_p, load: Load, cells: int) -> tuple[C.llama_context_p, bool]:
    """A context, and whether it uses flash attention. Raises LoadError."""
    params = _context_params(load)
    params.n_ctx = cells
    # Each sequence may have a token in a batch, and there must be room beside them for a prompt.
    params.n_batch = max(load.n_batch, 2 * load.sequences)
    params.n_ubatch = min(load.n_ubatch, params.n_batch)
    params.n_seq_max = load.sequences
    params.kv_unified = True
    params.swa_full = load.swa_full
    with _listening() as log:
        context: C.llama_context_p | None = C.llama_init_from_model(model, params)
    if not context:
        raise LoadError(_no_context(load, cells, _reason(log)))
    flash = load.flash_attention != "off" and not any(NO_FLASH.search(text) for _, text in log)
    return context, flash


def new_embedding_context(model: C.llama_model_p, load: Load, n_tokens: int) -> C.llama_context_p:
    """A context for one text at a time, of so many tokens at most. Raises LoadError."""
    params = _context_params(load)
    params.n_ctx = params.n_batch = params.n_ubatch = n_tokens
    params.n_seq_max = 1
    params.embeddings = True
    with _listening() as log:
        context: C.llama_context_p | None = C.llama_init_from_model(model, params)
    if not context:
        raise LoadError(_reason(log))
    return context


def _context_params(load: Load) -> Any:
    """What the settings say of every context."""
    params = C.llama_context_default_params()
    params.n_threads = _threads(load.threads)
    params.n_threads_batch = load.threads_batch or params.n_threads
    params.flash_attn_type = FLASH[load.flash_attention]
    params.type_k = CACHE_TYPES[load.cache_type_k]
    params.type_v = CACHE_TYPES[load.cache_type_v]
    params.rope_scaling_type = ROPE[load.rope_scaling]
    for name in CONTEXT_SETTINGS:
        setattr(params, name, getattr(load, name))
    return params


Adapters = list[tuple[Any, float]]
"""LoRA adapters with their scales."""


def load_adapters(model: C.llama_model_p, load: Load) -> Adapters:
    """They are freed with the model. Raises LoadError and FileError."""
    loaded = []
    for adapter in adapters(load.lora):
        with _listening() as log:
            found = C.llama_adapter_lora_init(model, os.fsencode(adapter.path))
        if not found:
            raise LoadError(f"engine.lora: the adapter {adapter.path} is refused: {_reason(log)}")
        loaded.append((found, adapter.scale))
    return loaded


def set_adapters(context: C.llama_context_p, loaded: Adapters) -> None:
    """Puts them on the context, for good. Raises LoadError."""
    table = (C.llama_adapter_lora_p_ctypes * len(loaded))(*[adapter for adapter, _ in loaded])
    scales = (ctypes.c_float * len(loaded))(*[scale for _, scale in loaded])
    if loaded and C.llama_set_adapters_lora(context, table, len(loaded), scales):
        raise LoadError("engine.lora: llama.cpp does not take the adapters.")


def _no_context(load: Load, cells: int, reason: str) -> str:
    # llama.cpp names its own parameters: the settings behind them stand beside.
    names = ("cache_tokens", "cache_type_k", "cache_type_v", "flash_attention")
    settings = ", ".join(f"engine.{name} {getattr(load, name)}" for name in names)
    asked = f"n_ctx {load.n_ctx}, {settings}"
    return f"llama.cpp cannot make a KV cache of {cells} tokens ({asked}): {reason}"


def _threads(wanted: int) -> int:
    """0 takes all cores but one, which is for the UI and its database beside the model: threads
    wait for each other by spinning, so one busy neighbour on a full machine cuts the speed to a
    tenth (measured on two cores: decode 97 tokens/s alone, 3 to 12 beside one busy process). Of
    two cores both are taken: one alone would halve the speed at all times.
    """
    cores = os.cpu_count() or 1
    return wanted or (cores - 1 if cores > 2 else cores)


# -- llama.cpp's reasons ---------------------------------------------------------------------------

Log = list[tuple[int, str]]
"""(level, text) of what was said."""


@contextmanager
def _listening() -> Iterator[Log]:
    """What llama.cpp says meanwhile, which goes to stderr all the same, but for the list of each
    node of its graphs: its functions return null and no reason. For the time of loading only:
    later its own threads may speak.
    """
    log: Log = []

    def hear(level: int, text: bytes, _: object) -> None:
        if level != GGML_LOG_DEBUG:
            line = text.decode("utf-8", "replace")
            log.append((level, line))
            sys.stderr.write(line)

    before, data = C.llama_log_callback(), ctypes.c_void_p()
    C.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    callback = C.llama_log_callback(hear)
    C.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield log
    finally:
        C.llama_log_set(before, data)


def _reason(log: Log) -> str:
    """The first error: later ones only say that something failed for it."""
    errors = [text.strip() for level, text in log if level == GGML_LOG_ERROR and text.strip()]
    if not errors:
        return "it does not say why."
    # "llama_model_load: error loading model: ..." begins with the function's name.
    return errors[0].partition(": ")[2] or errors[0]
