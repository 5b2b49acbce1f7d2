"""Writes a choice into the configuration file, and changes nothing else in it."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from memory.policy import Policy

_SET = re.compile(r"^[ \t]*policy[ \t]*=.*$", re.MULTILINE)
_SHOWN = re.compile(r"^#[ \t]*policy[ \t]*=.*$", re.MULTILINE)
_SECTION = re.compile(r"^[ \t]*\[", re.MULTILINE)


class ApplyError(Exception):
    """The file was left as it is. `str()` is one sentence that says why."""


def with_policy(text: str, value: str) -> str:
    """The file's text with `policy = VALUE`, in the place of the old one, behind the line that
    shows the default, or before the first section. Raises ApplyError if that would change more."""
    line = f"policy = {_quoted(value)}"
    first = _SECTION.search(text)
    top = text[: first.start()] if first else text
    if match := _SET.search(top):
        changed = text[: match.start()] + line + _comment(match.group()) + text[match.end() :]
    elif match := _SHOWN.search(top):
        changed = f"{text[: match.end()]}\n{line}{text[match.end() :]}"
    else:
        gap = "" if not top or top.endswith("\n") else "\n"
        changed = f"{top}{gap}{line}\n{text[len(top) :]}"
    _check(text, changed, value)
    return changed


def _comment(line: str) -> str:
    """The comment behind the value that goes, where it can be told from the value."""
    match = re.fullmatch(r"""[^"'#]*(?:"[^"\\]*"|'[^']*')[ \t]*(#.*)""", line)
    return f"  {match.group(1)}" if match else ""


def _check(before: str, after: str, value: str) -> None:
    try:
        wanted: dict[str, Any] = tomllib.loads(before)
        found = tomllib.loads(after)
    except tomllib.TOMLDecodeError as exc:
        raise ApplyError(f"the file is not valid TOML: {exc}") from exc
    if found != wanted | {"policy": value}:
        raise ApplyError("the file sets `policy` in a way that is not understood: change it there")


def apply(file: Path, value: str) -> str:
    """Writes `policy = value` into the file, which is made where there is none. At any moment the
    file is whole. Returns what was done, as a sentence. Raises ApplyError."""
    target = file.resolve()
    try:
        before = target.read_text("utf-8") if target.exists() else ""
        changed = with_policy(before, value)
        if changed == before:
            return f"{file} says policy = {_quoted(value)} already."
        _replace(target, changed)
    except (OSError, UnicodeDecodeError) as exc:
        raise ApplyError(f"{file} cannot be changed: {exc}") from exc
    except ApplyError as exc:
        raise ApplyError(f"{file} was left as it is: {exc}") from exc
    old = tomllib.loads(before).get("policy")
    was = "" if old is None else f" (it was {_quoted(str(old))})"
    made = "" if before else " The file is new."
    return f"{file}: policy = {_quoted(value)}{was}.{made} Restart chatfold to use it."


def save_policy(file: Path, policy: Policy, *, explanation: str) -> None:
    """Writes a policy's own file. Raises ApplyError where another one stands there already."""
    text = policy_text(policy, explanation=explanation)
    try:
        if file.exists() and tomllib.loads(file.read_text("utf-8")) != tomllib.loads(text):
            raise ApplyError(f"{file} holds another policy: move it, or give another name.")
        _replace(file, text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ApplyError(f"{file} cannot be written: {exc}") from exc


def policy_text(policy: Policy, *, explanation: str = "") -> str:
    """The knobs that differ from their defaults, as TOML."""
    lines = [f"# {line}" for line in explanation.splitlines()]
    for f in fields(Policy):
        value = getattr(policy, f.name)
        if f.name == "name" or value != f.default:
            lines.append(f"{f.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ApplyError("a policy's name has no control characters")
    return f'"{escaped}"'


def _replace(file: Path, text: str) -> None:
    """Whole or not at all, with the mode that the file had."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with draft.open("x", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        if file.exists():
            draft.chmod(file.stat().st_mode & 0o7777)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
