"""What a remote server cannot be asked for, refused with one sentence each. Pure."""

from __future__ import annotations

from proxy.engines.base import CallFormat, Generate, RequestRefused
from proxy.engines.remote_server import Kind


def refuse_embeddings(kind: Kind, *, forwards_key: bool) -> None:
    """Raises RequestRefused."""
    if kind is not Kind.OTHER:
        raise RequestRefused("Embeddings are not passed on to servers of llama.cpp.", param="model")
    if forwards_key:
        sentence = "Embeddings are not passed on where each client sends a key of its own."
        raise RequestRefused(sentence, param="model")


def refuse_what_is_missing(request: Generate, kind: Kind | None) -> None:
    """Raises RequestRefused: an answer that silently lacks what was asked would be a wrong one."""
    if request.n > 1:
        raise RequestRefused("Only one choice is passed on to the upstream server.", param="n")
    if isinstance(request.format, CallFormat) and kind not in (Kind.OTHER, None):
        sentence = "A server of llama.cpp is not made to call: `tool_choice` must be auto or none."
        raise RequestRefused(sentence, param="tool_choice")
    if request.raw is not None and kind not in (Kind.OTHER, None):
        sentence = "Prompts without a chat are not passed on to servers of llama.cpp."
        raise RequestRefused(sentence, param="prompt")
    if request.raw is not None and request.sampling.logprobs is not None:
        sentence = "The upstream server is not asked for `logprobs` of a text without a chat."
        raise RequestRefused(sentence, param="logprobs")
    if request.sampling.logprobs is not None and kind is Kind.LLAMA_CPP:
        # It wants to be started with --logits_all, does not tell, and fails inside of the stream.
        sentence = "llama_cpp.server gives no `logprobs` in a stream."
        raise RequestRefused(sentence, param="logprobs")
