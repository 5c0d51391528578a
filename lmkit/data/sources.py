"""Files, folders and hub names to documents (for pretraining) and rows (for everything else), read strictly.

Local files only, unless a source starts with `hub:`. What cannot be read is an error that names file and line: a
tolerant reader turns a damaged file into a model that is a little worse, and nobody learns why.
"""

from __future__ import annotations

import bisect
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset, IterableDataset
from datasets.table import InMemoryTable

from lmkit.artifact import MANIFEST, verify
from lmkit.data.formats import OnBad, to_preferences, to_prompt_completion, to_prompts
from lmkit.data.parts import parse, share
from lmkit.data.strict import ROW_SUFFIXES, data_suffix, open_parquet, read_lines, read_rows, refuse
from lmkit.errors import BadInput

Source = str | Path
MAX_DOCUMENT_CHARS = 64 * 2**20
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def read_text(
    paths: Source | list[Source],
    *,
    document_separator: str | None = "\n\n",
    on_bad: OnBad = "error",
    streaming: bool = False,
    part: str | None = None,
) -> Iterator[str]:
    """Documents of files, folders (all .txt .jsonl .parquet below them) and patterns, in the order of their names.

    Each file may be .gz or .zst. A text file's documents stand between blank lines; other files give their column
    `text`. A byte order mark is dropped and line ends become "\\n"; documents of white space only are left out. Memory
    is bounded by the longest document (at most 64 Mi characters), not by the size of the files.

    document_separator: what divides a text file. N newlines mean at least N - 1 blank lines, so "\\n\\n\\n" gives the
        chapters of most Gutenberg books, whose paragraphs stand one blank line apart, and "\\n" one document a line.
        Other text, such as "<|endoftext|>", is a line of its own. None takes each file whole.
    on_bad: "error" stops at the first line that is not UTF-8, holds a NUL or is not the row it should be, naming
        file and line; "skip" leaves out such lines and warns with their number. Files that cannot be read, or have
        no document at all, are BadInput either way.
    streaming: read a hub name over the network in each pass; otherwise it is downloaded once, and read from the disk.
    part: "2/8" gives the second of eight parts: every eighth file, or every eighth document where files are fewer.
    """
    if on_bad not in ("error", "skip"):
        raise BadInput(f'on_bad is {on_bad!r}; wanted "error" or "skip".')
    if document_separator is not None and not document_separator.strip(" \t"):
        raise BadInput(f"document_separator is {document_separator!r}; wanted newlines, the text of a line, or null.")
    if isinstance(paths, str) and paths.startswith("hub:"):
        return share(_column_text(paths, streaming), part)
    files = _find(paths, TEXT_SUFFIXES)
    if part and len(files) < parse(part)[1]:
        return share(_documents(files, document_separator, on_bad), part)
    return _documents([*share(files, part)], document_separator, on_bad)


def load_rows(source: Source | list[Source], on_bad: OnBad = "error") -> Dataset:
    """All rows of a source: JSON, JSONL, CSV or parquet files (or .gz, .zst of them), folders, patterns, or a hub name.

    A folder is what `save_to_disk` wrote, its manifest checked if there is one, or holds data files. Only
    `hub:org/name[@revision][:split]` (split `train` unless named) asks the Hub, and `hub:org/name:split[:N]` streams
    the first N rows of it; a path that does not exist is an error. Rows of local files are held in memory, and every
    row must have the first row's columns and types.

    on_bad: "error" stops at the first line that is no such row, naming file and line; "skip" leaves them out and warns
        with their number; more bad rows than good ones are BadInput, as is a nested value of another type than before.
    """
    if (whole := _whole(source)) is not None:
        return _not_empty(whole, source)
    files = _find(source, ROW_SUFFIXES)
    if all(data_suffix(file) == ".parquet" for file in files):
        return _not_empty(Dataset(InMemoryTable(_parquet_table(files))), source)
    skipped: list[str] | None = [] if on_bad == "skip" else None
    rows = [row for _, row in _file_rows(files, skipped)]
    if skipped:
        found = f"left out {len(skipped):,} bad rows beside {len(rows):,} good ones, the first: {skipped[0]}"
        if len(skipped) > len(rows):
            raise BadInput(f"{source}: {found} More bad than good: the file was probably misread.")
        warnings.warn(f"{source}: {found}", stacklevel=2)
    try:
        return Dataset.from_list(rows)
    except _UNLIKE as error:
        number = 1 + bisect.bisect_left(range(1, len(rows)), True, key=lambda n: not _alike(rows[:n]))
        raise BadInput(
            f"{_place(source, number, on_bad)}  differs from the rows before it in the types of a nested value: "
            f"{error}. Make them alike."
        ) from None


_UNLIKE = (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, TypeError, ValueError)


def _alike(rows: list[dict[str, Any]]) -> bool:
    try:
        Dataset.from_list(rows)
    except _UNLIKE:
        return False
    return True


def _file_rows(files: list[Path], skipped: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of data files; a row with other columns or types than those before it is refused."""
    first: dict[str, Any] = {}
    types: dict[str, type] = {}
    for file in files:
        number, before = -1, len(skipped or ())
        for number, (where, row) in enumerate(read_rows(file, skipped)):  # noqa: B007 - the last number is looked at
            first = first or row
            if row.keys() != first.keys():
                found = f"{where}  has the columns {_names(row)}, the rows before it {_names(first)}."
                refuse(f"{found} Give every row the same columns (null where one has no value).", skipped)
            elif other := _other_type(row, types):
                refuse(f"{where}  {other}", skipped)
            else:
                yield where, row
        if number < 0 and len(skipped or ()) == before:
            raise BadInput(f"{file} holds no rows. Remove it or choose another file.")


def _place(source: Source | list[Source], number: int, on_bad: OnBad) -> str:
    """Where the row of that number, from 1, stands: file:line. The files are read again, for a message alone."""
    if _whole(source) is not None:
        return f"row {number}"
    rows = _file_rows(_find(source, ROW_SUFFIXES), [] if on_bad == "skip" else None)
    return next(itertools.islice(rows, number - 1, None))[0]


def load_demonstrations(
    source: Source | list[Source], mapping: Mapping[str, str] | None = None, on_bad: OnBad = "error"
) -> Dataset:
    """Rows of `prompt` and `completion`; see `load_rows` and `lmkit.data.formats.to_prompt_completion`."""
    return _load(to_prompt_completion, source, mapping, on_bad)


def hold_out(rows: Dataset, held_out: Dataset | None, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to learn from and held-out ones: those given, or a random share of the rows; BadInput for a single row."""
    if held_out is not None:
        return rows, held_out
    if len(rows) < 2:
        raise BadInput(
            f"{len(rows)} row: nothing is left to learn from beside what is held out. Give more rows, or --eval_data."
        )
    learnt, held_out = rows.train_test_split(fraction, seed=seed).values()
    return learnt, held_out


def load_pairs(
    source: Source | list[Source], mapping: Mapping[str, str] | None = None, on_bad: OnBad = "error"
) -> Dataset:
    """Rows of `prompt`, `chosen` and `rejected`; see `load_rows` and `lmkit.data.formats.to_preferences`."""
    return _load(to_preferences, source, mapping, on_bad)


def load_prompts(
    source: Source | list[Source], mapping: Mapping[str, str] | None = None, on_bad: OnBad = "error"
) -> Dataset:
    """Rows of `prompt`; see `load_rows` and `lmkit.data.formats.to_prompts`."""
    return _load(to_prompts, source, mapping, on_bad)


def _load(convert: Callable[..., Dataset], source, mapping: Mapping[str, str] | None, on_bad: OnBad) -> Dataset:
    if on_bad not in ("error", "skip"):
        raise BadInput(f'on_bad is {on_bad!r}; wanted "error" or "skip".')
    return convert(load_rows(source, on_bad), mapping, str(source), on_bad, lambda n: _place(source, n, on_bad))


def check_rows(stage: str, config: Any) -> None:
    """Reads the rows that a stage's configuration names, so that a chain refuses them before its first stage starts."""
    readers = {
        "sft": {"data": load_demonstrations, "eval_data": load_demonstrations},
        "preferences": {"data": load_pairs} if getattr(config, "data", None) else {"prompts": load_prompts},
        "ppo": {"prompts": load_prompts, "eval_prompts": load_prompts},
        "evaluation": {"prompts": load_prompts},
    }
    options = {name: getattr(config, name) for name in ("mapping", "on_bad") if hasattr(config, name)}
    for field, read in readers.get(stage, {}).items():
        if (value := getattr(config, field)) is not None:
            read(value, **options)


# ------------------------------------------------------------------------------------------------------ finding


def _find(paths: Source | list[Source], suffixes: tuple[str, ...]) -> list[Path]:
    files: list[Path] = []
    for source in paths if isinstance(paths, list) else [paths]:
        path = Path(source)
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and data_suffix(p) in suffixes and p.name != MANIFEST]
            found = sorted(p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts))
            what = f"has no file that ends in {', '.join(suffixes)} (or .gz, .zst of them)"
        elif any(sign in path.name for sign in "*?[") and not path.exists():
            found, what = sorted(p for p in path.parent.glob(path.name) if p.is_file()), "matches no file"
        else:
            found, what = [path] if path.is_file() else [], "does not exist"
        if not found:
            hint = (
                f" For a dataset of the Hub write hub:{source}."
                if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source))
                else ""
            )
            raise BadInput(f"{source} {what}. Wanted a file, a folder or a pattern; check the path.{hint}")
        files += found
    if not files:
        raise BadInput("The list of sources is empty. Name at least one file, folder or pattern.")
    return files


def _whole(source: Source | list[Source]) -> Dataset | None:
    """What a hub name or a folder of `save_to_disk` holds; None when the source is files."""
    if isinstance(source, str) and source.startswith("hub:"):
        return _from_hub(source)
    return _from_disk(Path(source)) if not isinstance(source, list) and Path(source).is_dir() else None


def _from_disk(folder: Path) -> Dataset | None:
    """What `save_to_disk` wrote; None when the folder holds something else."""
    for sealed in (folder, folder.parent):  # a split of a sealed DatasetDict lies below its manifest
        if (sealed / MANIFEST).is_file():
            verify(sealed)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise BadInput(f"{folder} holds the splits {', '.join(splits)}. Name one, as in {folder / splits[0]}.")
    return datasets.load_from_disk(str(folder)) if (folder / "state.json").is_file() else None


def _from_hub(source: str, streaming: bool = False) -> Dataset | IterableDataset:
    match = re.fullmatch(r"hub:(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@([\w.-]+))?(?::([\w.-]+)(?:\[:(\d+)\])?)?", source)
    if match is None:
        raise BadInput(
            f"{source} is not a hub name. Write hub:org/name, hub:org/name:split or hub:org/name@revision, and "
            "hub:org/name:split[:1000] for its first rows alone."
        )
    name, revision, split, first = match.groups()
    streamed = streaming or first is not None
    try:
        rows = datasets.load_dataset(name, split=split or "train", revision=revision, streaming=streamed)
        if first is not None:
            rows = rows.take(int(first))
            rows = rows if streaming else Dataset.from_list(list(rows))
    except (OSError, ValueError, ConnectionError) as error:
        raise BadInput(f"{source} could not be loaded from the Hub: {error}. Check name, split and network.") from None
    return rows if streaming else _not_empty(rows, source)


def _not_empty(rows: Dataset, source: Any) -> Dataset:
    if len(rows) == 0:
        raise BadInput(f"{source} holds no rows. Choose another source.")
    return rows


# ------------------------------------------------------------------------------------------------------ text


def _documents(files: list[Path], separator: str | None, on_bad: OnBad) -> Iterator[str]:
    for file in files:
        skipped: list[str] | None = [] if on_bad == "skip" else None
        count = 0
        parts = _rows_text(file, skipped) if data_suffix(file) in ROW_SUFFIXES else _split(file, separator, skipped)
        for document in parts:
            if document and not document.isspace():
                count += 1
                yield document
        if skipped:
            warnings.warn(f"{file}: left out {len(skipped)} bad lines, the first: {skipped[0]}", stacklevel=2)
        if count == 0:
            raise BadInput(f"{file} holds no text: it is empty or white space only. Remove it or choose another file.")


def _rows_text(file: Path, skipped: list[str] | None) -> Iterator[str]:
    for where, row in read_rows(file, skipped):
        if isinstance(row.get("text"), str):
            yield row["text"].replace("\r\n", "\n").replace("\r", "\n")
        else:
            refuse(f"{where}  has no text in a column `text`; found the columns {_names(row)}.", skipped)


def _column_text(hub_name: str, streaming: bool) -> Iterator[str]:
    rows = _from_hub(hub_name, streaming)
    columns = rows.column_names or list(next(iter(rows), {}))  # a stream may not know them beforehand
    if "text" not in columns:
        raise BadInput(f"{hub_name} has the columns {', '.join(columns)}; wanted documents in `text`.")
    return (row["text"] for row in rows if row["text"] and not row["text"].isspace())


def _split(file: Path, separator: str | None, skipped: list[str] | None) -> Iterator[str]:
    mark = separator.strip() if separator else None
    gap = len(separator) - 1 if separator and not mark else None
    document: list[str] = []
    num_blank = num_chars = 0
    for number, text in read_lines(file, skipped):
        for line in text.removesuffix("\n").split("\n"):
            stripped = line.strip()
            at_mark = bool(mark) and stripped == mark
            if at_mark or (gap is not None and stripped and num_blank >= gap):
                yield "\n".join(document).strip("\n")
                document, num_chars = [], 0
            num_blank = 0 if stripped else num_blank + 1
            if at_mark:
                continue
            document.append(line)
            num_chars += len(line) + 1
            if num_chars > MAX_DOCUMENT_CHARS:
                raise BadInput(
                    f"{file}:{number}  the document is longer than {MAX_DOCUMENT_CHARS // 2**20} Mi characters. Say "
                    'what divides documents: document_separator "\\n\\n" for blank lines; or split the file.'
                )
    yield "\n".join(document)


def _parquet_table(files: list[Path]) -> pyarrow.Table:
    tables = [open_parquet(file).read() for file in files]
    for file, table in zip(files, tables):
        if table.schema.names != tables[0].schema.names:
            found = f"the columns {', '.join(table.schema.names)}, {files[0]} {', '.join(tables[0].schema.names)}"
            raise BadInput(f"{file} has {found}. Read them as two sources, or give them the same columns.")
    try:
        return pyarrow.concat_tables(tables)
    except pyarrow.ArrowInvalid as error:
        raise BadInput(f"The parquet files from {files[0]} on differ in their types: {error}") from None


def _other_type(row: dict[str, Any], types: dict[str, type]) -> str:
    """What a row's column of another type than `types` has is to be told; else empty, and `types` knows the row's."""
    found = {}
    for name, value in row.items():
        kind = float if isinstance(value, int) and not isinstance(value, bool) else type(value)
        if value is None:
            continue
        if types.get(name, kind) is not kind:
            wanted = types[name].__name__
            return f"column {name} holds a {kind.__name__}, in the rows before a {wanted}. Make them alike."
        found[name] = kind
    types |= found
    return ""


def _names(row: dict[str, Any]) -> str:
    return ", ".join(row) or "(none)"
