"""The model that a replay is for: its vocabulary without it, and itself where it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from memory.context import Context
from memory.tokens import tokens_of
from proxy.config import MAX_DEFAULT_CTX, Config, load, model_file
from proxy.engines.base import Engine
from proxy.tuning.simulation import Vocabulary

MESSAGE_TOKENS = 4
BASE_TOKENS = 3
"""What templates add around a message and once, where nobody can be asked: ChatML's."""


class Estimated:
    """Vocabulary for a server whose tokenizer is not here: cl100k's tokens, ChatML's markup."""

    fingerprint = "tiktoken:cl100k_base"
    default_system = ""
    message_tokens = MESSAGE_TOKENS
    base_tokens = BASE_TOKENS

    def prompt(self, context: Context, *, answer_header: bool) -> list[Any]:
        out: list[Any] = ["<bos>"]
        for i, message in enumerate(context.messages):
            out += ["<start>", message.role, "\n"]
            for part in message.parts:
                out += self.tokens(part)
            if not (context.continues and i == len(context.messages) - 1):
                out.append("<end>")
        return [*out, "<start>", "assistant"] if answer_header and not context.continues else out

    def tokens(self, text: str) -> list[Any]:
        return tokens_of(text)

    def ids(self, token_ids: bytes) -> list[Any]:
        raise NotImplementedError("a server's token ids are not known here")


def vocabulary_of(flags: Mapping[str, str]) -> Vocabulary:
    """That of the model which these flags name. Raises ConfigError."""
    return vocabulary(load(flags, environ={}, file=None))


def vocabulary(config: Config) -> Vocabulary:
    """The embedded model's own, or an estimate for a server's. Raises ConfigError."""
    if config.upstream:
        return Estimated()
    from proxy.engines.embedded.vocabulary import EmbeddedVocabulary

    return EmbeddedVocabulary(_load(config))


def window_tokens(config: Config, known: Vocabulary) -> int:
    """The window that `serve` would have."""
    return config.n_ctx or int(getattr(known, "window_tokens", MAX_DEFAULT_CTX))


def _load(config: Config) -> Any:
    from proxy.engines.embedded.protocol import Load

    return Load(
        path=str(model_file(config)),
        n_ctx=config.n_ctx,
        lora=config.engine.lora,
        chat_template=config.engine.chat_template,
    )


def engine(config: Config, *, directory: Path) -> Engine:
    """The model itself, beside any proxy that runs: it leaves nothing in that one's folders."""
    if config.upstream:
        from proxy.engines.remote import RemoteEngine

        return RemoteEngine.from_config(config)
    from proxy.engines.embedded.engine import EmbeddedEngine

    bare = replace(config.engine, snapshot_bytes=0)
    return EmbeddedEngine.from_config(replace(config, data=directory, engine=bare))
