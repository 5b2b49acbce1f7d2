"""From a context's messages to the tokens of a prompt, and what the template itself costs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from proxy.engines.embedded.call_grammar import grammar_of_calls
from proxy.engines.embedded.llama import TOKEN_BYTES, Llama, from_bytes
from proxy.engines.embedded.protocol import Part, Submit
from proxy.engines.embedded.template import CHATML, ChatTemplate, Content, Markup, TemplateError
from proxy.engines.embedded.tools import (
    in_json,
    in_own_form,
    results_as_user,
    told_in_system,
)

TAGS = ("<tool_call>", "</tool_call>", "<|python_tag|>")
"""What models write around calls of tools. Where it is one control token, it must be seen."""

CACHED_TEXTS = 4096
"""Texts whose tokens are remembered: a context's older messages come again with every request."""


class UnknownToken(ValueError):
    """A token id that the model does not have."""


class Prompter:
    """Safe to use from one thread at a time, beside the thread that decodes."""

    def __init__(self, llama: Llama) -> None:
        self._llama = llama
        self._cache: OrderedDict[tuple[str, bool], list[int]] = OrderedDict()
        self.template = ChatTemplate(
            llama.chat_template() or CHATML,
            bos=llama.special_text(llama.bos),
            eos=llama.special_text(llama.eos),
        )
        llama.reveal((*TAGS, *self.template.think_tags))

    def tokens(
        self,
        messages: Sequence[Part],
        *,
        answer_header: bool,
        continues: bool,
        tools: str = "",
        thinks: bool = True,
    ) -> list[int]:
        """The prompt, token by token. `tools` is a JSON list. Without `thinks` the model is past
        its reasoning. Raises TemplateError."""
        if tools and not self.template.takes_tools:
            messages, tools = told_in_system(messages, tools), ""
        messages = self._in_roles(self._fold_system(messages))
        segments = self.template.render(
            [m.role for m in messages],
            answer_header=answer_header,
            continues=continues,
            tools=tools,
            thinks=thinks,
        )
        tokens: list[int] = []
        for segment in segments:
            if isinstance(segment, Markup):
                tokens += self._text(segment.text, markup=True, first=not tokens)
            elif isinstance(segment, Content):
                tokens += self._content(
                    messages[segment.index], quoted=segment.quoted, first=not tokens
                )
            else:
                tokens += self._text(segment.text, markup=False, first=not tokens)
        return self._with_bos(tokens)

    def raw(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt without a template, as llama.cpp's server takes it: special tokens written in it
        count as such, and the token that begins every text is put first. Raises UnknownToken.
        """
        if isinstance(prompt, str):
            return self._with_bos(self._llama.tokenize(prompt, markup=True, first=True))
        for token in prompt:
            if not 0 <= token < self._llama.n_vocab:
                raise UnknownToken(f"The model has no token {token}.")
        return list(prompt)

    def count(self, text: str) -> int:
        return len(self.tokens_of(text))

    def tokens_of(self, text: str) -> list[int]:
        """A text inside a prompt: what looks like markup in it is text."""
        return self._text(text, markup=False, first=False)

    def call_grammar(self, submit: Submit) -> str:
        """What an answer may be that must call. Raises GrammarError."""
        template = self.template
        # Without reasoning the header leaves it closed, and an answer that goes on has no header.
        return grammar_of_calls(
            submit.tools,
            submit.must_call,
            one_call=submit.one_call,
            form=template.form,
            think_tags=template.think_tags if template.thinks and submit.thinks else None,
            thinks_first=template.thinks_first and not submit.continues,
        )

    def tools_cost(self, tools: str) -> int:
        """Tokens that the tools add to a prompt. Raises TemplateError."""
        chat = [Part(role="system", parts=()), Part(role="user", parts=())]
        bare = self.tokens(chat, answer_header=True, continues=False)
        return len(self.tokens(chat, answer_header=True, continues=False, tools=tools)) - len(bare)

    def overhead(self) -> tuple[int, int]:
        """(tokens around each message, tokens once), so that n messages, whoever begins and ends,
        have at most n times the one and once the other around them. A system message that the
        template adds by itself is one of them.

        Templates write the same around every turn: its cost is the difference of two prompts, and
        what no message accounts for shows in the shortest ones.
        """
        one = self._markup_tokens(["system", "user"])
        each = -(-(self._markup_tokens(["system", "user", "assistant", "user"]) - one) // 2)
        bare = ["user"], ["user", "assistant"]
        default = self.default_system()
        added = self.count(default) + each if default else 0
        rests = [self._rest(["system", *roles], each) for roles in bare]
        rests += [self._rest(roles, each) - added for roles in bare]
        return each, max(0, *rests)

    def default_system(self) -> str:
        return self.template.default_system()

    def _rest(self, roles: list[str], each: int) -> int:
        try:
            return self._markup_tokens(roles) - len(roles) * each
        except TemplateError:
            return 0  # Never sent to the model either.

    def _markup_tokens(self, roles: list[str]) -> int:
        empty = [Part(role=r, parts=()) for r in roles]
        return len(self.tokens(empty, answer_header=True, continues=False))

    def _content(self, message: Part, *, quoted: bool, first: bool) -> list[int]:
        exact = message.token_ids
        if exact is not None and not quoted and self._knows(exact):
            return from_bytes(exact)
        tokens: list[int] = []
        for part in message.parts:
            text = in_json(part) if quoted else part
            tokens += self._text(text, markup=False, first=first and not tokens)
        return tokens

    def _knows(self, token_ids: bytes) -> bool:
        """Whether llama.cpp would take these: one unknown id fails everybody in its batch."""
        if len(token_ids) % TOKEN_BYTES:
            return False
        tokens = from_bytes(token_ids)
        return all(0 <= t < self._llama.n_vocab for t in tokens)

    def _text(self, text: str, *, markup: bool, first: bool) -> list[int]:
        if first:
            return self._llama.tokenize(text, markup=markup, first=True)
        key = (text, markup)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        tokens = self._cache[key] = self._llama.tokenize(text, markup=markup)
        if len(self._cache) > CACHED_TEXTS:
            self._cache.popitem(last=False)
        return tokens

    def _fold_system(self, messages: Sequence[Part]) -> Sequence[Part]:
        """For templates without a system role: its text goes in front of the first user message."""
        if self.template.takes_system or not messages or messages[0].role != "system":
            return messages
        system, rest = messages[0], list(messages[1:])
        if not rest or rest[0].role != "user":
            return [Part(role="user", parts=system.parts), *rest]
        first = Part(role="user", parts=(*system.parts, "\n\n", *rest[0].parts))
        return [first, *rest[1:]]

    def _in_roles(self, messages: Sequence[Part]) -> Sequence[Part]:
        """Calls and results of tools as this template's models know them."""
        messages = [
            in_own_form(m, self.template.form) if m.role == "assistant" else m for m in messages
        ]
        return messages if self.template.takes_results else results_as_user(messages)

    def _with_bos(self, tokens: list[int]) -> list[int]:
        llama = self._llama
        if llama.adds_bos and (not tokens or tokens[0] != llama.bos):
            return [llama.bos, *tokens]
        return tokens
