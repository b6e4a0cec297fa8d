"""References in a configuration: environment variables, and secret files."""

from pathlib import Path

import pytest

from config.references import other_references, replace_references


def replaced(text: str, **environment: str) -> tuple[str, list[str]]:
    """Replace the references of a text; returns it with the problems."""
    problems: list[str] = []
    return replace_references(text, environment, lambda what, hint: problems.append(f"{what}; {hint}")), problems


@pytest.mark.parametrize("content", ["s3cret", "s3cret\n", "s3cret\r\n"])
def test_a_credential_is_the_content_of_its_file(tmp_path: Path, content: str) -> None:
    """Without the newline at its end, which editors add."""
    (tmp_path / "db.password").write_bytes(content.encode())
    text = "postgresql://user:${credential:db.password}@${env:HOST}/x"
    expected = "postgresql://user:s3cret@db/x"
    assert replaced(text, CREDENTIALS_DIRECTORY=str(tmp_path), HOST="db") == (expected, [])


def test_a_credential_is_not_searched_for_references(tmp_path: Path) -> None:
    """A password may look like a reference."""
    (tmp_path / "key").write_text("${env:HOME}")
    assert replaced("${credential:key}", CREDENTIALS_DIRECTORY=str(tmp_path), HOME="/root") == ("${env:HOME}", [])


def test_a_credential_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    """The message has the path, and what to do."""
    (tmp_path / "binary").write_bytes(b"\xff")
    directory = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    missing = f"the credential key can't be read: {tmp_path}/key: No such file or directory; create the file"
    assert replaced("${credential:key}", **directory) == ("", [missing])
    binary = f"the credential binary can't be read: {tmp_path}/binary is not UTF-8 text; save it as UTF-8"
    assert replaced("${credential:binary}", **directory) == ("", [binary])
    (tmp_path / "none").write_text("\n")
    empty = f"the credential none is empty: {tmp_path}/none; write the secret into the file"
    assert replaced("${credential:none}", **directory) == ("", [empty])
    unset = "the credential key can't be read: CREDENTIALS_DIRECTORY is not set; "
    assert replaced("${credential:key}") == (
        "",
        [unset + "set CREDENTIALS_DIRECTORY to the directory of the secret files"],
    )


@pytest.mark.parametrize("text", ["${credential:../key}", "${credential:}", "${env:A-B}", "${HOME}", "${credential"])
def test_what_looks_like_a_reference_is_found(text: str) -> None:
    """A credential has a name, not a path."""
    assert other_references(text) == [text]
    assert replaced(text) == (text, [])
