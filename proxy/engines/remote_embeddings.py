"""Embeddings by a server that makes them: OpenAI's objects, there and back. Pure."""

from __future__ import annotations

import binascii
from array import array
from base64 import b64decode
from collections.abc import Sequence
from math import isfinite

import msgspec

from proxy.engines.base import Embeddings, EngineError


class _Item(msgspec.Struct, frozen=True):
    embedding: str | list[float]
    index: int


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0


class _Body(msgspec.Struct, frozen=True):
    data: list[_Item]
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Body)


def body(model: str, inputs: Sequence[str | tuple[int, ...]]) -> bytes:
    """In base64 a vector is a fifth as long as in figures."""
    given = [_printable(x) if isinstance(x, str) else x for x in inputs]
    fields = {"model": model, "input": given, "encoding_format": "base64"}
    return msgspec.json.encode(fields)


def embeddings(received: bytes, *, n_inputs: int) -> Embeddings:
    """In the order of the inputs. Raises EngineError where it is anything but one for each."""
    try:
        answer = _decoder.decode(received)
        vectors = {item.index: _vector(item.embedding) for item in answer.data}
    except (msgspec.MsgspecError, binascii.Error, OverflowError, RecursionError, ValueError) as exc:
        raise EngineError(f"The upstream server's embeddings cannot be read: {exc}.") from exc
    lengths = {len(vector) for vector in vectors.values()}
    if sorted(vectors) != list(range(n_inputs)) or len(lengths) != 1 or lengths & {0}:
        raise EngineError("The upstream server's embeddings are not one for each input.")
    ordered = tuple(vectors[i] for i in range(n_inputs))
    return Embeddings(ordered, answer.usage.prompt_tokens if answer.usage else 0)


def _vector(given: str | list[float]) -> bytes:
    """Little-endian float32, as base64 holds it. Raises ValueError."""
    numbers = array("f", given if isinstance(given, list) else ())
    if isinstance(given, str):
        numbers.frombytes(b64decode(given, validate=True))
    if not all(map(isfinite, numbers)):
        raise ValueError("a number is too large")
    return numbers.tobytes()


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
