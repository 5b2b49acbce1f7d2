"""From settings to a loaded model and its context: each setting of `Load` becomes a parameter of
llama.cpp here, and only here.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import llama_cpp as C

from proxy.engines.embedded.protocol import Load


class LoadError(Exception):
    """The model cannot be loaded. `str()` says why in a sentence."""


def build() -> str:
    """Names the build whose states are alike: another one may lay them out otherwise."""
    return f"llama-cpp-python-{C.__version__}"


def fingerprint(path: str) -> str:
    """Names the model file by size, head and tail: a changed vocabulary or weights changes it."""
    digest = hashlib.blake2b(digest_size=12)
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        digest.update(size.to_bytes(8, "little"))
        for start in (0, max(0, size - (1 << 20))):
            file.seek(start)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def load_model(load: Load) -> C.llama_model_p:
    params = C.llama_model_default_params()
    params.n_gpu_layers = load.gpu_layers
    model: C.llama_model_p | None = C.llama_model_load_from_file(load.path.encode(), params)
    if not model:
        raise LoadError(f"llama.cpp cannot load {load.path}.")
    return model


def window(model: C.llama_model_p, n_ctx: int) -> int:
    return n_ctx or min(int(C.llama_model_n_ctx_train(model)), 8192)


def new_context(model: C.llama_model_p, load: Load, cells: int) -> C.llama_context_p:
    params = C.llama_context_default_params()
    params.n_ctx = cells
    # Each sequence may have a token in a batch, and there must be room beside them for a prompt.
    params.n_batch = max(load.n_batch, 2 * load.sequences)
    params.n_ubatch = min(load.n_ubatch, params.n_batch)
    params.n_seq_max = load.sequences
    params.kv_unified = True
    # A full-size cache for sliding-window layers: a prefix can be cut anywhere and stays exact.
    params.swa_full = True
    params.n_threads = params.n_threads_batch = load.threads or _threads(os.cpu_count() or 1)
    context: C.llama_context_p | None = C.llama_init_from_model(model, params)
    if not context:
        raise LoadError(f"There is not enough memory for a window of {cells} tokens.")
    return context


def _threads(cores: int) -> int:
    """All cores but one, which is for the UI and its database beside the model: threads wait for
    each other by spinning, so one busy neighbour on a full machine cuts the speed to a tenth
    (measured on two cores: decode 97 tokens/s alone, 3 to 12 beside one busy process). Of two
    cores both are taken: one alone would halve the speed at all times.
    """
    return cores - 1 if cores > 2 else cores
