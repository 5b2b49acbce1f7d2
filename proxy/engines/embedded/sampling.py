"""How the next token is chosen: llama.cpp's chain of samplers, held to a grammar where asked."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as C
import numpy as np

from proxy.engines.embedded.grammar import GrammarError
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.protocol import Submit, TokenLogprob

PENALTY_LAST_N = 64
"""How far back penalties look: llama.cpp's own default."""

SEEDS = 2**32 - 1
"""Seeds are the numbers below: LLAMA_DEFAULT_SEED, this very one, makes llama.cpp draw another."""

GREEDY_TEMPERATURE = 1e-6
"""Below it the likeliest token is taken: a logit divided by less than 1e-37 is no finite float, and
then the choice falls on any token."""

GRAMMAR_STEP_S = 2.0
"""Longest time that a grammar may take for one token. Checking all 49,152 tokens of SmolLM2 took
7 ms (a schema of three fields) and 15 ms (any object) in the median, 81 ms at most, with one other
busy process on two cores. What takes 25 times the longest has choices that multiply, and would go
on to double with every few tokens, while everybody waits."""

GRAMMAR_MOST_S = 10.0
"""The same for one that does not come back by itself: llama.cpp cannot be broken off in there, and
all that is left is to end the process and start another one."""

DEAD_END = "No token of this model continues the answer as its schema wants."
TOO_SLOW = "The schema leaves too many ways to go on at this place of the answer."

TOKEN_DATA = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
"""llama_token_data."""


class CannotGoOn(Exception):
    """The answer's grammar leaves nothing to choose, or too much. `str()` is one sentence."""


class Grammar:
    """What an answer may be, as far as it has come. `close` frees it."""

    def __init__(self, llama: Llama, text: str, *, after: str = "") -> None:
        """With `after` the answer is free until that text has come: a prompt that opens the model's
        reasoning wants it closed first. Raises GrammarError. May be made in any thread; is then
        for one.
        """
        self._llama = llama
        self._after, self._heard = after.encode(), b""
        self._sampler = C.llama_sampler_init_grammar(llama.vocab, text.encode(), b"root")
        if not self._sampler:
            raise GrammarError("llama.cpp does not take the grammar of this schema.")

    def copy(self) -> Grammar:
        """Another one at the same place of its text."""
        other = object.__new__(Grammar)
        other._llama, other._sampler = self._llama, C.llama_sampler_clone(self._sampler)
        other._after, other._heard = self._after, self._heard
        return other

    @property
    def waits(self) -> bool:
        return not self._heard.endswith(self._after)

    def hear(self, token: int) -> None:
        """A token of the free part. It must not be asked for once `waits` is false."""
        heard = self._heard + self._llama.piece(token)
        at = heard.find(self._after)
        self._heard = self._after if at >= 0 else heard[-len(self._after) :]

    def close(self) -> None:
        if self._sampler:
            C.llama_sampler_free(self._sampler)
            self._sampler = None

    def allows(self, token: int) -> bool:
        if self._llama.is_control(token):
            return False  # Its text would count here, and is not shown.
        one = _Candidates(np.array([(token, 1.0, 0.0)], TOKEN_DATA))
        C.llama_sampler_apply(self._sampler, one.pointer)
        return bool(one.table["logit"][0] != -np.inf)

    def restrict(self, candidates: _Candidates) -> None:
        """Makes what is not allowed impossible: every token is looked at. Raises CannotGoOn."""
        candidates.table["logit"][self._llama.markup_tokens] = -np.inf
        C.llama_sampler_apply(self._sampler, candidates.pointer)
        # The chain cannot choose among none: it would take any.
        if candidates.table["logit"].max() == -np.inf:
            raise CannotGoOn(DEAD_END)

    def accept(self, token: int) -> None:
        """The token, which must be allowed: llama.cpp ends the process over any other."""
        C.llama_sampler_accept(self._sampler, token)


class Sampler:
    """A chain in llama.cpp's own order: bias, penalties, top-k, top-p, min-p, temperature, seed.

    `history` is what penalties look back on. `grammar` is used and stays the caller's. `close`
    frees the chain.
    """

    def __init__(
        self,
        llama: Llama,
        submit: Submit,
        *,
        seed: int,
        history: Sequence[int],
        grammar: Grammar | None,
    ) -> None:
        self._llama = llama
        self._grammar = grammar
        self._chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        adjusters = _adjusters(llama, submit)
        self._greedy = submit.temperature < GREEDY_TEMPERATURE and not adjusters
        for sampler in (*adjusters, *_choosers(submit, seed)):
            C.llama_sampler_chain_add(self._chain, sampler)
        for token in history[-PENALTY_LAST_N:]:
            C.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        if self._chain:
            C.llama_sampler_free(self._chain)
            self._chain = None

    def next(self, index: int) -> int:
        """The next token from the logits of batch entry `index`; it is remembered.

        Raises CannotGoOn.
        """
        if self._grammar is None or self._grammar.waits:
            token = self._next_of_all(index)
            if self._grammar:
                self._grammar.hear(token)
            return token
        began = self._llama.choosing_since = time.monotonic()
        try:
            token = self._next_allowed(self._grammar, self._llama.logits(index))
        finally:
            self._llama.choosing_since = 0.0
        C.llama_sampler_accept(self._chain, token)
        if time.monotonic() - began > GRAMMAR_STEP_S:
            raise CannotGoOn(TOO_SLOW)
        return token

    def _next_of_all(self, index: int) -> int:
        if self._greedy:
            # What the chain would choose, without a table of all tokens to look through: a tenth of
            # its time for SmolLM2, and the chain itself remembers nothing.
            return int(self._llama.logits(index).argmax())
        return int(C.llama_sampler_sample(self._chain, self._llama.context, index))

    def _next_allowed(self, grammar: Grammar, logits: Any) -> int:
        # As llama.cpp's own programs do it: most first choices are allowed, and asking about one
        # token costs nothing beside asking about all of them.
        token = self._choose(_Candidates.all(logits))
        if not grammar.allows(token):
            candidates = _Candidates.all(logits)
            grammar.restrict(candidates)
            token = self._choose(candidates)
            if not grammar.allows(token):
                raise CannotGoOn(DEAD_END)
        grammar.accept(token)
        return token

    def _choose(self, candidates: _Candidates) -> int:
        C.llama_sampler_apply(self._chain, candidates.pointer)
        return candidates.selected


class _Candidates:
    """Tokens with their logits, as llama.cpp's samplers read and reorder them."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self._array = C.llama_token_data_array(
            data=table.ctypes.data_as(C.llama_token_data_p),
            size=len(table),
            selected=-1,
            sorted=False,
        )
        self.pointer = ctypes.byref(self._array)

    @classmethod
    def all(cls, logits: Any) -> _Candidates:
        table = np.zeros(len(logits), TOKEN_DATA)
        table["id"] = np.arange(len(logits), dtype=np.int32)
        table["logit"] = logits
        return cls(table)

    @property
    def selected(self) -> int:
        return int(self._array.data[self._array.selected].id)


def logprob(llama: Llama, index: int, token: int, *, top: int) -> TokenLogprob:
    """Log probability of `token` and of the `top` likeliest at batch entry `index`.

    From the model's own logits: before bias, penalties, temperature and cuts, as OpenAI and
    llama-server have it.
    """
    logits = llama.logits(index).astype(np.float64)
    logits -= logits.max()
    logits -= np.log(np.exp(logits).sum())
    best = np.argpartition(-logits, top)[:top] if top else np.array([], np.int64)
    order = best[np.argsort(-logits[best], kind="stable")]
    return TokenLogprob(
        token=llama.piece(token),
        logprob=float(logits[token]),
        top=tuple((llama.shown_piece(int(t)), float(logits[t])) for t in order),
    )


def _adjusters(llama: Llama, submit: Submit) -> list[Any]:
    found = []
    if submit.logit_bias:
        entries = [C.llama_logit_bias(token, bias) for token, bias in submit.logit_bias]
        table = (C.llama_logit_bias * len(entries))(*entries)
        found.append(C.llama_sampler_init_logit_bias(llama.n_vocab, len(entries), table))
    penalties = (submit.repeat_penalty, submit.frequency_penalty, submit.presence_penalty)
    if penalties != (1.0, 0.0, 0.0):
        found.append(C.llama_sampler_init_penalties(llama.n_vocab, PENALTY_LAST_N, *penalties))
    return found


def _choosers(submit: Submit, seed: int) -> list[Any]:
    if submit.temperature < GREEDY_TEMPERATURE:
        return [C.llama_sampler_init_greedy()]
    chain = [C.llama_sampler_init_top_k(submit.top_k)] if submit.top_k > 0 else []
    if submit.top_p < 1:
        chain.append(C.llama_sampler_init_top_p(submit.top_p, 1))
    if submit.min_p > 0:
        chain.append(C.llama_sampler_init_min_p(submit.min_p, 1))
    chain.append(C.llama_sampler_init_temp(submit.temperature))
    return [*chain, C.llama_sampler_init_dist(seed)]
