"""POST /v1/embeddings: OpenAI's objects. Pure."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from proxy import wire
from proxy.completions import Given, Prompt, texts_of
from proxy.engines.base import Embeddings
from proxy.errors import bad_request

MAX_INPUTS = 256
FORMATS = ("float", "base64")
FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    model: str
    inputs: tuple[Prompt, ...]
    as_base64: bool = False
    dimensions: int | None = None


class _Body(msgspec.Struct, frozen=True):
    input: Given = None
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None


_decoder = msgspec.json.Decoder(_Body)


def parse_embeddings(body: bytes) -> EmbeddingsRequest:
    """Raises ApiError (400) and nothing else."""
    request = wire.decode(body, _decoder)
    if request.encoding_format not in (None, *FORMATS):
        sentence = "`encoding_format` must be float or base64."
        raise bad_request(sentence, param="encoding_format")
    return EmbeddingsRequest(
        model=request.model or "chatfold",
        inputs=_inputs(request.input),
        as_base64=request.encoding_format == "base64",
        dimensions=request.dimensions,
    )


def _inputs(given: Given) -> tuple[Prompt, ...]:
    if not given:
        raise bad_request("`input` is missing or empty.", param="input")
    texts = texts_of(given, "input", most=MAX_INPUTS)
    if not all(texts):
        raise bad_request("`input` holds an empty input.", param="input")
    return texts


def embeddings_object(request: EmbeddingsRequest, found: Embeddings) -> dict[str, Any]:
    """The whole answer. Raises ApiError where the model's vectors have another length."""
    n = len(found.vectors[0]) // FLOAT_BYTES
    if request.dimensions not in (None, n):
        sentence = f"The vectors of this model have {n} dimensions, neither more nor fewer."
        raise bad_request(sentence, param="dimensions")
    return {
        "object": "list",
        "data": _data(found.vectors, as_base64=request.as_base64),
        "model": request.model,
        "usage": {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens},
    }


def _data(vectors: Sequence[bytes], *, as_base64: bool) -> list[dict[str, Any]]:
    return [
        {"object": "embedding", "index": index, "embedding": _shown(vector, as_base64=as_base64)}
        for index, vector in enumerate(vectors)
    ]


def _shown(vector: bytes, *, as_base64: bool) -> str | list[float]:
    return base64.b64encode(vector).decode() if as_base64 else array("f", vector).tolist()
