"""Content-addressed store of what is slow to make: compiled libraries, tuning results, plans.

One entry is one file, ``<root>/v1/<key[:2]>/<key>-<sha256 of the content><suffix>``.  The name carries the digest of
the content, so publishing an entry is a single atomic rename, there is no second file that could disagree with it, and
whatever a crash, a full disk or a bad sector leaves behind is noticed when the entry is read: a file whose content does
not hash to its own name is deleted and made again.  (This is also why nothing is fsynced: after a power cut an entry is
either whole or rebuilt.)

Entries are code that will run in this process, so a file is only ever loaded when it is a regular file of this user in
directories of this user that nobody else can write to.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import filelock
import platformdirs

from memplan.ir.config import Config, from_environment
from memplan.ir.errors import CacheError

_log = logging.getLogger("memplan.cache")

_LAYOUT = "v1"
"""Changes whenever the layout of the directory does, so that versions of memplan do not read each other's files."""

_LOCK_TIMEOUT_SECONDS = 900.0
"""How long to wait for another process's build before building too. Two builds of one key are wasteful, never wrong."""

_STALE_SECONDS = 86_400.0
"""Temporary files older than this were left by a killed process."""

KeyPart: TypeAlias = "str | bytes | int | bool | tuple[KeyPart, ...] | None"


class CacheWarning(UserWarning):
    """The cache directory cannot be used; entries go to a temporary directory and are lost when the process ends."""


def cache_key(*parts: KeyPart) -> str:
    """Hexadecimal sha256 of ``parts``, encoded with type and length so that different parts never encode alike.

    ``cache_key("ab", "c") != cache_key("a", "bc")`` and ``cache_key(1) != cache_key(True) != cache_key("1")``.
    """
    digest = hashlib.sha256()
    for chunk in _encode(parts):
        digest.update(chunk)
    return digest.hexdigest()


def _encode(part: KeyPart) -> Iterator[bytes]:
    """Type tag, length, content: a prefix code, so a concatenation decodes in one way only."""
    if part is None:
        yield b"N"
    elif isinstance(part, bool):
        yield b"T" if part else b"F"
    elif isinstance(part, int):
        yield b"i%d;" % part
    elif isinstance(part, str):
        data = part.encode("utf-8", "surrogatepass")
        yield b"s%d:" % len(data)
        yield data
    elif isinstance(part, bytes):
        yield b"b%d:" % len(part)
        yield part
    elif isinstance(part, tuple):
        yield b"(%d:" % len(part)
        for inner in part:
            yield from _encode(inner)
    else:
        raise TypeError(f"cache_key takes str, bytes, int, bool, None and tuples of them, not {type(part).__name__}")


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What a cache directory holds: number of entries, their bytes, and where it is."""

    entries: int
    bytes: int
    path: Path


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    key: str
    digest: str
    size: int
    used: float


class Cache:
    """A directory of verified entries, shared safely by threads and processes.

    Parameters
    ----------
    root
        The directory; made when it does not exist.  Default: the user's cache directory for memplan.
    max_bytes
        When given, the entries used longest ago are deleted after a write, until the rest fits.

    Where ``root`` cannot be written (read-only, another user's, world-writable, no space), one `CacheWarning` names the
    path and the reason, and what is put goes to a directory private to this process; entries that ``root`` already
    holds are still read if they can be trusted.
    """

    def __init__(self, root: Path | str | None = None, *, max_bytes: int | None = None) -> None:
        self.root = (Path(root) if root is not None else default_root()).absolute()
        self.max_bytes = max_bytes
        self._mutex = threading.Lock()

    @property
    def _fallback(self) -> Path | None:
        """Where writes go instead of to ``root``, once that has failed in this process (not in a parent's)."""
        return _diverted.get((os.getpid(), self.root))

    # -- reading ---------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Path | None:
        """Path of the entry, its content verified, or None."""
        found = self._find(key)
        return found[0] if found is not None else None

    def get_bytes(self, key: str) -> bytes | None:
        """Content of the entry, verified (the very bytes returned were hashed), or None."""
        found = self._find(key)
        return found[1] if found is not None else None

    def _find(self, key: str) -> tuple[Path, bytes] | None:
        _check_key(key)
        places = (self.root,) if self._fallback is None else (self._fallback, self.root)
        for place in places:
            found = _find_in(place, key)
            if found is not None:
                return found
        return None

    # -- writing ---------------------------------------------------------------------------------------------------

    def put(self, key: str, data: bytes, *, suffix: str = "") -> Path:
        """Store ``data`` under ``key``, replacing what was there; returns the path.

        Raises CacheError when neither the cache directory nor a temporary one can be written.
        """
        _check_key(key)
        _check_suffix(suffix)
        return self._write(lambda place: self._publish(place, key, data, suffix))

    def get_or_build(self, key: str, build: Callable[[Path], None], *, suffix: str = "") -> Path:
        """Path of the entry; when there is none, ``build(path)`` is called to write it to a path of its own.

        Of several threads or processes that ask at once, one builds and the others wait for it.  An exception of
        ``build`` passes through and leaves nothing behind, but an OSError (its disk is full) becomes a CacheError.
        Raises CacheError as `put` does, and when ``build`` returns without having written its file.
        """
        found = self.get(key)
        if found is not None:
            return found
        with self._locked(key):
            found = self.get(key)
            if found is not None:
                return found
            # Built outside the cache directory: a full or slow cache disk must not fail the build itself.
            try:
                with tempfile.TemporaryDirectory(prefix="memplan-build-") as scratch:
                    target = Path(scratch) / f"entry{suffix}"
                    build(target)
                    if not target.is_file():
                        raise CacheError(f"the build of cache entry {key[:16]} did not write its file")
                    data = target.read_bytes()
            except OSError as error:
                place = tempfile.gettempdir()
                raise CacheError(f"cannot build in the temporary directory {place}: {error}") from error
            return self.put(key, data, suffix=suffix)

    def keep(self, name: str, data: bytes) -> Path:
        """Write a file for a person to look at (the source of a failed build); never read back, dropped by `clear`.

        Raises CacheError as `put` does.
        """
        return self._write(lambda place: _write_atomically(_prepare(place, "kept") / name, data))

    def _write(self, action: Callable[[Path], Path]) -> Path:
        """``action`` on the root, and where that fails on the fallback directory."""
        with self._mutex:
            if self._fallback is None:
                try:
                    return action(self.root)
                except (OSError, CacheError) as error:
                    self._divert(error)
            fallback = _fallback_directory(self.root)
            try:
                return action(fallback)
            except OSError as error:
                raise CacheError(f"cannot write to the temporary directory {fallback}: {error}") from error

    def _publish(self, place: Path, key: str, data: bytes, suffix: str) -> Path:
        folder = _prepare(place, key[:2])
        digest = hashlib.sha256(data).hexdigest()
        target = _write_atomically(folder / f"{key}-{digest}{suffix}", data)
        for old in _entries_of(folder, key):
            if old.path != target:
                _unlink(old.path)
        # Two that publish at once may each have taken the other's for old: whoever looks last leaves its own.
        if not target.exists():
            target = _write_atomically(target, data)
        if self.max_bytes is not None:
            _trim(place, self.max_bytes, keep=target)
        return target

    def _divert(self, reason: Exception) -> None:
        """Send this process's further writes for ``root`` to a temporary directory, with one warning."""
        fallback = _fallback_directory(self.root)
        first = (os.getpid(), self.root) not in _diverted
        _diverted[os.getpid(), self.root] = fallback
        text = os.strerror(reason.errno) if isinstance(reason, OSError) and reason.errno else str(reason)
        if first:
            warnings.warn(
                f"memplan cannot write its cache directory {self.root} ({text}); what is compiled now goes to "
                f"{fallback} and is lost when this process ends. Set MEMPLAN_CACHE_DIR to a directory of yours.",
                CacheWarning,
                stacklevel=5,
            )

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the key's lock.  The kernel frees it when the holder dies, so a killed builder blocks nobody."""
        lock: filelock.FileLock | None = None
        try:
            path = self._write(lambda place: _lock_file(place, key))
            lock = filelock.FileLock(path, timeout=_LOCK_TIMEOUT_SECONDS, thread_local=False, mode=0o600)
            lock.acquire()
        except filelock.Timeout:
            _log.warning("waited %.0f s for another process to build %s; building it here", _LOCK_TIMEOUT_SECONDS, key)
            lock = None
        except (OSError, NotImplementedError) as error:
            # No locks on this file system: entries are still published atomically, some may be built twice.
            _log.warning("cannot lock cache entry %s (%s); building without a lock", key[:16], error)
            lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    # -- accounting ------------------------------------------------------------------------------------------------

    def info(self) -> CacheInfo:
        """Entries and bytes of the directory in use; damaged entries count, since only reading one tells."""
        place = self._fallback or self.root
        entries = list(_all_entries(place))
        return CacheInfo(len(entries), sum(entry.size for entry in entries), place)

    def kinds(self) -> dict[str, CacheInfo]:
        """The entries of each suffix."""
        place = self._fallback or self.root
        found: dict[str, list[int]] = {}
        for entry in _all_entries(place):
            found.setdefault(entry.path.suffix, []).append(entry.size)
        return {suffix: CacheInfo(len(sizes), sum(sizes), place) for suffix, sizes in sorted(found.items())}

    def clear(self) -> CacheInfo:
        """Delete every entry, kept file and lock; returns what was there.  Libraries that are loaded stay mapped.

        Raises CacheError when something cannot be deleted.
        """
        before = self.info()
        top = before.path / _LAYOUT
        try:
            if top.is_dir():
                shutil.rmtree(top)
        except OSError as error:
            raise CacheError(f"cannot clear {top}: {error}") from error
        return before

    def trim(self, max_bytes: int) -> CacheInfo:
        """Delete the entries used longest ago until at most ``max_bytes`` remain; returns what remains."""
        _trim(self._fallback or self.root, max_bytes, keep=None)
        return self.info()


def default_root() -> Path:
    """The user's cache directory for memplan (``~/.cache/memplan`` on Linux, ``XDG_CACHE_HOME`` honoured).

    What is memplan's own (its searches, what the compiler can do) stays there, whatever directory plans and kernels are
    kept in; where it cannot be written, that goes to the directory that the environment chooses, too.
    """
    home = Path(platformdirs.user_cache_dir("memplan"))
    nearest = next(p for p in (home, *home.parents) if p.exists())
    if os.access(nearest, os.W_OK):
        return home
    return Path(from_environment(Config()).cache_dir or home)


# -- the process's private directory ------------------------------------------------------------------------------

_diverted: dict[tuple[int, Path], Path] = {}
_fallbacks: dict[int, Path] = {}
_fallback_lock = threading.Lock()


def _fallback_directory(root: Path) -> Path:
    """In one temporary directory per process, removed when the process ends; a forked child gets its own."""
    with _fallback_lock:
        pid = os.getpid()
        if pid not in _fallbacks:
            try:
                _fallbacks[pid] = Path(tempfile.mkdtemp(prefix="memplan-cache-"))
            except OSError as error:
                raise CacheError(f"no temporary directory can be made either: {error}") from error
            atexit.register(_remove_fallback, pid)
        return _fallbacks[pid] / cache_key(str(root))[:16]


def _remove_fallback(pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(_fallbacks[pid], ignore_errors=True)


# -- files --------------------------------------------------------------------------------------------------------


def _check_key(key: str) -> None:
    if len(key) != 64 or not set(key) <= set("0123456789abcdef"):
        raise ValueError(f"a cache key is what cache_key returns, 64 hexadecimal digits, not {key!r}")


def _check_suffix(suffix: str) -> None:
    if "/" in suffix or "\0" in suffix or len(suffix) > 100 or suffix.endswith((".lock", ".tmp")):
        raise ValueError(f"not a usable suffix of a file name: {suffix!r}")


def _refusal(status: os.stat_result, *, directory: bool) -> str | None:
    """Why a file or directory must not be trusted, or None."""
    if directory and not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"
    if not directory and not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, not to user {os.geteuid()}"
    if status.st_mode & stat.S_IWOTH:
        return "everybody may write to it"
    return None


def _prepare(place: Path, shard: str) -> Path:
    """Make and check ``place/v1/shard``; OSError when it cannot be made, CacheError when it cannot be trusted."""
    folder = place / _LAYOUT / shard
    if not folder.is_dir():
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in (place / _LAYOUT, folder):
            part.mkdir(mode=0o700, exist_ok=True)
    for part in (place, place / _LAYOUT, folder):
        # The root may be reached through a link of the user's own; what it holds may not.
        reason = _refusal(part.stat() if part == place else part.lstat(), directory=True)
        if reason is not None:
            raise CacheError(f"{part} cannot be trusted: {reason}")
    return folder


def _lock_file(place: Path, key: str) -> Path:
    """The key's lock file, in a folder that was seen to take files: better said before the build than after it."""
    folder = _prepare(place, key[:2])
    handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    _unlink(Path(name))
    return folder / f"{key}.lock"


def _write_atomically(target: Path, data: bytes) -> Path:
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.replace(target)
    except BaseException:
        _unlink(temporary)
        raise
    return target


def _unlink(path: Path) -> None:
    """Delete; being gone already is as good, and an old entry that cannot be deleted is checked again when read."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.info("cannot delete %s: %s", path, error)


def key_of(path: Path) -> str:
    """The key of an entry whose path `Cache` gave.  Raises ValueError for another path."""
    parsed = _parse_name(path)
    if parsed is None:
        raise ValueError(f"not the path of a cache entry: {path}")
    return parsed[0]


def _parse_name(path: Path) -> tuple[str, str] | None:
    """Key and digest from an entry's file name, or None for locks, temporary and foreign files."""
    key, dash, rest = path.name.partition("-")
    digest = rest[:64]
    if not dash or len(key) != 64 or len(digest) != 64 or path.name.endswith((".lock", ".tmp")):
        return None
    return key, digest


def _entries_of(folder: Path, key: str) -> list[_Entry]:
    return [entry for entry in _entries_in(folder) if entry.key == key]


def _entries_in(folder: Path) -> Iterator[_Entry]:
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    for name in names:
        parsed = _parse_name(folder / name)
        if parsed is None:
            continue
        try:
            status = (folder / name).lstat()
        except FileNotFoundError:  # deleted meanwhile by another process
            continue
        yield _Entry(folder / name, parsed[0], parsed[1], status.st_size, status.st_mtime)


def _all_entries(place: Path) -> Iterator[_Entry]:
    for folder in sorted((place / _LAYOUT).glob("??")):
        yield from _entries_in(folder)


def _find_in(place: Path, key: str) -> tuple[Path, bytes] | None:
    folder = place / _LAYOUT / key[:2]
    entries = _entries_of(folder, key)
    if not entries:
        return None
    for part in (place, place / _LAYOUT, folder):
        reason = _refusal(part.stat() if part == place else part.lstat(), directory=True)
        if reason is not None:
            _log.warning("not loading from the cache directory %s: %s", part, reason)
            return None
    for entry in entries:
        data = _read_verified(entry)
        if data is not None:
            with contextlib.suppress(OSError):  # a read-only cache keeps no record of use
                os.utime(entry.path)
            return entry.path, data
    return None


def _read_verified(entry: _Entry) -> bytes | None:
    """Content of the entry, or None (and the file is deleted) where it is damaged or not ours."""
    try:
        # O_NOFOLLOW and fstat: what is checked is what is read, whatever happens to the name meanwhile.
        handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENOENT:
            _log.warning("cannot read cache entry %s (%s); making it again", entry.path, error)
            _unlink(entry.path)
        return None
    try:
        reason = _refusal(os.fstat(handle), directory=False)
        data = b""
        if reason is None:
            with os.fdopen(handle, "rb", closefd=False) as file:
                data = file.read()
    finally:
        os.close(handle)
    if reason is None and hashlib.sha256(data).hexdigest() != entry.digest:
        reason = f"its {len(data)} bytes do not have the digest in its name"
    if reason is None:
        return data
    _log.warning("cache entry %s is not used: %s; making it again", entry.path, reason)
    _unlink(entry.path)
    return None


def _trim(place: Path, max_bytes: int, keep: Path | None) -> None:
    entries = sorted(_all_entries(place), key=lambda entry: (entry.used, entry.path))
    total = sum(entry.size for entry in entries)
    for entry in entries:
        if total <= max_bytes:
            break
        if entry.path != keep:
            _unlink(entry.path)
            total -= entry.size
    old = time.time() - _STALE_SECONDS
    for temporary in (place / _LAYOUT).glob("*/*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if temporary.stat().st_mtime < old:
                _unlink(temporary)
