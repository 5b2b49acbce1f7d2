"""`chatfold inspect` in this very process, for tests: on the file alone, or on a running proxy."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import pytest
from served import Served

from proxy.cli import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def inspect(house: Served, *arguments: str) -> Done:
    """On the file alone."""
    return run(*arguments, "--data", str(house.app.state.config.data))


def run(*arguments: str) -> Done:
    """In this very process: a start of Python for each would be most of the time."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(["inspect", *arguments])
    return Done(int(end.value.code or 0), told(out), told(err))


def told(stream: io.TextIOWrapper) -> str:
    stream.seek(0)
    return stream.read()


def on(house: Served, *arguments: str) -> Done:
    return run(*arguments, "--url", house.url)


def value(done: Done) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
