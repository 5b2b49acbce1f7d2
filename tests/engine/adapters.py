"""LoRA adapters for the tests: small random weights, as GGUF files."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WIDTH = 576
"""SmolLM2-135M's embedding: its query projections are WIDTH x WIDTH."""
RANK = 4


def write_adapter(
    path: Path, *, seed: int = 1, architecture: str = "llama", width: int = WIDTH, size: float = 1.0
) -> Path:
    """An adapter for the query projections of the first layers, strong enough to change answers."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for layer in range(4):
        for name, shape in (("lora_a", (RANK, width)), ("lora_b", (width, RANK))):
            weights = random.normal(0, size, shape).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.attn_q.weight.{name}", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
