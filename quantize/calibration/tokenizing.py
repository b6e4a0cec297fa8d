"""Rows -> token samples, once and by us: no double BOS, real truncation, reasoning kept. Runs as a child process."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from quantize.calibration.literals import Literals
from quantize.calibration.records import Record
from quantize.calibration.rendering import Tokenizer, has_reasoning, render
from quantize.calibration.thinking import THINK, Markers, Span, markers_of
from quantize.errors import CalibrationError, RecipeError
from quantize.model_files.kept_files import TOKENIZER_FILES
from quantize.running.worker import WorkerChannel, run_child

_PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
_PROBLEMS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as token ids, `cut_tokens` fewer than it has.

    `reasoning` are the ranges [first, last) of token positions in think spans, tags included, together
    `reasoning_tokens`; `answer` is the range of the last answer without its reasoning. `reasoning_from` is the
    position where reasoning begins in the whole row, also beyond the cut; None where the rendered text has none.
    `is_text`: the row is bare text, without turns.
    """

    ids: tuple[int, ...]
    reasoning_tokens: int
    where: str
    sha256: str
    reasoning: tuple[Span, ...] = ()
    answer: Span = (0, 0)
    cut_tokens: int = 0
    generated: bool = False
    reasoning_from: int | None = None
    is_text: bool = False


def encode(record: Record, tokenizer: Tokenizer, max_tokens: int, literals: Literals | None = None) -> Sample:
    """Tokenize a row, cut to `max_tokens` ids; special tokens come from the template, or for bare text one BOS.

    `literals` keep special tokens that are written out in contents from becoming special.
    """
    masked = literals.masked(record) if literals else record
    rendered = render(masked, tokenizer)
    if literals and masked is not record:
        encoded = literals.encode(rendered.text)
    else:
        encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]
    if record.text and adds_bos(tokenizer):
        ids, offsets = [tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
    if _starts_twice(ids, tokenizer.bos_token_id):
        ids, offsets = ids[1:], offsets[1:]
    kept = offsets[:max_tokens]
    every = _inside(offsets, rendered.reasoning)
    reasoning = _ranges([place for place in every if place < max_tokens])
    answered = _ranges(_inside(kept, [rendered.answer]))
    return Sample(
        ids=tuple(ids[:max_tokens]),
        reasoning_tokens=sum(last - first for first, last in reasoning),
        where=record.where,
        sha256=record.sha256,
        reasoning=reasoning,
        answer=(answered[0][0], answered[-1][1]) if answered else (len(kept), len(kept)),
        cut_tokens=max(len(ids) - max_tokens, 0),
        generated=record.generated,
        reasoning_from=every[0] if every else None,
        is_text=bool(record.text),
    )


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Tell whether a tokenizer begins a text with its BOS by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def require_reasoning(records: Sequence[Record], samples: Sequence[Sample], markers: Markers = THINK) -> None:
    """Refuse samples that lost all of their source's reasoning: the Hessian would never see it.

    What is cut off and what the template deletes are counted apart.
    """
    lost = [pair for pair in zip(records, samples, strict=True) if has_reasoning(pair[0], markers)]
    if not lost or any(sample.reasoning_tokens for sample in samples):
        return
    cut = [(sample.reasoning_from, record.where) for record, sample in lost if sample.reasoning_from is not None]
    if cut:
        first, where = min(cut)
        problem = (
            f"{where}: --max-tokens cuts every sample before its reasoning; here, where it begins earliest, it does at "
            f"token {first + 1}; raise --max-tokens, or shorten what comes before"
        )
    else:
        problem = (
            f"{lost[0][0].where}: the chat template deletes all {markers.start} reasoning; "
            "put it in the last assistant turn, or calibrate on text without reasoning"
        )
    raise CalibrationError([problem])


def load_tokenizer(base: Path, *, chats: bool = True) -> Any:
    """Load a base's own tokenizer; RecipeError where it can't be, or has no template for `chats`."""
    import transformers  # noqa: PLC0415

    # For a plain tokenizer.json AutoTokenizer gives the same object, but imports torch on its way (10 s).
    plain = (base / "tokenizer.json").is_file() and _tokenizer_class(base) in _PLAIN_CLASSES
    loader = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
    if not any((base / name).is_file() for name in TOKENIZER_FILES):
        raise RecipeError(f"{base}: has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy it from its own base")
    try:
        tokenizer = loader.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{base}: its tokenizer can't be loaded: {str(error).splitlines()[0]}") from error
    if chats and not tokenizer.chat_template:
        raise RecipeError(f"{base}: has no chat template; put its chat_template.jinja there")
    _require_template(base, tokenizer.chat_template)
    return tokenizer


def _require_template(base: Path, template: Any) -> None:
    """Raise RecipeError where a chat template is not valid Jinja; None and named templates are left to transformers."""
    from jinja2 import Environment, TemplateSyntaxError  # noqa: PLC0415

    if not isinstance(template, str):
        return
    try:
        # The extensions of transformers' own environment (`utils/chat_template_utils.py`), and its `generation` tag.
        Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(template)  # noqa: S701 - no HTML
    except TemplateSyntaxError as error:
        if "generation" not in str(error):
            raise RecipeError(
                f"{base}: its chat template is invalid: line {error.lineno}: {error.message}; copy it from its own base"
            ) from None


def longest_input(config: dict[str, Any]) -> int | None:
    """How many positions a model was made for, by its configuration."""
    limit = config.get("text_config", config).get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else None


def vocabulary_size(config: dict[str, Any]) -> int | None:
    """How many rows the embeddings have, by a model's configuration."""
    size = config.get("text_config", config).get("vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def require_embedded(base: Path, samples: Iterable[Sample], rows: int | None) -> None:
    """Raise RecipeError for a sample with a token beyond the embeddings' `rows`: the model can't read it."""
    if rows is None:
        return
    for sample in samples:
        largest = max(sample.ids, default=0)
        if largest >= rows:
            raise RecipeError(
                f"{base}: its tokenizer gives token id {largest}, and the embeddings have {rows} rows "
                f"({sample.where}); resize them (resize_token_embeddings), or use the tokenizer that it was "
                "trained with"
            )


def vocabulary_notes(tokens: int, rows: int | None) -> list[str]:
    """Warn of a tokenizer that is larger than the embeddings; tokens that no text uses do no harm."""
    if rows is None or tokens <= rows:
        return []
    return [f"warning: the tokenizer has {tokens} tokens and the embeddings {rows} rows; requests with the others fail"]


def tokenize_split(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, max_tokens, max_bad, rows: {side: [row]}}` -> `{max_tokens, sides, refused, notes}`.

    `sides` has a sample for each row, or None where the template refuses the row; `refused` are the problems.
    """
    base = Path(job["base"])
    sides = {side: list(map(Record.from_dict, records)) for side, records in job["rows"].items()}
    every = [record for records in sides.values() for record in records]
    tokenizer = load_tokenizer(base, chats=any(record.messages for record in every))
    config = json.loads((base / "config.json").read_bytes())
    limit = longest_input(config) or job["max_tokens"]
    max_tokens = min(job["max_tokens"], limit)
    problems: list[str] = []
    encoded = _encode_all(every, tokenizer, max_tokens, channel, problems)
    if len(problems) > job.get("max_bad", 0.0) * len(every):
        raise CalibrationError(problems[:_PROBLEMS_SHOWN])
    following = iter(encoded)
    samples = {side: [next(following) for _ in records] for side, records in sides.items()}
    for side, records in sides.items():
        pairs = [(record, sample) for record, sample in zip(records, samples[side], strict=True) if sample]
        require_reasoning([record for record, _ in pairs], [sample for _, sample in pairs], markers_of(tokenizer))
    rows = vocabulary_size(config)
    require_embedded(base, [sample for sample in encoded if sample], rows)
    return {
        "max_tokens": max_tokens,
        "sides": {side: [sample and asdict(sample) for sample in encoded] for side, encoded in samples.items()},
        "refused": problems,
        "notes": [*tool_notes(every, tokenizer), *vocabulary_notes(len(tokenizer), rows)],
    }


def tool_notes(records: Sequence[Record], tokenizer: Tokenizer) -> list[str]:
    """Say so if rows have tools and the template has no place for them: then they are not calibrated on."""
    template, using = str(getattr(tokenizer, "chat_template", "")), sum(record.uses_tools for record in records)
    if not using or "tool" in template:
        return []
    return [f"warning: {using} of {len(records)} rows have tools, and the base's chat template renders none of them"]


def _encode_all(
    records: Sequence[Record], tokenizer: Tokenizer, max_tokens: int, channel: WorkerChannel, problems: list[str]
) -> list[Sample | None]:
    """Encode rows; where the template refuses one, its sample is None and `problems` says why."""
    from jinja2 import TemplateError  # noqa: PLC0415

    samples: list[Sample | None] = []
    literals = Literals.of(tokenizer)
    for done, record in enumerate(records, 1):
        try:
            samples.append(encode(record, tokenizer, max_tokens, literals))
        except (TemplateError, TypeError) as error:  # filters of templates raise TypeError
            samples.append(None)
            problems.append(f"{record.where}: the base's chat template refuses this chat: {error}")
        channel.progress(done, len(records))
    return samples


def _starts_twice(ids: Sequence[int | None], bos: int | None) -> bool:
    return bos is not None and list(ids[:2]) == [bos, bos]


def _inside(offsets: Iterable[Span], spans: Iterable[Span]) -> list[int]:
    """List the positions of the tokens that begin in a span; BOS and the like come from no character."""
    ranges = list(spans)
    return [
        place
        for place, (first, last) in enumerate(offsets)
        if last > first and any(start <= first < end for start, end in ranges)
    ]


def _ranges(places: Sequence[int]) -> tuple[Span, ...]:
    """Join ascending positions into ranges [first, last)."""
    if not places:
        return ()
    breaks = [(before, after) for before, after in pairwise(places) if after > before + 1]
    starts = [places[0], *(after for _, after in breaks)]
    ends = [*(before + 1 for before, _ in breaks), places[-1] + 1]
    return tuple(zip(starts, ends, strict=True))


def _tokenizer_class(base: Path) -> str:
    path = base / "tokenizer_config.json"
    return str(json.loads(path.read_bytes()).get("tokenizer_class", "")) if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(run_child(tokenize_split))
