"""What each stage of a run takes: seconds, main memory, GPU memory; estimates from shapes and nominal rates. Pure.

Evaluation reads parent and variant by layers (`quantize.layered_models`); only generation holds a whole model.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType

from config.manifest import Engine
from quantize.base import BaseModel
from quantize.calibration.generation_child import LARGEST_BATCH, cache_room
from quantize.evaluation.evaluate import EvaluationPlan
from quantize.evaluation.lm_head import PASS_TOKENS
from quantize.evaluation.sampling import rows_at_once
from quantize.planning.cost_estimate import CostEstimate
from quantize.planning.model_sizes import ModelSizes, sizes_of
from quantize.schemes.module_config import fused_name

# Resident memory of a child after its imports, as measured with torch 2.13, transformers 5.19 and GPTQModel 7.6.
LIBRARY_BYTES: Mapping[str, int] = MappingProxyType({"tokenizers": 85_000_000, "transformers": 520_000_000})
# Of each word of the vocabulary, in the tokenizer.
_WORD_BYTES = 1400
_FP32_BYTES = 4
_ITEM_BYTES: Mapping[Engine, int] = MappingProxyType({"cpu": 4, "cuda": 2})
# int32 words, integers, zero points and scales of a packed matrix, while its dense weights are computed (a weight).
_UNPACKING_BYTES = 20
# Tensors as wide as the model, and as wide as its inner layer, that live at once in a forward pass of one layer.
_HIDDEN_COPIES, _INNER_COPIES = 6, 3
# fp32 logits of 512 positions and 4096 tokens of the vocabulary, in the copies that a comparison makes.
_COMPARISON_BYTES = 8 * 512 * 4096 * _FP32_BYTES
_SHARD_BYTES = 4_000_000_000
# What a search reads (`quantize.mixed_precision.auto_scheme`): tokens for a unit or a kind of units and for a whole
# assignment, with their context; positions whose log-probabilities are in memory at once, copies included; how many
# kinds of units of all solutions, and assignments, are measured.
_SHORT_TOKENS, _LONG_TOKENS, _SEARCH_SCORED, _KINDS, _ASSIGNMENTS = 2400, 2900, 3500, 16, 12
# What a search for scales of channels reads (`quantize.transforms`): samples, and tokens for each set of scales.
_SMOOTH_SAMPLES, _SMOOTH_TOKENS, _SMOOTH_CANDIDATES = 16, 256, 21


@dataclass(frozen=True, slots=True)
class DataRates:
    """What a machine moves in a second, nominally: weights that a decoding step reads, operations of a forward pass."""

    weight_bytes: float
    forward_flops: float


DATA_RATES: Mapping[Engine, DataRates] = MappingProxyType(
    {"cpu": DataRates(6e9, 50e9), "cuda": DataRates(1.5e12, 100e12)}
)
_DISK_BYTES_PER_SECOND = 1.5e9
_HASHED_BYTES_PER_SECOND = 1.2e9
# On one core.
_UNPACKED_WEIGHTS_PER_SECOND = 150e6
_START_SECONDS = 8.0


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage: `gpu_bytes` (0 without a GPU) are of all GPUs together where `spread`, else of one.

    `mapped_bytes` are those of files that are mapped while they are read: they count as resident, and give way.
    """

    stage: str
    seconds: float
    host_bytes: int
    gpu_bytes: int = 0
    spread: bool = False
    mapped_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Workload:
    """What decides the cost of a run beside its base.

    `tokens` of calibration text, the longest sample of `longest_tokens`; `held_out_tokens` and `prompt_tokens` (the
    longest) of the evaluation; `self_generate` answers of up to `max_tokens` that the base writes itself;
    `groups` of modules that a search exchanges one at a time between at most `most_solves` solutions; `cache_scales`
    are measured where the KV cache is FP8; `transformed_bytes` are written of a base that is transformed.
    """

    engine: Engine
    cores: int
    tokens: int
    longest_tokens: int
    evaluation: EvaluationPlan
    held_out_tokens: int
    prompt_tokens: int
    variant_bytes: int
    memory_bytes: int
    self_generate: int = 0
    max_tokens: int = 0
    by_replica: bool = False
    groups: int = 0
    cache_scales: bool = False
    most_solves: int = 1
    transformed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts that a model writes: how many, of how many tokens, after prompts of how many."""

    count: int
    new_tokens: int
    prompt_tokens: int


def stage_costs(base: BaseModel, solving: CostEstimate, work: Workload) -> tuple[StageCost, ...]:
    """List the stages of a run with what each takes, in their order."""
    return tuple(_stages(base, sizes_of(base), solving, work))


def evaluation_costs(base: BaseModel, work: Workload) -> tuple[StageCost, ...]:
    """List what the parts of an evaluation take."""
    return tuple(_evaluation(base, sizes_of(base), work))


def _stages(base: BaseModel, sizes: ModelSizes, solving: CostEstimate, work: Workload) -> Iterator[StageCost]:
    yield StageCost("hash base", base.bytes / _HASHED_BYTES_PER_SECOND, 50_000_000)
    if work.self_generate and not work.by_replica:
        texts = Texts(work.self_generate, work.max_tokens, work.max_tokens // 4)
        yield _generation(base, sizes, work, "self-generate", texts)
    yield StageCost(
        "tokenize",
        _START_SECONDS / 2 + work.tokens / 50_000,
        LIBRARY_BYTES["tokenizers"] + _WORD_BYTES * sizes.vocabulary + 30 * work.tokens,
    )
    if work.transformed_bytes:
        yield _transform(base, sizes, work)
    mapped = 0 if solving.by_layers else base.bytes
    # A tensor of the base that is copied: as it is read, and as it is handed on.
    reading = 2 * max((tensor.bytes for tensor in base.tensors.values()), default=0)
    solve = StageCost("solve", solving.seconds, solving.host_bytes, solving.gpu_bytes, mapped_bytes=mapped)
    yield solve
    if work.groups:
        more = work.most_solves - 1
        yield replace(solve, stage=f"solve, {more} more" if more > 1 else "solve again", seconds=more * solve.seconds)
        yield _sensitivity(base, sizes, work)
    if work.cache_scales:
        yield _reading(base, sizes, replace(work, held_out_tokens=work.tokens), "KV cache scales", packed=False)
    yield StageCost(
        "write checkpoint",
        (base.bytes + 2 * work.variant_bytes) / _DISK_BYTES_PER_SECOND,
        LIBRARY_BYTES["transformers"] // 2 + min(work.variant_bytes, _SHARD_BYTES) + sizes.matrix * 6 + reading,
    )
    yield from _evaluation(base, sizes, work)
    yield StageCost("seal", work.variant_bytes / _HASHED_BYTES_PER_SECOND, 50_000_000)


def _transform(base: BaseModel, sizes: ModelSizes, work: Workload) -> StageCost:
    """The base reads a few samples by layers; each set of scales is tried on some tokens; all weights are written."""
    read = min(work.tokens, _SMOOTH_SAMPLES * work.longest_tokens)
    cost = _reading(base, sizes, replace(work, held_out_tokens=read), "transform", packed=False)
    tried = 2 * _SMOOTH_CANDIDATES * _SMOOTH_TOKENS * sizes.layers * sizes.layer / _forward(work)
    return replace(cost, seconds=cost.seconds + tried + work.transformed_bytes / _DISK_BYTES_PER_SECOND)


def _sensitivity(base: BaseModel, sizes: ModelSizes, work: Workload) -> StageCost:
    """The whole model reads: short texts for each unit, with half of its layers on average, and longer ones.

    The parent's weights of a kind of units wait in main memory while those of a solution are in their place.
    """
    weights = sizes.parameters * _ITEM_BYTES[work.engine]
    waiting = _largest_kind(base) * _ITEM_BYTES[work.engine]
    kept = (_SEARCH_SCORED * sizes.vocabulary + _SHORT_TOKENS * sizes.layers * sizes.hidden) * _FP32_BYTES
    read = _SHORT_TOKENS * (work.groups / 2 + _KINDS) + _LONG_TOKENS * _ASSIGNMENTS
    return StageCost(
        "sensitivity",
        _START_SECONDS + 2 * read * sizes.active * sizes.layers / _forward(work),
        *_placed(weights + waiting + 6 * sizes.matrix * _FP32_BYTES + kept, weights + kept, work),
        spread=True,
        mapped_bytes=base.bytes,
    )


def _largest_kind(base: BaseModel) -> int:
    """Count the weights of the units that differ in their layer alone, of the largest such kind."""
    kinds: Counter[str] = Counter()
    for module, shape in base.shapes.items():
        kinds[fused_name(module).rpartition(".")[2]] += prod(shape)
    return max(kinds.values(), default=0)


def _evaluation(base: BaseModel, sizes: ModelSizes, work: Workload) -> Iterator[StageCost]:
    yield _reading(base, sizes, work, "evaluate: parent reads", packed=False)
    yield _reading(base, sizes, work, "evaluate: variant reads", packed=True)
    if work.evaluation.prompts or work.evaluation.tasks:
        texts = Texts(work.evaluation.prompts * work.evaluation.seeds, work.evaluation.new_tokens, work.prompt_tokens)
        yield _generation(base, sizes, work, "evaluate: both write", texts, models=2)


def _reading(base: BaseModel, sizes: ModelSizes, work: Workload, stage: str, *, packed: bool) -> StageCost:
    """One model by layers: its outer weights, one layer, and the activations of one pass."""
    item = _ITEM_BYTES[work.engine]
    tokens = min(work.held_out_tokens, max(PASS_TOKENS, work.longest_tokens))
    inner = max(sizes.widest_inputs, sizes.widest_outputs)
    activations = tokens * (_HIDDEN_COPIES * sizes.hidden + _INNER_COPIES * inner) * item
    resident = (sizes.outer + sizes.layer + sizes.vocabulary * sizes.hidden) * item + activations + _COMPARISON_BYTES
    transient = sizes.matrix * (_UNPACKING_BYTES if packed else 2)
    size = work.variant_bytes if packed else base.bytes
    unpacked = sizes.layers * sizes.layer / _UNPACKED_WEIGHTS_PER_SECOND / work.cores if packed else 0.0
    seconds = _START_SECONDS + size / _DISK_BYTES_PER_SECOND + unpacked
    seconds += 2 * work.held_out_tokens * (sizes.layers * sizes.active + sizes.outer) / _forward(work)
    return StageCost(stage, seconds, *_placed(resident + transient, resident, work))


def _generation(
    base: BaseModel, sizes: ModelSizes, work: Workload, stage: str, texts: Texts, models: int = 1
) -> StageCost:
    """Whole models, one after the other, that write texts in batches."""
    item = _ITEM_BYTES[work.engine]
    weights = sizes.parameters * item
    token_bytes = max(sizes.kv * item, 1)
    length = texts.prompt_tokens + texts.new_tokens
    if stage == "self-generate":
        gpus = (work.memory_bytes,) if work.engine == "cuda" else ()
        most = min(LARGEST_BATCH, cache_room(weights, gpus) // (token_bytes * length))
    else:
        most = rows_at_once(token_bytes, length, work.memory_bytes)
    rows = max(1, min(texts.count, most))
    active = (sizes.layers * sizes.active + sizes.outer) * item
    step_seconds = max(active / DATA_RATES[work.engine].weight_bytes, 2 * rows * active / item / _forward(work))
    steps = texts.new_tokens * -(-texts.count // rows)
    seconds = models * (_START_SECONDS + weights / _DISK_BYTES_PER_SECOND + steps * step_seconds)
    resident = weights + rows * length * token_bytes + rows * sizes.vocabulary * 3 * _FP32_BYTES
    host, gpu = _placed(resident + sizes.matrix * item, resident, work)
    return StageCost(stage, seconds, host, gpu, spread=True, mapped_bytes=base.bytes)


def _placed(on_cpu: int, on_gpu: int, work: Workload) -> tuple[int, int]:
    """Say what main memory and GPU hold: with a GPU main memory has only what passes through it."""
    if work.engine == "cpu":
        return LIBRARY_BYTES["transformers"] + on_cpu, 0
    return LIBRARY_BYTES["transformers"] + (on_cpu - on_gpu) + 2_000_000_000, on_gpu


def _forward(work: Workload) -> float:
    return DATA_RATES[work.engine].forward_flops * (work.cores if work.engine == "cpu" else 1)
