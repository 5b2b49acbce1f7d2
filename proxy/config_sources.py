"""Where values come from: a TOML file, the environment, flags. Which keys there are, the caller
says.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

ENVIRONMENT_PREFIX = "CHATFOLD_"
FILE_VARIABLE = "CHATFOLD_CONFIG"
OTHER_VARIABLES = (FILE_VARIABLE, "CHATFOLD_TRACE", "CHATFOLD_CHECK_INTEGRITY")
"""Variables of the same prefix that are no keys: which file to read; tools for developers."""

DEFAULT_FILE = Path("config/chatfold.toml")

Given = dict[str, tuple[object, str]]
"""Values by key name, each with the words for where it came from."""


class ConfigError(Exception):
    """The configuration cannot be used. `str()` is one sentence that says where and what."""


def named_file(environ: Mapping[str, str], file: Path | None) -> Path | None:
    """The file to read: `file`, the one that the environment names, or the one that lies ready."""
    if file is not None:
        return file
    if named := environ.get(FILE_VARIABLE):
        return Path(named).expanduser()
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None


def from_file(path: Path, names: Collection[str]) -> Given:
    """`names` are the dotted names of all keys. Raises ConfigError."""
    given: Given = {}
    for name, value in _flatten(_read_toml(path), "", names):
        if name not in names:
            raise _unknown(name, names, what="key", where=f" in {path}")
        given[name] = (value, f"in {path}")
    return given


def from_environment(environ: Mapping[str, str], variables: Mapping[str, str]) -> Given:
    """`variables` gives the key of each variable. Raises ConfigError."""
    given: Given = {}
    for variable, value in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable not in variables:
            known = [*variables, FILE_VARIABLE]
            raise _unknown(variable, known, what="environment variable", where="")
        given[variables[variable]] = (value, f"in the environment as {variable}")
    return given


def from_flags(flags: Mapping[str, object], shown: Mapping[str, str]) -> Given:
    """`flags` by key name, None where one was not given; `shown` is what each is called."""
    return {
        name: (value, f"given as {shown[name]}")
        for name, value in flags.items()
        if value is not None
    }


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"the configuration file {path} cannot be read: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the configuration file {path} is not valid TOML: {exc}") from exc


def _flatten(
    table: dict[str, Any], prefix: str, names: Collection[str]
) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        is_section = any(known.startswith(f"{prefix}{name}.") for known in names)
        if is_section and isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.", names)
        else:
            yield prefix + name, value


def _unknown(name: str, known: Collection[str], *, what: str, where: str) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return ConfigError(f"unknown {what} {name!r}{where}: did you mean {near[0]!r}?")
