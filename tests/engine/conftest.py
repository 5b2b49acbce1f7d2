"""The model that the engine's tests run on."""

from __future__ import annotations

import pytest

from tests.engine import model_files


@pytest.fixture(scope="session")
def model_path() -> str:
    """The default model's file."""
    return model_files.smollm2()
