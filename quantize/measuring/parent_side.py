"""The parent's side of an evaluation: its last states, its texts and its answers, from the cache or from the model.

The model is loaded only if something is missing, and is gone from memory before its variant is loaded.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantize.dense_models import engine, load_base, reclaim
from quantize.measuring.material import Material, Writing
from quantize.measuring.parent_cache import ParentCache, ParentCacheEntry, entry_key, roomiest, states_file
from quantize.measuring.readout import WHOLE, Readout, describe_readout, find_readout, load_readout, read_states
from quantize.measuring.sampling import Reply, write_texts

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Archive:
    """Where entries are kept: for all evaluations to come, or in scratch for this one alone."""

    lasting: Path
    scratch: Path
    base: Path
    digest: str

    def caches(self) -> tuple[ParentCache, ...]:
        """The caches to look in; a base without a digest has nothing that lasts."""
        wanted = (self.lasting, self.scratch) if self.digest else (self.scratch,)
        return tuple(ParentCache(root) for root in wanted)

    def find(self, key: str) -> ParentCacheEntry | None:
        """Look an entry up."""
        return next((entry for cache in self.caches() if (entry := cache.find(key))), None)

    def room(self, needed_bytes: int, *, lasting: bool = True) -> ParentCache:
        """Choose the cache for a new entry."""
        if lasting and self.digest:
            return ParentCache(roomiest(self.lasting, self.scratch, needed_bytes))
        return ParentCache(self.scratch)


@dataclass(frozen=True, slots=True)
class ParentSide:
    """What the parent had to say about the material."""

    states: ParentCacheEntry
    texts: tuple[Reply, ...]
    answers: tuple[Reply, ...]

    def tensor(self) -> Any:
        """The last states of all predicted tokens [tokens, width], mapped from disk."""
        import torch  # noqa: PLC0415

        tokens, width = self.states.facts["shape"]
        kind = getattr(torch, self.states.facts["dtype"])
        flat = torch.from_file(str(self.states.states), shared=False, size=tokens * width, dtype=kind)
        return flat.view(tokens, width)

    def readout(self, model: Any, base: Path) -> Readout:
        """How the states become logits, beside a model that is loaded."""
        told = self.states.facts["readout"]
        return load_readout(told, base, model) if told else WHOLE


@dataclass(frozen=True, slots=True)
class _Keys:
    states: str
    texts: str
    answers: str


def read_parent(material: Material, archive: Archive, announce: Callable[[int], Advance]) -> ParentSide:
    """Give what the parent says, running it if need be; `announce` is told the tokens that takes, and lends a meter."""
    keys = _keys(material, archive.digest)
    found = {key: archive.find(key) for key in (keys.states, keys.texts, keys.answers)}
    missing = [key for key, entry in found.items() if entry is None]
    work = {
        keys.states: material.tokens,
        keys.texts: material.prompts.most_tokens,
        keys.answers: material.questions.most_tokens,
    }
    advance = announce(sum(work[key] for key in missing if work[key]))
    if any(work[key] for key in missing):
        found |= _run_parent(material, archive, {key for key in missing if work[key]}, keys, advance)
        reclaim()
    states = found[keys.states]
    assert states is not None
    return ParentSide(states, _replies(found[keys.texts]), _replies(found[keys.answers]))


def _run_parent(
    material: Material, archive: Archive, missing: set[str], keys: _Keys, advance: Advance
) -> dict[str, ParentCacheEntry]:
    import torch  # noqa: PLC0415

    model = load_base(archive.base)
    made: dict[str, ParentCacheEntry] = {}
    with torch.inference_mode():
        if keys.states in missing:
            made[keys.states] = _keep_states(model, material, archive, keys.states, advance)
        for key, writing in ((keys.texts, material.prompts), (keys.answers, material.questions)):
            if key in missing:
                made[key] = _keep_texts(model, writing, archive, key, advance)
    return made


def _keep_states(model: Any, material: Material, archive: Archive, key: str, advance: Advance) -> ParentCacheEntry:
    readout = find_readout(model, material.samples[0])
    told = describe_readout(readout, archive.base) if readout.weight is not None else None
    readout = readout if told else WHOLE
    width = readout.weight.shape[1] if told else model.config.get_text_config().vocab_size
    needed = material.tokens * width * model.dtype.itemsize
    # Whole logits are for this evaluation alone: they would fill the cache with a single base.
    cache = archive.room(needed, lasting=told is not None)
    with cache.staging(key) as staged:
        chunks = (states for ids in material.samples for states in read_states(model, readout, ids))
        shape, kind = _write_states(states_file(staged), chunks, advance)
        return cache.keep(key, staged, {"readout": told, "shape": shape, "dtype": kind})


def _write_states(path: Path, chunks: Iterable[Any], advance: Advance) -> tuple[tuple[int, int], str]:
    import torch  # noqa: PLC0415

    tokens, width, kind = 0, 0, ""
    with path.open("wb") as file:
        for states in chunks:
            file.write(states.cpu().contiguous().view(torch.uint8).numpy().data)
            tokens, width, kind = tokens + states.shape[0], states.shape[1], str(states.dtype).rpartition(".")[2]
            advance(states.shape[0])
    return (tokens, width), kind


def _keep_texts(model: Any, writing: Writing, archive: Archive, key: str, advance: Advance) -> ParentCacheEntry:
    replies = write_texts(model, writing.requests, writing.sampling, advance)
    cache = archive.room(0)
    with cache.staging(key) as staged:
        return cache.keep(key, staged, {"replies": [[list(reply.ids), reply.finished] for reply in replies]})


def _replies(entry: ParentCacheEntry | None) -> tuple[Reply, ...]:
    told = entry.facts["replies"] if entry else []
    return tuple(Reply(tuple(ids), finished) for ids, finished in told)


def _keys(material: Material, digest: str) -> _Keys:
    def texts(writing: Writing) -> Mapping[str, Any]:
        return {"requests": [asdict(request) for request in writing.requests], "sampling": asdict(writing.sampling)}

    common = {"base": digest, "engine": engine()}
    return _Keys(
        states=entry_key("states", samples=material.samples, **common),
        texts=entry_key("texts", **texts(material.prompts), **common),
        answers=entry_key("texts", **texts(material.questions), **common),
    )
