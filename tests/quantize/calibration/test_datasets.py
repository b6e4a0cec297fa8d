"""Calibration text: every broken line is told, files give by weight, and evaluation text is never calibrated on."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.calibration.datasets import (
    CalibrationSplit,
    contents_digest,
    is_held_out,
    read_datasets,
    shipped_files,
    split_records,
    with_split_keys,
)
from quantize.calibration.parsing import parse_line
from quantize.calibration.records import Message, Record, content_sha256, prompt_of
from quantize.errors import CalibrationError
from tests.quantize.chats import chat, write_chats, write_lines

GOOD = json.dumps(chat(1))


def problems_of(path: Path) -> list[str]:
    """The problems of a file, without its folder."""
    with pytest.raises(CalibrationError) as caught:
        read_datasets([path])
    return [problem.replace(f"{path}", "f") for problem in caught.value.problems]


def rows(count: int) -> list[Record]:
    """Rows with different contents."""
    parsed = [parse_line(json.dumps(chat(number)), f"f:{number}") for number in range(count)]
    return [row for row in parsed if isinstance(row, Record)]


@pytest.mark.parametrize(
    "line,problem",
    [
        ("{", "f:2: not JSON: Expecting property name"),
        ("[]", 'f:2: is no object; a line is {"messages"'),
        ('{"prompt": "a"}', "f:2: has a format that is not known (its keys: prompt); a line is {"),
        ('{"text": ""}', 'f:2: "text" is empty or no text'),
        ('{"text": ["a"]}', 'f:2: "text" is empty or no text'),
        ('{"completion": "a"}', 'f:2: "prompt" is empty or no list'),
        ('{"prompt": " ", "completion": "a"}', 'f:2: message 1: "content" is empty or no text'),
        ('{"prompt": [{"role": "user"}], "completion": "a"}', 'f:2: message 1: "content" is empty'),
        ('{"prompt": "a", "completion": null}', 'f:2: "completion" is empty or no text'),
        ('{"prompt": "a", "completion": "b", "self_generated": true}', 'f:2: "self_generated" is not {"from"'),
        ('{"text": "\\ud83d"}', "f:2: holds half of a surrogate pair"),
        ('{"messages": [{"role": "assistant", "reasoning": "a", "content": 5}]}', 'f:2: message 1: "content" is'),
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
        read_datasets([tmp_path / "a", tmp_path / "b"])
    assert len(caught.value.problems) == 2


def test_empty_lines_and_duplicates_count_once(tmp_path: Path) -> None:
    """Blank lines are skipped and equal contents are one row."""
    _, found = read_datasets([write_lines(tmp_path / "a.jsonl", [GOOD, "", GOOD, "  "])])
    assert len(found) == 1


def test_too_few_rows_are_refused_with_the_counts() -> None:
    """A handful of chats is no calibration; the message tells how many there are and how many it takes."""
    with pytest.raises(CalibrationError, match=r"too few calibration rows: 9 different chats .* at least 16 and 4"):
        split_records(rows(9), samples=16, seed=0)


@given(st.integers(min_value=40, max_value=90), st.integers(), st.integers(min_value=16, max_value=40))
def test_held_out_text_is_never_calibrated_on(count: int, seed: int, samples: int) -> None:
    """For every seed and size the two sides share no content, and calibration takes what was asked for at most."""
    split = split_records(rows(count), samples=samples, seed=seed)
    calibration, held_out = ({row.sha256 for row in side} for side in (split.calibration, split.held_out))
    assert not calibration & held_out
    assert len(split.calibration) <= samples
    assert all(map(is_held_out, split.held_out))


@pytest.mark.parametrize("samples,spare,expected", [(16, 12, 12), (16, 0, 0), (16, 1000, None), (1000, 12, 0)])
def test_rows_to_spare_are_on_neither_side(samples: int, spare: int, expected: int | None) -> None:
    """They are what calibration left over, in the seed's order; the draw is the same without them."""
    split = split_records(rows(90), samples=samples, seed=3, spare=spare)
    plain = split_records(rows(90), samples=samples, seed=3)
    assert replace(split, spare=()) == plain
    assert len(split.spare) == (90 - len(plain.calibration) - len(plain.held_out) if expected is None else expected)
    assert not {row.sha256 for row in split.spare} & {row.sha256 for row in (*split.calibration, *split.held_out)}
    assert not any(map(is_held_out, split.spare))


def test_rows_to_spare_have_other_prompts(tmp_path: Path) -> None:
    """What the solver has read the question of is nothing new; bare text has no question."""
    lines = [json.dumps(line) for line in answered(60, 3)]
    _, records = read_datasets([write_lines(tmp_path / "a.jsonl", lines)])
    split = split_records(records, samples=20, seed=0, spare=1000)
    assert split.spare
    assert not {prompt_of(row) for row in split.spare} & {prompt_of(row) for row in split.calibration}
    texts = [json.dumps({"text": f"Once upon a time, {number}."}) for number in range(90)]
    _, records = read_datasets([write_lines(tmp_path / "b.jsonl", texts)])
    assert len(split_records(records, samples=16, seed=0, spare=9).spare) == 9


@given(st.permutations(rows(45)), st.integers(min_value=0, max_value=5))
def test_the_seed_alone_decides_choice_and_order(shuffled: list[Record], seed: int) -> None:
    """The order of the file's lines changes nothing."""
    assert split_records(shuffled, samples=20, seed=seed) == split_records(rows(45), samples=20, seed=seed)


def test_another_seed_draws_other_rows() -> None:
    """Seeds differ in choice, not in what is held out."""
    one, two = (split_records(rows(90), samples=16, seed=seed) for seed in (0, 1))
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
    assert isinstance(first, Record)
    assert isinstance(elsewhere, Record)
    assert isinstance(other, Record)
    assert first.sha256 == elsewhere.sha256 != other.sha256


def test_order_is_part_of_a_draws_digest() -> None:
    """The digest of what was used tells its order too."""
    assert contents_digest(["a", "b"]) != contents_digest(["b", "a"])


def test_shipped_text_is_in_order_and_reasons(tmp_path: Path) -> None:
    """The files in the package are valid, large enough, and every chat shows its reasoning."""
    datasets, found = read_datasets(shipped_files())
    assert [source.path.name for source in datasets] == ["reasoning-de.jsonl", "reasoning-en.jsonl"]
    assert len(found) >= 96
    assert all("</think>" in row.messages[-1].content for row in found)
    assert len(split_records(found, samples=64, seed=0).calibration) == 64


@pytest.mark.parametrize("count", [40, 60])
def test_files_are_digested(tmp_path: Path, count: int) -> None:
    """A source carries the digest of its bytes."""
    (source,), found = read_datasets([write_chats(tmp_path / "a.jsonl", count)])
    assert len(source.sha256) == 64
    assert len(found) == count


def row_of(**line: Any) -> Record:
    """The row of a valid line."""
    row = parse_line(json.dumps(line), "f:1")
    assert isinstance(row, Record)
    return row


def test_all_kinds_of_lines_mix_in_one_file(tmp_path: Path) -> None:
    """Chats, prompts with completions and bare text are read side by side; other keys are nobody's business."""
    lines: list[dict[str, Any]] = [
        {**chat(1), "id": 7},
        {"prompt": "Why?", "completion": "So."},
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
            "completion": "So.",
        },
        {"text": "Once upon a time."},
    ]
    _, found = read_datasets([write_lines(tmp_path / "a.jsonl", map(json.dumps, lines))])
    assert [(len(row.messages), row.completion, row.text) for row in found] == [
        (2, "", ""),
        (1, "So.", ""),
        (2, "So.", ""),
        (0, "", "Once upon a time."),
    ]
    assert len({row.sha256 for row in found}) == 4


def test_a_prompt_with_its_completion_says_what_the_chat_of_both_says() -> None:
    """So the two are one content, and on one side of the split."""
    told = row_of(prompt="Why?", completion="So.")
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert told.sha256 == row_of(messages=turns).sha256


@pytest.mark.parametrize(
    "message,content",
    [
        ({"content": "4", "reasoning_content": "two twos"}, "<think>\ntwo twos\n</think>\n\n4"),
        ({"content": "4", "reasoning": "two twos\n"}, "<think>\ntwo twos\n</think>\n\n4"),
        ({"content": None, "thinking": "two twos"}, "<think>\ntwo twos\n</think>\n\n"),
        ({"content": "<think>a</think>4", "reasoning": "two twos"}, "<think>a</think>4"),
        ({"content": "4", "reasoning": ""}, "4"),
        ({"content": "4", "reasoning": None}, "4"),
    ],
)
def test_reasoning_beside_the_content_is_put_in_front_of_it(message: dict[str, Any], content: str) -> None:
    """Servers and data sets tell an answer's reasoning apart from it; none of it gets lost."""
    assert row_of(messages=[{"role": "assistant", **message}]).messages[-1].content == content


@pytest.mark.parametrize(
    "roles,answered",
    [("su", "su"), ("sua", "su"), ("uaua", "uau"), ("uau", "uau"), ("uta", "u"), ("sa", "")],
)
def test_the_prompt_of_a_chat_ends_with_its_last_user_turn(roles: str, answered: str) -> None:
    """Whatever follows the last question is its answer."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    turns = [{"role": names[role], "content": "x"} for role in roles]
    assert [turn.role[0] for turn in prompt_of(row_of(messages=turns))] == list(answered)


def drawn_from(paths: list[Path], weights: list[float], samples: int = 30, seed: int = 0) -> CalibrationSplit:
    """Draw from files."""
    datasets, found = read_datasets(paths, weights)
    return split_records(found, samples=samples, seed=seed, datasets=datasets)


def two_files(folder: Path) -> list[Path]:
    """Two files with different rows, 90 and 60."""
    first = write_chats(folder / "a.jsonl", 90)
    return [first, write_lines(folder / "b.jsonl", (json.dumps(chat(number)) for number in range(500, 560)))]


@pytest.mark.parametrize(
    "weights,counts", [([1, 1], [15, 15]), ([2, 1], [20, 10]), ([1, 0], [30]), ([0.1, 0.5], [5, 25])]
)
def test_files_give_samples_by_weight(tmp_path: Path, weights: list[float], counts: list[int]) -> None:
    """Weights are proportions; a file of weight 0 gives text to the evaluation alone."""
    split = drawn_from(two_files(tmp_path), weights)
    names = Counter(Path(row.where.rpartition(":")[0]).name for row in split.calibration)
    assert [names[name] for name in sorted(names)] == counts
    assert {Path(row.where.rpartition(":")[0]).name for row in split.held_out} == {"a.jsonl", "b.jsonl"}


def test_the_order_of_files_changes_nothing(tmp_path: Path) -> None:
    """Contents and weights decide the draw, also where files share rows."""
    first, second = two_files(tmp_path)
    second.write_text(second.read_text() + first.read_text().splitlines()[0] + "\n")
    one, two = drawn_from([first, second], [1, 2]), drawn_from([second, first], [2, 1])
    assert one == two
    assert one.read_rows == 151
    assert one.repeated_rows == 1


@pytest.mark.parametrize(
    "weights,problem",
    [
        ([1, -1], "f/b.jsonl: weight -1 is no number from 0 up"),
        ([float("nan"), 1], "f/a.jsonl: weight nan is no number from 0 up"),
        ([float("inf"), 1], "f/a.jsonl: weight inf is no number from 0 up"),
        ([0, 0], "all calibration files have weight 0; give one of them more"),
    ],
)
def test_weights_that_make_no_sense_are_refused(tmp_path: Path, weights: list[float], problem: str) -> None:
    """With the file's name."""
    with pytest.raises(CalibrationError) as caught:
        read_datasets(two_files(tmp_path), weights)
    assert [told.replace(str(tmp_path), "f") for told in caught.value.problems] == [problem]


def test_a_source_knows_how_many_of_its_rows_repeat(tmp_path: Path) -> None:
    """For the preflight, which tells it."""
    (source,), _ = read_datasets([write_lines(tmp_path / "a.jsonl", [GOOD, GOOD, GOOD, json.dumps(chat(2))])])
    assert (source.rows, source.repeated_rows) == (4, 2)


@given(st.sampled_from(rows(60)), st.text(min_size=1).filter(str.strip))
def test_what_the_base_answers_stays_on_its_prompts_side(origin: Record, answer: str) -> None:
    """The answer's own content has no say: a prompt of the evaluation never gets into calibration."""
    made = replace(origin, sha256=content_sha256([Message("assistant", answer)]), origin=origin.sha256)
    assert is_held_out(made) == is_held_out(origin)
    assert made.generated


def answered(prompts: int, answers: int) -> list[dict[str, Any]]:
    """So many answers to each of so many prompts."""
    return [
        {"prompt": f"What is {prompt}?", "completion": f"<think>{answer}</think>It is {prompt}."}
        for answer in range(answers)
        for prompt in range(prompts)
    ]


@pytest.mark.parametrize("answers", [1, 2, 4])
def test_no_prompt_both_calibrates_and_judges(tmp_path: Path, answers: int) -> None:
    """All answers to a prompt are on one side; about a third of the prompts is held out, whatever their number."""
    path = write_lines(tmp_path / "a.jsonl", map(json.dumps, answered(400, answers)))
    split = drawn_from([path], [], samples=2000)
    sides = [{row.messages for row in side} for side in (split.calibration, split.held_out)]
    assert not sides[0] & sides[1]
    assert len(split.calibration) + len(split.held_out) == 400 * answers
    assert 0.26 < len(sides[1]) / 400 < 0.41
    assert (split.moved_rows > 0) == (answers > 1)


@given(st.permutations([row_of(**line) for line in answered(12, 3)]))
def test_the_order_of_answers_has_no_say(shuffled: list[Record]) -> None:
    """Rows are on the side of their prompt in any order of lines and files."""
    expected = {row.sha256: row.split_key for row in with_split_keys([row_of(**line) for line in answered(12, 3)])}
    assert {row.sha256: row.split_key for row in with_split_keys(shuffled)} == expected


def test_a_prompt_that_occurs_once_is_split_by_its_row() -> None:
    """So files without repeated prompts are split as they always were."""
    assert all(row.split_key == row.sha256 for row in with_split_keys(rows(60)))
    assert split_records(rows(60), samples=16, seed=0).moved_rows == 0


def test_what_the_base_answered_follows_the_rows_with_its_prompt() -> None:
    """Also where it names another origin, and even where its own digest is the smallest."""
    plain = [row_of(**line) for line in answered(40, 2)]
    made = [row_of(**line, self_generated={"from": "0" * 64, "finished": True}) for line in answered(40, 3)[80:]]
    sides = {row.messages: is_held_out(row) for row in with_split_keys(plain)}
    together = with_split_keys([*made, *plain])
    assert all(is_held_out(row) == sides[row.messages] for row in together)
    assert {row.split_key for row in with_split_keys(made)} == {"0" * 64}


def test_chats_that_all_share_a_prompt_are_refused_with_the_reason() -> None:
    """They can't be on both sides."""
    same = [row_of(prompt="Continue.", completion=f"{number}") for number in range(90)]
    with pytest.raises(CalibrationError, match=r"90 different chats with 1 different prompts give .* on the same side"):
        split_records(same, samples=16, seed=0)


def broken_in(folder: Path, broken: int, good: int) -> Path:
    """A file with so many invalid lines in the middle."""
    lines = [json.dumps(chat(number)) for number in range(good)]
    return write_lines(folder / "a.jsonl", [*lines[:5], *['{"messages": 1}'] * broken, *lines[5:]])


@pytest.mark.parametrize("broken,max_bad,passes", [(1, 0.01, True), (2, 0.01, False), (2, 0.02, True), (1, 0.0, False)])
def test_invalid_rows_are_skipped_up_to_a_share(tmp_path: Path, broken: int, max_bad: float, passes: bool) -> None:
    """They are counted and one is told; more of them are an error."""
    path = broken_in(tmp_path, broken, 120 - broken)
    if not passes:
        with pytest.raises(CalibrationError, match=f'{path}:6: "messages" is empty or no list'):
            read_datasets([path], max_bad=max_bad)
        return
    (source,), found = read_datasets([path], max_bad=max_bad)
    assert len(found) == 120 - broken
    assert source.summary() == [
        f"{path}: {120 - broken} rows, JSON lines, format: chat",
        f'{path}: invalid rows skipped: {broken} of 120: {path}:6: "messages" is empty or no list',
    ]


def test_the_share_is_that_of_each_file(tmp_path: Path) -> None:
    """A small file that is all wrong does not hide behind a large one."""
    large = write_chats(tmp_path / "large.jsonl", 400)
    small = write_lines(tmp_path / "small.jsonl", ['{"a": 1}'] * 3)
    with pytest.raises(CalibrationError) as caught:
        read_datasets([large, small])
    assert len(caught.value.problems) == 3


def test_images_are_one_problem_of_a_file(tmp_path: Path) -> None:
    """Not one for every row."""
    lines = [json.dumps({**chat(number), "images": ["a.png"]}) for number in range(30)]
    (problem,) = problems_of(write_lines(tmp_path / "a.jsonl", lines))
    assert problem == (
        'f:1: has "images": only text can calibrate a model; remove the rows with images, videos or audio '
        "(30 rows of this file)"
    )


def test_formats_are_counted(tmp_path: Path) -> None:
    """Commonest first."""
    lines = [{"instruction": f"a{number}", "output": "b"} for number in range(3)] + [{"text": "c"}]
    (source,), _ = read_datasets([write_lines(tmp_path / "a.jsonl", map(json.dumps, lines))])
    assert source.summary() == [f"{tmp_path / 'a.jsonl'}: 4 rows, JSON lines, format: Alpaca (3), text (1)"]
