"""Results of stages: found by the digest of their inputs, complete or missing, resumable, evicted by size."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.errors import BusyError
from quantize.running.stage_store import StageKey, StageResult, StageStore, stage_key

KEY = StageKey("solve", "a" * 32)


class Stopped(BaseException):
    """A run ends before its time."""


def keep(store: StageStore, key: StageKey, content: bytes = b"states", *, age: int = 0, cache: bool = True) -> Path:
    """Write a result that was last used `age` seconds ago."""
    with store.staging(key) as staged:
        (staged / "states.bin").write_bytes(content)
        result = store.keep(key, staged, {"width": 3}, subject="base", cache=cache)
    stamp = result.directory.stat().st_mtime - age
    os.utime(result.directory, (stamp, stamp))
    return result.directory


def names(store: StageStore) -> list[str]:
    """The directories of a store."""
    return sorted(path.name for path in store.root.iterdir())


def dead_pid() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    return child.pid


def test_every_input_is_in_the_digest() -> None:
    """Another input, or another stage, is another key; the order of inputs does not matter."""
    key = stage_key("tokens", base="b", samples=[[1, 2]])
    assert key == stage_key("tokens", samples=[[1, 2]], base="b")
    others = (stage_key("tokens", base="c", samples=[[1, 2]]), stage_key("tokens", base="b", samples=[[1, 3]]))
    assert len({key, *others, stage_key("solve", base="b", samples=[[1, 2]])}) == 4
    assert str(key).startswith("tokens-")


def test_a_result_is_found_by_its_key(tmp_path: Path) -> None:
    """Facts and files come back as they were kept; the store's own files are not among them."""
    store = StageStore(tmp_path / "stages")
    directory = keep(store, KEY, b"abc")
    found = store.find(KEY)
    assert isinstance(found, StageResult)
    assert (found.directory, found.facts) == (directory, {"width": 3})
    assert [path.name for path in found.files()] == ["states.bin"]
    assert store.find(StageKey("solve", "b" * 32)) is None


@pytest.mark.parametrize(
    "file,content",
    [("states.bin", b"abd"), ("states.bin", b"ab"), ("stage.json", b"{"), ("stage.json", b"[]"), ("states.bin", None)],
)
def test_a_damaged_result_is_missing_and_removed(tmp_path: Path, file: str, content: bytes | None) -> None:
    """A changed byte, a truncated or a missing file: it is computed again."""
    store = StageStore(tmp_path)
    path = keep(store, KEY, b"abc") / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert store.find(KEY) is None
    assert names(store) == []
    keep(store, KEY, b"abc")
    assert store.find(KEY) is not None


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path: Path) -> None:
    """A result appears as a whole or not at all."""
    store = StageStore(tmp_path)
    with pytest.raises(Stopped), store.staging(KEY) as staged:
        (staged / "half").write_bytes(b"half")
        raise Stopped
    assert names(store) == []


def test_two_processes_may_write_the_same_result(tmp_path: Path) -> None:
    """The later one replaces the earlier."""
    store = StageStore(tmp_path)
    with store.staging(KEY) as staged:
        keep(store, StageKey("solve", "b" * 32))
        (staged / "states.bin").write_bytes(b"new")
        store.keep(KEY, staged, {})
    keep(store, KEY, b"newer")
    assert names(store) == [str(KEY), f"solve-{'b' * 32}"]


def test_a_stopped_run_leaves_its_folder_for_the_next(tmp_path: Path) -> None:
    """Layers that are done stay until the stage is complete; an empty folder does not."""
    store = StageStore(tmp_path)
    with pytest.raises(Stopped), store.resumable(KEY):
        raise Stopped
    assert names(store) == []
    with pytest.raises(Stopped), store.resumable(KEY) as folder:
        (folder / "layer-0.json").write_text("[]")
        raise Stopped
    assert store.find(KEY) is None
    with store.resumable(KEY) as folder:
        assert (folder / "layer-0.json").is_file()
        store.keep(KEY, folder, {})
    assert names(store) == [str(KEY)]
    found = store.find(KEY)
    assert found is not None
    assert [path.name for path in found.files()] == ["layer-0.json"]


def test_one_process_at_a_time_works_on_a_resumable_stage(tmp_path: Path) -> None:
    """The second one is told to wait, and takes nothing away."""
    store = StageStore(tmp_path)
    with store.resumable(KEY) as folder:
        with pytest.raises(BusyError, match="another process computes this stage"), store.resumable(KEY):
            pass
        assert folder.is_dir()
        assert store.entries() == []


def test_forgetting_removes_complete_and_unfinished_results(tmp_path: Path) -> None:
    """`--no-resume` starts anew."""
    store = StageStore(tmp_path)
    keep(store, KEY)
    with store.resumable(KEY) as folder:
        (folder / "layer-0.json").write_text("[]")
    store.forget(KEY)
    assert names(store) == []


def test_the_longest_unused_results_are_evicted(tmp_path: Path) -> None:
    """Finding is using; small results go last, the unfinished work of a run not before it is released."""
    store = StageStore(tmp_path)
    large = bytes(17_000_000)
    old, older, used = (StageKey("parent-states", letter * 32) for letter in "abc")
    keep(store, old, large, age=100)
    keep(store, older, large + b"1", age=300)
    keep(store, used, large + b"2", age=900)
    assert store.find(used) is not None
    keep(store, StageKey("tokens", "d" * 32), b"small", age=10_000)
    keep(store, KEY, large + b"3", age=20_000, cache=False)
    assert [entry.path.name for entry in store.excess(40_000_000)] == [str(older)]
    store.release(KEY)
    assert [entry.path.name for entry in store.excess(40_000_000)] == [str(older), str(old)]
    assert str(KEY) in [entry.path.name for entry in store.excess(0)]
    store.trim(20_000_000)
    assert names(store) == [str(KEY), f"tokens-{'d' * 32}"]
    store.trim(0)
    assert names(store) == []


def test_what_dead_processes_left_is_swept(tmp_path: Path) -> None:
    """Not what living ones write, and not what a stopped run can continue."""
    store = StageStore(tmp_path)
    gone = tmp_path / f".{KEY}.{dead_pid()}.partial"
    living = tmp_path / f".{KEY}.{os.getppid()}.partial"
    unfinished = store.resumable_folder(KEY)
    for folder in (gone, living, unfinished):
        folder.mkdir()
    store.sweep()
    assert names(store) == sorted([living.name, unfinished.name])
    (entry,) = store.entries()
    assert (entry.name, entry.unfinished, entry.evictable) == ("solve", True, False)


def test_files_with_another_name_free_nothing(tmp_path: Path) -> None:
    """A sealed variant shares the files of its checkpoint."""
    store = StageStore(tmp_path / "stages")
    directory = keep(store, KEY, bytes(1000))
    (before,) = store.entries()
    os.link(directory / "states.bin", tmp_path / "model.safetensors")
    (after,) = store.entries()
    assert before.bytes - after.bytes == 1000


def test_a_lock_hides_a_stage_in_the_making(tmp_path: Path) -> None:
    """Whatever its age, nobody prunes it."""
    store = StageStore(tmp_path)
    folder = store.resumable_folder(KEY)
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert store.entries() == []
    assert len(store.entries()) == 1
