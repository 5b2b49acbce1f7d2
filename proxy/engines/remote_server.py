"""What a server is, told from the bodies of its answers: pure, no I/O.

Three kinds are told apart. What is not known of a server is not assumed: the third kind is given
prompts with a stable beginning and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b
from math import ceil
from typing import Any

WINDOW_DEFAULT_TOKENS = 4096

MESSAGE_TOKENS = 5
"""What templates put around a message: ChatML has 5, Llama 3 has 5, Gemma 4."""
BASE_TOKENS = 3 + 32
"""The header of the answer, and room for a system prompt that the template puts in by itself
(SmolLM2's has 22 tokens)."""

ESTIMATE = "estimate"

PLACES_OTHER = 256
"""Requests at a time where the server is a cluster, or nothing is known of it."""


class Kind(StrEnum):
    LLAMA_CPP = "llama_cpp.server"
    """llama-cpp-python's: one sequence, and a new request breaks off the answer at hand."""
    LLAMA_SERVER = "llama-server"
    """llama.cpp's own: slots, a prompt cache, progress and timings."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Template:
    """What the chat template adds, in tokens: around a question and its answer, and once, to
    prompts with a system message (`base`) and to those without (`bare`). `default_system` is the
    system prompt that it puts in where there is none."""

    pair: int = 2 * MESSAGE_TOKENS
    base: int = BASE_TOKENS
    bare: int = BASE_TOKENS
    default_system: str = ""

    @property
    def message_tokens(self) -> int:
        return ceil(self.pair / 2)

    @property
    def base_tokens(self) -> int:
        """The most of it, where it is not known whether there will be a system message."""
        return self.base if self.default_system else max(self.base, self.bare)

    def tokens(self, *, messages: int, with_system: bool) -> int:
        """All that is added to a prompt of so many messages."""
        return (self.base if with_system else self.bare) + ceil(self.pair * messages / 2)


@dataclass(frozen=True, slots=True)
class Server:
    """A server as it was found. `window_from` names who said how long the window is, `places` how
    many requests it serves at a time; `fingerprint` names model and vocabulary."""

    kind: Kind
    name: str
    window_tokens: int
    window_from: str
    places: int
    fingerprint: str
    template: Template = Template()
    counts: str = ESTIMATE
    """The route that counts tokens exactly, or ESTIMATE."""
    saves_slots: bool = False
    build: str = ""

    def facts(self) -> dict[str, Any]:
        """For /api/status: plain JSON values."""
        return {
            "server": self.kind.value,
            "build": self.build or None,
            "window_from": self.window_from,
            "places": self.places,
            "token_counts": self.counts,
            "cached_tokens": "not reported" if self.kind is Kind.LLAMA_CPP else "as reported",
            "slots_saved": self.saves_slots,
        }


def is_llama_server(props: object) -> bool:
    """From GET /props."""
    return isinstance(get(props, "default_generation_settings"), dict)


def is_llama_cpp(models: object, *, count_status: int) -> bool:
    """From GET /v1/models, and what GET says to the route that counts tokens by POST."""
    return get(_first(models), "owned_by") == "me" and count_status == 405


def model_name(models: object) -> str:
    name = get(_first(models), "id")
    return name if isinstance(name, str) and name else "default"


def window(models: object, props: object, *, n_ctx: int, refusal: int = 0) -> tuple[int, str]:
    """Tokens, and who said so. The surest first: what the server runs with comes before what the
    model was trained for. `refusal` is what a refused prompt told. A window that is set (`n_ctx`)
    can make the server's own smaller, never larger.
    """
    model = _first(models)
    places = {
        "/props": get(props, "default_generation_settings", "n_ctx"),
        "refusal": refusal,
        "max_model_len": get(model, "max_model_len"),
        "meta.n_ctx": get(model, "meta", "n_ctx"),
        "meta.n_ctx_train": get(model, "meta", "n_ctx_train"),
    }
    found = ((n, source) for source, n in places.items() if isinstance(n, int) and n > 0)
    tokens, source = next(found, (0, "default"))
    if n_ctx and (not tokens or n_ctx < tokens):
        return n_ctx, "n_ctx"
    return tokens or WINDOW_DEFAULT_TOKENS, source


def slots(props: object) -> int:
    total = get(props, "total_slots")
    return total if isinstance(total, int) and total > 0 else 1


def template_of(*, one: int, three: int, with_system: int | None, text: int) -> Template:
    """From the tokens of three prompts whose every text has `text` tokens: one user message; user,
    assistant, user; system, user (None where the template takes no system message)."""
    pair = max(2, three - one - 2 * text)
    bare = max(0, one - text - pair // 2)
    base = bare if with_system is None else max(0, with_system - 2 * text - pair)
    return Template(pair, base, bare)


def default_system(*, bare: str, marked: str, mark: str) -> str:
    """The template's own system prompt: `bare` is a prompt of a user's message alone, `marked` the
    same behind a system message that is `mark`."""
    before, _, after = marked.partition(mark)
    inside = bare.removeprefix(before).removesuffix(after)
    is_there = bare == before + inside + after and len(inside) > 0
    return inside if is_there else ""


def fingerprint(kind: Kind, name: str, *facts: object) -> str:
    digest = blake2b(repr(facts).encode("utf-8", "surrogatepass"), digest_size=8)
    return f"{kind.value}:{name}:{digest.hexdigest()}"


def get(value: object, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _first(models: object) -> object:
    data = get(models, "data")
    return data[0] if isinstance(data, list) and data else None
