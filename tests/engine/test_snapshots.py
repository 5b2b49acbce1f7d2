"""Snapshots on disk: whole or not at all, one owner's never another's, the oldest go first."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.engines.embedded.snapshots import Snapshots, forget_files


def opened(folder: Path, *, fingerprint: str = "model", budget_bytes: int = 10**6) -> Snapshots:
    return Snapshots(folder, fingerprint=fingerprint, budget_bytes=budget_bytes)


def loaded(snapshots: Snapshots, owner: str, tokens: list[int]) -> bytes | None:
    found, _ = snapshots.match(owner, tokens)
    return snapshots.load(found) if found else None


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_what_was_saved_comes_back_after_a_restart(tmp_path: Path) -> None:
    assert opened(tmp_path).save("anna", [1, 2, 3], b"state")
    again = opened(tmp_path)
    assert again.match("anna", [1, 2, 3, 4])[1] == 3
    assert loaded(again, "anna", [1, 2, 3]) == b"state"


def test_one_owners_snapshot_is_no_other_owners(tmp_path: Path) -> None:
    snapshots = opened(tmp_path)
    snapshots.save("anna", [1, 2, 3], b"state")
    assert snapshots.match("bert", [1, 2, 3]) == (None, 0)


def test_only_the_user_may_read_them(tmp_path: Path) -> None:
    opened(tmp_path / "s").save("anna", [1], b"state")
    for path in [tmp_path / "s", *(tmp_path / "s").rglob("*")]:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077


def test_a_longer_state_takes_the_place_of_the_one_it_extends(tmp_path: Path) -> None:
    snapshots = opened(tmp_path)
    snapshots.save("anna", [1, 2], b"a")
    snapshots.save("anna", [1, 2, 3], b"b")
    snapshots.save("anna", [1, 9], b"c")
    assert len(snapshots) == len(files(tmp_path)) == 2
    assert snapshots.holds("anna", [1, 2])


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    one = opened(tmp_path)
    one.save("anna", [1], b"x" * 1000)
    size = one.n_bytes
    snapshots = opened(tmp_path, budget_bytes=size * 3 + 100)
    snapshots.save("anna", [2], b"x" * 1000)
    snapshots.save("anna", [3], b"x" * 1000)
    assert loaded(snapshots, "anna", [1]) is not None
    snapshots.save("anna", [4], b"x" * 1000)
    assert snapshots.n_bytes <= size * 3 + 100
    assert snapshots.match("anna", [2]) == (None, 0)
    assert snapshots.match("anna", [1])[1] == 1
    assert len(files(tmp_path)) == len(snapshots) == 3


def test_more_than_the_budget_is_not_written(tmp_path: Path) -> None:
    snapshots = opened(tmp_path, budget_bytes=100)
    assert not snapshots.save("anna", [1], b"x" * 1000)
    assert not files(tmp_path)


def test_another_model_or_build_removes_them(tmp_path: Path) -> None:
    opened(tmp_path).save("anna", [1], b"state")
    assert len(opened(tmp_path, fingerprint="other")) == 0
    assert not files(tmp_path)


@given(at=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_flipped_byte_never_comes_back_as_state(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    opened(folder).save("anna", [1, 2, 3], b"the state")
    (path,) = files(folder)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= flip
    path.write_bytes(data)
    found = opened(folder)
    for owner in ("anna", "bert"):
        match, n = found.match(owner, [1, 2, 3])
        state = found.load(match) if match else None
        assert state is None, (n, "a damaged file was taken for whole")


@given(cut=st.integers(0, 10**6))
def test_a_file_cut_short_is_removed(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    opened(folder).save("anna", [1, 2, 3], b"the state")
    (path,) = files(folder)
    data = path.read_bytes()
    path.write_bytes(data[: cut % len(data)])
    assert len(opened(folder)) == 0
    assert not files(folder)


def test_forgetting_an_owner_removes_their_files(tmp_path: Path) -> None:
    snapshots = opened(tmp_path)
    snapshots.save("anna", [1], b"a")
    snapshots.save("bert", [1], b"b")
    snapshots.forget("anna")
    assert len(files(tmp_path)) == 1
    assert snapshots.match("anna", [1]) == (None, 0)
    assert loaded(snapshots, "bert", [1]) == b"b"


def test_a_full_disk_costs_the_snapshot_and_nothing_else(tmp_path: Path) -> None:
    snapshots = opened(tmp_path)
    snapshots.save("anna", [1], b"a")
    for folder in tmp_path.iterdir():
        folder.rename(tmp_path / "moved")
        folder.write_text("a file where the folder was")
    assert not snapshots.save("anna", [5], b"b")


def test_what_is_no_file_of_ours_switches_nothing_off(tmp_path: Path) -> None:
    one = opened(tmp_path)
    for token in range(3):
        one.save("anna", [token], b"x" * 1000)
    (home,) = tmp_path.iterdir()
    (home / "dangling").symlink_to(tmp_path / "nowhere")
    (home / "folder").mkdir()
    (tmp_path / "loose").write_bytes(b"a file beside the folders")
    (home / "foreign").write_bytes(b"not a snapshot")
    snapshots = opened(tmp_path, budget_bytes=one.n_bytes - 1)
    assert len(snapshots) == 2
    assert len(list(home.glob("*.kv"))) == 2
    assert not (home / "foreign").exists()
    snapshots.forget("anna")
    assert not list(home.glob("*.kv"))
    assert sorted(os.listdir(home)) == ["dangling", "folder"]


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No file can be removed, as on a disk that has become read-only; undo it to heal the disk."""

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    return monkeypatch


def test_files_that_cannot_be_removed_raise_nothing(
    tmp_path: Path, stuck: pytest.MonkeyPatch
) -> None:
    snapshots = opened(tmp_path)
    size = 0
    for tokens in ([1], [1, 2], [3], [4]):
        assert snapshots.save("anna", tokens, b"x" * 1000)
        size = size or snapshots.n_bytes
    found, _ = snapshots.match("anna", [3])
    assert found is not None
    snapshots.discard(found, "llama.cpp does not take it")
    opened(tmp_path, budget_bytes=size)
    opened(tmp_path, fingerprint="other")
    snapshots.forget("anna")
    assert snapshots.match("anna", [1, 2]) == (None, 0)


def test_forgetting_removes_what_could_not_be_removed_before(
    tmp_path: Path, stuck: pytest.MonkeyPatch
) -> None:
    snapshots = opened(tmp_path)
    snapshots.save("anna", [1], b"a")
    snapshots.save("anna", [1, 2], b"b")
    assert len(files(tmp_path)) == 2
    with pytest.raises(OSError, match="Read-only"):
        forget_files(tmp_path, "anna")
    stuck.undo()
    snapshots.forget("anna")
    assert not files(tmp_path)


def test_an_owners_files_go_where_no_process_has_them(tmp_path: Path) -> None:
    for owner in ("anna", "bert"):
        opened(tmp_path).save(owner, [1], b"a")
    found, _ = opened(tmp_path).match("anna", [1])
    assert found is not None
    (found.path.parent / "folder").mkdir()
    forget_files(tmp_path, "anna")
    forget_files(tmp_path, "who never was here")
    again = opened(tmp_path)
    assert (again.match("anna", [1])[1], again.match("bert", [1])[1]) == (0, 1)
