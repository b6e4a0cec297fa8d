"""Preflight: samples are described, doubtful ones are told, and a base with non-finite logits is caught by name."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize.base import BaseModel, read_base
from quantize.calibration.datasets import CalibrationSplit
from quantize.calibration.finiteness import NonFiniteModule, explained
from quantize.calibration.parsing import parse_line
from quantize.calibration.preflight import check, inspect
from quantize.calibration.records import Record
from quantize.calibration.samples import Samples, tokenize_samples
from quantize.errors import CalibrationError, QuantizeError, RecipeError
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ
from tests.quantize.models import write_tiny_llama


def sample(number: int, tokens: int = 400, **changes: Any) -> dict[str, Any]:
    """A sample as the tokenizing child and the parent describe it."""
    return {
        "ids": [number] * tokens,
        "reasoning_tokens": tokens // 2,
        "where": f"f:{number}",
        "sha256": f"{number:064}",
        "cut_tokens": 0,
        "generated": False,
        "language": "en",
        "dedup_key": f"{number:064}",
        **changes,
    }


def many(count: int, **changes: Any) -> list[dict[str, Any]]:
    """Samples that say different things."""
    return [sample(number, **changes) for number in range(count)]


def test_samples_are_described() -> None:
    """Counts, lengths and languages, in a value and in a line."""
    taken = [
        sample(1, 40, generated=True),
        sample(2, 100, cut_tokens=7),
        sample(3, 50, language="de"),
        sample(4, 60),
    ]
    found = inspect(Samples(taken, many(9)))
    assert (found.samples, found.tokens, found.reasoning_tokens, found.generated) == (4, 250, 125, 1)
    assert (found.shortest_tokens, found.median_tokens, found.longest_tokens, found.cut) == (40, 50, 100, 1)
    assert found.languages == (("en", 3), ("de", 1))
    assert found.summary() == (
        "4 samples, 250 tokens (50% reasoning), 40 to 100 a sample, median 50, 1 cut; languages: en 3, de 1"
    )


@pytest.mark.parametrize(
    "samples,widest,notes,warnings",
    [
        (Samples(many(128), []), 5120, [], []),
        (Samples(many(20), []), 0, ["20 samples with 8000 tokens are few; 128 with 32768"], []),
        (Samples(many(128), []), 60_000, [], ["51200 tokens can't determine a layer of 60000 inputs"]),
        (Samples([*many(127), sample(300, 31)], []), 0, [], ["1 of 128 samples have fewer than 32 tokens, like f:300"]),
        (Samples(many(128), [], read_rows=100, repeated_rows=20), 0, [], []),
        (
            Samples(many(128), [], read_rows=100, repeated_rows=21),
            0,
            [],
            ["21 of 100 rows repeat others word for word"],
        ),
        (Samples([*many(127), sample(200, dedup_key="0" * 64)], []), 0, [], []),
        (
            Samples([*many(100), *(sample(number, dedup_key="0" * 64) for number in range(100, 130))], []),
            0,
            [],
            ["30 of 130 samples say nearly what others say"],
        ),
    ],
)
def test_what_is_doubtful_is_told(samples: Samples, widest: int, notes: list[str], warnings: list[str]) -> None:
    """Each in its line; what is only worth knowing is a note."""
    found = inspect(samples, widest=widest)
    for told, expected in ((found.notes, notes), (found.warnings, warnings)):
        assert len(told) == len(expected)
        assert all(line.startswith(start) for line, start in zip(told, expected, strict=True))
    assert found.problems == ()


def test_no_samples_are_a_problem() -> None:
    """There is nothing to calibrate on."""
    assert inspect(Samples([], [])).problems == ("no samples to calibrate on; pass text with --data",)


EMBEDDING = NonFiniteModule("model.embed_tokens", 1, finite_inputs=True, finite_weights=False)
ATTENTION = NonFiniteModule("model.layers.1.self_attn.o_proj", 0, finite_inputs=False, finite_weights=True)
NORM = NonFiniteModule("model.norm", 0, finite_inputs=True, finite_weights=True)


@pytest.mark.parametrize(
    "modules,every,kind,told",
    [
        (
            [EMBEDDING] * 2,
            True,
            RecipeError,
            "m: its logits are NaN or Inf in every sample, first in model.embed_tokens, whose own weights have NaN or "
            "Inf; copy the model again, or train it anew",
        ),
        (
            [EMBEDDING],
            False,
            CalibrationError,
            "f:0: the base's logits are NaN or Inf, first in model.embed_tokens, whose own weights have NaN or Inf, "
            "at token 1 (id 0); remove this row, or repair the base",
        ),
        (
            [ATTENTION],
            True,
            CalibrationError,
            "f:0: the base's logits are NaN or Inf, first in what comes right before model.layers.1.self_attn.o_proj, "
            "at token 0 (id 0); remove this row, or repair the base",
        ),
        (
            [NORM, None],
            True,
            CalibrationError,
            "f:0: the base's logits are NaN or Inf, first in model.norm, at token 0 (id 0); remove this row, or "
            "repair the base; f:1: the base's logits are NaN or Inf; remove this row, or repair the base",
        ),
    ],
)
def test_samples_or_the_base_are_blamed(
    modules: list[NonFiniteModule | None], every: bool, kind: type[QuantizeError], told: str
) -> None:
    """Weights that spoil every sample are the base's fault; anything else is told sample by sample."""
    error = explained(Path("m"), many(len(modules)), modules, every=every)
    assert isinstance(error, kind)
    assert str(error) == told


# From here on with a tiny Llama.

RARE = "§"
LINES = [{"text": f"Number {number} is followed by {number + 1}, and that by {number + 2}."} for number in range(6)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound base."""
    # Imported here, where pytest lets third parties warn while they are compiled.
    pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs torch: install the quantize extra")
    return write_tiny_llama(tmp_path_factory.mktemp("preflight") / "tiny", [line["text"] for line in LINES] * 4)


def spoiled(tiny: Path, copy: Path, tensor: str, index: tuple[int, ...], value: float) -> BaseModel:
    """A copy of a base with one number replaced; its output matrix is its own, and it takes longer samples."""
    import shutil  # noqa: PLC0415

    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    shutil.copytree(tiny, copy)
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": False, "max_position_embeddings": 2048})
    )
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[tensor][index] = value
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return read_base(copy)


def checked(base: BaseModel, lines: list[dict[str, str]], folder: Path) -> str:
    """What is said while lines are tokenized and checked."""
    rows = [
        row
        for number, line in enumerate(lines, 1)
        if isinstance(row := parse_line(json.dumps(line), f"f:{number}"), Record)
    ]
    with (folder / "said").open("w") as stream:
        context = RunContext(folder, child_environ(os.environ), ProgressReporter(stream))
        samples = tokenize_samples(base.directory, CalibrationSplit(tuple(rows[:-2]), tuple(rows[-2:])), 2048, context)
        check(base, samples, context)
    return (folder / "said").read_text()


def token_of(base: Path, letter: str) -> int:
    """The last token of a letter."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    return int(Tokenizer.from_file(str(base / "tokenizer.json")).encode(letter).ids[-1])


@pytest.mark.real_model
@pytest.mark.timeout(120)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_planted_in_one_sample_is_found_by_line_and_module(tiny: Path, tmp_path: Path, value: float) -> None:
    """One token's embedding is NaN or Inf: the samples that hold it are named, on either side, with the token."""
    token = token_of(tiny, RARE)
    base = spoiled(tiny, tmp_path / "base", "model.embed_tokens.weight", (token, 0), value)
    lines = [*LINES[:2], {"text": f"A rare {RARE} sign"}, *LINES[2:5], {"text": "9" * 600 + RARE}]
    with pytest.raises(CalibrationError) as caught:
        checked(base, lines, tmp_path)
    blamed = "the base's logits are NaN or Inf, first in model.embed_tokens, whose own weights have NaN or Inf"
    first, second = caught.value.problems
    assert first.startswith(f"f:3: {blamed}, at token ")
    assert first.endswith(f" (id {token}); remove this row, or repair the base")
    # Two tokens for the sign, one for each digit: far behind the first forward pass.
    assert second.startswith(f"f:7: {blamed}, at token 601 (id {token})")


@pytest.mark.real_model
@pytest.mark.timeout(120)
def test_weights_that_spoil_every_sample_are_the_bases_own(tiny: Path, tmp_path: Path) -> None:
    """The module is named, and no sample is blamed."""
    base = spoiled(tiny, tmp_path / "base", "model.layers.1.mlp.up_proj.weight", (3, 5), float("nan"))
    with pytest.raises(RecipeError, match=r"in every sample, first in model.layers.1.mlp.up_proj, whose own weights"):
        checked(base, LINES, tmp_path)


@pytest.mark.real_model
@pytest.mark.timeout(120)
def test_a_sound_base_passes(tiny: Path, tmp_path: Path) -> None:
    """And the preflight says what the samples are like."""
    said = checked(read_base(tiny), [*LINES, *LINES[:2]], tmp_path)
    assert "preflight: 6 samples, " in said
    assert "warning: " in said
    assert "preflight: done" in said


@pytest.mark.real_model
@pytest.mark.timeout(120)
def test_memory_is_asked_for_before_the_base_is_loaded(tiny: Path, tmp_path: Path) -> None:
    """A base that could never fit is refused with the numbers."""
    huge = replace(read_base(tiny), bytes=10**15)
    with pytest.raises(QuantizeError, match=r"too little memory for quantizing tiny on .* about 2000001.0 GB needed"):
        checked(huge, LINES, tmp_path)
