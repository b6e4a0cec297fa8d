"""What can be known to go wrong before hours of quantizing: looked at first, said in lines, refused with reasons."""

from collections import Counter
from dataclasses import dataclass
from statistics import median_low

from quantize.base import BaseModel
from quantize.calibration.samples import Samples
from quantize.errors import CalibrationError
from quantize.running.context import RunContext
from quantize.running.memory import widest_inputs

_SHORT_TOKENS = 32
_MOST_REPEATED = 0.2
# With less text than this the result depends noticeably on which text it is.
_ENOUGH_SAMPLES = 128
_ENOUGH_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class Preflight:
    """What the calibration samples are like.

    `languages` counts samples, commonest first. `repeated` counts samples that say nearly what an earlier one says.
    `notes` are worth knowing, `warnings` worth mending, `problems` stop the work.
    """

    samples: int
    tokens: int
    reasoning_tokens: int
    generated: int
    shortest_tokens: int
    median_tokens: int
    longest_tokens: int
    cut: int
    repeated: int
    languages: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def summary(self) -> str:
        """Say it in one line."""
        share = self.reasoning_tokens / max(self.tokens, 1)
        spoken = ", ".join(f"{language} {count}" for language, count in self.languages)
        return (
            f"{self.samples} samples, {self.tokens} tokens ({share:.0%} reasoning), {self.shortest_tokens} to "
            f"{self.longest_tokens} a sample, median {self.median_tokens}, {self.cut} cut; languages: {spoken}"
        )


def check(base: BaseModel, samples: Samples, context: RunContext) -> Preflight:
    """Look at the samples and say what they are like; CalibrationError where there are none."""
    found = inspect(samples, widest=widest_inputs(base))
    for line in (found.summary(), *found.notes, *(f"warning: {line}" for line in found.warnings)):
        context.progress.log(f"preflight: {line}")
    if found.problems:
        raise CalibrationError(list(found.problems))
    return found


def inspect(samples: Samples, *, widest: int = 0) -> Preflight:
    """Describe calibration samples; `widest` is the number of inputs of the base's widest layer."""
    taken = samples.calibration
    lengths = [len(sample["ids"]) for sample in taken] or [0]
    languages = Counter(sample["language"] for sample in taken)
    repeated = len(taken) - len({sample["dedup_key"] for sample in taken})
    return Preflight(
        samples=len(taken),
        tokens=sum(lengths),
        reasoning_tokens=sum(sample["reasoning_tokens"] for sample in taken),
        generated=sum(sample["generated"] for sample in taken),
        shortest_tokens=min(lengths),
        median_tokens=median_low(lengths),
        longest_tokens=max(lengths),
        cut=sum(sample["cut_tokens"] > 0 for sample in taken),
        repeated=repeated,
        languages=tuple(sorted(languages.items(), key=lambda item: (-item[1], item[0]))),
        notes=tuple(_notes(len(taken), sum(lengths))),
        warnings=tuple(_warnings(samples, repeated, sum(lengths), widest)),
        problems=() if taken else ("no samples to calibrate on; pass text with --data",),
    )


def _notes(samples: int, tokens: int) -> list[str]:
    if samples >= _ENOUGH_SAMPLES and tokens >= _ENOUGH_TOKENS:
        return []
    return [
        f"{samples} samples with {tokens} tokens are few; {_ENOUGH_SAMPLES} with {_ENOUGH_TOKENS} give steadier ones"
    ]


def _warnings(samples: Samples, repeated: int, tokens: int, widest: int) -> list[str]:
    taken, warnings = samples.calibration, []
    short = [sample["where"] for sample in taken if len(sample["ids"]) < _SHORT_TOKENS]
    if samples.repeated_rows > _MOST_REPEATED * samples.read_rows:
        warnings.append(
            f"{samples.repeated_rows} of {samples.read_rows} rows repeat others word for word; each counts once"
        )
    if repeated > _MOST_REPEATED * len(taken):
        warnings.append(
            f"{repeated} of {len(taken)} samples say nearly what others say; more varied text calibrates better"
        )
    if short:
        warnings.append(f"{len(short)} of {len(taken)} samples have fewer than {_SHORT_TOKENS} tokens, like {short[0]}")
    if tokens < widest:
        warnings.append(f"{tokens} tokens can't determine a layer of {widest} inputs; take more or longer samples")
    return warnings
