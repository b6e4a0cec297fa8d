"""A replica's log that grows too long."""

import subprocess
import sys
from pathlib import Path

import pytest

from config.schema import LogSettings
from serving.log_file import LogFile


def grown(folder: Path, text: str, keep: int = 2) -> LogFile:
    """A log with some text in it."""
    path = folder / "int4-1.log"
    path.write_text(text)
    return LogFile(path, LogSettings(rotate_bytes=10, keep=keep))


def aside(folder: Path) -> dict[str, str]:
    """What was set aside, by name."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "int4-1.log"}


def test_a_short_log_stays(tmp_path: Path) -> None:
    """Nothing happens before it is longer than it may be, nor where there is none."""
    assert not grown(tmp_path, "0123456789").rotate()
    assert not LogFile(tmp_path / "none.log", LogSettings()).rotate()
    assert aside(tmp_path) == {}


def test_long_logs_are_set_aside(tmp_path: Path) -> None:
    """The newest is .1, and no more than wanted are kept."""
    for text in ("first log, long", "second log, long", "third log, long"):
        assert grown(tmp_path, text).rotate()
        assert (tmp_path / "int4-1.log").read_text() == ""
    assert aside(tmp_path) == {"int4-1.log.1": "third log, long", "int4-1.log.2": "second log, long"}


def test_none_is_kept(tmp_path: Path) -> None:
    """Then it is only cut."""
    assert grown(tmp_path, "a long log of a replica", keep=0).rotate()
    assert aside(tmp_path) == {}


def test_who_writes_goes_on_at_the_beginning(tmp_path: Path) -> None:
    """A process that holds it open for appending writes behind what is there now, not behind what was."""
    log = grown(tmp_path, "")
    program = "import sys\nfor line in sys.stdin: sys.stdout.write(line); sys.stdout.flush()"
    with log.path.open("ab") as output:
        writer = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=output, text=True)
    with writer:
        assert writer.stdin
        log.path.write_text("x" * 100)
        assert log.rotate()
        writer.stdin.write("after\n")
    assert log.path.read_text() == "after\n"


def test_without_room_for_the_copy_it_is_cut_all_the_same(tmp_path: Path) -> None:
    """A log that can't be set aside must not fill the disk."""
    log = grown(tmp_path, "a long log of a replica")
    (tmp_path / "int4-1.log.draft").mkdir()
    with pytest.raises(OSError, match="draft"):
        log.rotate()
    assert log.path.read_text() == ""
