"""Between the words of the engine's users and those of the model process: pure."""

from __future__ import annotations

from functools import lru_cache

from memory.context import Context, ContextMessage
from memory.ports import Budget
from proxy.engines.base import (
    CallFormat,
    ContextOverflow,
    Delta,
    EngineError,
    Finished,
    Generate,
    JsonFormat,
    ModelInfo,
    RequestRefused,
    Thinking,
    TokenLogprob,
)
from proxy.engines.embedded import protocol
from proxy.engines.embedded.grammar import GrammarError
from proxy.engines.embedded.protocol import Part, Submit
from proxy.engines.embedded.schema import grammar_of


def submit(id_: int, request: Generate, *, unread_most: int, grammar: str) -> Submit:
    """`unread_most` is how many texts the model may be ahead of who reads them."""
    s = request.sampling
    return Submit(
        id=id_,
        owner=request.owner,
        priority=int(request.priority),
        messages=parts(request.context),
        continues=request.context.continues,
        max_tokens=request.max_tokens,
        keep=request.keep,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        min_p=s.min_p,
        seed=s.seed,
        presence_penalty=s.presence_penalty,
        frequency_penalty=s.frequency_penalty,
        repeat_penalty=s.repeat_penalty,
        logit_bias=s.logit_bias,
        stop=s.stop,
        unread_most=unread_most,
        tools=request.context.tools,
        thinks=request.thinks,
        raw=printable(request.raw) if isinstance(request.raw, str) else request.raw,
        n=request.n,
        logprobs=s.logprobs,
        grammar=grammar,
        must_call=request.format.names if isinstance(request.format, CallFormat) else (),
        one_call=isinstance(request.format, CallFormat) and request.format.one_call,
        tells_progress=request.tells_progress,
    )


class Grammars:
    """Those made last are kept: a request is checked before it begins, and most ask for the form of
    the one before. One large schema takes a third of a second."""

    def __init__(self, *, most: int = 8) -> None:
        self._of_schema = lru_cache(most)(grammar_of)

    def of(self, request: Generate) -> str:
        """GBNF that the answer is held to, "" for none. Raises RequestRefused."""
        if not isinstance(request.format, JsonFormat):
            return ""
        try:
            return self._of_schema(request.format.schema)
        except GrammarError as exc:
            raise RequestRefused(str(exc), param="response_format") from exc


def check_biases(request: Generate, model: ModelInfo | None) -> None:
    """Nothing is checked while no model is known. Raises RequestRefused."""
    for token, _ in request.sampling.logit_bias:
        if model and token >= model.n_vocab:
            raise RequestRefused(f"The model has no token {token}.", param="logit_bias")


def delta(reply: protocol.Text) -> Delta:
    logprobs = tuple(TokenLogprob(t.token, t.logprob, t.top) for t in reply.logprobs)
    return Delta(reply.text, reply.choice, logprobs)


def parts(context: Context) -> tuple[Part, ...]:
    return tuple(_part(m) for m in context.messages)


def _part(message: ContextMessage) -> Part:
    parts = tuple(printable(p) for p in message.parts)
    return Part(role=message.role, parts=parts, token_ids=message.token_ids)


def printable(text: str) -> str:
    # Lone surrogates cannot be encoded; they reach the model as U+FFFD.
    return text.encode("utf-8", "replace").decode()


def error(failed: protocol.Failed) -> EngineError:
    if failed.kind == "overflow":
        return ContextOverflow(
            prompt_tokens=failed.prompt_tokens, window_tokens=failed.window_tokens
        )
    if failed.kind == "refused":
        return RequestRefused(failed.message, param=failed.param or None)
    return EngineError(failed.message)


def finished(reply: protocol.Ended) -> Finished:
    return Finished(
        finish_reason=reply.finish_reason,
        prompt_tokens=reply.prompt_tokens,
        cached_tokens=reply.cached_tokens,
        completion_tokens=reply.completion_tokens,
        token_ids=reply.token_ids,
        queued_s=reply.queued_s,
        prefill_s=reply.prefill_s,
        decode_s=reply.decode_s,
        others=reply.others,
        token_ends=reply.token_ends,
    )


def model_info(reply: protocol.Loaded) -> ModelInfo:
    return ModelInfo(
        reply.name,
        reply.fingerprint,
        Budget(reply.window_tokens, reply.message_tokens, reply.base_tokens),
        reply.default_system,
        dict(reply.details),
        Thinking(*reply.think_tags, first=reply.thinks_first),
        reply.n_vocab,
    )
