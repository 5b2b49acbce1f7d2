"""The files that settings of the embedded engine name: the model, adapters, a chat template.

Looked at twice with the same words: before anything starts, so that a mistake ends `chatfold
serve` at once, and by the model process, which may be started again hours later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class FileError(Exception):
    """A file cannot be used. `str()` is one sentence that says which, and which setting named
    it.
    """


@dataclass(frozen=True, slots=True)
class Adapter:
    path: Path
    scale: float


def adapters(entries: Sequence[str]) -> tuple[Adapter, ...]:
    """`FILE` or `FILE:SCALE` each, in order. Without those at scale 0: they are as good as not
    there. Reads the files' first bytes. Raises FileError."""
    found = tuple(map(_adapter, entries))
    for adapter in found:
        check_gguf(adapter.path, what="engine.lora: the adapter")
    return tuple(a for a in found if a.scale)


def template_source(setting: str) -> str:
    """The text of a chat template: the setting itself where it is one, else that of the file it
    names; "" stays "". Raises FileError."""
    if not setting or "{%" in setting or "{{" in setting:
        return setting
    path = Path(setting).expanduser()
    try:
        return path.read_text("utf-8")
    except OSError as exc:
        reason = exc.strerror
    except UnicodeDecodeError:
        reason = "it is not text"
    raise FileError(f"engine.chat_template: the file {path} cannot be read: {reason}")


def check_gguf(path: Path, *, what: str) -> None:
    """Reads the file's first bytes. Raises FileError."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as exc:
        raise FileError(f"{what} {path} cannot be read: {exc.strerror}") from exc
    if magic != b"GGUF":
        raise FileError(f"{what} {path} is not a GGUF file")


def _adapter(entry: str) -> Adapter:
    name, colon, scale = entry.rpartition(":")
    if not (colon and _is_number(scale)):
        name, scale = entry, "1"
    if not math.isfinite(float(scale)):
        raise FileError(f"engine.lora: {scale} is no scale for the adapter {name}")
    return Adapter(Path(name).expanduser(), float(scale))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
