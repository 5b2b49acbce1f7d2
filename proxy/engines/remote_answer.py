"""A server's answer as the text that a model would have written: pure.

Servers take reasoning and calls of tools apart into fields of their own; inside of the proxy both
are text, in one form (memory.calls, base.Thinking), whatever engine it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memory.calls import Call, text_with_calls
from proxy.engines.base import Thinking
from proxy.engines.remote_stream import CallPart, Piece

TAGS = Thinking()


@dataclass(slots=True)
class _Begun:
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class AnswerText:
    """Feed it pieces in order; it gives back text. Calls come whole, at the end."""

    thinks: bool = False
    has_said: bool = False
    calls: dict[int, _Begun] = field(default_factory=dict)

    def feed(self, piece: Piece) -> str:
        for part in piece.calls:
            self._add(part)
        return self._reasoning(piece.reasoning) + self._content(piece.text)

    def close(self) -> str:
        """What is still to come when the answer has ended."""
        closing = self._end_of_thought()
        calls = [Call(begun.name, begun.arguments) for _, begun in sorted(self.calls.items())]
        if not calls:
            return closing
        return closing + ("\n" if self.has_said else "") + text_with_calls("", calls)

    def _reasoning(self, text: str) -> str:
        if not text:
            return ""
        opening = "" if self.thinks else TAGS.opening
        self.thinks = True
        return opening + text

    def _content(self, text: str) -> str:
        if not text:
            return ""
        self.has_said = True
        return self._end_of_thought() + text

    def _end_of_thought(self) -> str:
        was, self.thinks = self.thinks, False
        return TAGS.closing if was else ""

    def _add(self, part: CallPart) -> None:
        begun = self.calls.setdefault(part.index, _Begun())
        if part.function:
            name = part.function.name or ""
            # Versions of vLLM say the name of a call that it was made to do with each piece of it.
            begun.name += "" if name == begun.name else name
            begun.arguments += part.function.arguments or ""
