"""The parent's side of an evaluation: its last states, its texts and its answers, from the cache or from the model.

The model is loaded only if something is missing, and is gone from memory before its variant is loaded.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantize.dense_models import layered_base, load_base, reclaim, runtime_fingerprint
from quantize.evaluation.inputs import EvalInputs, GenerationTask
from quantize.evaluation.lm_head import WHOLE, LmHead, describe_lm_head, find_lm_head, last_hidden_states, load_lm_head
from quantize.evaluation.sampling import Completion, generate
from quantize.evaluation.token_metrics import compare
from quantize.running.stage_store import StageKey, StageResult, StageStore, stage_key

Advance = Callable[[int], None]

_STATES_FILE = "states.bin"
# Raise this when a base's states are computed otherwise, and differ in their last digits.
_STATES_REVISION = 3
# Tokens that are read twice to see how far a model is from itself.
_FLOOR_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ParentCaches:
    """Where entries are kept: for all evaluations to come, or in scratch for this one alone."""

    lasting: Path
    scratch: Path
    base: Path
    digest: str

    def caches(self) -> tuple[StageStore, ...]:
        """The caches to look in; a base without a digest has nothing that lasts."""
        wanted = (self.lasting, self.scratch) if self.digest else (self.scratch,)
        return tuple(StageStore(root) for root in wanted)

    def find(self, key: StageKey) -> StageResult | None:
        """Look an entry up."""
        return next((entry for cache in self.caches() if (entry := cache.find(key))), None)

    def room(self, needed_bytes: int, *, lasting: bool = True) -> StageStore:
        """Choose the cache for a new entry."""
        if lasting and self.digest:
            return StageStore(roomiest(self.lasting, self.scratch, needed_bytes))
        return StageStore(self.scratch)


def roomiest(wanted: Path, scratch: Path, needed_bytes: int) -> Path:
    """Choose where to write: the wanted directory, or scratch where that one is not writable or full."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(wanted).free if os.access(wanted, os.W_OK) else 0
    except OSError:
        free = 0
    if free > needed_bytes:
        return wanted
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


@dataclass(frozen=True, slots=True)
class ParentOutputs:
    """What the parent had to say about the material."""

    states: StageResult
    texts: tuple[Completion, ...]
    answers: tuple[Completion, ...]

    def tensor(self) -> Any:
        """The last states of all predicted tokens [tokens, width], mapped from disk."""
        import torch  # noqa: PLC0415

        tokens, width = self.states.facts["shape"]
        kind = getattr(torch, self.states.facts["dtype"])
        flat = torch.from_file(str(self.states.directory / _STATES_FILE), shared=False, size=tokens * width, dtype=kind)
        return flat.view(tokens, width)

    @property
    def kl_floor(self) -> float | None:
        """Mean divergence in nats of the parent from itself, read one sample at a time instead of several."""
        floor: float | None = self.states.facts["kl_floor"]
        return floor

    def lm_head(self, model: Any, base: Path) -> LmHead:
        """How the states become logits, beside a model that is loaded."""
        description = self.states.facts["readout"]
        return load_lm_head(description, base, model) if description else WHOLE


@dataclass(frozen=True, slots=True)
class _Keys:
    states: StageKey
    texts: StageKey
    answers: StageKey


def read_parent(inputs: EvalInputs, parent_caches: ParentCaches, announce: Callable[[int], Advance]) -> ParentOutputs:
    """Give what the parent says, running it if need be; `announce` is told the tokens that takes, and lends a meter."""
    keys = _keys(inputs, parent_caches.digest)
    found = {key: parent_caches.find(key) for key in (keys.states, keys.texts, keys.answers)}
    missing = [key for key, entry in found.items() if entry is None]
    work = {
        keys.states: inputs.tokens,
        keys.texts: inputs.prompts.most_tokens,
        keys.answers: inputs.questions.most_tokens,
    }
    advance = announce(sum(work[key] for key in missing if work[key]))
    if any(work[key] for key in missing):
        found |= _run_parent(inputs, parent_caches, {key for key in missing if work[key]}, keys, advance)
        reclaim()
    states = found[keys.states]
    assert states is not None
    return ParentOutputs(states, _completions(found[keys.texts]), _completions(found[keys.answers]))


def _run_parent(
    inputs: EvalInputs, parent_caches: ParentCaches, missing: set[StageKey], keys: _Keys, advance: Advance
) -> dict[StageKey, StageResult | None]:
    import torch  # noqa: PLC0415

    made: dict[StageKey, StageResult | None] = {}
    with torch.inference_mode():
        if keys.states in missing:
            made[keys.states] = _keep_states(inputs, parent_caches, keys.states, advance)
        tasks = {keys.texts: inputs.prompts, keys.answers: inputs.questions}
        if missing & tasks.keys():
            model = load_base(parent_caches.base)
            for key in sorted(missing & tasks.keys(), key=str):
                made[key] = _keep_texts(model, tasks[key], parent_caches, key, advance)
    return made


def _keep_states(inputs: EvalInputs, parent_caches: ParentCaches, key: StageKey, advance: Advance) -> StageResult:
    layered = layered_base(parent_caches.base)
    with layered.without_layers() as model:
        lm_head = find_lm_head(model, inputs.samples[0])
    description = describe_lm_head(lm_head, parent_caches.base) if lm_head.weight is not None else None
    lm_head = lm_head if description else WHOLE
    width = lm_head.weight.shape[1] if description else model.config.get_text_config().vocab_size
    needed = inputs.tokens * width * model.dtype.itemsize
    # Whole logits are for this evaluation alone: they would fill the cache with a single base.
    cache = parent_caches.room(needed, lasting=description is not None)
    with cache.staging(key) as staged, layered.reading() as model:
        states = last_hidden_states(model, lm_head, inputs.samples)
        shape, kind, first = _write_states(staged / _STATES_FILE, states, advance)
        floor = _divergence_from_itself(model, lm_head, first, inputs.samples[0])
        return cache.keep(key, staged, {"readout": description, "shape": shape, "dtype": kind, "kl_floor": floor})


def _divergence_from_itself(model: Any, lm_head: LmHead, states: Any, ids: Sequence[int]) -> float:
    """Read a sample again, alone and cut, and hold it against its states [T, H] from a batch."""
    import torch  # noqa: PLC0415

    kept = ids[: _FLOOR_TOKENS + 1]
    again = next(iter(last_hidden_states(model, lm_head, [kept])))
    before = states[: len(again)].to(again.device)
    targets = torch.tensor(kept[1:], device=again.device)
    both = partial(lm_head.logits, before), partial(lm_head.logits, again)
    return float(compare(*both, targets, lm_head.vocabulary(again)).divergence.mean())


def _write_states(path: Path, chunks: Iterable[Any], advance: Advance) -> tuple[tuple[int, int], str, Any]:
    """Write states one behind the other; give their shape, their dtype and those of the first sample."""
    import torch  # noqa: PLC0415

    tokens, width, kind = 0, 0, ""
    first = None
    with path.open("wb") as file:
        for states in chunks:
            file.write(states.cpu().contiguous().view(torch.uint8).numpy().data)
            first = states.cpu() if first is None else first
            tokens, width, kind = tokens + states.shape[0], states.shape[1], str(states.dtype).rpartition(".")[2]
            advance(states.shape[0])
    return (tokens, width), kind, first


def _keep_texts(
    model: Any, task: GenerationTask, parent_caches: ParentCaches, key: StageKey, advance: Advance
) -> StageResult:
    completions = generate(model, task.requests, task.sampling, advance)
    cache = parent_caches.room(0)
    with cache.staging(key) as staged:
        return cache.keep(
            key, staged, {"replies": [[list(completion.ids), completion.finished] for completion in completions]}
        )


def _completions(entry: StageResult | None) -> tuple[Completion, ...]:
    payload = entry.facts["replies"] if entry else []
    return tuple(Completion(tuple(ids), finished) for ids, finished in payload)


def _keys(inputs: EvalInputs, digest: str) -> _Keys:
    def texts(task: GenerationTask) -> Mapping[str, Any]:
        return {"requests": [asdict(request) for request in task.requests], "sampling": asdict(task.sampling)}

    common = {"base": digest, "engine": runtime_fingerprint()}
    return _Keys(
        states=stage_key("parent-states", revision=_STATES_REVISION, samples=inputs.samples, **common),
        texts=stage_key("parent-texts", **texts(inputs.prompts), **common),
        answers=stage_key("parent-texts", **texts(inputs.questions), **common),
    )
