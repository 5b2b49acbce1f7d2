"""A BERT of two layers with random weights: it makes embeddings, and cannot write."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

EMBD, HEADS, FEED_FORWARD, LAYERS, N_CTX = 32, 2, 64, 2, 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "tower", "river", "train"]


def write_bert(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("tiny bert")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(EMBD)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    _add_vocabulary(writer)
    for name, shape in _shapes().items():
        writer.add_tensor(name, _weights(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens = [*SPECIAL, *("\u2581" + w for w in WORDS), *WORDS]
    normal = [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL))
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + normal)
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)


def _shapes() -> dict[str, tuple[int, ...]]:
    n_vocab = len(SPECIAL) + 2 * len(WORDS)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, EMBD),
        "token_types.weight": (2, EMBD),
        "position_embd.weight": (N_CTX, EMBD),
        "token_embd_norm.weight": (EMBD,),
        "token_embd_norm.bias": (EMBD,),
    }
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes |= {f"{at}{name}.weight": (EMBD, EMBD), f"{at}{name}.bias": (EMBD,)}
        shapes |= {f"{at}ffn_up.weight": (FEED_FORWARD, EMBD), f"{at}ffn_up.bias": (FEED_FORWARD,)}
        shapes |= {f"{at}ffn_down.weight": (EMBD, FEED_FORWARD), f"{at}ffn_down.bias": (EMBD,)}
        for name in ("attn_output_norm", "layer_output_norm"):
            shapes |= {f"{at}{name}.weight": (EMBD,), f"{at}{name}.bias": (EMBD,)}
    return shapes


def _weights(
    name: str, shape: tuple[int, ...]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    chance = np.random.default_rng(sum(name.encode()))
    return (chance.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
