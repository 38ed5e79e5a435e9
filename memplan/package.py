"""The file of a saved model: a zip without compression, with a manifest that has the digest of everything in it.

``manifest.json`` comes last and tells of every other entry its bytes and sha256; ``manifest.sha256`` is the manifest's
own. Entries below 2 GiB start at multiples of 64 bytes, so that a program may map weights where they lie. Reading
checks before it gives anything out; nothing here runs what is in a file. The digests tell damage, not who made the
file: load only files that you trust, as they hold code.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from .ir.errors import SavedModelError

FORMAT = "memplan model"
VERSION = 1
_ALIGNMENT = 64
_CHUNK = 1 << 22
_MANIFEST, _DIGEST = "manifest.json", "manifest.sha256"
_FIXED_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass
class Writer:
    """A package being written; the file appears when all of it is there."""

    archive: zipfile.ZipFile
    entries: dict[str, dict[str, object]] = field(default_factory=dict)

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Add an entry."""
        self._store(name, data)
        self.entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _store(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(name, _FIXED_DATE)
        start = self.archive.fp.tell() + 30 + len(name.encode())  # type: ignore[union-attr]  # of a local header
        gap = -(start + 4) % _ALIGNMENT  # an extra field has a header of four bytes
        info.extra = b"\x4d\x50" + gap.to_bytes(2, "little") + bytes(gap)
        info.external_attr = 0o600 << 16
        info.file_size = len(data)  # from 2 GiB on a longer header follows, and the entry lies where it lies
        with self.archive.open(info, "w") as file:
            file.write(data)

    def finish(self, manifest: Mapping[str, object]) -> None:
        """Write the manifest."""
        whole = {"format": FORMAT, "version": VERSION, **manifest, "entries": self.entries}
        text = json.dumps(whole, indent=1, sort_keys=True).encode()
        self._store(_MANIFEST, text)
        self._store(_DIGEST, hashlib.sha256(text).hexdigest().encode())


def write(path: Path, fill: Callable[[Writer], Mapping[str, object]]) -> None:
    """Write a package: ``fill`` adds entries and gives the rest of the manifest.

    Raises
    ------
    SavedModelError
        If the file cannot be written; one that was there before stays as it was.
    """
    target = path.resolve()  # of a link, what it leads to
    if target.exists() and not target.is_file():
        what = "is a folder" if target.is_dir() else "is no regular file, and would be replaced by one"
        raise SavedModelError(f"cannot write {path}: it {what}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        # opened by name: it gets the permissions that the user's other files get
        with temporary.open("x+b") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            writer = Writer(archive)
            writer.finish(fill(writer))
        temporary.replace(target)
    except OSError as error:
        raise SavedModelError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Reader:
    """An open package whose manifest has been checked."""

    path: Path
    archive: zipfile.ZipFile
    manifest: Mapping[str, object]
    entries: Mapping[str, tuple[int, str]]

    def read(self, name: str) -> bytes:
        """The content of an entry, checked.

        Raises
        ------
        SavedModelError
            If it is not there, or not as it was written.
        """
        size, _ = self._known(name)
        data = bytearray(size)
        self.read_into(name, memoryview(data))
        return bytes(data)

    def read_into(self, name: str, target: memoryview) -> None:
        """Read an entry to where it is to be, and check it there.  Raises SavedModelError as `read` does."""

        def take(start: int, data: memoryview) -> None:
            target[start : start + len(data)] = data

        if len(target) != self.size(name):
            raise SavedModelError(f"{self.path} is damaged: {name} has {self.size(name)} bytes and not {len(target)}")
        self.stream(name, take)

    def verify(self, name: str) -> None:
        """Check an entry and keep nothing of it.  Raises SavedModelError as `read` does."""
        self.stream(name, lambda start, data: None)

    def stream(self, name: str, take: Callable[[int, memoryview], None]) -> None:
        """Give an entry out piece by piece, each with its position; checked when all of it has been given."""
        size, digest = self._known(name)
        found, done = hashlib.sha256(), 0
        piece = memoryview(bytearray(_CHUNK))
        with self.open(name) as file:
            while count := file.readinto(piece):  # type: ignore[attr-defined]
                if done + count > size:
                    break
                found.update(piece[:count])
                take(done, piece[:count])
                done += count
        if done != size or found.hexdigest() != digest:
            raise SavedModelError(f"{self.path} is damaged: {name} is not what was saved")

    def size(self, name: str) -> int:
        """Bytes of an entry."""
        return self._known(name)[0]

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        try:
            with self.archive.open(name) as file:
                yield file
        except (KeyError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise SavedModelError(f"{self.path} is damaged: {name} cannot be read: {error}") from error

    def _known(self, name: str) -> tuple[int, str]:
        if name not in self.entries:
            raise SavedModelError(f"{self.path} holds no {name}")
        return self.entries[name]


@contextmanager
def read(path: Path) -> Iterator[Reader]:
    """Open a package.

    Raises
    ------
    SavedModelError
        If it is not there, damaged, no saved model, or of another version of the format.
    """
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise SavedModelError(f"there is no file {path}") from error
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise SavedModelError(f"{path} is no saved model, or it is damaged: {error}") from error
    with archive:
        try:
            text, digest = archive.read(_MANIFEST), archive.read(_DIGEST)
        except (KeyError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise SavedModelError(f"{path} is no saved model, or it is damaged: {error}") from error
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise SavedModelError(f"{path} is damaged: its manifest is not what was saved")
        manifest = json.loads(text)
        if manifest.get("format") != FORMAT:
            raise SavedModelError(f"{path} is no model that memplan saved")
        if manifest.get("version") != VERSION:
            raise SavedModelError(
                f"{path} has version {manifest.get('version')!r} of the format, this memplan reads version {VERSION}: "
                "save the model again"
            )
        entries = {name: (int(e["bytes"]), str(e["sha256"])) for name, e in manifest["entries"].items()}
        yield Reader(path, archive, manifest, entries)
