"""Reading and writing of the planner's files, with errors that name the line."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import PlanningError

COLUMNS = ("id", "lower", "upper", "size")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,25}")
_LARGEST = 2**61


@dataclass(frozen=True, slots=True)
class BufferTable:
    """A file of buffers: the header and rows as they stand, the line of each row, and the numbers in them."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]
    buffers: tuple[tuple[int, int, int], ...]

    def name(self, index: int) -> str:
        """The id in row ``index``."""
        return self.rows[index][self.header.index("id")]


def _fail(path: Path, line: int, message: str) -> PlanningError:
    return PlanningError(f"{path}, line {line}: {message}")


def _number(text: str, column: str, path: Path, line: int) -> int:
    shown = text.strip()
    if not _WHOLE_NUMBER.fullmatch(shown):
        raise _fail(path, line, f"{column} must be a whole number, found {shown[:40]!r}")
    value = int(shown)
    if abs(value) >= _LARGEST:
        raise _fail(path, line, f"{column} {shown} is beyond what the planner counts with (2**61)")
    return value


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line on which each ends; blank lines are left out."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            for row in reader:
                line = reader.line_num
                if row and any(field.strip() for field in row):
                    yield line, row
    except csv.Error as error:
        raise _fail(path, line + 1, str(error)) from error
    except UnicodeDecodeError as error:
        raise _fail(path, line + 1, f"not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise PlanningError(f"{path}: {error.strerror or error}") from error


def read_buffers(path: Path) -> BufferTable:
    """Read ``id,lower,upper,size`` (half-open lifetimes, bytes); further columns are kept as they stand.

    Raises
    ------
    PlanningError
        The file cannot be read, or a line is malformed; the message names the line.
    """
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise _fail(path, 1, f"the file is empty; expected the header {','.join(COLUMNS)}")
    header = tuple(field.strip() for field in first[1])
    missing = [column for column in COLUMNS if column not in header]
    if missing or len(set(header)) < len(header):
        raise _fail(path, first[0], f"expected the header {','.join(COLUMNS)}, found {','.join(header)[:120]}")
    if "offset" in header:
        raise _fail(path, first[0], "there is an offset column already")
    at = {column: header.index(column) for column in COLUMNS}
    seen: dict[str, int] = {}
    kept: list[tuple[str, ...]] = []
    lines: list[int] = []
    buffers: list[tuple[int, int, int]] = []
    total = 0
    for line, row in rows:
        if len(row) != len(header):
            raise _fail(path, line, f"expected {len(header)} fields, found {len(row)}")
        name = row[at["id"]].strip()
        if name in seen:
            raise _fail(path, line, f"the id {name[:60]!r} stands on line {seen[name]} already")
        seen[name] = line
        lower, upper, size = (_number(row[at[column]], column, path, line) for column in COLUMNS[1:])
        if lower >= upper:
            raise _fail(path, line, f"the lifetime [{lower}, {upper}) of {name[:60]!r} is empty")
        if size < 0:
            raise _fail(path, line, f"negative size {size}")
        total += size
        if total >= _LARGEST:
            raise _fail(path, line, "the sizes up to here add up to more than 2**61 bytes")
        kept.append(tuple(row))
        lines.append(line)
        buffers.append((lower, upper, size))
    return BufferTable(header, tuple(kept), tuple(lines), tuple(buffers))


def write_buffers(path: Path, table: BufferTable, offsets: Sequence[int]) -> None:
    """The same columns and rows, and ``offset`` in bytes."""
    try:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([*table.header, "offset"])
            writer.writerows([*row, offset] for row, offset in zip(table.rows, offsets, strict=True))
    except OSError as error:
        raise PlanningError(f"{path}: {error.strerror or error}") from error


class _Repeated(Exception):
    """A key that an object has twice."""


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, whose keys all differ: of two values one would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Repeated(next(key for key in keys if keys.count(key) > 1))
    return made


def read_json(path: Path) -> object:
    """A JSON file, gzipped or not.

    Raises
    ------
    PlanningError
        The file cannot be read or is not JSON; the message names the line.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        data: object = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise _fail(path, error.lineno, f"not JSON: {error.msg} (column {error.colno})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _fail(path, line, f"not UTF-8 text: {error.reason}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PlanningError(f"{path}: damaged gzip file: {error}") from error
    except _Repeated as error:
        raise PlanningError(f"{path}: the key {str(error)[:60]!r} stands twice in one object") from error
    except RecursionError as error:
        raise PlanningError(f"{path}: nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise PlanningError(f"{path}: not JSON: {error}") from error
    except OSError as error:
        raise PlanningError(f"{path}: {error.strerror or error}") from error
    return data


def write_json(path: Path, data: object) -> None:
    """JSON on one line."""
    try:
        path.write_text(json.dumps(data) + "\n", encoding="utf-8")
    except OSError as error:
        raise PlanningError(f"{path}: {error.strerror or error}") from error
