"""Output of the demo: responses with the gateway's headers, and a table of the variants."""

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from config.variant import Variant

COLUMNS = ("variant", "MB", "KL", "top-1", "ppl", "verdict", "tokens/s", "answered")


@dataclass(frozen=True, slots=True)
class Answer:
    """Text and gateway headers of a response, and its decode speed without the first token (None: not measured)."""

    text: str
    headers: dict[str, str]
    tokens_per_second: float | None

    @property
    def variant(self) -> str:
        """Name of the variant that answered."""
        return self.headers["x-quantgate-variant"]


def show_answer(out: Console, title: str, answer: Answer) -> None:
    """Print a response and its gateway headers."""
    out.print(f"\n[bold]{title}:[/bold] ", end="")
    out.print(answer.text, markup=False, highlight=False)
    show_headers(out, answer)


def show_headers(out: Console, answer: Answer) -> None:
    """Print the gateway headers of a response."""
    for name, value in sorted(answer.headers.items()):
        out.print(f"  {name}: {value}", highlight=False, style="dim")


def show_variants(
    out: Console, variants: Mapping[str, Variant], pinned: Mapping[str, Answer], alias_answered: Collection[str]
) -> None:
    """Print size, measured quality and speed of each variant.

    `pinned` are the responses to requests for each variant by name, `alias_answered` the variants that answered for the
    alias.
    """
    table = Table(title="variants of smol, best first", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("variant", "answered") else "right", no_wrap=True)
    for name, variant in variants.items():
        table.add_row(*_row(name, variant, pinned[name], alias=name in alias_answered))
    out.print()
    out.print(table)


def show_limits(out: Console, limits: Mapping[str, float]) -> None:
    """Print what the verdicts of the table were held against, and that it is the demo's own choice."""
    figures = ", ".join(f"{name} {value:g}" for name, value in limits.items())
    out.print(f"verdicts: all variants are held to the default limits for 4 bits ({figures}), a choice of this demo:")
    out.print("those for 8 bits are meant for larger models; a variant passes if its whole 95 % interval does")


def show_next_steps(out: Console, config: Path, *, serving: bool) -> None:
    """Print the configuration file that the demo leaves, and what can be done with it."""
    file = shlex.quote(str(config))
    steps = [
        (f"quantgate up {file}", "serve these variants without the demo" + (", after Ctrl-C" if serving else "")),
        (f"quantgate ps {file}", "which replicas run, and what they do"),
        (f"quantgate route explain smol --config {file}", "why which replica would answer"),
    ]
    out.print(f"\nThe configuration of this demo is {config}. Next steps:", highlight=False, markup=False)
    for command, purpose in steps:
        out.print(f"  {command}  # {purpose}", highlight=False, markup=False)


def _row(name: str, variant: Variant, answer: Answer, *, alias: bool) -> list[str]:
    quality = variant.quality
    measures = [
        _format_number(quality.kl_mean, ".4f"),
        _format_number(quality.top1_agreement, ".1%"),
        _format_number(quality.perplexity_ratio, "x.3f"),
    ]
    verdict = variant.manifest.quality.verdict if variant.manifest else quality.source
    speed = _format_number(answer.tokens_per_second, ".1f")
    answered = ("smol, " if alias else "") + (name if answer.variant == name and answer.text else "no")
    return [name, f"{_bytes(variant) / 1e6:.0f}", *measures, verdict, speed, answered]


def _bytes(variant: Variant) -> int:
    if variant.manifest is not None:
        return variant.manifest.bytes
    files = variant.path.glob("*") if variant.path else ()
    return sum(file.stat().st_size for file in files if file.is_file())


def _format_number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"x{value:{form[1:]}}" if form.startswith("x") else f"{value:{form}}"
