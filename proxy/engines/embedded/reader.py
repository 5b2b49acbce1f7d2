"""The thread of the model process that takes commands: renders, tokenizes, counts, refuses."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn, assert_never

from proxy.engines.embedded import protocol
from proxy.engines.embedded.embedding import Embedder, Job
from proxy.engines.embedded.grammar import GrammarError
from proxy.engines.embedded.inbox import End, Glance, Inbox
from proxy.engines.embedded.llama import Llama
from proxy.engines.embedded.outbox import Outbox
from proxy.engines.embedded.prompt import Prompter, UnknownToken
from proxy.engines.embedded.protocol import (
    Cancel,
    Command,
    Count,
    CountTools,
    Embed,
    Forget,
    Load,
    Look,
    Read,
    Submit,
)
from proxy.engines.embedded.request import Request
from proxy.engines.embedded.sampling import Grammar
from proxy.engines.embedded.template import TemplateError

LAST_SAVE_S = 4.0
"""How long the process may write snapshots once its parent has gone or told it to end."""

UNREADABLE = "The model process failed over this request, and says why in chatfold's log."


class Reader:
    """Turns commands into work for the engine thread."""

    def __init__(
        self,
        frames: Iterator[bytes],
        inbox: Inbox,
        outbox: Outbox,
        llama: Llama,
        prompter: Prompter,
        embedder: Embedder,
    ) -> None:
        self._frames = frames
        self._inbox = inbox
        self._outbox = outbox
        self._llama = llama
        self._prompter = prompter
        self._embedder = embedder
        self.steps = 0
        """Commands that were handled."""
        self.idle = True

    def run(self) -> NoReturn:
        # Whatever ends this loop ends the process: without its parent it has no purpose, and a
        # frame that cannot be read means that the two no longer understand each other.
        try:
            for body in self._frames:
                self.idle = False
                self._answer(protocol.command(body))
                self.steps, self.idle = self.steps + 1, True
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        # Should no thread get to run any more, the kernel ends the process.
        signal.alarm(math.ceil(LAST_SAVE_S) + 1)
        self._inbox.put(End())
        time.sleep(LAST_SAVE_S)
        os._exit(0)

    def _answer(self, command: Command) -> None:
        """An error in one request that nobody thought of ends that request alone: else all others
        would end with it, and it would be handed to the next process.
        """
        try:
            self._handle(command)
        except Exception:
            if not isinstance(command, Submit | Count | CountTools | Embed | Look):
                raise
            traceback.print_exc()
            sys.stderr.flush()
            failed = protocol.Failed(
                id=command.id, kind="engine", message=UNREADABLE, trace=traceback.format_exc()
            )
            self._outbox.send(failed)

    def _handle(self, command: Command) -> None:
        match command:
            case Submit():
                self._submit(command)
            case Cancel() | Read() | Forget():
                self._inbox.put(command)
            case Count(id=id_, texts=texts):
                counts = tuple(self._prompter.count(t) for t in texts)
                self._outbox.send(protocol.Counted(id=id_, counts=counts))
            case CountTools():
                self._count_tools(command)
            case Embed(id=id_, inputs=inputs):
                self._embed(id_, inputs)
            case Look():
                self._look(command)
            case Load():
                raise ValueError("a second Load")
            case _:
                assert_never(command)

    def _count_tools(self, command: CountTools) -> None:
        try:
            cost = self._prompter.tools_cost(command.tools)
        except TemplateError:
            # The request itself will be refused for the same reason, with a sentence.
            cost = self._prompter.count(command.tools)
        self._outbox.send(protocol.Counted(id=command.id, counts=(cost,)))

    def _look(self, command: Look) -> None:
        try:
            # As the keeper warms it: up to where the next message will stand.
            tokens = self._prompter.tokens(
                command.messages, answer_header=False, continues=False, tools=command.tools
            )
        except TemplateError as exc:
            self._refuse(command.id, "refused", str(exc))
            return
        self._inbox.put(Glance(command.id, command.owner, tokens))

    def _embed(self, id_: int, inputs: Sequence[str | Sequence[int]]) -> None:
        most = self._embedder.window_tokens
        if not self._embedder.possible:
            self._refuse(id_, "refused", "This model makes no embeddings.", param="model")
            return
        texts = []
        for text in inputs:
            tokens = self._embedder.tokens(text) if isinstance(text, str) else list(text)
            if not tokens or len(tokens) > most:
                sentence = f"Each input must have 1 to {most} tokens, and one has {len(tokens)}."
                self._refuse(id_, "refused", sentence, param="input")
                return
            if any(not 0 <= t < self._llama.n_vocab for t in tokens):
                self._refuse(id_, "refused", "The model has no such token.", param="input")
                return
            texts.append(tokens)
        self._inbox.put(Job(id_, texts))

    def _submit(self, submit: Submit) -> None:
        if not self._llama.generates:
            sentence = "This model makes embeddings and nothing else: it cannot answer."
            self._refuse(submit.id, "refused", sentence, param="model")
            return
        try:
            tokens = self._tokens(submit)
        except (TemplateError, UnknownToken) as exc:
            self._refuse(submit.id, "refused", str(exc))
            return
        # One more token must fit behind the prompt, or there is nothing to answer with.
        if len(tokens) >= self._llama.window_tokens:
            self._refuse(submit.id, "overflow", "", prompt_tokens=len(tokens))
            return
        if not tokens:
            self._refuse(submit.id, "refused", "The request holds no text.")
            return
        try:
            grammar = self._grammar(submit)
        except GrammarError as exc:
            param = "tool_choice" if submit.must_call else "response_format"
            self._refuse(submit.id, "refused", str(exc), param=param)
            return
        arrived_at = time.monotonic()
        self._inbox.put(Request(submit, tokens, arrived_at, grammar=grammar))

    def _grammar(self, submit: Submit) -> Grammar | None:
        if submit.must_call:
            return Grammar(self._llama, self._prompter.call_grammar(submit))
        if not submit.grammar:
            return None
        template = self._prompter.template
        thinks = template.thinks_first and submit.thinks and submit.raw is None
        thinks = thinks and not submit.continues
        return Grammar(self._llama, submit.grammar, after=template.think_tags[1] if thinks else "")

    def _tokens(self, submit: Submit) -> list[int]:
        if submit.raw is not None:
            return self._prompter.raw(submit.raw)
        return self._prompter.tokens(
            submit.messages,
            answer_header=submit.max_tokens != 0,
            continues=submit.continues,
            tools=submit.tools,
            thinks=submit.thinks,
        )

    def _refuse(
        self, id_: int, kind: str, message: str, *, prompt_tokens: int = 0, param: str = ""
    ) -> None:
        self._outbox.send(
            protocol.Failed(
                id=id_,
                kind=kind,
                message=message,
                prompt_tokens=prompt_tokens,
                window_tokens=self._llama.window_tokens,
                param=param,
            )
        )
