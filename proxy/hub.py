"""Files of the Hugging Face hub: how they are named, and where they lie once they are here. Pure;
`hub_http.py` fetches them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs

SUFFIX = ".gguf"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""How a model that is split over several files numbers them: each names how many there are."""


class HubError(Exception):
    """The file cannot be had. `str()` is one sentence that says what to do, where that helps."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """`repo` is OWNER/NAME, `path` the file's path within it."""

    repo: str
    path: str

    def __str__(self) -> str:
        return f"{self.repo}:{self.path}"

    def parts(self) -> tuple[HubFile, ...]:
        """All files of the model, itself first where it is one file or the first of several."""
        found = PART.search(self.path)
        if not found:
            return (self,)
        start, n = self.path[: found.start()], int(found[2])
        return tuple(
            HubFile(self.repo, f"{start}-{i:05d}-of-{n:05d}{SUFFIX}") for i in range(1, n + 1)
        )

    def local(self, cache: Path | None = None) -> Path:
        """Where it lies, or will, under the user's cache directory."""
        return (cache or Path(platformdirs.user_cache_dir("chatfold"))) / self.repo / self.path


def parse(text: str) -> HubFile:
    """`REPO:FILE`. Raises HubError."""
    repo, colon, path = text.partition(":")
    names = repo.split("/")
    if not colon or len(names) != 2 or not all(map(NAME.fullmatch, names)):
        raise HubError(f"{text!r} is no REPO:FILE, with the repository as OWNER/NAME")
    if not path.endswith(SUFFIX) or not all(map(NAME.fullmatch, path.split("/"))):
        raise HubError(f"{path!r} is not the name of a GGUF file, which ends in {SUFFIX}")
    file = HubFile(repo, path)
    return file.parts()[0]
