"""What the remote engine does not pass on yet, refused with one sentence each. Pure."""

from __future__ import annotations

from proxy.engines.base import CallFormat, Generate, RequestRefused


def refuse_what_is_missing(request: Generate) -> None:
    """Raises RequestRefused: an answer that silently lacks what was asked would be a wrong one."""
    if request.n > 1:
        raise RequestRefused("Only one choice is passed on to the upstream server.", param="n")
    if request.sampling.logprobs is not None:
        sentence = "`logprobs` is not passed on to the upstream server."
        raise RequestRefused(sentence, param="logprobs")
    if isinstance(request.format, CallFormat):
        sentence = "The upstream server cannot be made to call: `tool_choice` must be auto or none."
        raise RequestRefused(sentence, param="tool_choice")
    if request.format is not None:
        sentence = "`response_format` is not passed on to the upstream server."
        raise RequestRefused(sentence, param="response_format")
    if request.raw is not None:
        sentence = "Prompts without a chat are not passed on to the upstream server."
        raise RequestRefused(sentence, param="prompt")
