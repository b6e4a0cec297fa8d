"""API keys in the state database: changes, their revision, and writers at the same time."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.state.database import StateDatabase
from serving.state.keys import KeyRecords, KeyTable


def test_a_database_without_tables_is_not_created(state: str) -> None:
    """A reader that must not create them finds no keys."""
    database = StateDatabase.at(state, create=False)
    assert KeyTable(database).read() == KeyRecords("", 0, {})
    assert KeyTable(database).revision() == ("", 0)
    database.close()


def test_each_change_counts(state: str) -> None:
    """What a block adds, changes and removes is one revision; after an error nothing has changed."""
    database = StateDatabase.at(state)
    table = KeyTable(database)
    with table.edited() as documents:
        documents.update(alice="1", bob="2")
    first = table.read()
    assert (first.revision, first.documents) == (1, {"alice": "1", "bob": "2"})
    with table.edited() as documents:
        documents.update(alice="3", carol="4")
        del documents["bob"]
    assert table.revision() == (first.epoch, 2)
    assert table.read().documents == {"alice": "3", "carol": "4"}
    with pytest.raises(ZeroDivisionError), table.edited() as documents:
        documents.clear()
        raise ZeroDivisionError
    assert table.read() == KeyRecords(first.epoch, 2, {"alice": "3", "carol": "4"})
    database.close()


def _add(state: str, number: int) -> None:
    database = StateDatabase.at(state)
    with KeyTable(database).edited() as documents:
        documents[f"key-{number}"] = str(len(documents))
    database.close()


def test_writers_at_the_same_time(state: str) -> None:
    """Each sees what those before it have written."""
    database = StateDatabase.at(state)
    database.heartbeat()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: _add(state, number), range(16)))
    records = KeyTable(database).read()
    assert records.revision == 16
    assert sorted(map(int, records.documents.values())) == list(range(16))
    database.close()
