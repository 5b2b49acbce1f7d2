"""The real model under `chatfold tune --real`, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tuning.test_command import WINDOW, chat, rows, tune


@pytest.mark.slow
def test_with_the_model_and_on_from_where_it_stopped(tmp_path: Path) -> None:
    """The same figures come out whether a run was interrupted or not; what is done is not done
    again; and planning foretells what the model evaluates for users to the token."""
    path, state = tmp_path / "chat.json", tmp_path / "state"
    path.write_text(json.dumps(chat(8)))
    flags = (path, "--window", WINDOW, "--policy", "small-window", "--json", "--no-page")
    real = (*flags, "--real", "--state", state)
    whole = rows(tune(*real, cwd=tmp_path, timeout_s=250))["small-window"]
    (lines,) = state.glob("*.jsonl")
    assert not lines.with_suffix("").exists(), "the chat's text is not left behind"
    planned = rows(tune(*flags, cwd=tmp_path))["small-window"]
    assert planned["evaluated_mean"] == whole["evaluated_mean"]
    assert whole["summaries"] > 0
    assert (tmp_path / "cache/chatfold/speeds.json").exists()
    kept = lines.read_bytes().splitlines(keepends=True)
    assert len(kept) == 8
    again = rows(tune(*real, cwd=tmp_path))["small-window"]
    assert again == whole
