"""The summarisation policy: when to compact, how far, and what a summary may be."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import Any

SHARE_OR_TOKENS = "a share of the window up to 1.0, or a number of tokens above"

SUMMARY_SHARE = 0.4
"""Most of the budget of all summaries that one of them may have."""
SUMMARY_TOKENS_LEAST = 24
"""A summary of fewer tokens says nothing."""


def _knob(default: Any, doc: str, *choices: str) -> Any:
    return field(default=default, metadata={"doc": doc, "choices": choices})


@dataclass(frozen=True, slots=True)
class Policy:
    """Every knob of a policy file. `doc` in the metadata says unit and effect.

    Knobs with a length take a share of the window up to 1.0, or a number of tokens above that.
    """

    name: str = _knob("balanced", "Name shown in listings.")
    compact: bool = _knob(True, "Whether older turns become summaries at all.")
    high: float = _knob(
        0.5,
        "Verbatim turns above this start a compaction (share or tokens). Higher keeps more word "
        "for word and makes each prompt longer.",
    )
    low: float = _knob(
        0.25,
        "A compaction leaves about this much verbatim (share or tokens). The distance to `high` "
        "decides how seldom it happens.",
    )
    block: float = _knob(
        0.4,
        "Most source text of one summary (share or tokens). More makes fewer, coarser summaries.",
    )
    summaries: float = _knob(
        0.2,
        "Budget of all summaries together (share or tokens). Above it, the two adjacent ones of "
        "the lowest rank become one.",
    )
    summary: float = _knob(
        0.04,
        "Length of one summary (share or tokens), at most 0.4 of the budget. Longer keeps more "
        "facts and takes longer to write.",
    )
    answer: float = _knob(
        0.2,
        "Room kept free for the answer when a prompt must be cut (share or tokens); a request "
        "that asks for less gets less.",
    )
    verbatim_turns: int = _knob(
        2, "This many newest turns are never summarised (turns, at least 1)."
    )
    idle_s: float = _knob(
        0.0,
        "Quiet time after an answer before a compaction begins (seconds). User requests interrupt "
        "it in any case.",
    )
    method: str = _knob(
        "model",
        "`model` asks the model and falls back to sentences of the source when its text fails the "
        "checks; `extractive` never asks it.",
        "model",
        "extractive",
    )
    ask_on: str = _knob(
        "cached",
        "`cached` asks for the summary behind the conversation's own context, whose tokens are in "
        "the KV cache; `fresh` asks with a prompt of its own.",
        "cached",
        "fresh",
    )
    merge_from: str = _knob(
        "originals",
        "Merged summaries are written from the original turns where these fit the window "
        "(`originals`), or from the two summaries (`summaries`).",
        "originals",
        "summaries",
    )
    language: str = _knob(
        "chat", "Language of summaries: `chat` follows the chat, else a name such as `English`."
    )
    prompt: str = _knob(
        "",
        "Your own words to ask for a summary; empty means the built-in ones. `{words}` and "
        "`{language}` are filled in.",
    )
    system: str = _knob(
        "split",
        "`split` keeps the lasting part of a changing system prompt in front and puts the rest "
        "before the newest user message; `front` sends it as it comes, which breaks the prefix "
        "whenever it changes.",
        "split",
        "front",
    )
    overflow: str = _knob(
        "drop",
        "What happens to a prompt that does not fit: `drop` leaves the oldest verbatim turns out "
        "and says so in the prompt, `refuse` answers with an error.",
        "drop",
        "refuse",
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            _check(f, getattr(self, f.name))
        if self.low >= self.high and (self.low > 1) == (self.high > 1):
            raise ValueError(f"low ({self.low}) must be below high ({self.high}).")

    @property
    def digest(self) -> str:
        """Names everything that shapes a summary's text; the same digest means the same policy."""
        text = repr(dataclasses.astuple(replace(self, name="")))
        return blake2b(text.encode(), digest_size=8).hexdigest()

    def limits(self, window_tokens: int) -> Limits:
        def tokens(value: float) -> int:
            return max(1, round(value * window_tokens) if value <= 1 else round(value))

        high = min(tokens(self.high), window_tokens)
        summaries = tokens(self.summaries)
        # With the list of exact facts (memory.summarize) a block has a quarter more, and two must
        # fit the budget, or each would be merged with the next.
        longest = max(SUMMARY_TOKENS_LEAST, int(summaries * SUMMARY_SHARE))
        return Limits(
            high_tokens=high,
            low_tokens=min(tokens(self.low), high - 1),
            block_tokens=tokens(self.block),
            summaries_tokens=summaries,
            summary_tokens=min(longest, max(SUMMARY_TOKENS_LEAST, tokens(self.summary))),
            answer_tokens=min(tokens(self.answer), window_tokens // 2),
            verbatim_turns=max(1, self.verbatim_turns),
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """A policy's lengths for one window, in tokens."""

    high_tokens: int
    low_tokens: int
    block_tokens: int
    summaries_tokens: int
    summary_tokens: int
    answer_tokens: int
    verbatim_turns: int

    @property
    def step_tokens(self) -> int:
        """How far a cut moves at once, so that it moves seldom."""
        return max(1, self.high_tokens - self.low_tokens)

    def within(self, room_tokens: int) -> Limits:
        """The same with marks that suit so much room for verbatim turns: a long system prompt takes
        its own from them, and turns that are neither sent nor summarised would be lost."""
        high = min(self.high_tokens, max(2, room_tokens))
        return replace(self, high_tokens=high, low_tokens=min(self.low_tokens, high // 2))


def load_policy(name_or_path: str, search: Path | None = None) -> Policy:
    """A policy by preset name or by file. Raises ValueError with a sentence that names the
    fault.
    """
    folder = search or presets_folder()
    path = folder / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.toml"))
        raise ValueError(
            f"There is no policy {name_or_path!r}{_nearest(name_or_path, known)} "
            f"Presets: {', '.join(known)}; or give a file."
        )
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as exc:
        raise ValueError(f"{path} cannot be read: {exc}") from exc
    return parse_policy(table, source=str(path))


def parse_policy(table: dict[str, Any], *, source: str) -> Policy:
    """A policy from a table of knobs. Raises ValueError naming `source`, the knob and the
    nearest.
    """
    known = [f.name for f in fields(Policy)]
    for key in table:
        if key not in known:
            raise ValueError(f"{source}: there is no knob {key!r}{_nearest(key, known)}")
    try:
        return Policy(**table)
    except (ValueError, TypeError) as exc:
        raise ValueError(f"{source}: {exc}") from exc


def presets_folder() -> Path:
    """Where the presets lie: beside the package when installed, in config/ in a checkout."""
    installed = Path(__file__).parent / "policies"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "config" / "policies"


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else "."


def _check(f: dataclasses.Field[Any], value: Any) -> None:
    types: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "bool": (bool,),
        "int": (int,),
        "float": (int, float),
    }
    wanted = types[str(f.type)]
    if not isinstance(value, wanted) or (isinstance(value, bool) and f.type != "bool"):
        raise ValueError(f"{f.name} must be {f.type}, not {value!r}.")
    if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < 1e9:
        raise ValueError(f"{f.name} must be 0 or more, not {value!r}.")
    choices = f.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value!r}.")
