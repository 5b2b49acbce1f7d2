"""Does `chatfold tune` tell the truth? `make bench-tuning`; exits 1 if a bound is missed.

The 60-turn chat of `make bench-flat` through a real chatfold under three policies. Then the chat
is read from that chatfold's store and replayed without a model, and what the replay says is held
against what was measured, turn by turn. After that the table and the plot of all presets over
LoCoMo's conversations, which need no model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import command
from bench.bounds import Check, at_most
from bench.chats import Chat, UserTokens
from bench.locomo import CHAT, user_turns
from bench.servers import ROOT, BenchError, Chatfold
from memory.policy import load_policy, presets_folder
from proxy.doctor import DATABASE
from proxy.tuning.chats import Chat as Replayed
from proxy.tuning.measures import PAUSE_S
from proxy.tuning.models import vocabulary_of
from proxy.tuning.planning import planned
from proxy.tuning.replay import Aim, Setting, Turn
from proxy.tuning.report import Report, at_rest, headline, pareto, table
from proxy.tuning.running import Run, plan
from proxy.tuning.sources import read_source
from proxy.tuning.speeds import Speeds
from proxy.tuning.svg import standalone

POLICIES = ("balanced", "small-window", "verbatim")
OFF_MOST = 0.03
PRESETS_WINDOW = 4096
QUIET = Speeds(prefill_s=1 / 175, decode_s=1 / 56)
"""SmolLM2 on two cores that do nothing else: a loaded machine's speeds would say nothing."""

BACKGROUND_OFF_MOST = 0.03
PRESETS_WINDOW = 4096
QUIET = Speeds(prefill_s=1 / 175, decode_s=1 / 56)
"""SmolLM2 on two cores that do nothing else: a loaded machine's speeds would say nothing."""


BACKGROUND = re.compile(
    r'^chatfold_tokens_evaluated_total\{work="background"\} (\S+)$', re.MULTILINE
)


@dataclass(frozen=True)
class Measured:
    """What a real chat cost. Tokens over all its turns."""

    turns: int
    evaluated: int
    background: int
    prompt: int
    worst_turn: int


@dataclass(frozen=True)
class Compared:
    policy: str
    measured: Measured
    reused: Measured
    """Predicted with the summaries that the store has."""
    assumed: Measured
    """Predicted without them."""
    turns_off: int
    """Turns whose evaluated tokens were predicted wrongly at all (with the stored summaries)."""

    def off(self, name: str, *, predicted: Measured) -> float:
        measured = getattr(self.measured, name)
        return float(abs(getattr(predicted, name) - measured) / max(1, measured))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    return command.run(lambda: _measure(options), with_chat=True)


def _measure(options: argparse.Namespace) -> int:
    if options.only != "real":
        asyncio.run(_presets(options))
    if options.only == "presets":
        return 0
    checks: list[Check] = []
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory:
        work = options.work or Path(directory)
        for name in options.policy or POLICIES:
            one = _compared(name, work / name, options)
            print(_text(one), flush=True)
            checks += (held := _checks(one))
            # At once: the next policy takes minutes.
            _keep(options.results, [one], held)
    print("\n".join(map(str, checks)))
    return 0 if all(check.holds for check in checks) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.tuning", description=__doc__)
    parser.add_argument("--turns", type=int, default=60, help="fewer for a quick trial")
    parser.add_argument("--n-ctx", type=int, default=2048, help="the window in tokens")
    parser.add_argument("--max-tokens", type=int, default=48, help="the longest answer")
    parser.add_argument("--threads", type=int, default=0, help="fewer beside other work")
    parser.add_argument("--policy", nargs="+", help="these in place of the three")
    parser.add_argument("--only", choices=("real", "presets"), help="one half alone")
    parser.add_argument("--presets", type=Path, default=ROOT / "bench/results/tuning-presets.json")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs", help="where plots go")
    parser.add_argument("--work", type=Path, help="keep data, logs and traces there")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/tuning.json")
    return parser.parse_args(arguments)


async def _presets(options: argparse.Namespace) -> None:
    """All presets on LoCoMo's conversations: prints the table, writes figures and plots."""
    known = vocabulary_of({"n_ctx": str(PRESETS_WINDOW)})
    files = sorted(CHAT.parent.glob("conv-*.json"))
    chats = [chat for file in files for chat in await read_source(file, limit=1)]
    run = Run.of(chats, Setting(PRESETS_WINDOW), QUIET, pause_s=PAUSE_S)
    policies = [load_policy(file.stem) for file in sorted(presets_folder().glob("*.toml"))]
    rows = await plan(run, policies, known, tell=lambda n: None)
    found = Report(
        rows=tuple(rows),
        chats=tuple((c.name, len(c.exchanges)) for c in chats),
        window_tokens=PRESETS_WINDOW,
        model="the default model's tokenizer",
        depth="planning",
        speeds=QUIET,
        speeds_from="a quiet machine with two cores",
        pause_s=PAUSE_S,
    )
    print(f"{headline(found)}\n\n{table(found)}\n")
    values = {"window_tokens": PRESETS_WINDOW, "policies": [row.to_json() for row in rows]}
    options.presets.parent.mkdir(parents=True, exist_ok=True)
    options.presets.write_text(json.dumps(values, indent=1) + "\n")
    (options.plots / "tuning.svg").write_text(standalone(pareto(found)))
    (options.plots / "tuning-rest.svg").write_text(standalone(at_rest(found)))


def _keep(path: Path, found: list[Compared], checks: list[Check]) -> None:
    """Policies that were measured before and not now stay in the file."""
    known = json.loads(path.read_text()) if path.exists() else {"compared": [], "checks": []}
    names = {one.policy for one in found}
    compared = [c for c in known["compared"] if c["policy"] not in names]
    old = [c for c in known["checks"] if c["claim"].partition(":")[0] not in names]
    new = {
        "compared": [*compared, *(one.to_json() for one in found)],
        "checks": [*old, *(check.to_json() for check in checks)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(new, indent=1, ensure_ascii=False) + "\n")


def _compared(policy: str, directory: Path, options: argparse.Namespace) -> Compared:
    turns, background = _chat(policy, directory, options)
    measured = Measured(
        turns=len(turns),
        evaluated=sum(t.evaluated or 0 for t in turns),
        background=background,
        prompt=sum(t.answer.prompt_tokens or 0 for t in turns),
        worst_turn=max(t.evaluated or 0 for t in turns),
    )
    source = directory / "data" / DATABASE
    (replayed,) = asyncio.run(read_source(source, limit=1))
    reused = _predicted(replayed, policy, options)
    bare = Replayed(
        replayed.name,
        replayed.messages,
        replayed.systems,
        replayed.token_ids,
        replayed.tokenizer,
    )
    off = sum(
        ours.evaluated != theirs.chat.evaluated for ours, theirs in zip(turns, reused, strict=True)
    )
    return Compared(
        policy, measured, _added(reused), _added(_predicted(bare, policy, options)), off
    )


def _chat(policy: str, directory: Path, options: argparse.Namespace) -> tuple[list[Any], int]:
    """The turns, and the tokens evaluated in the background, of a real chat at a reader's pace."""
    tokens = UserTokens()
    arguments = ["--policy", policy]
    threads = {"CHATFOLD_ENGINE_THREADS": str(options.threads)}
    with Chatfold(
        directory, window_tokens=options.n_ctx, arguments=arguments, environ=threads
    ) as chatfold:
        chat = Chat(chatfold.client, options.max_tokens)
        for text in user_turns(CHAT, options.turns):
            turn = chat.say(text, new_tokens=tokens.count(text))
            if not turn.answer.ok:
                raise BenchError(f"turn {turn.number} has no answer: {turn.answer.trouble}")
            chatfold.wait_until_idle()
            line = f"{policy} {turn.number}/{options.turns}: evaluated {turn.evaluated}"
            print(line, file=sys.stderr, flush=True)
        metrics = chatfold.client.get("/metrics").raise_for_status().text
    found = BACKGROUND.search(metrics)
    if found is None:
        raise BenchError("the metrics do not tell what was evaluated in the background")
    return chat.turns, int(float(found.group(1)))


def _predicted(chat: Replayed, policy: str, options: argparse.Namespace) -> list[Turn]:
    vocabulary = vocabulary_of({"n_ctx": str(options.n_ctx)})
    setting = Setting(options.n_ctx, max_tokens=options.max_tokens)
    return asyncio.run(planned(Aim(chat, {}), load_policy(policy), vocabulary, setting))


def _added(turns: Sequence[Turn]) -> Measured:
    return Measured(
        turns=len(turns),
        evaluated=sum(t.chat.evaluated for t in turns),
        background=sum(w.evaluated for t in turns for w in t.background),
        prompt=sum(t.chat.prompt_tokens for t in turns),
        worst_turn=max(t.chat.evaluated for t in turns),
    )


def _checks(one: Compared) -> list[Check]:
    name = one.policy
    return [
        at_most(
            f"{name}: evaluated for users, predicted against measured",
            one.off("evaluated", predicted=one.reused),
            OFF_MOST,
        ),
        at_most(
            f"{name}: the same with assumed summaries",
            one.off("evaluated", predicted=one.assumed),
            OFF_MOST,
        ),
        at_most(
            f"{name}: evaluated in the background, predicted against measured",
            one.off("background", predicted=one.reused),
            BACKGROUND_OFF_MOST,
        ),
    ]


def _text(one: Compared) -> str:
    rows = [("measured", one.measured), ("predicted", one.reused), ("assumed", one.assumed)]
    lines = [f"{one.policy}, {one.measured.turns} turns, {one.turns_off} of them predicted wrongly"]
    lines += [
        f"  {name:10} evaluated {m.evaluated:>7,}  worst turn {m.worst_turn:>5,}"
        f"  background {m.background:>7,}  prompts {m.prompt:>8,}"
        for name, m in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
