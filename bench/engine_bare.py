"""What the embedded engine is held against, in a process of its own: `llama_cpp.Llama` as its users
have it, and a bare loop over `llama_decode`. `python -m bench.engine_bare`.

A JSON line in, a JSON line out; the first line in says how to load. Between two commands the
process sleeps. Tokens are timed here, with nothing between the clock and llama.cpp.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import llama_cpp as C
from llama_cpp import Llama

STREAMS_MOST = 8
PROMPT = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What native code prints is no answer.
    settings = json.loads(sys.stdin.readline())
    llama = _load(**settings)
    raw = Raw(llama, **settings)
    commands = {"generate": _generate, "together": raw.together}
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        prompts = [_tokens(llama, system, user) for system, user in command["prompts"]]
        found = commands[command["do"]](llama, prompts, n=command["n"])
        print(json.dumps(found), file=answers, flush=True)


def _load(*, path: str, n_ctx: int, n_batch: int, n_ubatch: int, threads: int) -> Llama:
    # The engine leaves flash attention to llama.cpp, which takes it on a CPU; Llama's default, off,
    # is no fair opponent.
    return Llama(
        path,
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )


def _tokens(llama: Llama, system: str, user: str) -> list[int]:
    text = PROMPT.format(system=system, user=user)
    return list(llama.tokenize(text.encode(), add_bos=False, special=True))


def _generate(llama: Llama, prompts: Sequence[list[int]], *, n: int) -> dict[str, Any]:
    """`n` greedy tokens from a prompt that is evaluated whole."""
    (prompt,) = prompts
    llama.reset()
    began = time.perf_counter()
    tokens = llama.generate(prompt, temp=0.0)
    found = [next(tokens)]
    first = time.perf_counter()
    found += islice(tokens, n - 1)
    last = time.perf_counter()
    return {
        "prompt_tokens": len(prompt),
        "prefill_s": first - began,
        "decode_s": last - first,
        "text": llama.detokenize(found).decode("utf-8", "replace"),
    }


class Raw:
    """A context like the engine's, and nothing around `llama_decode` that could be left out."""

    def __init__(
        self, llama: Llama, *, path: str, n_ctx: int, n_batch: int, n_ubatch: int, threads: int
    ) -> None:
        params = C.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_ubatch
        params.n_seq_max, params.kv_unified = STREAMS_MOST, True
        params.n_threads = params.n_threads_batch = threads
        self._context = C.llama_init_from_model(llama.model, params)
        self._memory = C.llama_get_memory(self._context)
        self._batch = C.llama_batch_init(n_batch, 0, 1)
        self._greedy = C.llama_sampler_init_greedy()

    def together(self, llama: Llama, prompts: Sequence[list[int]], *, n: int) -> dict[str, Any]:
        """`n` tokens behind each prompt, one of each sequence a batch; prompts are not timed."""
        C.llama_memory_clear(self._memory, False)
        last = [self._prefill(i, prompt) for i, prompt in enumerate(prompts)]
        position = [len(prompt) for prompt in prompts]
        began = time.perf_counter()
        for _ in range(n):
            self._decode([(i, position[i], last[i]) for i in range(len(prompts))])
            last = [self._sample(i) for i in range(len(prompts))]
            position = [p + 1 for p in position]
        return {"tokens": n * len(prompts), "decode_s": time.perf_counter() - began}

    def _prefill(self, sequence: int, prompt: Sequence[int]) -> int:
        self._decode([(sequence, i, token) for i, token in enumerate(prompt)], last_only=True)
        return self._sample(len(prompt) - 1)

    def _decode(self, entries: Sequence[tuple[int, int, int]], *, last_only: bool = False) -> None:
        b = self._batch
        b.n_tokens = len(entries)
        for i, (sequence, position, token) in enumerate(entries):
            b.token[i], b.pos[i] = token, position
            b.n_seq_id[i], b.seq_id[i][0] = 1, sequence
            b.logits[i] = not last_only or i == len(entries) - 1
        if status := C.llama_decode(self._context, b):
            raise RuntimeError(f"llama_decode returned {status}")

    def _sample(self, index: int) -> int:
        return int(C.llama_sampler_sample(self._greedy, self._context, index))


if __name__ == "__main__":
    main()
