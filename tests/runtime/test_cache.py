"""The on-disk cache: keys, damage, foreign files, several processes, killed builders, unwritable directories."""

from __future__ import annotations

import errno
import hashlib
import logging
import multiprocessing
import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.ir.errors import CacheError
from memplan.runtime import cache as cache_module
from memplan.runtime.cache import Cache, CacheWarning, cache_key

KEY = cache_key("a key")
_scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.binary(max_size=4)
_parts = st.recursive(_scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


def _typed(part: object) -> object:
    """Parts with their types, since Python holds 1 == True."""
    return ("tuple", *map(_typed, part)) if isinstance(part, tuple) else (type(part).__name__, part)


@settings(max_examples=40, deadline=None)
@given(st.lists(_parts, max_size=4), st.lists(_parts, max_size=4))
def test_equal_keys_only_for_equal_parts(left: list, right: list) -> None:
    assert (cache_key(*left) == cache_key(*right)) == (_typed(tuple(left)) == _typed(tuple(right)))


def test_parts_do_not_run_together() -> None:
    keys = [cache_key(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), (("ab", "c"),), (1,), (True,), ("1",)]]
    assert len(set(keys)) == len(keys)


def test_a_key_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="float"):
        cache_key(1.5)  # type: ignore[arg-type]


def test_put_then_get(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    assert cache.get(KEY) is None
    path = cache.put(KEY, b"content", suffix="-n.so")
    assert cache.get(KEY) == path
    assert path.name.endswith("-n.so")
    assert Cache(tmp_path / "c").get_bytes(KEY) == b"content"
    assert cache.get(cache_key("another")) is None


def test_put_replaces(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, b"one")
    cache.put(KEY, b"two")
    assert cache.get_bytes(KEY) == b"two"
    assert cache.info().entries == 1


def test_two_that_put_at_once_leave_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = threading.Barrier(2)
    entries_of = cache_module._entries_of

    def both_there(folder: Path, key: str) -> list[cache_module._Entry]:
        listed.wait(30)  # both have written
        found = entries_of(folder, key)
        listed.wait(30)  # and neither has deleted what it takes for old
        return found

    key = cache_key("both")
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_entries_of", both_there)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda data: Cache(tmp_path).put(key, data), (b"one", b"other")))
    assert Cache(tmp_path).get_bytes(key) in (b"one", b"other")


def test_only_cache_keys_are_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        Cache(tmp_path).get("../../etc/passwd")
    with pytest.raises(ValueError, match="suffix"):
        Cache(tmp_path).put(KEY, b"", suffix="/../../x")


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "link", "writable", "directory"])
def test_damaged_entry_is_never_loaded(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    cache = Cache(tmp_path / "c")
    path = cache.put(KEY, b"0123456789")
    if damage == "flip":
        path.write_bytes(b"0123456780")
    elif damage == "truncate":
        path.write_bytes(b"01234")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(b"0123456789")
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "writable":
        path.chmod(0o666)
    else:
        path.unlink()
        path.mkdir()
    with caplog.at_level(logging.WARNING, "memplan.cache"):
        assert cache.get(KEY) is None
        assert cache.get_bytes(KEY) is None
    assert str(path) in caplog.text
    built = cache.get_or_build(KEY, lambda target: target.write_bytes(b"again") and None)
    assert built.read_bytes() == b"again"
    assert cache.get_bytes(KEY) == b"again"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_file_is_never_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    os.chown(cache.put(KEY, b"content"), 65534, 65534)
    assert cache.get(KEY) is None
    assert "belongs to user 65534" in caplog.text
    other = cache.put(KEY, b"content")
    os.chown(other.parent, 65534, 65534)
    assert cache.get(KEY) is None
    assert other.exists()


def test_files_of_another_user_id_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, b"content")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert cache.get(KEY) is None


def test_world_writable_directory_is_neither_read_nor_written(tmp_path: Path) -> None:
    root = tmp_path / "c"
    path = Cache(root).put(KEY, b"content")
    root.chmod(0o777)
    cache = Cache(root)
    assert cache.get(KEY) is None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = cache.get_or_build(KEY, lambda target: target.write_bytes(b"mine") and None)
        cache.put(cache_key("more"), b"more")
        Cache(root).put(cache_key("yet more"), b"more")
    assert [warning.category for warning in caught] == [CacheWarning]
    assert f"{root} cannot be trusted: everybody may write" in str(caught[0].message)
    assert root not in built.parents
    assert Cache(root).get(KEY) == built
    assert path.read_bytes() == b"content"


def test_unwritable_root_falls_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "c")
    with pytest.warns(CacheWarning, match="Not a directory"):
        path = cache.put(KEY, b"content")
    assert cache.get(KEY) == path
    assert cache.info().path in path.parents
    assert cache.keep("a.cpp", b"int").read_bytes() == b"int"


def test_full_disk_falls_back_and_what_was_there_is_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    cache = Cache(tmp_path)
    old = cache.put(KEY, b"old")
    whole = cache_module._write_atomically

    def full(target: Path, data: bytes) -> Path:
        if tmp_path in target.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(target, data)

    monkeypatch.setattr(cache_module, "_write_atomically", full)
    with pytest.warns(CacheWarning, match="No space left on device"):
        new = cache.get_or_build(cache_key("new"), lambda target: target.write_bytes(b"new") and None)
    assert tmp_path not in new.parents
    assert cache.get_bytes(cache_key("new")) == b"new"
    assert cache.get(KEY) == old

    def fuller(target: Path, data: bytes) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "_write_atomically", fuller)
    with pytest.raises(CacheError, match="No space left"):
        cache.put(cache_key("third"), b"x")


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    folder = cache.put(KEY, b"old").parent

    def fail(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEY, b"new")
    monkeypatch.undo()
    assert [path.suffix for path in folder.iterdir() if path.suffix == ".tmp"] == []
    assert cache.get_bytes(KEY) == b"old"


def test_failing_build_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fail(target: Path) -> None:
        target.write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.get_or_build(KEY, fail)
    assert cache.info().entries == 0
    with pytest.raises(CacheError, match="did not write"):
        cache.get_or_build(KEY, lambda target: None)
    assert cache.get_or_build(KEY, lambda target: target.write_bytes(b"x") and None).read_bytes() == b"x"


def _slow_build(root: Path, log: Path) -> None:
    def build(target: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        target.write_bytes(b"content")

    path = Cache(root).get_or_build(KEY, build)
    os._exit(0 if path.read_bytes() == b"content" else 1)


def test_several_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "c", tmp_path / "log")
    workers = [context.Process(target=_slow_build, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def _die_building(root: Path) -> None:
    def build(target: Path) -> None:
        target.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    Cache(root).get_or_build(KEY, build)


def test_killed_builder_leaves_no_entry_and_no_lock(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_die_building, args=(tmp_path,))
    worker.start()
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL
    started = time.monotonic()
    cache = Cache(tmp_path)
    assert cache.get(KEY) is None
    assert cache.get_or_build(KEY, lambda target: target.write_bytes(b"x") and None).read_bytes() == b"x"
    assert time.monotonic() - started < 5


def test_half_written_entry_is_invisible(tmp_path: Path) -> None:
    """What a kill in the middle of a write leaves: a temporary file, or a final name with half the content."""
    cache = Cache(tmp_path)
    folder = cache.put(KEY, b"x").parent
    cache.clear()
    folder.mkdir(parents=True)
    (folder / "tmpabc.tmp").write_bytes(b"cont")
    (folder / f"{KEY}-{hashlib.sha256(b'content').hexdigest()}.so").write_bytes(b"cont")
    assert cache.get(KEY) is None


def test_info_clear_and_trim(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    keys = [cache_key(number) for number in range(5)]
    for number, key in enumerate(keys):
        path = cache.put(key, bytes(100))
        os.utime(path, (1000 + number, 1000 + number))
    cache.keep("source.cpp", b"int")
    assert cache.info() == cache_module.CacheInfo(5, 500, tmp_path)
    assert cache.get(keys[0]) is not None  # used now, so it outlives those used before
    assert cache.trim(250).entries == 2
    assert [cache.get(key) is not None for key in keys] == [True, False, False, False, True]
    assert cache.clear().entries == 2
    assert cache.info().bytes == 0
    assert list(tmp_path.iterdir()) == []


def test_max_bytes_keeps_the_newest(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=150)
    for number in range(3):
        path = cache.put(cache_key(number), bytes(100))
        assert path.exists()
        os.utime(path, (1000 + number, 1000 + number))
    assert cache.info().entries == 1
    assert cache.get(cache_key(2)) is not None
    assert cache.put(cache_key("big"), bytes(500)).exists()


def test_a_disk_that_is_full_while_building_is_named(tmp_path: Path) -> None:
    def build(target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = Cache(tmp_path)
    with pytest.raises(CacheError, match=r"cannot build in the temporary directory .*No space left on device"):
        store.get_or_build("ab" * 32, build)
    assert store.get("ab" * 32) is None


def test_where_the_home_cannot_be_written_the_chosen_directory_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MEMPLAN_CACHE_DIR", str(tmp_path / "chosen"))
    assert Cache().root == tmp_path / "home" / "memplan"
    monkeypatch.setattr(os, "access", lambda path, mode: not str(tmp_path).startswith(str(path)))
    assert Cache().root == tmp_path / "chosen"
    monkeypatch.delenv("MEMPLAN_CACHE_DIR")
    assert Cache().root == tmp_path / "home" / "memplan"
