"""What LibreChat's clients get: `make bench-librechat`; exits 1 if a bound is missed.

Every form of the URL; titles before, during and after the answer; chats whose window slides, as
versions 0.6, 0.7 and 0.8 send them; what the model does after the last word; Stop; and 40 turns of
LibreChat's own current client with everything a user does, in four settings.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import librechat_chats as chats
from bench import librechat_side as side
from bench import librechat_whole as whole
from bench.bounds import Check
from bench.servers import ROOT, BenchError, Chatfold

WINDOW_TOKENS = 2048
RESULTS = ROOT / "bench/results/librechat.json"

Part = Callable[[Chatfold], tuple[dict[str, Any], list[Check]]]
PARTS: dict[str, Part] = {
    "urls": side.urls,
    "titles": side.titles,
    "slide_0_6": chats.slide_0_6,
    "slide_now": chats.slide_now,
    "after": chats.after_the_answer,
    "stop": chats.stop,
    **whole.PARTS,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    # A plain death would leave the servers behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    wanted = options.only or list(PARTS)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    checks: list[Check] = []
    try:
        for name in wanted:
            with tempfile.TemporaryDirectory(prefix="chatfold-bench-") as directory:
                figures, more = _measure(name, Path(directory))
            print(f"\n{name}\n{json.dumps(figures, indent=1, ensure_ascii=False)}", flush=True)
            found[name] = figures
            checks += more
    except BenchError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print("", *whole.table(found), "", *checks, sep="\n")
    return 0 if all(check.holds for check in checks) else 1


def _measure(name: str, directory: Path) -> tuple[dict[str, Any], list[Check]]:
    # Two threads that wait for each other by spinning are far slower than one beside other work.
    threads = {"CHATFOLD_ENGINE_THREADS": "1"}
    with Chatfold(directory, window_tokens=WINDOW_TOKENS, environ=threads) as chatfold:
        return PARTS[name](chatfold)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.librechat", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="one part; repeatable")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
