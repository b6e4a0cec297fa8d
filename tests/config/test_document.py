"""Reading YAML: whatever a parser can return is data or a problem with a place, never another exception."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from config.document import MAX_DEPTH, MAX_VALUES, Document, read_document
from config.errors import Problem, SettingsError
from config.load import load_settings
from config.schema import Settings, Table
from gateway.keys import StoredKey, read_keys

ANY_TMP_PATH = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
SLOW = settings(ANY_TMP_PATH, max_examples=40)  # each reads a long file


def read(folder: Path, content: str | bytes, **environment: str) -> Document:
    """Read a document with these variables in its environment."""
    path = folder / "file.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_document(path, environment)


def told(folder: Path, content: str | bytes) -> list[str]:
    """The problems of a file, without its directory."""
    try:
        found = read(folder, content).problems
    except SettingsError as error:
        found = error.problems
    return [str(problem).removeprefix(f"{folder}/") for problem in found]


@pytest.mark.parametrize(
    "content, data",
    [
        ("a: yes", {"a": "yes"}),
        ("a: true", {"a": "true"}),
        ("a: off", {"a": "off"}),
        ("a: ~", {"a": None}),
        ("a:", {"a": None}),
        ("a: 'null'", {"a": "null"}),
        ("a: 0777", {"a": 777}),
        ("a: 0x10", {"a": "0x10"}),
        ("a: 12:30:45", {"a": "12:30:45"}),
        ("a: -1.5e3", {"a": -1500.0}),
        ("a: 1e3", {"a": 1000.0}),
        ("a: '5'", {"a": "5"}),
        ("a: 2026-02-30", {"a": "2026-02-30"}),
        ("2026-13-45: 1", {"2026-13-45": 1}),
        ("4: x", {"4": "x"}),
        ("no: x", {"no": "x"}),
        ("a: !!str b", {"a": "b"}),
        ("\ufeffa: b", {"a": "b"}),
        ("a: b\r\nc: d\r\n", {"a": "b", "c": "d"}),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("a: &x {b: 1}\ne: {<<: [*x, {b: 2, d: 4}]}", {"a": {"b": 1}, "e": {"b": 1, "d": 4}}),
        ("a: ${env:HOST}:1", {"a": "db:1"}),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
        ("{}", {}),
    ],
)  # fmt: skip
def test_data(tmp_path: Path, content: str, data: object) -> None:
    """Scalars are numbers, nothing or text; keys are text; aliases and merges are replaced by what they name."""
    document = read(tmp_path, content, HOST="db")
    assert (document.data, document.problems) == (data, [])


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "file.yaml:1:1: is empty; restore its content; {} stands for a file that is empty on purpose"),
        ("\n# a comment\n", "file.yaml:1:1: is empty; "),
        ("---\n...\n", "file.yaml:1:1: is empty; "),
        (b"a: b\nc: \xff", "file.yaml:2:1: is not UTF-8 text; save it as UTF-8"),
        ("a: b\nc: \x07", "file.yaml:2:4: is not YAML: it contains the control character #x0007; remove it"),
        ("a:\n\tb: c", "file.yaml:2:1: is not YAML: found character '\\t' that cannot start any token; indent with"),
        ("a: b: c", "file.yaml:1:5: is not YAML: mapping values are not allowed here; put a value that"),
        ("a: 1\n---\nb: 2", "file.yaml:2:1: is not YAML: but found another document; remove the line '---'"),
        ("a: [1}", "file.yaml:1:6: is not YAML: expected ',' or ']', but got '}'; close the bracket opened in line 1"),
        ("a: 'b", "file.yaml:1:6: is not YAML: found unexpected end of stream; close the quote opened in line 1"),
        ("a: *b", "file.yaml:1:4: is not YAML: found undefined alias 'b'; define the anchor with & before it"),
        (
            'a: "\\UFFFFFFFF"',
            "file.yaml:1:5: is not YAML: it has an escape that is not a character; check the \\U escapes",
        ),
        ('a: "\\ud800"', "file.yaml:1:1: a: contains \\ud800, which is not text; remove it"),
        ('a: "x\\0"', "file.yaml:1:1: a: contains \\x00, which is not text; remove it"),
        ("a: !include b", "file.yaml:1:1: a: the tag !include is not supported; remove it"),
        ("a: !!python/object:os.system b", "file.yaml:1:1: a: the tag !!python/object:os.system is not supported"),
        ("a: !!set {b}", "file.yaml:1:1: a: the tag !!set is not supported; remove it"),
        ("a: 1\na: 2", "file.yaml:2:1: a: is a duplicate key; keep one"),
        ("? [a]\n: b", "file.yaml:1:3: a key is not a name; write 'name: value'"),
        ("?\n: b", "file.yaml:1:2: a key is not a name; write 'name: value'"),
        ("a: {<<: b}", "file.yaml:1:5: a.<<: must name a mapping; write <<: *NAME, with &NAME at the mapping"),
        ("x: &a [*a]", "file.yaml:1:4: x.0: contains itself through an alias; remove the alias"),
        ("x: &a {b: *a}", "file.yaml:1:4: x.b: contains itself through an alias; remove the alias"),
        ("x: &a {<<: *a}", "file.yaml:1:4: x: contains itself through an alias; remove the alias"),
        ("[" * 50 + "]" * 50, f"is nested too deeply; use at most {MAX_DEPTH} levels"),
        ("[" * 2000, f"is nested too deeply; use at most {MAX_DEPTH} levels"),
        ("a: ${env:NOWHERE}", "file.yaml:1:1: a: the environment variable NOWHERE is not set; export NOWHERE=..."),
        ("a: ${HOME}/x", "file.yaml:1:1: a: ${HOME} is not replaced; write ${env:HOME} for an environment variable"),
        ("a: ${env:A-B}", "file.yaml:1:1: a: ${env:A-B} is not replaced; write ${env:NAME} for an environment"),
    ],
)
def test_problems(tmp_path: Path, content: str | bytes, problem: str) -> None:
    """A problem has its place, and says what to do."""
    (only,) = told(tmp_path, content)
    assert problem in only
    assert "; " in only


def test_aliases_are_bounded(tmp_path: Path) -> None:
    """Aliases of aliases can't exhaust the memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (only,) = told(tmp_path, "\n".join(lines))
    assert f"has more than {MAX_VALUES} values; use fewer aliases" in only


def test_a_value_from_the_environment_must_be_text(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 get into the environment, but not into a header."""
    (problem,) = read(tmp_path, "a: ${env:KEY}", KEY="\udcff").problems
    assert "which is not text" in str(problem)


# What a YAML writer makes, and what an editor, a full disk or an attacker makes of it.
TABLES_OF_THE_SCHEMA = [*(table.model_fields for table in Table.__subclasses__()), StoredKey.model_fields]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.dates(),
    st.text(max_size=20),
    st.binary(max_size=8),
    st.sampled_from(["yes", "~", "<<", "2026-02-30", "${HOME}", "${env:X}", "*a", "&a", "!x", "1_000", "0o7", "1:2"]),
)
NAMES = st.one_of(
    st.sampled_from(sorted({*Settings.model_fields, *(name for table in TABLES_OF_THE_SCHEMA for name in table), "a"})),
    SCALARS,
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=25
)
TABLES = st.dictionaries(NAMES, TREES, max_size=5)
YAML_TEXTS = st.text("{}[]:,-?&*!|>%@`'\"#~<.\\ \n\t01ab$\x07\x85\u2028\ud800", max_size=40)


def problems(reading: Callable[[], object]) -> list[Problem]:
    """The problems that reading a file finds; none if it is valid."""
    try:
        reading()
    except SettingsError as error:
        return error.problems
    return []


def without_traceback(path: Path) -> None:
    """Read a file as a configuration and as keys: it is valid, or its problems are in the words of YAML."""
    content = path.read_bytes().decode(errors="replace")
    # What the file itself says is quoted.
    foreign = [word for word in ("Input should", "valid dictionary", "None", "Traceback") if word not in content]
    for reading in (lambda: load_settings(path, {}), lambda: read_keys(path)):
        for problem in problems(reading):
            line = str(problem)
            assert line.isprintable(), line
            assert not any(word in line for word in foreign), line
            assert problem.hint, line


@ANY_TMP_PATH
@given(st.one_of(TREES, TABLES))
def test_nothing_that_yaml_can_say_is_a_traceback(tmp_path: Path, tree: Any) -> None:
    """Any tree that a YAML writer writes is read, or refused with a place, a problem and a remedy."""
    path = tmp_path / "file.yaml"
    path.write_text(yaml.dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    without_traceback(path)


@ANY_TMP_PATH
@given(YAML_TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=30))
@example(b'a: "\\UFFFFFFFF"')
@example(b"&a ? *a : *a")
def test_nothing_that_a_file_can_hold_is_a_traceback(tmp_path: Path, content: bytes) -> None:
    """Any bytes are read, or refused with a problem and a remedy."""
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    without_traceback(path)


EXAMPLE = Path(__file__).parents[2] / "config" / "example.yaml"


def places(tree: Any, *path: Any) -> list[tuple[Any, ...]]:
    """The path of every value in a tree."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for name, value in entries for place in places(value, *path, name))]


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A tree with another value at a path."""
    if not path:
        return value
    changed = tree.copy()
    changed[path[0]] = replaced(tree[path[0]], path[1:], value)
    return changed


HOSTS = st.sampled_from(["[", "[::1", "http://[::1", "http://[", "unix:///a[b", "postgresql://[::1", "~x/y"])


@cache
def example_tree() -> Any:
    """The data of the shipped example, without references to the environment."""
    return yaml.safe_load(EXAMPLE.read_text().replace("${env:", "${").replace("${", ""))


@ANY_TMP_PATH
@given(st.data())
def test_no_value_of_an_option_is_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever stands in the place of a value of the shipped example is valid, or refused with a remedy."""
    tree = example_tree()
    place = data.draw(st.sampled_from(places(tree)))
    path = tmp_path / "file.yaml"
    # The table of the value alone: long files take long to read.
    changed = replaced({name: tree[name] for name in place[:1]}, place, data.draw(SCALARS | HOSTS | TREES))
    path.write_text(yaml.dump(changed, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    without_traceback(path)


@SLOW
@given(st.data())
def test_no_truncated_file_is_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    """The shipped example, cut off anywhere, is read or refused."""
    whole = EXAMPLE.read_bytes()
    path = tmp_path / "file.yaml"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    without_traceback(path)
