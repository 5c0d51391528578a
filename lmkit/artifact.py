"""Sealed folders: an artifact becomes visible whole, by one rename, and carries a manifest that proves it unchanged."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lmkit.errors import BadInput, CorruptInput

MANIFEST = "MANIFEST.json"
# Beside the bytes of a save: manifest, directories, a line of a log.
SPARE_BYTES = 1 << 20
# A larger file may be read in a thread while other work goes on; on one core it takes about 10 ms.
READ_AT_ONCE = 1 << 24
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors (Rust) and torch (C++) hide the error number in a text, torch even the reason.
_FULL_TEXTS = ("No space left on device", "os error 28", "File too large", "os error 27", "unexpected pos")


@contextlib.contextmanager
def seal(target: Path, num_bytes: int = 0) -> Iterator[Path]:
    """Yields an empty staging folder that becomes `target`, whole, when the block ends without an exception.

    Files are made readable (0644), flushed to the disk and listed in MANIFEST.json with size and sha256; links and
    special files are refused. An existing `target` is moved aside before the rename and deleted after it. Waits for
    `check_inputs`: nothing is made from a damaged input.

    num_bytes: about how much will be written. Where less is free, or the disk fills up in the middle, this raises
    OSError (ENOSPC) that names `target`, and leaves everything as it was.
    """
    check_inputs()
    target = Path(target)
    staging, replaced = (target.with_name(f".{kind}-{target.name}") for kind in ("staging", "replaced"))
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (staging, replaced):
        remove(leftover)
    wanted, free = num_bytes + SPARE_BYTES, shutil.disk_usage(target.parent).free
    if free < wanted:
        raise OSError(errno.ENOSPC, f"{wanted / 1e6:,.1f} MB wanted, {free / 1e6:,.1f} MB free", str(target))
    staging.mkdir()
    try:
        yield staging
        _write_manifest(staging)
    except BaseException as error:
        remove(staging)  # frees the space when the disk was full
        if is_out_of_space(error):
            raise OSError(errno.ENOSPC, "the disk filled up while it was written", str(target)) from error
        raise
    if target.exists():
        target.rename(replaced)
    staging.rename(target)
    _sync(target.parent)
    remove(replaced)


def is_out_of_space(error: BaseException) -> bool:
    """Whether an exception, or one behind it, says that a disk, a quota or a limit on file sizes is exhausted."""
    seen = error
    while seen is not None:
        if getattr(seen, "errno", None) in _FULL or any(text in str(seen) for text in _FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def remove(path: Path) -> None:
    """Deletes a file, a link (never what it points to) or a folder with all in it, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())


def _write_manifest(folder: Path) -> None:
    files = {}
    for path in _files(folder):
        if path.is_symlink() or not stat.S_ISREG(path.stat().st_mode):
            raise BadInput(f"{path} is a link or a special file; an artifact holds plain files only.")
        path.chmod(0o644)
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, {"files": files, "id": _manifest_id(files)})
    for directory in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        directory.chmod(0o755)
        _sync(directory)


def _manifest_id(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that `path` holds either the old text or all of the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)  # a link that lies in wait there is not written through
    try:
        temporary.write_text(_json(value), encoding="utf-8")
        _sync(temporary)
    except OSError:
        remove(temporary)
        raise
    temporary.replace(path)
    _sync(path.parent)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"


def sha256(path: Path) -> str:
    # In large pieces: between two of them a thread waits for its turn, up to 5 ms while others compute in Python.
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(1 << 22, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def verify(folder: Path, meanwhile: bool = False) -> str:
    """The manifest id of a sealed folder, after checking every file; CorruptInput names the first that differs.

    meanwhile: the bytes of files over READ_AT_ONCE are compared in a thread; `check_inputs` waits for it.
    """
    folder = Path(folder)
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        listed, found_id = manifest["files"], manifest["id"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CorruptInput(f"{folder} is not a finished artifact: {MANIFEST} is missing or unreadable.") from None
    if found_id != _manifest_id(listed) or text != _json(manifest) or (folder / MANIFEST).is_symlink():
        raise CorruptInput(f"{folder / MANIFEST} was edited: it is not what sealing wrote.")
    present = {p.relative_to(folder).as_posix() for p in _files(folder)} - {MANIFEST}
    for name in sorted(present ^ set(listed)):
        raise CorruptInput(f"{folder / name} is {'not in the manifest' if name in present else 'missing'}.")
    for name, entry in listed.items():
        if (folder / name).is_symlink() or (folder / name).stat().st_size != entry["size"]:
            raise _damaged(folder / name)
    at_once, large = {}, {}
    for name, entry in listed.items():
        (large if meanwhile and entry["size"] > READ_AT_ONCE else at_once)[folder / name] = entry["sha256"]
    _compare(at_once)
    if large:
        _compare_in_a_thread(large)
    return found_id


def _damaged(path: Path) -> CorruptInput:
    return CorruptInput(f"{path} is damaged: it is not the file the manifest lists.")


def _compare(sums: Mapping[Path, str]) -> None:
    for path, wanted in sums.items():
        if sha256(path) != wanted:
            raise _damaged(path)


_comparisons: list[Future] = []


def _compare_in_a_thread(sums: Mapping[Path, str]) -> None:
    done: Future = Future()
    _comparisons.append(done)

    def work() -> None:
        try:
            done.set_result(_compare(sums))
        except BaseException as error:
            done.set_exception(error)

    # A daemon: a process that ends for another reason does not read on.
    threading.Thread(target=work, name="comparison", daemon=True).start()


def check_inputs() -> None:
    """Waits for all that this process compares in threads; CorruptInput when a file is not what its manifest lists."""
    while _comparisons:
        _comparisons.pop(0).result()


def require(source: str | Path | list, name: str = "") -> list[Path]:
    """The existing files and folders a source names, globs expanded; none for `module:function` or `hub:...`.

    A missing local path is BadInput that begins with `name`, never a request to a hub.
    """
    if isinstance(source, list):
        return [path for one in source for path in require(one, name)]
    path = Path(source)
    matches = sorted(path.parent.glob(path.name)) if "*" in path.name else [path] * path.exists()
    if not matches and ":" not in str(source):
        what = f"{name}: {source}" if name else str(source)
        raise BadInput(
            f"{what} does not exist. Wanted a file or folder: check the path, or run the stage that makes it."
        )
    return matches


def content_id(source: str | Path | list, name: str = "", meanwhile: bool = False) -> str:
    """What identifies an input: a sealed folder's manifest id, else the sha256 of a file or of all files of a folder.

    A text that is not a path but names code or a hub revision (`module:function`, `hub:org/name@commit`) stands for
    itself. meanwhile: as in `verify`.
    """
    paths = require(source, name)
    if not paths:
        return str(source)
    if isinstance(source, list) or "*" in Path(source).name:
        several = source if isinstance(source, list) else paths
        return hashlib.sha256("".join(content_id(one, meanwhile=meanwhile) for one in several).encode()).hexdigest()
    path = paths[0]
    if path.is_file():
        return sha256(path)
    if (path / MANIFEST).is_file():
        return verify(path, meanwhile)
    return _manifest_id({p.relative_to(path).as_posix(): sha256(p) for p in _files(path) if p.is_file()})
