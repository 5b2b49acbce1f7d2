"""Downloads from the Hugging Face hub, against a server on this machine that answers as it does."""

from __future__ import annotations

import fcntl
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from proxy import hub_http
from proxy.hub import HubError, HubFile, parse
from proxy.hub_http import fetch
from tests.proxy.test_cli import chatfold, mistake

REPO, NAME = "anna/tiny-GGUF", "tiny-q4.gguf"
CONTENT = b"GGUF" + bytes(range(256)) * 20_000
FILE = HubFile(REPO, NAME)
PATH = f"/{REPO}/resolve/main/{NAME}"


@dataclass
class Hub:
    """Files by their path on the hub, and what goes wrong on the way to them."""

    files: dict[str, bytes] = field(default_factory=lambda: {PATH: CONTENT})
    large: bool = True
    """Kept as the hub keeps large files: it tells size and SHA-256, and leads to another server."""
    breaks: list[int] = field(default_factory=list)
    """Bytes after which the next downloads break off."""
    statuses: list[int] = field(default_factory=list)
    """What the next requests are answered with, in place of the file."""
    sends: bytes | None = None
    """What comes in place of the content that was announced."""
    takes_ranges: bool = True
    token: str = ""
    requests: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(server, method, range, authorization)."""
    url: str = ""
    store_url: str = ""

    def methods(self) -> list[tuple[str, str]]:
        return [(server, method) for server, method, _, _ in self.requests]

    def ranges(self) -> list[str]:
        return [r[2] for r in self.requests if r[:2] == ("store", "GET")]


class Answering(BaseHTTPRequestHandler):
    hub: Hub
    name: str

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, headers = self.hub, self.headers
        span, token = headers.get("Range", ""), headers.get("Authorization", "")
        hub.requests.append((self.name, self.command, span, token))
        if hub.statuses:
            self.plain(hub.statuses.pop(0))
        elif self.name == "hub" and hub.token and token != f"Bearer {hub.token}":
            self.plain(401)
        elif self.path.startswith("/old/"):
            self.plain(307, {"Location": self.path.replace("/old/", "/anna/")})
        elif self.path not in hub.files:
            self.plain(404)
        elif self.name == "hub" and hub.large:
            content = hub.files[self.path]
            told = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha(content)}"'}
            self.plain(302, {"Location": hub.store_url + self.path, **told})
        else:
            self.content(hub.sends or hub.files[self.path], span)

    def plain(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def content(self, content: bytes, span: str) -> None:
        start = int(span.removeprefix("bytes=").partition("-")[0] or 0)
        start = start if self.hub.takes_ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"a-git-tag"')
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            most = self.hub.breaks.pop(0) if self.hub.breaks else len(content)
            self.wfile.write(content[start : start + most])
            self.close_connection = True


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub, servers = Hub(), []
    for name in ("hub", "store"):
        handler = type(name, (Answering,), {"hub": hub, "name": name})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,)).start()
    hub.url, hub.store_url = (f"http://127.0.0.1:{s.server_port}" for s in servers)
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()


def get(hub: Hub, cache: Path, file: HubFile = FILE, **environ: str) -> Path:
    said: list[str] = []
    known = {"HF_ENDPOINT": hub.url, **environ}
    path = fetch(file, environ=known, tell=said.append, cache=cache, wait_first_s=0.001)
    if hub.requests:
        assert said[-1].endswith("100 %")
    return path


def refused(hub: Hub, cache: Path, file: HubFile = FILE, **environ: str) -> str:
    with pytest.raises(HubError) as caught:
        get(hub, cache, file, **environ)
    assert "\n" not in str(caught.value)
    assert not file.local(cache).exists()
    return str(caught.value)


def parts(cache: Path) -> list[Path]:
    return list(cache.rglob("*.part"))


@pytest.mark.parametrize("large", [True, False])
def test_a_file_comes_whole_once_and_is_asked_for_no_more(
    hub: Hub, tmp_path: Path, large: bool
) -> None:
    hub.large = large
    path = get(hub, tmp_path)
    assert path == tmp_path / REPO / NAME
    assert path.read_bytes() == CONTENT
    assert not parts(tmp_path)
    assert hub.methods()[0] == ("hub", "HEAD")
    hub.requests.clear()
    assert get(hub, tmp_path, HF_HUB_OFFLINE="1") == path
    assert get(hub, tmp_path) == path
    assert hub.requests == []


def test_the_token_goes_to_the_hub_and_not_to_where_it_leads(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    get(hub, tmp_path, HF_TOKEN="hf_secret")
    tokens = {(server, token) for server, _, _, token in hub.requests}
    assert tokens == {("hub", "Bearer hf_secret"), ("store", "")}


def test_a_renamed_repository_is_followed(hub: Hub, tmp_path: Path) -> None:
    old = HubFile("old/tiny-GGUF", NAME)
    assert get(hub, tmp_path, old).read_bytes() == CONTENT


def test_a_broken_download_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = [1_500_000, 0, 700_000]
    assert get(hub, tmp_path).read_bytes() == CONTENT
    starts = [int(r.removeprefix("bytes=").rstrip("-") or 0) for r in hub.ranges()]
    assert starts == [0, 1_500_000, 1_500_000, 2_200_000]


def test_a_later_start_goes_on_too(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = [1_000_000, *([0] * 9)]
    assert "the same command goes on from here" in refused(hub, tmp_path)
    (part,) = parts(tmp_path)
    assert part.stat().st_size == 1_000_000
    hub.breaks.clear()
    hub.requests.clear()
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.ranges() == ["bytes=1000000-"]


def test_a_file_that_changed_meanwhile_is_begun_anew(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = [1_000_000, *([0] * 9)]
    refused(hub, tmp_path)
    hub.breaks.clear()
    hub.requests.clear()
    hub.files = dict.fromkeys(hub.files, CONTENT[::-1])
    assert get(hub, tmp_path).read_bytes() == CONTENT[::-1]
    assert hub.ranges() == [""]


def test_a_server_without_ranges_sends_it_all_again(hub: Hub, tmp_path: Path) -> None:
    hub.breaks, hub.takes_ranges = [1_000_000], False
    assert get(hub, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("sends", [CONTENT[:-1] + b"x", CONTENT + b"x", CONTENT * 2])
def test_what_is_not_what_was_announced_is_thrown_away(
    hub: Hub, tmp_path: Path, sends: bytes
) -> None:
    hub.sends = sends
    assert "not what the hub announced" in refused(hub, tmp_path)
    assert not parts(tmp_path)
    hub.sends = None
    assert get(hub, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_is_busy_is_asked_again(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.statuses = [status] * 3
    assert get(hub, tmp_path).read_bytes() == CONTENT
    hub.statuses = [status] * 99
    file = HubFile(REPO, "other.gguf")
    assert f"127.0.0.1 answered {status}" in refused(hub, tmp_path, file)


def test_what_is_not_to_be_had_is_said_in_a_sentence(hub: Hub, tmp_path: Path) -> None:
    assert "the hub has no file none.gguf" in refused(hub, tmp_path, HubFile(REPO, "none.gguf"))
    for status in (401, 403):
        hub.statuses = [status]
        assert "HF_TOKEN" in refused(hub, tmp_path)
    hub.statuses = [200]
    assert "does not answer as the Hugging Face hub does" in refused(hub, tmp_path)
    assert "HF_HUB_OFFLINE forbids" in refused(hub, tmp_path, HF_HUB_OFFLINE="1")
    hub.url = "http://127.0.0.1:9"
    assert "127.0.0.1 cannot be reached" in refused(hub, tmp_path)


def test_two_downloads_of_one_file_do_not_write_into_each_other(hub: Hub, tmp_path: Path) -> None:
    part = FILE.local(tmp_path).with_name(f"{NAME}.{sha(CONTENT)[:16]}.part")
    part.parent.mkdir(parents=True)
    with part.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is downloading" in refused(hub, tmp_path)
    assert get(hub, tmp_path).read_bytes() == CONTENT


def test_a_disk_that_is_too_small_is_told_before_the_download(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 10**6

    monkeypatch.setattr(hub_http.shutil, "disk_usage", lambda _: Full)
    assert "needs 5 MB, and" in refused(hub, tmp_path)
    assert ("store", "GET") not in hub.methods()


def test_a_cache_that_cannot_be_written_is_told(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "anna").write_text("a file where the folder would be")
    assert "cannot be written" in refused(hub, tmp_path)


def test_a_model_in_several_files_comes_with_all_of_them(hub: Hub, tmp_path: Path) -> None:
    names = [f"big-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    hub.files = {f"/{REPO}/resolve/main/q8/{n}": n.encode() * 9 for n in names}
    path = get(hub, tmp_path, parse(f"{REPO}:q8/{names[1]}"))
    assert path == tmp_path / REPO / "q8" / names[0]
    for name in names:
        assert (path.parent / name).read_bytes() == name.encode() * 9


@pytest.mark.parametrize(
    "text",
    [
        "tiny.gguf",
        "anna:tiny.gguf",
        "anna/tiny-GGUF",
        "anna/tiny-GGUF:Q4_K_M",
        "anna/tiny-GGUF:../x.gguf",
        "anna/..:x.gguf",
        "../tiny:x.gguf",
        "anna/tiny/more:x.gguf",
        "anna/tiny:/x.gguf",
        "anna/tiny:a//x.gguf",
        "anna/ti ny:x.gguf",
        "https://huggingface.co/anna/tiny:x.gguf",
    ],
)
def test_what_names_no_file_is_refused(text: str) -> None:
    with pytest.raises(HubError):
        parse(text)


# -- the command ---------------------------------------------------------------------------------


def test_serve_takes_the_model_from_the_hub_and_says_what_is_wrong(
    hub: Hub, tmp_path: Path
) -> None:
    environ = {"HF_ENDPOINT": hub.url, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    hf, data = f"{REPO}:{NAME}", ("--data", str(tmp_path / "data"))
    message = mistake("serve", "--hf", "anna", cwd=tmp_path)
    assert message.startswith("chatfold: hf: 'anna' is no REPO:FILE")
    both = mistake("serve", "--hf", hf, "--model", "x.gguf", cwd=tmp_path)
    assert "model and hf both name a model" in both
    offline = environ | {"HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE" in mistake("serve", "--hf", hf, *data, cwd=tmp_path, environ=offline)
    doctor = chatfold("doctor", *data, cwd=tmp_path, environ=environ | {"CHATFOLD_HF": hf})
    assert f"the model {hf} is not downloaded yet" in doctor.stdout
    # With no policy of that name it stops once the model is there, before it serves.
    end = chatfold("serve", "--hf", hf, "--policy", "none", *data, cwd=tmp_path, environ=environ)
    assert end.returncode == 2
    assert f"{hf}: 5 of 5 MB, 100 %" in end.stderr
    assert (tmp_path / "cache/chatfold" / REPO / NAME).read_bytes() == CONTENT
    doctor = chatfold("doctor", *data, cwd=tmp_path, environ=offline | {"CHATFOLD_HF": hf})
    assert "not downloaded" not in doctor.stdout
    assert NAME in doctor.stdout
