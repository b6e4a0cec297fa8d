"""The benchmark of quality per bit: its table, its bits per weight, and its evaluation of other tools' directories."""

import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from config.estimates import token_mean
from config.measurements import ChatMetrics, TokenSums
from quantize.evaluation.inputs import chat_name
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ, run_worker
from tests.benchmarks.quality.__main__ import kept_result, last_line, model_directory, parser, wanted
from tests.benchmarks.quality.contenders import PROJECT, contenders
from tests.benchmarks.quality.our_pipeline import request_of
from tests.benchmarks.quality.paired import kl_ratio
from tests.benchmarks.quality.scripts.ggml_blocks import format_of, use_more_bits
from tests.benchmarks.quality.scripts.llm_compressor import smoothed_layers
from tests.benchmarks.quality.sizes import bits_per_weight
from tests.benchmarks.quality.table import Figure, Result, ratio_to, row
from tests.quantize.models import write_hollow_model, write_tiny_llama

FIGURE = Figure(value=0.5, low=0.25, high=0.75)


def test_a_row_has_figures_with_intervals_or_a_failure() -> None:
    """A contender that failed keeps its row."""
    result = Result(
        contender="one",
        seconds=12.4,
        layer_bits=4.25,
        file_bits=7,
        kl_mean=FIGURE,
        top1_agreement=FIGURE,
        perplexity_ratio=FIGURE,
    )
    rest = "50.0% (25.0% to 75.0%) | x0.500 (0.250 to 0.750) | 12 |"
    assert row(result) == f"| one | 4.25, 7.00 | 0.5000 (0.2500 to 0.7500) |  | {rest}"
    assert f"| 0.50 (0.25 to 0.75) | {rest}" in row(result, FIGURE)
    assert row(Result(contender="two", failure="no wheel")) == "| two | | no wheel | | | | |"
    assert Figure.of(token_mean([1.0, 1.0], [1, 1])) == Figure(value=1, low=1, high=1)


def measured(*divergences: float) -> tuple[ChatMetrics, ...]:
    """Write chats of 10 tokens with these sums."""
    return tuple(
        ChatMetrics(chat=str(number), positions=10, generated=TokenSums(tokens=10, divergence=divergence))
        for number, divergence in enumerate(divergences)
    )


def test_rows_are_compared_chat_by_chat() -> None:
    """What makes chats hard is the same for both rows: a constant ratio has no error, however much they differ."""
    exact = kl_ratio(measured(1, 10, 100), measured(2, 20, 200))
    assert (exact.value, exact.low, exact.high) == (0.5, 0.5, 0.5)
    near = kl_ratio(measured(1.1, 10, 99), measured(2, 21, 200))
    assert 0.4 < near.low < near.value < near.high < 0.6
    with pytest.raises(ValueError, match="different chats"):
        kl_ratio(measured(1, 2), measured(1, 2, 3))


def test_the_interval_of_a_ratio_has_the_true_one_in_it() -> None:
    """In 19 of 20 sets of chats; few draws leave room for chance."""
    draw = random.Random(5)
    held = 0
    for _ in range(30):
        theirs = [draw.lognormvariate(0, 0.5) for _ in range(30)]
        ours = [0.8 * one * draw.lognormvariate(-0.02, 0.2) for one in theirs]
        found = kl_ratio(measured(*ours), measured(*theirs))
        held += found.low < 0.8 < found.high
    assert 25 <= held <= 30
    assert (found.high - found.low) / found.value < 0.35


def test_a_row_is_compared_with_the_one_of_ours_that_it_names() -> None:
    """It can be one that was made before; without it the cell is empty."""
    ours = Result(contender="ours", measured=measured(1, 2))
    theirs = Result(contender="theirs", against="ours", measured=measured(2, 4))
    assert ratio_to({"ours": ours}, theirs) == Figure(value=0.5, low=0.5, high=0.5)
    assert ratio_to({}, theirs) is None
    assert ratio_to({"ours": Result(contender="ours", failure="no")}, theirs) is None
    assert ratio_to({"ours": ours}, ours) is None


def test_a_kept_result_is_of_the_same_chats(tmp_path: Path) -> None:
    """Other chats, or none, are measured again."""
    file = tmp_path / "result.json"
    held_out = [{"sha256": f"{number:064x}"[::-1]} for number in (1, 2)]
    assert kept_result(file, held_out) is None
    chats = zip(measured(1, 2), held_out, strict=True)
    result = Result(
        contender="one", measured=tuple(one.model_copy(update={"chat": chat_name(sample)}) for one, sample in chats)
    )
    file.write_text(result.model_dump_json())
    assert kept_result(file, held_out) == result
    assert kept_result(file, held_out[:1]) is None
    file.write_text('{"contender": "one", "chats": 12}')
    assert kept_result(file, held_out) is None


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_contenders(group_size: int, tmp_path: Path) -> None:
    """Names are unique, versions exact, and every script exists; all of 4 bits have one group size."""
    every = contenders(group_size)
    assert len({contender.name for contender in every}) == len(every)
    assert all("==" in package for contender in every for package in contender.environment.requirements)
    root = Path(__file__).parents[2]
    for contender in every:
        argv = contender.argv("python", str(root), "job.json")
        assert (argv[0], argv[-1]) == ("python", "job.json")
        assert Path(argv[1]).is_file() or (argv[1] == "-m" and contender.environment is PROJECT)
        assert contender.options.get("group_size", group_size) == group_size
        assert not contender.against or contender.against in {one.name for one in every}
        if contender.module.endswith("our_pipeline"):
            job = {"base": "b", "into": "o", "samples": [[1]], "max_tokens": 64, "data": ["d"], **contender.options}
            assert request_of(job).samples == 1


@pytest.mark.parametrize(
    "parts,expected",
    [
        (["awq", "q8_0"], ["llm-compressor AWQ", "llama.cpp Q8_0"]),
        (["LLM-compressor W4A16"], ["llm-compressor W4A16"]),
        (["none of them"], []),
    ],
)
def test_contenders_are_chosen_by_name(parts: list[str], expected: list[str]) -> None:
    """By a part, or a whole name, which then is not also a part of longer ones; case does not matter."""
    options = parser().parse_args(["--model", "m", "--work", "w", "--contender", *parts])
    every = contenders(64)
    assert [one.name for one in every if wanted(one, every, options.contender)] == expected


@pytest.mark.parametrize(
    "name,shape,mixture,expected",
    [
        ("model.norm.weight", (576,), "Q4_K_M", "F32"),
        ("model.embed_tokens.weight", (8, 512), "Q4_K_M", "Q6_K"),
        ("model.embed_tokens.weight", (8, 576), "Q4_K_M", "Q8_0"),
        ("model.layers.5.self_attn.q_proj.weight", (8, 512), "Q4_K_M", "Q4_K"),
        ("model.layers.5.self_attn.q_proj.weight", (8, 576), "Q4_K_M", "Q5_0"),
        ("model.layers.0.mlp.down_proj.weight", (8, 1536), "Q4_K_M", "Q6_K"),
        ("model.layers.3.mlp.down_proj.weight", (8, 1536), "Q4_K_M", "Q4_K"),
        ("model.layers.3.mlp.down_proj.weight", (8, 1536), "Q8_0", "Q8_0"),
    ],
)
def test_formats_of_llama_cpp(name: str, shape: tuple[int, ...], mixture: str, expected: str) -> None:
    """The mixture depends on the tensor, its layer, and whether its rows are whole super-blocks."""
    assert format_of(name, shape, 30, mixture) == expected


def test_llm_compressor_smooths_what_the_mlp_reads() -> None:
    """Gemma has a norm of its own before the MLP; of all others llm-compressor knows which."""
    assert smoothed_layers({"input_layernorm", "post_attention_layernorm"}) is None
    gemma = smoothed_layers({"post_attention_layernorm", "pre_feedforward_layernorm"})
    assert gemma is not None
    assert [norm for _, norm in gemma] == ["re:.*input_layernorm", "re:.*pre_feedforward_layernorm"]


def test_layers_with_more_bits() -> None:
    """Of 32 layers: the first and last four, and every third between."""
    more = [layer for layer in range(32) if use_more_bits(layer, 32)]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]


def test_bits_per_weight(tmp_path: Path) -> None:
    """Bytes are those of the tensors, or those that a dense directory names."""
    base = write_hollow_model(tmp_path / "base")
    assert bits_per_weight(base, base).file == 16
    other = write_hollow_model(tmp_path / "other")
    names = {"model.embed_tokens.weight": 4608, "model.layers.0.mlp.down_proj.weight": 442368}
    (other / "stored_bytes.json").write_text(json.dumps(names))
    bits = bits_per_weight(other, base)
    assert bits.layers == pytest.approx(8 * 442368 / (576 * 576 + 576 * 1536 + 576))
    assert bits.file == pytest.approx(8 * (442368 + 4608) / (576 * 576 + 576 * 1536 + 576 + 8 * 576))


def test_a_model_in_a_folder_of_its_own_is_found(tmp_path: Path) -> None:
    """AutoRound writes `into/NAME-w4g64`."""
    inner = write_hollow_model(tmp_path / "model" / "tiny-w4g64")
    assert model_directory(tmp_path / "model") == inner
    assert model_directory(inner) == inner


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    """A failure is told by what the tool said last."""
    log = tmp_path / "log.txt"
    assert last_line(log) == ""
    log.write_text("Traceback\nValueError: a | b\n\n")
    assert last_line(log) == "ValueError: a / b"


def test_a_dense_directory_is_measured(tmp_path: Path) -> None:
    """A copy of the base is no further from it than it is from itself; another model is."""
    pytest.importorskip("torch", reason="needs torch: install the quantize extra")
    base = write_tiny_llama(tmp_path / "base", ["one two three four five six seven eight"])
    copy = shutil.copytree(base, tmp_path / "copy")
    other = write_tiny_llama(tmp_path / "other", ["one two three four five six seven eight"], layers=1)
    assert divergence(copy, base, tmp_path) == pytest.approx(0, abs=1e-6)
    assert divergence(other, base, tmp_path) > 1e-6


def divergence(directory: Path, base: Path, work: Path) -> float:
    """Measure a directory on one sample of bare text."""
    sample = {"ids": list(range(2, 34)), "sha256": "0" * 64, "reasoning": [], "answer": [0, 0], "is_text": True}
    job: dict[str, Any] = {
        "base": str(base),
        "base_digest": "",
        "directory": str(directory),
        "cache": str(work / "cache"),
        "scratch": str(work / "scratch"),
        "samples": [sample],
    }
    with ProgressReporter(io.StringIO()).stage("evaluation", "tokens") as advance:
        told = run_worker(
            "tests.benchmarks.quality.evaluation_child",
            job,
            folder=work,
            environ=child_environ(os.environ),
            on_progress=advance,
        )
    return float(told["chats"][0]["generated"]["divergence"])
