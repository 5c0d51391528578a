"""Lines and rows of one file, read strictly: every refusal names the file, the line and what to do.

`skipped` is None to refuse by BadInput, or a list that collects the messages while the bad lines are left out.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from lmkit.errors import BadInput

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MAX_LINE_BYTES = 16 * 2**20
MAX_NESTING = 64
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
_MAGIC = {
    b"\x1f\x8b": "gzip data: name it .gz",
    b"\x28\xb5\x2f\xfd": "zstd data: name it .zst",
    b"PAR1": "a parquet file: name it .parquet",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8 (iconv -f utf-16 -t utf-8)",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8 (iconv -f utf-16 -t utf-8)",
}


def data_suffix(path: Path) -> str:
    """The suffix that says what a file holds, compression left aside: `.jsonl` of `a.jsonl.gz`."""
    suffixes = [s for s in path.suffixes if s not in (".gz", ".zst")]
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> BinaryIO:
    """The file's bytes, decompressed when its name says so, after checking that name and first bytes agree."""
    with path.open("rb") as file:
        head = file.read(4)
    compression = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}.get(path.suffix)
    if compression and not head.startswith(compression):
        raise BadInput(f"{path} is named {path.suffix} but does not hold such data. Rename it, or compress it again.")
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise BadInput(f"{path} is not UTF-8 text; it looks like {what}.")
    return path.open("rb")


def read_lines(path: Path, skipped: list[str] | None) -> Iterator[tuple[int, str]]:
    """(line number from 1, text with its line end) of a UTF-8 file; a line end of any kind becomes "\\n"."""
    number = 0
    try:
        with _open(path) as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise BadInput(
                        f"{path}:{number}  the line is longer than {MAX_LINE_BYTES // 2**20} MiB. Break it up."
                    )
                if (text := _decode(raw, f"{path}:{number}", skipped)) is not None:
                    text = text.removeprefix("\ufeff") if number == 1 else text
                    yield number, text.replace("\r\n", "\n").replace("\r", "\n")
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not the data's
            raise
        raise BadInput(
            f"{path}:{number + 1}  the compressed data is damaged ({error}). Fetch or make it again."
        ) from None


def _decode(raw: bytes, where: str, skipped: list[str] | None) -> str | None:
    if b"\0" in raw:
        refuse(f"{where}  holds a NUL byte, so this is not text. Choose a text file, or remove the byte.", skipped)
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(
            f"{where}:{error.start + 1}  the byte 0x{raw[error.start]:02x} is not UTF-8. "
            "Save the file as UTF-8 (for example iconv -f latin1 -t utf-8).",
            skipped,
        )
    return None


def refuse(message: str, skipped: list[str] | None) -> None:
    """BadInput with the message, or one more message in `skipped`."""
    if skipped is None:
        raise BadInput(message)
    skipped.append(message)


# ------------------------------------------------------------------------------------------------------ rows


def read_rows(path: Path, skipped: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a data file; `where` is file:line, or file and row number."""
    suffix = data_suffix(path)
    if suffix == ".parquet":
        batches = open_parquet(path).iter_batches(batch_size=1024)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{path} row {number}", row
    elif suffix == ".csv":
        yield from _csv_rows(path, skipped)
    elif suffix == ".json" and _is_array(path):
        yield from _array_rows(path, skipped)
    elif suffix in (".json", ".jsonl"):
        for number, line in read_lines(path, skipped):
            if line.strip() and (row := _json(line, f"{path}:{number}", skipped)) is not None:
                yield f"{path}:{number}", row
    else:
        raise BadInput(f"{path} is not a file of rows; wanted {', '.join(ROW_SUFFIXES)} (or .gz, .zst of them).")


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """An open parquet file; BadInput when it is not one."""
    try:
        if path.suffix != ".parquet":
            with _open(path) as packed:
                whole = tempfile.TemporaryFile()  # noqa: SIM115 - it is read as long as the rows are
                shutil.copyfileobj(packed, whole)
            return pyarrow.parquet.ParquetFile(whole)
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, EOFError, zlib.error, OSError) as error:
        raise BadInput(f"{path} is not a readable parquet file ({error}). Fetch or make it again.") from None


def _csv_rows(path: Path, skipped: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line for _, line in read_lines(path, None)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise BadInput(f"{path}:1  names a column twice: {', '.join(header)}. Rename one of them.")
        for cells in reader:
            if len(cells) != len(header):
                found = f"{len(cells)} cells where the header has {len(header)}"
                refuse(f"{path}:{reader.line_num}  has {found}. Quote cells with commas or line ends in them.", skipped)
                continue
            yield f"{path}:{reader.line_num}", dict(zip(header, cells))
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}  is not valid CSV ({error}).") from None


def _is_array(path: Path) -> bool:
    return next((line.lstrip()[0] == "[" for _, line in read_lines(path, None) if line.strip()), False)


def _array_rows(path: Path, skipped: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    values = _loads("".join(line for _, line in read_lines(path, None)), str(path), 1)
    for number, value in enumerate(values, 1):
        where = f"{path} row {number}"
        if (row := _or_refused(lambda value=value, where=where: _checked(value, where), skipped)) is not None:
            yield where, row


def _json(line: str, where: str, skipped: list[str] | None) -> dict[str, Any] | None:
    path, _, number = where.rpartition(":")
    return _or_refused(lambda: _checked(_loads(line.rstrip("\n"), path, int(number)), where), skipped)


def _or_refused(read: Callable[[], dict[str, Any]], skipped: list[str] | None) -> dict[str, Any] | None:
    try:
        return read()
    except BadInput as error:
        refuse(str(error), skipped)
    return None


def _loads(text: str, path: str, first_line: int) -> Any:
    """The value of a JSON text, refusing what JSON leaves open: NaN, a key given twice, numbers beyond 64 bits."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"gives the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
        return value

    def finite(constant: str) -> None:
        raise ValueError(f"holds {constant}, which is not JSON; write null or a number")

    def integer(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
            raise ValueError(f"holds the number {digits[:24]}, which does not fit in 64 bits; write it as a string")
        return int(digits)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=finite, parse_int=integer)
    except json.JSONDecodeError as error:
        where = f"{path}:{first_line + error.lineno - 1}:{error.colno}"
        raise BadInput(f'{where}  is not valid JSON: {error.msg}. Wanted a row such as {{"text": ...}}.') from None
    except RecursionError:
        raise BadInput(f"{path}:{first_line}  is nested deeper than {MAX_NESTING} levels. Flatten it.") from None
    except ValueError as error:
        raise BadInput(f"{path}:{first_line}  {error}.") from None


def _checked(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f'{where}  holds a {type(value).__name__}; wanted an object such as {{"text": ...}}.')
    stack: list[tuple[Any, int]] = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_NESTING:
            raise BadInput(f"{where}  is nested deeper than {MAX_NESTING} levels. Flatten it.")
        if isinstance(item, str) and _NOT_TEXT.search(item):
            raise BadInput(f"{where}  holds \\u0000 or half a surrogate pair, which is not text. Remove it.")
        if isinstance(item, dict):
            stack += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            stack += [(part, depth + 1) for part in item]
    return value
