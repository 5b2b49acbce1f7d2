"""Embeddings of texts, by models that were made for it: one text at a time, behind chat."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import llama_cpp as C
import numpy as np

from proxy.engines.embedded.llama import ABORTED, DecodeError, Llama
from proxy.engines.embedded.loading import LoadError
from proxy.engines.embedded.protocol import Embedded, Failed, Reply
from proxy.engines.embedded.request import SIDE

MAX_TOKENS = 2048
"""Longest text. All of it is one micro-batch, whose buffers grow with its square."""

POOLED = (
    C.LLAMA_POOLING_TYPE_MEAN,
    C.LLAMA_POOLING_TYPE_CLS,
    C.LLAMA_POOLING_TYPE_LAST,
)
"""Ways to make one vector of all. A model without one makes none that mean anything, and rerankers
(RANK) make scores."""


class Embedder:
    """A second context of a model; made when the first text comes, as most models never need it."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._context: C.llama_context_p | None = None
        self.possible = llama.pooling in POOLED
        self.window_tokens = min(llama.trained_tokens, MAX_TOKENS)

    def tokens(self, text: str) -> list[int]:
        """With the tokens that the model wants at both ends."""
        return self._llama.tokenize_whole(text)

    def vector(self, tokens: Sequence[int]) -> bytes | None:
        """The text's vector, of length 1, as float32; None if aborted. Raises DecodeError."""
        try:
            context = self._context = self._context or self._llama.embedding_context(
                self.window_tokens
            )
        except LoadError as exc:
            raise DecodeError(str(exc).rstrip(".")) from exc
        status = self._evaluate(context, tokens)
        if status == ABORTED:
            return None
        found = C.llama_get_embeddings_seq(context, 0) if status == 0 else None
        if not found:
            raise DecodeError(f"llama.cpp made no embedding ({status})")
        vector = np.ctypeslib.as_array(found, (self._llama.embedding_size,)).astype(np.float32)
        length = float(np.linalg.norm(vector))
        return (vector / length if length else vector).astype("<f4").tobytes()

    def _evaluate(self, context: C.llama_context_p, tokens: Sequence[int]) -> int:
        batch = C.llama_batch_init(len(tokens), 0, 1)
        try:
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
            batch.n_tokens = len(tokens)
            memory = C.llama_get_memory(context)
            if not memory:
                return int(C.llama_encode(context, batch))
            C.llama_memory_clear(memory, True)
            return int(C.llama_decode(context, batch))
        finally:
            C.llama_batch_free(batch)


@dataclass(slots=True, eq=False)
class Job:
    """Texts of one request, tokenized, and the vectors made so far."""

    id: int
    texts: list[list[int]]
    vectors: list[bytes] = field(default_factory=list)


class Embeddings:
    """The queue of them. Owned by the engine thread."""

    def __init__(
        self,
        embedder: Embedder,
        *,
        emit: Callable[[Reply], None],
        gate: Callable[[int, Sequence[int]], bool],
    ) -> None:
        self._embedder = embedder
        self._emit = emit
        self._gate = gate
        self._jobs: deque[Job] = deque()

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job: Job) -> None:
        self._jobs.append(job)

    def cancel(self, job_id: int) -> None:
        self._jobs = deque(job for job in self._jobs if job.id != job_id)

    def step(self) -> None:
        """One text, unless something arrives that comes first: then it is begun anew later."""
        job = self._jobs[0]
        if not self._gate(SIDE, [job.id]):
            return
        try:
            vector = self._embedder.vector(job.texts[len(job.vectors)])
        except DecodeError as exc:
            self._jobs.popleft()
            self._emit(Failed(id=job.id, kind="engine", message=f"No embedding: {exc}."))
            return
        if vector is None:
            return
        job.vectors.append(vector)
        if len(job.vectors) == len(job.texts):
            self._jobs.popleft()
            n_tokens = sum(len(t) for t in job.texts)
            self._emit(Embedded(id=job.id, vectors=tuple(job.vectors), prompt_tokens=n_tokens))
