"""`make bench-engine-warm`: warm equals cold, 300 random cases on five models.

Each case is a script of what happens to a KV cache: prefixes reused, shared and evicted, snapshots
and restarts, regenerations, edits, prefills broken off, batches with others, background warming.
Each greedy answer is compared to that of the model alone in an empty cache, token for token; how,
stands in tests/engine/warm_cold.py. Ends with status 1 if any answer differs for another reason
than the order of a floating-point sum.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.engine.warm_cold import KINDS, Comparison, Outcome

SHARE = {"smollm2": 45, "gemma": 15, "tiny_gemma": 80, "mamba": 80, "jamba": 80}
"""Cases of 300. The tiny models are quick, and exact enough to show what others' noise hides."""

HEAD = (
    f"{'model':12}{'cases':>6}{'answers':>9}{'equal':>7}{'ties':>6}{'differ':>8}"
    f"{'worst logit':>13}{'tolerance':>11}{'from cache':>12}{'checkpoints':>13}"
    f"{'restored':>10}{'s':>6}"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=300, help="over all models")
    parser.add_argument("--model", choices=sorted(SHARE), help="this one alone")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    options = parser.parse_args(arguments)
    names = [options.model] if options.model else list(SHARE)
    whole = sum(SHARE[name] for name in names)
    print(HEAD)
    outcomes = []
    for name in names:
        cases = max(1, round(options.cases * SHARE[name] / whole))
        outcomes.append(_run(name, cases, options.seed))
    return _verdict(outcomes)


def _run(name: str, cases: int, seed: int) -> Outcome:
    started = time.monotonic()
    comparison = Comparison(name)
    for n in range(cases):
        with tempfile.TemporaryDirectory() as folder:
            comparison.case(seed + n, Path(folder))
    o = comparison.outcome
    share = o.cached_tokens / max(1, o.prompt_tokens)
    print(
        f"{name:12}{o.cases:6}{o.answers:9}{o.equal:7}{o.near_ties:6}{len(o.differing):8}"
        f"{o.worst_logit:13.2g}{KINDS[name].tolerance:11g}{share:12.0%}{o.checkpoint_hits:13}"
        f"{o.restored_tokens:10}{time.monotonic() - started:6.0f}",
        flush=True,
    )
    return o


def _verdict(outcomes: list[Outcome]) -> int:
    differing = [where for o in outcomes for where in o.differing]
    answers = sum(o.answers for o in outcomes)
    saved = sum(o.cached_tokens for o in outcomes)
    ties = sum(o.near_ties for o in outcomes)
    print(
        f"{sum(o.cases for o in outcomes)} cases, {answers} answers: "
        f"{answers - ties - len(differing)} equal, {ties} near ties, {len(differing)} different; "
        f"{saved} of {sum(o.prompt_tokens for o in outcomes)} prompt tokens from the cache"
    )
    for where in differing:
        print("differs:", where)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
