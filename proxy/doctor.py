"""`chatfold doctor`: looks at what is set up and says in plain words what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memory.policy import load_policy
from memory.store import StoreError, integrity
from proxy.config import Config, ConfigError, check_files, model_file, shown_url

DATABASE = "chatfold.db"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `trouble` is "" when it is well, else what is wrong and what to do."""

    subject: str
    detail: str
    trouble: str = ""


def examine(config: Config) -> Iterator[Finding]:
    """Looks at model, policy and database, in that order. Reads only."""
    yield _model(config)
    yield _policy(config)
    yield from _database(config.data / DATABASE)


def _model(config: Config) -> Finding:
    if config.upstream:
        return Finding("model", f"upstream {shown_url(config.upstream)}")
    try:
        check_files(config)
        return Finding("model", str(model_file(config)))
    except ConfigError as exc:
        return Finding("model", "", f"{exc}.")


def _policy(config: Config) -> Finding:
    try:
        return Finding("policy", load_policy(config.policy).name)
    except ValueError as exc:
        return Finding("policy", "", str(exc))


def _database(path: Path) -> Iterator[Finding]:
    for aside in sorted(path.parent.glob(f"{path.name}.damaged-*")):
        if not aside.name.endswith(("-wal", "-shm")):
            yield Finding(
                "database",
                str(aside),
                "A damaged database was set aside here; its conversations are not in use. Try "
                f"`sqlite3 {aside.name} .recover`, and delete it when you no longer need it.",
            )
    if not path.exists():
        yield Finding("database", f"{path} does not exist yet; the first start makes it")
        return
    try:
        faults = integrity(path)
    except StoreError as exc:
        yield Finding("database", str(path), f"{exc}.")
        return
    yield Finding("database", str(path), "; ".join(faults))
