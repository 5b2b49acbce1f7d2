"""Does a long chat stay flat? `make bench-flat`; exits 1 if a bound is missed.

A 60-turn chat with the default model in a window of 2,048 tokens, through chatfold and beside it
with the bare server; the same chat without a pause; and a kill -9 in the middle of a third.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import bounds, command, plot, report, runs
from bench.bounds import Check, at_least, at_most
from bench.chats import UserTokens
from bench.locomo import CHAT, user_turns
from bench.runs import Paced, Plan, Restarted, Unpaced
from bench.servers import ROOT

KILL_AFTER_TURN = 30


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory:
        work = Path(options.work or directory)
        return command.run(lambda: _measure(options, work), with_chat=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.flat", description=__doc__)
    parser.add_argument("--turns", type=int, default=60, help="fewer for a quick trial")
    parser.add_argument("--n-ctx", type=int, default=2048, help="the window in tokens")
    parser.add_argument("--max-tokens", type=int, default=48, help="the longest answer")
    parser.add_argument("--work", type=Path, help="keep data, logs and traces there")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/flat.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/flat.svg")
    return parser.parse_args(arguments)


def _measure(options: argparse.Namespace, directory: Path) -> int:
    plan = _plan(options, directory)
    paced = runs.paced(plan)
    unpaced = runs.unpaced(plan)
    restarted = runs.restarted(plan, after_turn=min(KILL_AFTER_TURN, options.turns - 1))
    checks = _checks(plan, paced, unpaced, restarted)
    print(report.text(paced, unpaced, restarted, checks))
    found = report.to_json(paced, unpaced, restarted, checks)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    plot.draw(options.plot, paced.ours, paced.theirs, window_tokens=options.n_ctx)
    return 0 if all(check.holds for check in checks) else 1


def _plan(options: argparse.Namespace, directory: Path) -> Plan:
    tokens = UserTokens()
    return Plan(
        lines=[(text, tokens.count(text)) for text in user_turns(CHAT, options.turns)],
        directory=directory,
        window_tokens=options.n_ctx,
        max_tokens=options.max_tokens,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )


def _checks(plan: Plan, paced: Paced, unpaced: Unpaced, restarted: Restarted) -> list[Check]:
    wanted = len(plan.lines)
    lost = restarted.messages_before - restarted.messages_after
    return [
        *bounds.paced_checks(
            paced.ours,
            wanted=wanted,
            compactions=paced.compactions,
            window_tokens=plan.window_tokens,
        ),
        at_least("without waiting: turns answered", _answered(unpaced), wanted),
        at_least("without waiting: requests in the trace", len(unpaced.visits), wanted),
        at_most("without waiting: background batches", unpaced.background_batches, 0),
        at_most(
            "without waiting: prompt + answer, most tokens",
            bounds.most_tokens(unpaced.turns),
            plan.window_tokens,
        ),
        at_most("kill -9: stored messages lost", lost, 0),
        at_least("kill -9: the context has the same bytes", restarted.same_bytes, 1),
        at_least("kill -9: the next turn is answered", restarted.next_turn.answer.ok, 1),
    ]


def _answered(unpaced: Unpaced) -> int:
    return sum(turn.answer.ok for turn in unpaced.turns)


if __name__ == "__main__":
    sys.exit(main())
