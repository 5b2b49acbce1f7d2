"""Warm equals cold on five models, a few random scripts each; `make bench-engine-warm` runs 300."""

from __future__ import annotations

import pytest

from tests.engine.warm_cold import Comparison, Outcome

pytestmark = pytest.mark.slow

CASES = {"smollm2": 3, "gemma": 1, "tiny_gemma": 8, "mamba": 8, "jamba": 8}


@pytest.fixture(scope="module", params=CASES)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    comparison = Comparison(request.param)
    for seed in range(CASES[request.param]):
        comparison.case(seed, tmp_path_factory.mktemp("snapshots"))
    return comparison.outcome


def test_an_answer_is_the_cold_runs_whatever_happened_to_the_cache(outcome: Outcome) -> None:
    assert outcome.differing == []
    assert outcome.answers >= 5 * outcome.cases // 2
    assert outcome.near_ties <= outcome.answers // 10


def test_and_most_of_each_prompt_was_in_the_cache(outcome: Outcome) -> None:
    assert outcome.cached_tokens > outcome.prompt_tokens // 3
