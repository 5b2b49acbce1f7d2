"""Models small enough for a test to write: real architectures, random weights, bytes as tokens.

They know nothing, and llama.cpp loads and runs them like any other: what a recurrent or a hybrid
state does under cutting, sharing and restoring shows on two layers as well as on fifty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

EMBD, INNER, CONV, STATE, RANK = 64, 128, 4, 16, 8
HEADS, HEADS_KV, FEED_FORWARD = 4, 2, 128
N_CTX = 8192


def write_mamba(path: Path) -> Path:
    """Recurrent: two Mamba layers. Its state is one block a sequence, and knows no positions."""
    writer = _writer(path, "mamba", layers=2)
    tensors = _Tensors(seed=1)
    for layer in range(2):
        _mamba_layer(tensors, layer, norms=False)
    return _finish(writer, tensors, path)


def write_jamba(path: Path) -> Path:
    """Hybrid: a Mamba layer, an attention layer, a Mamba layer, an attention layer."""
    writer = _writer(path, "jamba", layers=4)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, HEADS_KV, 0, HEADS_KV])
    writer.add_feed_forward_length(FEED_FORWARD)
    tensors = _Tensors(seed=2)
    for layer in range(4):
        if layer % 2:
            _attention_layer(tensors, layer)
        else:
            _mamba_layer(tensors, layer, norms=True)
        _feed_forward(tensors, layer)
    return _finish(writer, tensors, path)


def write_gemma3(path: Path, *, embeds: bool = False) -> Path:
    """Sliding windows of 32 tokens in five layers, full attention in the sixth. With `embeds` the
    mean of what comes out is the text's vector."""
    writer = _writer(path, "gemma3", layers=6)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS_KV)
    writer.add_key_length(EMBD // HEADS)
    writer.add_value_length(EMBD // HEADS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_sliding_window(32)
    if embeds:
        writer.add_pooling_type(gguf.PoolingType.MEAN)
    tensors = _Tensors(seed=3)
    for layer in range(6):
        _attention_layer(tensors, layer)
        _feed_forward(tensors, layer)
        for name in ("attn_q_norm", "attn_k_norm"):
            tensors.ones(f"blk.{layer}.{name}.weight", EMBD // HEADS)
        for name in ("post_attention_norm", "post_ffw_norm"):
            tensors.ones(f"blk.{layer}.{name}.weight", EMBD)
    return _finish(writer, tensors, path)


class _Tensors(dict[str, Any]):
    """Weights by name, drawn one after another from one seed. Shapes as numpy has them: rows
    first.
    """

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        self._rng = np.random.default_rng(seed)
        self.normal("token_embd.weight", len(_vocabulary()), EMBD, scale=1.0)
        self.normal("output.weight", len(_vocabulary()), EMBD)
        self.ones("output_norm.weight", EMBD)

    def normal(self, name: str, *shape: int, scale: float = 0.0) -> None:
        spread = scale or shape[-1] ** -0.5
        self[name] = (self._rng.standard_normal(shape) * spread).astype(np.float32)

    def ones(self, name: str, *shape: int) -> None:
        self[name] = np.ones(shape, np.float32)


def _mamba_layer(tensors: _Tensors, layer: int, *, norms: bool) -> None:
    at = f"blk.{layer}."
    tensors.ones(at + "attn_norm.weight", EMBD)
    tensors.normal(at + "ssm_in.weight", 2 * INNER, EMBD)
    tensors.normal(at + "ssm_conv1d.weight", INNER, CONV)
    tensors.normal(at + "ssm_conv1d.bias", INNER, scale=0.1)
    tensors.normal(at + "ssm_x.weight", RANK + 2 * STATE, INNER)
    tensors.normal(at + "ssm_dt.weight", INNER, RANK)
    tensors.normal(at + "ssm_dt.bias", INNER, scale=0.5)
    # Slow decay: what stood a hundred tokens ago still moves the answer.
    tensors[at + "ssm_a"] = -np.tile(np.geomspace(0.005, 1, STATE, dtype=np.float32), (INNER, 1))
    tensors.ones(at + "ssm_d", INNER)
    tensors.normal(at + "ssm_out.weight", EMBD, INNER)
    if norms:
        for name, n in (("dt", RANK), ("b", STATE), ("c", STATE)):
            tensors.ones(f"{at}ssm_{name}_norm.weight", n)


def _attention_layer(tensors: _Tensors, layer: int) -> None:
    at, kv = f"blk.{layer}.", EMBD // HEADS * HEADS_KV
    tensors.ones(at + "attn_norm.weight", EMBD)
    for name, n in (("q", EMBD), ("k", kv), ("v", kv), ("output", EMBD)):
        tensors.normal(f"{at}attn_{name}.weight", n, EMBD)


def _feed_forward(tensors: _Tensors, layer: int) -> None:
    at = f"blk.{layer}.ffn_"
    tensors.ones(at + "norm.weight", EMBD)
    tensors.normal(at + "gate.weight", FEED_FORWARD, EMBD)
    tensors.normal(at + "up.weight", FEED_FORWARD, EMBD)
    tensors.normal(at + "down.weight", EMBD, FEED_FORWARD)


def _writer(path: Path, architecture: str, *, layers: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"tiny {architecture}")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(EMBD)
    writer.add_block_count(layers)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(_vocabulary()))
    if architecture == "gemma3":
        return writer
    writer.add_ssm_conv_kernel(CONV)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(RANK)
    if architecture == "mamba":
        writer.add_head_count(0)
        writer.add_feed_forward_length(0)
    return writer


def _finish(writer: gguf.GGUFWriter, tensors: _Tensors, path: Path) -> Path:
    tokens = _vocabulary()
    control = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 2) + [control] * 2)
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary() -> list[str]:
    """Every byte, written as GPT-2's tokenizer writes it, the one merge that llama.cpp must have,
    and the marks of a ChatML turn.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    names = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [names[b] for b in range(256)] + ["th", "<|im_start|>", "<|im_end|>"]
