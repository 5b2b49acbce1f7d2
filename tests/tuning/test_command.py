"""`chatfold tune` from end to end: without a model in seconds, and once with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memory.policy import load_policy
from memory.transcript import ASSISTANT, USER
from proxy.cli import main
from proxy.tuning.chats import Chat
from proxy.tuning.progress import Progress, name_of
from proxy.tuning.replay import Aim, Setting

ROOT = Path(__file__).parents[2]
SPEEDS = ("--prefill", "175", "--decode", "56")
WINDOW = "512"
SMALL = ("--window", "256", *SPEEDS)


def chat(turns: int) -> list[dict[str, str]]:
    said = [
        (
            f"Question {i}: how is Katrin Oberle, who paid {200 + i} dollars on May {i + 1}?",
            f"Answer {i}: she is well, and she came back to Lisbon with the {300 + i} letters.",
        )
        for i in range(turns)
    ]
    roles = (USER, ASSISTANT)
    return [{"role": r, "content": t} for pair in said for r, t in zip(roles, pair, strict=True)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"title": "<b>Letters</b>", "messages": chat(20)}))
    return path


def tune(
    *arguments: str | Path, cwd: Path, status: int = 0, timeout_s: float = 100
) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CHATFOLD_")}
    environ |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cwd / "cache")}
    command = [sys.executable, "-m", "proxy", "tune", *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {row["policy"]: row for row in json.loads(done.stdout)["policies"]}


def test_a_table_and_a_page_for_every_preset(tmp_path: Path, source: Path) -> None:
    done = tune(source, "--window", WINDOW, *SPEEDS, cwd=tmp_path)
    first, _, head, *lines = done.stdout.splitlines()
    assert first.startswith("1 chat, 20 turns, planned without the model in a window of 512 tokens")
    assert head.split()[:3] == ["policy", "first", "p50"]
    named = [line.split()[0] for line in lines if line and not line.startswith("tune.html")]
    assert named == ["balanced", "extractive", "roomy", "small-window", "verbatim"]
    page = (tmp_path / "tune.html").read_text()
    assert "&lt;b&gt;Letters" in page
    assert "<b>Letters" not in page
    assert all(f">{name}</text>" in page for name in named)
    assert "http://www.w3.org" in page
    assert page.count("http") == page.count("http://www.w3.org") + page.count("http-equiv")
    assert json.loads(source.read_text())["title"] == "<b>Letters</b>"


def test_summaries_keep_more_than_none_and_cost_work_behind(tmp_path: Path, source: Path) -> None:
    found = rows(tune(source, "--window", WINDOW, *SPEEDS, "--json", "--no-page", cwd=tmp_path))
    balanced, verbatim = found["balanced"], found["verbatim"]
    assert balanced["summaries"] > 0
    assert verbatim["summaries"] == 0
    assert balanced["retention"] > verbatim["retention"]
    assert balanced["evaluated_mean"] < verbatim["evaluated_mean"]
    assert balanced["background_mean"] > verbatim["background_mean"]
    assert not (tmp_path / "tune.html").exists()


def test_a_choice_is_written_into_the_file_and_nothing_else_changes(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    file.write_text("# mine\nport = 9\n\n[engine]\nthreads = 2 # two\n")
    file.chmod(0o640)
    done = tune("--apply", "small-window", "--config", file, cwd=tmp_path)
    assert done.stdout.startswith(f'{file}: policy = "small-window".')
    wanted = '# mine\nport = 9\n\npolicy = "small-window"\n[engine]\nthreads = 2 # two\n'
    assert file.read_text() == wanted
    assert file.stat().st_mode & 0o777 == 0o640
    again = tune("--apply", "small-window", "--config", file, cwd=tmp_path)
    assert "already" in again.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["my.toml"]


def test_a_suggestion_is_explained_and_applied_as_a_file_of_its_own(
    tmp_path: Path, source: Path
) -> None:
    limits = ("--window", WINDOW, "--first-token", "1.5", "--tries", "6")
    flags = ("--policy", "small-window", "--policy", "verbatim", "--suggest", "--no-page")
    applied = ("--apply", "suggested", "--config", "c.toml")
    (tmp_path / "c.toml").write_text("# mine\n")
    done = tune(source, *limits, *flags, *SPEEDS, *applied, cwd=tmp_path)
    reasons = [line for line in done.stdout.splitlines() if line.startswith("- ")]
    assert reasons[0].startswith("- Of the policies at hand small-window is where to begin")
    assert any("(asked: 1.5 s)" in line for line in reasons)
    config = (tmp_path / "c.toml").read_text()
    if "suggested" in config:
        assert load_policy(str(tmp_path / "suggested.toml")).name == "suggested"
    else:
        assert config == '# mine\npolicy = "small-window"\n'
    served = subprocess.run(
        [sys.executable, "-m", "proxy", "doctor", "--config", "c.toml", "--data", "none"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "ok     policy: s" in served.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("none.json",), "none.json cannot be read: No such file or directory."),
        (("bad.json",), "bad.json is no export that is understood"),
        (("chat.json", "--policy", "balancd"), "There is no policy 'balancd'; did you mean"),
        (("chat.json", "--prefill", "10"), "--prefill and --decode go together"),
        (("chat.json", "--suggest", "--real"), "--suggest plans without the model"),
        (("chat.json", "--first-token", "1"), "--first-token is a limit for --suggest"),
        (("--apply", "suggested"), "--apply suggested needs --suggest"),
        (("--apply", "nothing"), "There is no policy 'nothing'"),
        (("--data", ".", *SPEEDS), "chatfold.db cannot be read: No such file"),
        (("chat.json", "--model", "no.gguf"), "the model no.gguf cannot be read"),
        (
            ("chat.json", "--policy", "strict.toml", "--window", "256", *SPEEDS),
            "is refused under bal",
        ),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    source: Path,
    arguments: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.json").write_text('{"some": "thing"}')
    (tmp_path / "strict.toml").write_text('overflow = "refuse"\ncompact = false\n')
    monkeypatch.chdir(tmp_path)
    # In this process, whose logging is not the command's to set.
    monkeypatch.setattr("proxy.tuning.command._quiet", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(["tune", *arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("chatfold: ")
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "tune.html").exists()


def test_ctrl_c_ends_it_quietly_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "long.json").write_text(json.dumps(chat(2000)))
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    arguments = ("tune", "long.json", "--window", WINDOW, *SPEEDS)
    running = subprocess.Popen(
        [sys.executable, "-m", "proxy", *arguments],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background the signal is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        begun = wait_for(lambda: list(tmp_path.glob("chatfold-tune-*")))
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=100)
    finally:
        running.kill()
    assert begun
    assert (running.returncode, out, err.strip()) == (130, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["long.json"]


def wait_for(condition: Callable[[], Any], *, limit_s: float = 60) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_an_unfinished_line_and_a_lost_store_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    turn = b'{"chat":{"prompt_tokens":3,"evaluated":2},"background":[],"summaries":0}'
    path.write_bytes(turn + b"\n" + turn[:20])
    progress = Progress(tmp_path, "x")
    assert len(progress.turns()) == 1
    assert progress.begin(1) == progress.turns()
    assert path.read_bytes().count(b"\n") == 1
    assert progress.begin(2) == [], "one turn of two, and its store is gone"
    assert path.read_bytes() == b""


def test_every_change_of_what_is_replayed_is_another_run() -> None:
    aim = Aim(Chat("x", ()), {})
    other = Aim(Chat("x", (), ("Be kind.",)), {})
    policy, setting = load_policy("balanced"), Setting(512)
    names = {
        name_of(aim, policy, setting, "m"),
        name_of(other, policy, setting, "m"),
        name_of(aim, load_policy("roomy"), setting, "m"),
        name_of(aim, policy, Setting(513), "m"),
        name_of(aim, policy, Setting(512, 9), "m"),
        name_of(aim, policy, setting, "n"),
    }
    assert len(names) == 6
