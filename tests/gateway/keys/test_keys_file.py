"""How a keys file is written: whole or not at all, and by whom it can be read."""

import os
import resource
import signal
import stat
from pathlib import Path

import pytest

from config.errors import ConfigError
from gateway.keys import KeyFile
from gateway.keys.issuing import create_key


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """One line says why."""
    with pytest.raises(ConfigError, match=r"nowhere/keys\.yaml: can't be written: No such file or directory"):
        create_key(KeyFile(tmp_path / "nowhere" / "keys.yaml"), "alice")


def test_a_write_that_fails(tmp_path: Path) -> None:
    """What was there stays, and no draft is left."""
    path = tmp_path / "keys.yaml"
    path.mkdir()
    with pytest.raises(ConfigError, match="keys can't be read: Is a directory"):
        create_key(KeyFile(path), "alice")
    path.rmdir()
    create_key(KeyFile(path), "alice")
    before = path.read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))
    try:
        with pytest.raises(ConfigError, match="can't be written: File too large"):
            create_key(KeyFile(path), "bob")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_text() == before
    assert {each.name for each in tmp_path.iterdir()} == {"keys.yaml", ".keys.yaml.lock"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_file_stays_its_owners(tmp_path: Path) -> None:
    """What root changes, the gateway that owns the file still reads."""
    path = tmp_path / "keys.yaml"
    create_key(KeyFile(path), "alice")
    os.chown(path, 12345, 12346)
    create_key(KeyFile(path), "bob")
    now = path.stat()
    assert (now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)) == (12345, 12346, 0o600)


def test_the_mode_of_a_new_file_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    """Even where everything is open by default, keys aren't."""
    before = os.umask(0)
    try:
        create_key(KeyFile(tmp_path / "keys.yaml"), "alice")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()} == {0o600}
