"""The parent's words on disk: found again, never wrong, never too many."""

import os
from pathlib import Path

import pytest

from quantize.evaluation.parent_cache import ParentCache, ParentCacheEntry, entry_key, roomiest, states_file


def keep(cache: ParentCache, key: str, states: bytes = b"states", age_seconds: int = 0) -> ParentCacheEntry:
    """Write an entry, last used so long ago."""
    with cache.staging(key) as staged:
        states_file(staged).write_bytes(states)
        entry = cache.keep(key, staged, {"width": 3})
    stamp = entry.directory.stat().st_mtime - age_seconds
    os.utime(entry.directory, (stamp, stamp))
    return entry


def test_an_entry_is_found_by_its_key(tmp_path: Path) -> None:
    """Facts and states come back as they were kept."""
    cache = ParentCache(tmp_path)
    keep(cache, "states-1", b"abc")
    found = cache.find("states-1")
    assert found is not None
    assert (found.facts, found.states.read_bytes()) == ({"width": 3}, b"abc")
    assert cache.find("states-2") is None


@pytest.mark.parametrize(
    "file,content",
    [("states.bin", b"abd"), ("states.bin", b"ab"), ("entry.json", b"{"), ("entry.json", b"[]"), ("states.bin", None)],
)
def test_a_damaged_entry_is_a_miss_and_goes(tmp_path: Path, file: str, content: bytes | None) -> None:
    """A changed byte, a cut file or a missing one: the entry is removed, and can be written anew."""
    cache = ParentCache(tmp_path)
    entry = keep(cache, "states-1", b"abc")
    path = entry.directory / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert cache.find("states-1") is None
    assert not entry.directory.exists()
    keep(cache, "states-1", b"abc")
    assert cache.find("states-1") is not None


def test_an_entry_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """What fails while it is written leaves nothing behind."""
    cache = ParentCache(tmp_path)
    with pytest.raises(RuntimeError), cache.staging("states-1") as staged:
        states_file(staged).write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_writing_an_entry_twice_keeps_one(tmp_path: Path) -> None:
    """Two evaluations that both missed don't disturb each other."""
    cache = ParentCache(tmp_path)
    with cache.staging("states-1") as staged:
        keep(cache, "states-2")
        states_file(staged).write_bytes(b"new")
        cache.keep("states-1", staged, {})
    keep(cache, "states-1", b"newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["states-1", "states-2"]


def test_old_entries_make_room(tmp_path: Path) -> None:
    """Longest unused goes first, the newest stays even if it is too large alone."""
    cache = ParentCache(tmp_path, limit_bytes=1000)
    keep(cache, "a", b"0" * 300, age_seconds=100)
    keep(cache, "b", b"0" * 300, age_seconds=300)
    assert cache.find("b") is not None  # used again just now
    keep(cache, "c", b"0" * 300, age_seconds=50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    keep(cache, "d", b"0" * 5000)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_what_a_dead_process_staged_makes_room_too(tmp_path: Path) -> None:
    """Half-written entries of this process are left alone, those of a process that is gone are not."""
    cache = ParentCache(tmp_path, limit_bytes=400)
    living = tmp_path / f".x.{os.getpid()}.partial"
    dead = tmp_path / ".x.99999999.partial"
    for path in (living, dead):
        path.mkdir()
        (path / "states.bin").write_bytes(b"0" * 500)
    keep(cache, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "a"]


def test_everything_that_decides_is_in_the_name() -> None:
    """Another base, engine or token is another entry."""
    key = entry_key("states", base="b", samples=[[1, 2]])
    assert key == entry_key("states", samples=[[1, 2]], base="b")
    assert (
        len({key, entry_key("states", base="c", samples=[[1, 2]]), entry_key("states", base="b", samples=[[1, 3]])})
        == 3
    )


@pytest.mark.parametrize("needed_bytes,expected", [(1, "home"), (10**18, "scratch")])
def test_without_room_the_scratch_folder_serves(tmp_path: Path, needed_bytes: int, expected: str) -> None:
    """A full home directory costs the next evaluation time, not this one its figures."""
    assert roomiest(tmp_path / "home", tmp_path / "scratch", needed_bytes) == tmp_path / expected


def test_a_closed_home_directory_is_no_error(tmp_path: Path) -> None:
    """Where nothing can be written the scratch folder serves."""
    (tmp_path / "file").write_text("")
    assert roomiest(tmp_path / "file" / "home", tmp_path / "scratch", 1) == tmp_path / "scratch"
