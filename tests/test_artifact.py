import errno
import hashlib
import json
import os

import pytest

from lmkit.artifact import MANIFEST, check_inputs, content_id, is_out_of_space, seal, sha256, verify, write_json
from lmkit.errors import BadInput, CorruptInput


@pytest.fixture
def sealed(tmp_path):
    with seal(tmp_path / "model") as folder:
        (folder / "sub").mkdir()
        (folder / "a.bin").write_bytes(b"weights" * 100)
        (folder / "sub" / "b.txt").write_text("text")
        (folder / "empty").write_bytes(b"")
    return tmp_path / "model"


def test_sealing_gives_a_manifest_without_time_host_or_path(sealed, tmp_path):
    manifest = json.loads((sealed / MANIFEST).read_text())
    assert set(manifest) == {"files", "id"}
    assert set(manifest["files"]) == {"a.bin", "sub/b.txt", "empty"}
    moved = tmp_path / "elsewhere"
    sealed.rename(moved)
    assert verify(moved) == manifest["id"]
    assert oct((moved / "a.bin").stat().st_mode & 0o777) == "0o644"


def test_a_block_that_fails_leaves_nothing_and_keeps_the_old_one(sealed):
    before = verify(sealed)
    with pytest.raises(RuntimeError), seal(sealed) as folder:  # noqa: PT012 - the block is what is tested
        (folder / "a.bin").write_bytes(b"half")
        raise RuntimeError
    assert verify(sealed) == before
    assert [p.name for p in sealed.parent.iterdir()] == ["model"]


def test_resealing_replaces_the_whole_folder(sealed):
    with seal(sealed) as folder:
        (folder / "c.txt").write_text("new")
    verify(sealed)
    assert {p.name for p in sealed.iterdir()} == {"c.txt", MANIFEST}


def damage_missing(folder):
    (folder / "a.bin").unlink()


def damage_empty(folder):
    (folder / "a.bin").write_bytes(b"")


def damage_truncated(folder):
    (folder / "a.bin").write_bytes(b"weights" * 50)


def damage_flipped(folder):
    data = bytearray((folder / "a.bin").read_bytes())
    data[350] ^= 1
    (folder / "a.bin").write_bytes(data)


def damage_extra(folder):
    (folder / "sub" / "more.txt").write_text("x")


def damage_link(folder):
    (folder / "a.bin").rename(folder.parent / "a.bin")
    (folder / "a.bin").symlink_to(folder.parent / "a.bin")


def damage_manifest(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"size": 4', '"size": 5'))


def damage_manifest_layout(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + "\n")


def damage_manifest_link(folder):
    (folder / MANIFEST).rename(folder.parent / MANIFEST)
    (folder / MANIFEST).symlink_to(folder.parent / MANIFEST)


def damage_no_manifest(folder):
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize("damage", [v for k, v in list(globals().items()) if k.startswith("damage_")])
def test_damage_is_found_and_the_file_named(sealed, damage):
    damage(sealed)
    with pytest.raises(CorruptInput, match=r"a\.bin|more\.txt|MANIFEST"):
        verify(sealed)


def test_links_are_refused(tmp_path):
    with pytest.raises(BadInput, match="link"), seal(tmp_path / "x") as folder:
        os.symlink("/etc/hostname", folder / "a")


def test_content_id_of_files_folders_globs_and_names(sealed, tmp_path):
    assert content_id(sealed) == verify(sealed)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.txt").write_text("one")
    before = content_id(tmp_path / "d")
    assert content_id(tmp_path / "d" / "*.txt") == content_id([tmp_path / "d" / "1.txt"])
    (tmp_path / "d" / "1.txt").write_text("two")
    assert content_id(tmp_path / "d") != before
    assert content_id("package.module:function") == "package.module:function"
    ids = {
        content_id([sealed, name]) for name in ("package.module:one", "package.module:two", "http://localhost/score")
    }
    assert len(ids) == 3
    with pytest.raises(BadInput, match=r"nowhere does not exist"):
        content_id(tmp_path / "nowhere")


def test_without_space_nothing_is_begun_and_the_old_one_stays(sealed):
    before = verify(sealed)
    with pytest.raises(OSError, match=r"MB wanted, .* MB free") as caught, seal(sealed, 10**18):
        pass
    assert is_out_of_space(caught.value)
    assert caught.value.filename == str(sealed)
    assert verify(sealed) == before
    assert [p.name for p in sealed.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 61312 vs 61200"),
    ],
)
def test_a_disk_that_fills_up_is_told_with_the_folder(sealed, error):
    with pytest.raises(OSError, match="filled up") as caught, seal(sealed):
        raise error
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(sealed))
    assert not is_out_of_space(ValueError("what else can go wrong"))


def test_links_that_lie_in_wait_are_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "precious")
    (tmp_path / ".staging-m").symlink_to(tmp_path)
    write_json(tmp_path / "a.json", 1)
    with seal(tmp_path / "m") as folder:
        (folder / "w").touch()
    assert (tmp_path / "precious").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "m", "precious"]


def flip_unseen(path):
    """Another byte, the same size and time of change."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=times)


@pytest.fixture
def all_files_are_large(monkeypatch):
    monkeypatch.setattr("lmkit.artifact.READ_AT_ONCE", 0)


@pytest.mark.usefixtures("all_files_are_large")
def test_nothing_is_sealed_before_large_inputs_are_compared(sealed, tmp_path):
    whole = verify(sealed)
    assert content_id(sealed, meanwhile=True) == whole
    check_inputs()
    flip_unseen(sealed / "a.bin")
    assert verify(sealed, meanwhile=True) == whole
    with pytest.raises(CorruptInput, match=r"a\.bin is damaged: it is not the file"), seal(tmp_path / "made"):
        pytest.fail("the block was entered")
    assert not (tmp_path / "made").exists()
    with seal(tmp_path / "made"):
        pass  # said once


@pytest.mark.usefixtures("all_files_are_large")
@pytest.mark.parametrize("damage", [damage_missing, damage_empty, damage_truncated])
def test_what_needs_no_reading_is_seen_at_once(sealed, damage):
    damage(sealed)
    with pytest.raises(CorruptInput, match=r"a\.bin is (missing|damaged)"):
        verify(sealed, meanwhile=True)


def test_a_file_is_hashed_in_pieces(tmp_path):
    path = tmp_path / "large"
    for size in (0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 5):
        path.write_bytes(os.urandom(size))
        assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
