"""Calibration text: every broken line is told, and evaluation text is never calibrated on."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.calibration import Row, contents_digest, draw, is_held_out, parse_line, read_sources, shipped_files
from quantize.errors import CalibrationError
from tests.quantize.chats import chat, write_chats, write_lines

GOOD = json.dumps(chat(1))


def problems_of(path: Path) -> list[str]:
    """The problems of a file, without its folder."""
    with pytest.raises(CalibrationError) as caught:
        read_sources([path])
    return [problem.replace(f"{path}", "f") for problem in caught.value.problems]


def rows(count: int) -> list[Row]:
    """Rows with different contents."""
    parsed = [parse_line(json.dumps(chat(number)), f"f:{number}") for number in range(count)]
    return [row for row in parsed if isinstance(row, Row)]


@pytest.mark.parametrize(
    "line,problem",
    [
        ("{", "f:2: not JSON: Expecting property name"),
        ("[]", 'f:2: has no "messages"; a line is {"messages"'),
        ('{"text": "a"}', 'f:2: has no "messages"'),
        ('{"messages": []}', 'f:2: "messages" is empty or no list'),
        ('{"messages": {}}', 'f:2: "messages" is empty or no list'),
        ('{"messages": ["a"]}', "f:2: message 1: is no object"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "f:2: message 1: role 'bot' is none of assistant"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "f:2: message 1: role ['user'] is none of"),
        ('{"messages": [{"role": "user"}]}', 'f:2: message 1: "content" is empty or no text'),
        ('{"messages": [{"role": "user", "content": " "}]}', 'f:2: message 1: "content" is empty'),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 5}]}',
            'f:2: message 2: "content" is empty or no text',
        ),
    ],
)
def test_a_broken_line_is_told_with_its_number(tmp_path: Path, line: str, problem: str) -> None:
    """Each way in which a line can be broken has its message and its line number."""
    found = problems_of(write_lines(tmp_path / "a.jsonl", [GOOD, line, GOOD]))
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_bytes_that_are_no_text_are_told_with_their_line(tmp_path: Path) -> None:
    """A line that is not UTF-8 is a problem of that line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\xff\xfe\n")
    assert problems_of(path) == ["f:2: not UTF-8: invalid start byte at byte 0"]


def test_all_broken_lines_are_told_up_to_ten(tmp_path: Path) -> None:
    """Twelve broken lines give the first ten problems at once."""
    found = problems_of(write_lines(tmp_path / "a.jsonl", ["{}"] * 12))
    assert [problem.split(":")[1] for problem in found] == [str(number) for number in range(1, 11)]


def test_missing_files_are_told_together(tmp_path: Path) -> None:
    """Every file that is not there is named."""
    with pytest.raises(CalibrationError) as caught:
        read_sources([tmp_path / "a", tmp_path / "b"])
    assert len(caught.value.problems) == 2


def test_empty_lines_and_duplicates_count_once(tmp_path: Path) -> None:
    """Blank lines are skipped and equal contents are one row."""
    _, found = read_sources([write_lines(tmp_path / "a.jsonl", [GOOD, "", GOOD, "  "])])
    assert len(found) == 1


def test_too_few_rows_are_refused_with_the_counts() -> None:
    """A handful of chats is no calibration; the message tells how many there are and how many it takes."""
    with pytest.raises(CalibrationError, match=r"too few calibration rows: 9 different chats .* at least 16 and 4"):
        draw(rows(9), samples=16, seed=0)


@given(st.integers(min_value=40, max_value=90), st.integers(), st.integers(min_value=16, max_value=40))
def test_held_out_text_is_never_calibrated_on(count: int, seed: int, samples: int) -> None:
    """For every seed and size the two sides share no content, and calibration takes what was asked for at most."""
    drawn = draw(rows(count), samples=samples, seed=seed)
    calibration, held_out = ({row.sha256 for row in side} for side in (drawn.calibration, drawn.held_out))
    assert not calibration & held_out
    assert len(drawn.calibration) <= samples
    assert all(map(is_held_out, drawn.held_out))


@given(st.permutations(rows(45)), st.integers(min_value=0, max_value=5))
def test_the_seed_alone_decides_choice_and_order(shuffled: list[Row], seed: int) -> None:
    """The order of the file's lines changes nothing."""
    assert draw(shuffled, samples=20, seed=seed) == draw(rows(45), samples=20, seed=seed)


def test_another_seed_draws_other_rows() -> None:
    """Seeds differ in choice, not in what is held out."""
    one, two = (draw(rows(90), samples=16, seed=seed) for seed in (0, 1))
    assert one.calibration != two.calibration
    assert set(one.held_out) == set(two.held_out)


def test_about_a_third_is_held_out() -> None:
    """The split by content keeps a third for evaluation."""
    share = sum(map(is_held_out, rows(900))) / 900
    assert 0.28 < share < 0.39


def test_a_rows_name_is_its_content() -> None:
    """The same chat has the same digest wherever it was read; another role or word gives another."""
    first, elsewhere = parse_line(GOOD, "a:1"), parse_line(json.dumps(chat(1), indent=1).replace("\n", " "), "b:7")
    other = parse_line(json.dumps(chat(2)), "a:2")
    assert isinstance(first, Row)
    assert isinstance(elsewhere, Row)
    assert isinstance(other, Row)
    assert first.sha256 == elsewhere.sha256 != other.sha256


def test_order_is_part_of_a_draws_digest() -> None:
    """The digest of what was used tells its order too."""
    assert contents_digest(["a", "b"]) != contents_digest(["b", "a"])


def test_shipped_text_is_in_order_and_reasons(tmp_path: Path) -> None:
    """The files in the package are valid, large enough, and every chat shows its reasoning."""
    sources, found = read_sources(shipped_files())
    assert [source.path.name for source in sources] == ["reasoning-de.jsonl", "reasoning-en.jsonl"]
    assert len(found) >= 96
    assert all("</think>" in row.messages[-1].content for row in found)
    assert len(draw(found, samples=64, seed=0).calibration) == 64


@pytest.mark.parametrize("count", [40, 60])
def test_files_are_digested(tmp_path: Path, count: int) -> None:
    """A source carries the digest of its bytes."""
    (source,), found = read_sources([write_chats(tmp_path / "a.jsonl", count)])
    assert len(source.sha256) == 64
    assert len(found) == count
