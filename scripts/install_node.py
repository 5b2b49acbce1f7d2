"""Installs LibreChat's own client for the tests: .node-librechat/, 0.5 GB, only when it changed.

Never fails: without npm or a network the tests that need it are skipped, and say so.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "e2e" / "node_librechat"
TARGET = ROOT / ".node-librechat"
LOCK = "package-lock.json"
INSTALL = ("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")
INSTALL_S = 600


def main() -> None:
    if not shutil.which("npm"):
        print("chatfold: npm is not installed: the tests with LibreChat's client are skipped")
        return
    if not is_current():
        print("chatfold: installing @librechat/agents for the tests (0.5 GB)", flush=True)
        install()


def is_current() -> bool:
    """Whether what is installed is what the lock file names."""
    there = TARGET / LOCK
    installed = (TARGET / "node_modules" / "@librechat" / "agents" / "package.json").is_file()
    return installed and there.read_bytes() == (SOURCE / LOCK).read_bytes()


def install() -> None:
    TARGET.mkdir(exist_ok=True)
    for name in ("package.json", LOCK):
        shutil.copyfile(SOURCE / name, TARGET / name)
    try:
        done = subprocess.run(INSTALL, cwd=TARGET, timeout=INSTALL_S, check=False)
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        failed = True
    # npm may have touched the lock file: what is compared next time is ours.
    shutil.copyfile(SOURCE / LOCK, TARGET / LOCK)
    if failed:
        shutil.rmtree(TARGET / "node_modules", ignore_errors=True)
        print("chatfold: it could not be installed: those tests are skipped")


if __name__ == "__main__":
    main()
