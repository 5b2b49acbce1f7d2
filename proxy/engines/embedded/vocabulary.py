"""What the model in the child process would make of texts, without the model: its vocabulary and
chat template, in this process. Loads in a tenth of a second.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

from memory.context import Context
from proxy.engines.embedded.llama import Llama, from_bytes
from proxy.engines.embedded.loading import fingerprint
from proxy.engines.embedded.prompt import Prompter
from proxy.engines.embedded.protocol import Load, Part

MAX_DEFAULT_CTX = 8192


class EmbeddedVocabulary:
    """The very tokens that the child would evaluate. Raises LoadError, FileError, TemplateError."""

    def __init__(self, load: Load) -> None:
        # What llama.cpp has to say about the file is for those who run it.
        with contextlib.redirect_stderr(io.StringIO()):
            llama = Llama.for_texts(load)
        self._prompter = Prompter(llama)
        self.fingerprint = fingerprint(load.path)
        self.default_system = self._prompter.default_system()
        self.message_tokens, self.base_tokens = self._prompter.overhead()
        trained = llama.meta(f"{llama.meta('general.architecture')}.context_length")
        self.window_tokens = load.n_ctx or min(int(trained or MAX_DEFAULT_CTX), MAX_DEFAULT_CTX)

    def prompt(self, context: Context, *, answer_header: bool) -> list[Any]:
        same = context.tokenizer == self.fingerprint
        messages = [
            Part(role=m.role, parts=m.parts, token_ids=m.token_ids if same else None)
            for m in context.messages
        ]
        return self._prompter.tokens(
            messages,
            answer_header=answer_header,
            continues=context.continues,
            tools=context.tools,
        )

    def tokens(self, text: str) -> list[Any]:
        return self._prompter.tokens_of(text)

    def ids(self, token_ids: bytes) -> list[Any]:
        return from_bytes(token_ids)
