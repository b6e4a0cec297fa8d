"""What an FP8 KV cache costs: KL divergence of a model whose keys and values are rounded, by how the scales are chosen.

`python -m tests.benchmarks.kv_cache MODEL [--variant DIR ...]` reads the shipped held-out chats with the base, and with
the base and each variant over caches of several kinds; it prints a table for RESULTS.md. Scales are those of the
calibration chats, by layer.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from config.estimates import percentile, sign_flip_p, token_mean
from config.load import process_environment
from quantize.base import read_base
from quantize.calibration.datasets import read_datasets, shipped_files, split_records
from quantize.calibration.samples import Samples, tokenize_samples
from quantize.calibration.tokenizing import load_tokenizer
from quantize.dense_models import layered_base, layered_variant
from quantize.evaluation.inputs import EvalInputs, prepare
from quantize.evaluation.lm_head import find_lm_head
from quantize.evaluation.parent_outputs import ParentCaches, ParentOutputs, read_parent
from quantize.evaluation.sample_metrics import LmHeads, SampleMetrics, read_samples
from quantize.evaluation.token_metrics import token_sums
from quantize.kv_cache import E4M3_MAX, attention_modules, change_cache, read_texts, recorded, rounded_to_e4m3
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.stage_store import stage_store
from quantize.running.worker import child_environ
from tests.benchmarks.machine import machine_line

INT8_MAX = 127
# Of each sample and layer, tokens that the search looks at.
_KEPT_TOKENS = 64
_STEPS = tuple(2.0 ** (-step / 4) for step in range(33))

Rounding = Callable[[Any, Any], Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """Of a layer's keys, or of its values: the largest by head [H], and some of them [H, N]."""

    largest: Any
    kept: Any


@dataclass(frozen=True, slots=True)
class Cache:
    """A kind of cache: how it rounds, and the scale that it has of what was seen."""

    name: str
    rounded: Rounding
    scale: Callable[[Seen], Any]


class Recorder:
    """Keeps what a layer writes."""

    def __init__(self) -> None:
        self._largest: list[list[Any]] = [[], []]
        self._kept: list[list[Any]] = [[], []]

    def __call__(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Take in keys and values [1, H, T, D]."""
        for place, tensor in enumerate((keys, values)):
            heads = tensor[0].float()
            self._largest[place].append(heads.abs().amax((1, 2)))
            step = max(1, heads.shape[1] // _KEPT_TOKENS)
            self._kept[place].append(heads[:, ::step].flatten(1))
        return keys, values

    def result(self) -> tuple[Seen, Seen]:
        """Give keys and values."""
        import torch  # noqa: PLC0415

        keys, values = (
            Seen(torch.stack(largest).amax(0), torch.cat(kept, 1))
            for largest, kept in zip(self._largest, self._kept, strict=True)
        )
        return keys, values


def rounded_to_int8(values: Any, scale: Any) -> Any:
    """Round values [B, H, T, D] to int8 with one scale, or one a head [H]."""
    factor = scale.reshape(1, -1, 1, 1)
    return (values / factor).round().clamp(-INT8_MAX, INT8_MAX) * factor


def least_squares(seen: Seen) -> Any:
    """Search the scale, from the largest value down to a 256th of it, that loses least of the kept values."""
    import torch  # noqa: PLC0415

    values = seen.kept[None, :, :, None]
    scales = [seen.largest.max() / E4M3_MAX * step for step in _STEPS]
    errors = [float((rounded_to_e4m3(values, scale) - values).square().sum()) for scale in scales]
    return scales[int(torch.tensor(errors).argmin())]


def _one(seen: Seen) -> Any:
    return seen.largest.new_ones(1)


CACHES = (
    Cache("FP8, scale 1.0", rounded_to_e4m3, _one),
    Cache("FP8, largest of the layer / 448", rounded_to_e4m3, lambda seen: seen.largest.max() / E4M3_MAX),
    Cache("FP8, twice that", rounded_to_e4m3, lambda seen: 2 * seen.largest.max() / E4M3_MAX),
    Cache("FP8, least squares", rounded_to_e4m3, least_squares),
    Cache("FP8, largest of each head / 448", rounded_to_e4m3, lambda seen: seen.largest / E4M3_MAX),
    Cache("int8, largest of the layer / 127", rounded_to_int8, lambda seen: seen.largest.max() / INT8_MAX),
)


def calibrated(base: Path, samples: Samples) -> dict[str, tuple[Seen, Seen]]:
    """Let the base read the calibration chats; what each layer wrote."""
    layered = layered_base(base)
    modules = attention_modules(layered.model)
    recorders = {layer: Recorder() for layer in modules}
    with recorded(modules, recorders), layered.reading() as model:
        for _ in read_texts(model, [sample["ids"] for sample in samples.calibration]):
            pass
    return {layer: recorder.result() for layer, recorder in recorders.items()}


def reading_with(
    opened: Any, parent: ParentOutputs, base: Path, inputs: EvalInputs, changes: Mapping[str, Any]
) -> SampleMetrics:
    """Let a model read the held-out chats over a cache."""
    with opened.without_layers() as model:
        heads = LmHeads(parent.lm_head(model, base), find_lm_head(model, inputs.samples[0]))
    modules = attention_modules(opened.model)
    handles = [change_cache(modules[layer], change) for layer, change in changes.items()]
    with opened.reading() as model:
        result = read_samples(model, heads, parent.tensor(), inputs.samples, lambda _: None)
    for handle in handles:
        handle.remove()
    return result


def changes_of(cache: Cache, seen: Mapping[str, tuple[Seen, Seen]]) -> dict[str, Any]:
    """Give each layer what a cache does to its keys and values."""

    def change(scales: tuple[Any, Any], keys: Any, values: Any) -> tuple[Any, Any]:
        return cache.rounded(keys, scales[0]), cache.rounded(values, scales[1])

    return {layer: partial(change, (cache.scale(keys), cache.scale(values))) for layer, (keys, values) in seen.items()}


def rows(options: argparse.Namespace, context: RunContext) -> Iterator[str]:
    """Measure and yield the lines of the result."""
    base = options.model.resolve()
    datasets, records = read_datasets(options.data or shipped_files())
    split = split_records(records, samples=options.samples, seed=0, datasets=datasets)
    samples = tokenize_samples(base, split, options.max_tokens, context)
    seen = calibrated(base, samples)
    yield from ranges(seen)
    job: dict[str, Any] = {"base": str(base), "samples": samples.held_out[: options.eval_chats], "prompted": []}
    job |= {"prompts": 0, "seeds": 1, "new_tokens": 1, "questions": [], "task_tokens": 1}
    inputs = prepare(job, load_tokenizer(base, chats=False))
    kept = ParentCaches(stage_store(context.environ).root, context.folder, base, read_base(base).digest)
    parent = read_parent(inputs, kept, lambda _: lambda _: None)
    yield f"\n{len(inputs.samples)} held-out chats, {inputs.tokens:,} tokens; KL in nats of generated tokens\n"
    yield "| weights | cache | KL | 95 % | p99 | top-1 | change from the first row | p |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, opened in (("base", None), *((path.name, path) for path in options.variant)):
        before: list[Any] = []
        for cache in (*(() if opened is None else (None,)), *wanted(options)):
            layered = layered_base(base) if opened is None else layered_variant(opened, base)
            changes = changes_of(cache, seen) if cache else {}
            reading = reading_with(layered, parent, base, inputs, changes)
            line, before = row(reading, inputs, before)
            yield f"| {name} | {cache.name if cache else 'not rounded'} | {line} |"


def wanted(options: argparse.Namespace) -> list[Cache]:
    """Give the kinds of cache that the command line names."""
    return [cache for cache in CACHES if not options.cache or any(part in cache.name for part in options.cache)]


def ranges(seen: Mapping[str, tuple[Seen, Seen]]) -> Iterator[str]:
    """Tell how large keys and values are, and how many would be rounded to less than 3 bits with scale 1.0."""
    for place, name in enumerate(("keys", "values")):
        largest = sorted(float(pair[place].largest.max()) for pair in seen.values())
        small = [float((pair[place].kept.abs() < 2**-6).float().mean()) for pair in seen.values()]
        yield (
            f"{name}: the largest of a layer is {largest[0]:.3g} to {largest[-1]:.3g}, of half the layers up to "
            f"{largest[len(largest) // 2]:.3g}; below 2^-6 are {min(small):.1%} to {max(small):.1%} of a layer's"
        )


def row(reading: SampleMetrics, inputs: EvalInputs, before: Sequence[Any]) -> tuple[str, list[Any]]:
    """Give a reading's figures, and the difference from the first reading of the same weights."""
    import torch  # noqa: PLC0415

    sums, each = [], []
    for number, metrics in enumerate(reading.samples):
        marked = torch.tensor(inputs.subsets(number)["generated"])
        sums.append(token_sums(metrics, marked))
        each.append(metrics.divergence[marked].tolist())
    counts = [one.tokens for one in sums]
    kl = token_mean([one.divergence for one in sums], counts)
    agreed = sum(one.agreed for one in sums) / sum(counts)
    cells = [f"{kl.value:.5f}", f"{kl.low:.5f} to {kl.high:.5f}", f"{percentile(each, 0.99).value:.4f}"]
    cells.append(f"{agreed:.2%}")
    if not before:
        return " | ".join([*cells, "", ""]), list(sums)
    changes = [after.divergence - first.divergence for after, first in zip(sums, before, strict=True)]
    more = token_mean(changes, counts)
    cells.append(f"{more.value:+.5f} ({more.low:+.5f} to {more.high:+.5f})")
    return " | ".join([*cells, f"{sign_flip_p(changes):.4f}"]), list(before)


def main() -> int:
    """Print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--variant", type=Path, action="append", default=[])
    parser.add_argument("--data", type=Path, action="append")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--eval-chats", type=int, default=96)
    parser.add_argument("--cache", action="append", metavar="NAME", help="kinds by any part of their names (all)")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="quantgate-") as folder:
        context = RunContext(Path(folder), child_environ(process_environment()), ProgressReporter(sys.stderr))
        import torch  # noqa: PLC0415

        with torch.inference_mode():
            for line in rows(options, context):
                print(line, flush=True)
    print(f"\n{machine_line()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
