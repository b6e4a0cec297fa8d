"""Stage 1, tokens: records of calibration data -> token samples, by the base's own tokenizer and chat template."""

import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from config.manifest import sha256_of
from quantize.calibration.datasets import CalibrationSplit
from quantize.calibration.samples import Samples, tokenize_samples
from quantize.model_files.kept_files import kept_files
from quantize.running.stage_store import StageKey, stage_key
from quantize.stages.variant_run import VariantRun

# Raise this when the same records give other samples.
_REVISION = 2
_SAMPLES = "samples.json"


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token samples of both sides, and the key under which they are kept."""

    samples: Samples
    key: StageKey


def tokenize(run: VariantRun, split: CalibrationSplit) -> Tokens:
    """Tokenize both sides of a split, or read what an equal run has kept."""
    key = tokens_key(run.recipe.base.directory, split, run.recipe.max_tokens)
    found = run.find(key)
    if found is not None:
        return Tokens(Samples(**json.loads((found.directory / _SAMPLES).read_bytes())), key)
    samples = tokenize_samples(run.recipe.base.directory, split, run.recipe.max_tokens, run.context)
    with run.store.staging(key) as staged:
        (staged / _SAMPLES).write_text(json.dumps(asdict(samples)))
        run.store.keep(key, staged, {}, subject=run.recipe.variant_id)
    return Tokens(samples, key)


def tokens_key(base: Path, split: CalibrationSplit, max_tokens: int) -> StageKey:
    """Digest the records, the limit, and the files that the tokenizer is made of."""
    files = [*kept_files(base), base / "config.json"]
    drawn = asdict(split)
    if not split.spare:
        del drawn["spare"]  # results of runs without a search keep their names
    return stage_key(
        "tokens",
        revision=_REVISION,
        transformers=metadata.version("transformers"),
        files={file.name: sha256_of(file) for file in files if file.is_file()},
        split=drawn,
        max_tokens=max_tokens,
    )
