"""The engine's own model process, with a clock around `llama_decode`.

`python -m bench.engine_child` in place of the engine's own. Appends two doubles a call, when it
began and when it ended, to the file that DECODE_TIMES names.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import llama_cpp as C

from proxy.engines.embedded import child

TIMES = struct.Struct("<dd")
VARIABLE = "DECODE_TIMES"


def main() -> None:
    fd = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    C.llama_decode = _timed(C.llama_decode, fd)
    child.main()


def _timed(decode: Callable[..., int], fd: int) -> Callable[..., int]:
    def timed(*arguments: Any) -> int:
        began = time.monotonic()
        status = decode(*arguments)
        os.write(fd, TIMES.pack(began, time.monotonic()))
        return status

    return timed


if __name__ == "__main__":
    sys.exit(main())
