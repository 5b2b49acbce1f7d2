"""The model's own chat template, rendered so that text stays text.

A template is run with a marker in the place of each message's content (and of texts in the tools
that could hold markup). What the template wrote
itself is tokenized with markup recognised, what stands for a marker is not: `<|im_end|>` typed by
a user is eight characters and ends nothing. Format: Jinja2 as in Hugging Face's chat templates,
stored in GGUF under tokenizer.chat_template.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from proxy.engines.embedded.tools import PROBE, PROBES, family, in_json, masked, read

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""For models that bring no template of their own."""


TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the code in a model's template can raise while it runs: it is a program of its own."""


class TemplateError(ValueError):
    """The template cannot render these messages."""


@dataclass(frozen=True, slots=True)
class Markup:
    """Text that the template wrote: special tokens in it count as such."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """The content of message number `index` stands here, whole; with `quoted` as it stands between
    the quotes of a JSON string."""

    index: int
    quoted: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """A text out of the tools stands here: text like a message's."""

    text: str


Segment = Markup | Content | Told

THINK_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""What models put around their reasoning. The first pair is taken where a template shows none."""


class ChatTemplate:
    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        """Raises TemplateError if `source` is no template."""
        self._nonce = secrets.token_hex(8)
        self._marker = re.compile(f"\ue000{self._nonce}:([mqtj][0-9]+)\ue001")
        self._constants = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = self._environment().from_string(source)
        except jinja2.TemplateError as exc:
            raise TemplateError(f"The chat template does not parse: {exc}") from exc
        self.takes_system = self._probe_system()
        self.takes_tools = self._probe_tools()
        self.takes_results = self.takes_tools and self._probe_results()
        self.form = family(source)
        self.think_tags = next((pair for pair in THINK_TAGS if pair[1] in source), THINK_TAGS[0])
        self.thinks = self.think_tags[1] in source
        self.thinks_first = self._probe_thinking()

    def render(
        self,
        roles: Sequence[str],
        *,
        answer_header: bool,
        continues: bool = False,
        tools: str = "",
        thinks: bool = True,
    ) -> tuple[Segment, ...]:
        """Segments for messages of these roles, in order.

        With `answer_header` the header of the assistant's answer follows. With `continues` the
        text ends right behind the last message's content, so that the model goes on with it.
        An answer at the end stands as it will when more follows: some templates put an empty
        thought before the last one. `tools` is a JSON list, "" for none. Without `thinks` a
        header leaves the reasoning closed. Raises TemplateError if the template refuses the roles
        or loses a message.
        """
        told: list[str] = []
        given = masked(read(tools), lambda text: self._told(told, text)) or None
        header = answer_header and not continues
        text = self._run(roles, answer_header=header, tools=given, thinks=thinks)
        if header and not thinks and self._opens(text):
            text += f"\n{self.think_tags[1]}\n\n"
        if roles and roles[-1] == "assistant" and not header:
            text = self._as_history(roles, text, tools=given)
        segments = tuple(self._split(text, told))
        present = {s.index for s in segments if isinstance(s, Content)}
        if missing := set(range(len(roles))) - present:
            raise TemplateError(f"The chat template leaves out message {min(missing) + 1}.")
        return _until(segments, len(roles) - 1) if continues else segments

    def default_system(self) -> str:
        """The system prompt that the template adds when there is none, "" if it adds none."""
        if not self.takes_system:
            return ""
        try:
            given = self._unquoted(self._run(["system", "user"], answer_header=False))
            absent = self._unquoted(self._run(["user"], answer_header=False))
        except TemplateError:
            return ""  # A template that insists on a system message has no default one.
        head, tail = given.split(self._mark(0), 1)
        between, head_of_user = tail.split(self._mark(1))[0], absent.split(self._mark(0))[0]
        if head and head_of_user.startswith(head) and head_of_user.endswith(between):
            return head_of_user[len(head) : len(head_of_user) - len(between)]
        return ""

    def _probe_system(self) -> bool:
        try:
            text = self._run(["system", "user"], answer_header=False)
        except TemplateError:
            return False
        return self._mark(0) in self._unquoted(text)

    def _probe_tools(self) -> bool:
        try:
            return PROBE in self._run(["user"], answer_header=False, tools=list(PROBES))
        except TemplateError:
            return False

    def _probe_results(self) -> bool:
        roles = ["user", "assistant", "tool"]
        try:
            text = self._run(roles, answer_header=False, tools=list(PROBES))
        except TemplateError:
            return False
        return self._mark(2) in self._unquoted(text)

    def _probe_thinking(self) -> bool:
        """Whether the header of an answer opens its reasoning already."""
        try:
            return self._opens(self._run(["user"], answer_header=True))
        except TemplateError:
            return False

    def _opens(self, text: str) -> bool:
        """Whether a prompt ends inside of reasoning."""
        header = self._marker.split(text)[-1]
        return header.rfind(self.think_tags[0]) > header.rfind(self.think_tags[1])

    def _as_history(self, roles: Sequence[str], text: str, *, tools: Any) -> str:
        """The text of a prompt that ends with an answer, as it is when a question follows."""
        last = self._mark(len(roles) - 1)
        try:
            longer = self._run([*roles, "user"], answer_header=False, tools=tools)
        except TemplateError:
            return text
        if last not in longer or last not in text:
            return text
        return longer[: longer.rindex(last)] + text[text.rindex(last) :]

    def _mark(self, index: int) -> str:
        return f"\ue000{self._nonce}:m{index}\ue001"

    def _unquoted(self, text: str) -> str:
        """The same with the markers of quoted contents as of others."""
        return text.replace(f"\ue000{self._nonce}:q", f"\ue000{self._nonce}:m")

    def _told(self, told: list[str], text: str) -> str:
        """A marker for a text of the tools, which is remembered in `told`."""
        told.append(text)
        return f"\ue000{self._nonce}:t{len(told) - 1}\ue001"

    def _tojson(self, value: Any, **options: Any) -> str:
        """As Hugging Face's. Markers in it stand for texts inside quotes from here on."""
        text = json.dumps(value, **(options | {"ensure_ascii": False}))
        for plain, quoted in ("mq", "tj"):
            text = text.replace(f"\ue000{self._nonce}:{plain}", f"\ue000{self._nonce}:{quoted}")
        return text

    def _environment(self) -> ImmutableSandboxedEnvironment:
        # The settings Hugging Face renders chat templates with.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = self._tojson
        return environment

    def _run(
        self,
        roles: Sequence[str],
        *,
        answer_header: bool,
        tools: Any = None,
        thinks: bool = True,
    ) -> str:
        # Named as Qwen 3's and many after it name it; left out, their own default counts.
        extra = {} if thinks else {"enable_thinking": False}
        messages = [{"role": r, "content": self._mark(i)} for i, r in enumerate(roles)]
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=answer_header,
                raise_exception=_raise,
                strftime_now=lambda f: datetime.now().strftime(f),
                tools=tools,
                **self._constants,
                **extra,
            )
        except TEMPLATE_FAILURES as exc:
            raise TemplateError(f"The chat template refuses these messages: {exc}") from exc

    def _split(self, text: str, told: Sequence[str]) -> list[Segment]:
        segments: list[Segment] = []
        for i, piece in enumerate(self._marker.split(text)):
            if i % 2:
                kind, index = piece[0], int(piece[1:])
                if kind in "mq":
                    segments.append(Content(index, quoted=kind == "q"))
                else:
                    segments.append(Told(in_json(told[index]) if kind == "j" else told[index]))
            elif piece:
                segments.append(Markup(piece))
        return segments


class _Generation(Extension):
    """`{% generation %}` of Hugging Face's templates: its body counts, the tag means nothing
    here.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Any) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _until(segments: Sequence[Segment], index: int) -> tuple[Segment, ...]:
    last = max(i for i, s in enumerate(segments) if isinstance(s, Content) and s.index == index)
    return tuple(segments[: last + 1])
