"""schemathesis against the API as it is published: whatever is sent, no server error, and no answer
that the description does not know. `make fuzz` makes more requests of it.

The models have random weights: what they say is nothing, and it comes at once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.tiny_bert import write_bert
from tests.engine.tiny_models import write_gemma3

from .serving import Proxy, serving

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))
"""Random requests per route, besides those that schemathesis writes for each field."""
RUN_S = 90 + EXAMPLES
KEY = "fuzzed"
CHECKS = (
    *("--checks", "all"),
    # A tool that is asked for must be offered, a message must say something: no schema says that.
    *("--exclude-checks", "positive_data_acceptance"),
)


def fuzz(proxy: Proxy, folder: Path, *selected: str) -> int:
    """How many requests were made. Fails the test where one was answered as it must not be."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{proxy.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {proxy.key}", "--no-color", "--warnings", "off"),
            *("--generation-deterministic", "--max-examples", str(EXAMPLES)),
            *("--request-timeout", "60", "--continue-on-failure", *CHECKS, *selected),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + proxy.log_path.read_text()
    counted = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert counted and counted[1] == counted[2], done.stdout
    return int(counted[1])


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 60)
def test_chats_texts_and_models_hold_to_their_description(tmp_path: Path) -> None:
    model = write_gemma3(tmp_path / "tiny.gguf")
    options = ("--model", str(model), "--n-ctx", "1024")
    with serving(tmp_path, *options, key=KEY, CHATFOLD_API_KEY=KEY) as proxy:
        assert fuzz(proxy, tmp_path, "--exclude-path", "/v1/embeddings") > 500
        answers = [text for role, text in proxy.stored() if role == "assistant"]
        assert len(answers) > 50, "most were refused: that says little"


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 60)
def test_embeddings_hold_to_their_description(tmp_path: Path) -> None:
    model = write_bert(tmp_path / "bert.gguf")
    options = ("--model", str(model), "--n-ctx", "64")
    with serving(tmp_path, *options, key=KEY, CHATFOLD_API_KEY=KEY) as proxy:
        assert fuzz(proxy, tmp_path, "--include-path", "/v1/embeddings") > 50
