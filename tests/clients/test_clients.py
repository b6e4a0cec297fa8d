"""Clients that install in seconds, and the table of all of them."""

import asyncio
from pathlib import Path

import pytest

from tests.clients.client import read_client, read_clients
from tests.clients.environment import Environment, last_words
from tests.clients.results import HEADER, README, read_results, table
from tests.clients.server import MODEL, serving

CLIENTS = read_clients()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name, client in CLIENTS.items() if client.in_ci])
async def test_a_client(name: str) -> None:
    """The client does what its program says, in the environment that `deploy/install.py test` made for it."""
    environment = Environment.of(CLIENTS[name])
    if not environment.installed:
        pytest.skip(f"{name} is not installed; python -m tests.clients --install-ci does it")
    async with serving() as fleet:
        outcome = await asyncio.to_thread(environment.run, fleet.url, MODEL)
    assert outcome.failure is None


def test_the_table_of_the_readme() -> None:
    """gateway/README.md has the outcomes of the latest runs; `python -m tests.clients --write` puts them there."""
    outcomes = read_results()
    assert set(outcomes) <= set(CLIENTS)
    assert table(outcomes, CLIENTS) in README.read_text()


def test_every_client_was_run() -> None:
    """There is an outcome for each program, and the table begins as the README's does."""
    assert set(read_results()) == set(CLIENTS)
    assert HEADER in README.read_text()


def test_a_program_without_a_head(tmp_path: Path) -> None:
    """A program has to say what it needs and what it does."""
    path = tmp_path / "some_client.py"
    path.write_text("# pip: some-client[extra]==1.2 other\n# title: Some\n")
    with pytest.raises(ValueError, match=r"some_client.py: no runs in its first lines"):
        read_client(path)
    path.write_text(path.read_text() + "# runs: a chat\n")
    client = read_client(path)
    assert (client.name, client.package, client.installer, client.in_ci) == ("some-client", "some-client", "pip", False)


def test_the_last_words() -> None:
    """What a failed client said last is kept, within bounds."""
    assert last_words("one\ntwo\n\n") == "two"
    assert last_words("") == "no output"
    assert len(last_words("x" * 1000)) == 200
