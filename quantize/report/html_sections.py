"""A variant as a part of the HTML page: checks, figures, losses, divergences, worst samples, how it was made."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from config.manifest import Generation, Manifest, Quality, Restricted, Tasks
from quantize.report.markup import Child, Markup, element
from quantize.report.plots import Point, Series, columns, legend, linear_axis, lines, log_axis
from quantize.report.variant_record import VariantRecord

_WORST_SHOWN = 8
_PAIRS_SHOWN = 3
_NUMBER = re.compile(r"\.(\d+)\.")


def variant_article(anchor: str, one: VariantRecord) -> Markup:
    """Tell everything about one variant; what was not measured is one line."""
    manifest = one.manifest
    heading = element("h3", f"{manifest.id} ", verdict_mark(manifest.quality.verdict == "pass"))
    return element(
        "article",
        heading,
        _checks(manifest.quality),
        _restricted(manifest.quality),
        _generation(manifest.quality.generation, manifest.quality.length_ratio),
        _tasks(manifest.quality.tasks),
        _losses(anchor, one.modules),
        _histogram(anchor, one.evidence.get("kl_histogram")),
        *_worst(one.evidence.get("worst")),
        *_pairs(one.evidence.get("generations")),
        _making(one),
        id=anchor,
    )


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Child]], numbers: Sequence[int] = ()) -> Markup:
    """Build a table; columns in `numbers` have headings on the right."""
    head = [
        element("th", name, scope="col", class_="number" if place in numbers else None)
        for place, name in enumerate(heads)
    ]
    body = [element("tr", *(_cell(cell) for cell in row)) for row in rows]
    told = element("caption", caption), element("thead", element("tr", *head)), element("tbody", *body)
    return element("div", element("table", *told), class_="wide")


def number_cell(text: str) -> Markup:
    """A number, on the right side of its column."""
    return element("td", text, class_="number")


def verdict_mark(passed: bool) -> Markup:
    """A verdict that doesn't hang on its colour."""
    return element("span", "✓ pass" if passed else "✗ fail", class_="pass" if passed else "fail")


def _cell(cell: Child) -> Markup:
    return cell if isinstance(cell, Markup) and cell.startswith("<td") else element("td", cell)


def _absent(what: str) -> Markup:
    return element("p", what, class_="quiet")


def _checks(quality: Quality) -> Markup:
    rows = [
        (check.name, number_cell(f"{check.value:.4g}"), number_cell(f"{check.limit:g}"), verdict_mark(check.passed))
        for check in quality.checks
    ]
    if not rows:
        return _absent("No limits were set.")
    heads = ["check", "value", "limit", "verdict"]
    return table(f"Checks, on {quality.tokens:,} held-out tokens", heads, rows, numbers=(1, 2))


def _restricted(quality: Quality) -> Markup:
    parts = [("reasoning", quality.reasoning), ("answer", quality.answer)]
    rows = [_restricted_row(name, part) for name, part in parts if part]
    if not rows:
        return _absent("No figures for reasoning and answers apart.")
    heads = ["tokens of", "tokens", "mean KL", "top-1", "perplexity"]
    return table("The same, on a part of the tokens", heads, rows, numbers=(1, 2, 3, 4))


def _restricted_row(name: str, part: Restricted) -> Sequence[Child]:
    figures = (f"{part.tokens:,}", f"{part.kl_mean:.4f}", f"{part.top1_agreement:.2%}", f"x{part.perplexity_ratio:.4f}")
    return (name, *map(number_cell, figures))


def _generation(told: Generation | None, length_ratio: float | None) -> Markup:
    if told is None:
        return _absent("No paired generations.")
    ratio = length_ratio if length_ratio is not None else told.length_ratio
    caption = (
        f"Paired answers: {told.prompts} prompts, {told.seeds} seeds each, up to {told.new_tokens} tokens; "
        f"the variant's are x{ratio:.3f} as long"
    )
    rows = [
        (name, *(number_cell(f"{rate:.1%}") for rate in rates))
        for name, rates in (
            ("never stopped", (told.parent_unfinished, told.unfinished)),
            ("ended in repetition", (told.parent_repeating, told.repeating)),
            ("left <think> open", (told.parent_unclosed, told.unclosed)),
        )
    ]
    return table(caption, ["share of answers", "base", "variant"], rows, numbers=(1, 2))


def _tasks(told: Tasks | None) -> Markup | None:
    if told is None:
        return None
    figures = (told.parent_accuracy, told.accuracy, told.recovery, told.flips)
    row = (number_cell(f"{told.items:,}"), *(number_cell(f"{figure:.1%}") for figure in figures))
    heads = ["questions", "base right", "variant right", "recovery", "flips"]
    return table("Questions with known answers", heads, [row], numbers=range(5))


def _losses(anchor: str, modules: Sequence[Mapping[str, Any]]) -> Markup:
    kinds: dict[str, list[Point]] = {}
    for module in modules:
        number = _NUMBER.search(module["module"])
        if number and module.get("loss"):
            hint = f"{module['module']}: {module['loss']:.4g} ({module.get('bits')} bits, damping {module.get('damp')})"
            kinds.setdefault(module["module"].rpartition(".")[2], []).append(
                Point(int(number[1]), module["loss"], hint)
            )
    if not kinds:
        return _absent("No losses: quant_log.json is missing, or has none.")
    series = [Series(kind, tuple(sorted(points, key=lambda point: point.x))) for kind, points in kinds.items()]
    every = [point for line_series in series for point in line_series.points]
    rounded = [module["module"] for module in modules if module.get("fallback")]
    plot = lines(
        f"{anchor}-loss",
        "Loss of each layer",
        f"{len(every)} modules of {len(series)} kinds over {len({point.x for point in every})} layers.",
        linear_axis("layer", [point.x for point in every]),
        log_axis("loss", [point.y for point in every]),
        series,
    )
    told = f" Rounded to nearest instead of solved: {', '.join(rounded)}." if rounded else ""
    return element("figure", plot, legend(series), element("figcaption", f"What solving left, by module.{told}"))


def _histogram(anchor: str, told: Mapping[str, Any] | None) -> Markup:
    if not told or not told.get("counts"):
        return _absent("No histogram of divergences: evaluation.json is missing.")
    tokens = sum(told["counts"])
    plot = columns(
        f"{anchor}-kl",
        "Divergence of each token",
        f"How {tokens:,} tokens spread over divergences.",
        told["edges"],
        told["counts"],
        "KL from the base, nats",
    )
    caption = f"{tokens:,} held-out tokens by their divergence. The first column is everything below the first mark."
    return element("figure", plot, element("figcaption", caption))


def _worst(samples: Sequence[Mapping[str, Any]] | None) -> Iterator[Markup]:
    yield element("h4", "Worst samples")
    if not samples:
        yield _absent("None are kept: evaluation.json is missing.")
        return
    for sample in samples[:_WORST_SHOWN]:
        divergence = f"mean KL {sample.get('kl_mean', 0):.4g}"
        here = f", {sample['kl_here']:.4g} at token {sample.get('place', '?')}" if "kl_here" in sample else ""
        yield element(
            "div",
            element("p", f"{divergence}{here}, sample ", element("code", str(sample.get("where", ""))), class_="quiet"),
            element("pre", f"… {sample.get('text', '')}"),
            element("div", _side("Base", sample, "parent"), _side("Variant", sample, "variant"), class_="sides"),
            class_="sample",
        )


def _side(name: str, sample: Mapping[str, Any], key: str) -> Markup:
    """The token that a model thinks likeliest, and the next ones with their probabilities."""
    likeliest = [f"{_visible(token)} {share:.1%}" for token, share in sample.get(f"{key}_top", ())]
    listed = element("p", " · ".join(likeliest), class_="quiet") if likeliest else None
    return element("div", element("strong", name), element("pre", _visible(str(sample.get(key, "")))), listed)


def _pairs(pairs: Sequence[Mapping[str, Any]] | None) -> Iterator[Markup]:
    if not pairs:
        return
    yield element("h4", "Answers side by side")
    for pair in pairs[:_PAIRS_SHOWN]:
        sides = [
            element("div", element("strong", f"{name}{_length(pair, key)}"), element("pre", str(pair.get(key, ""))))
            for name, key in (("Base", "parent"), ("Variant", "variant"))
        ]
        prompt = element("summary", f"{str(pair.get('prompt', ''))[-200:]} (seed {pair.get('seed', '?')})")
        yield element("details", prompt, element("div", *sides, class_="sides"), class_="sample")


def _length(pair: Mapping[str, Any], key: str) -> str:
    tokens = pair.get(f"{key}_tokens")
    return "" if tokens is None else f", {tokens} tokens{'' if pair.get(f'{key}_finished') else ', cut'}"


def _making(one: VariantRecord) -> Markup:
    manifest = one.manifest
    made, text, scheme = manifest.quantizer, manifest.calibration, manifest.scheme
    rows: list[tuple[str, str]] = [
        ("directory", one.directory.name),
        ("made", f"{manifest.created:%Y-%m-%d %H:%M} UTC by {made.backend} {made.version}"),
        ("took", f"{made.seconds:,.0f} s for {made.modules} modules" if made.seconds else "unknown"),
        ("scheme", f"{scheme.bits} bits, group size {scheme.group_size}, activations {scheme.activation_bits} bits"),
        ("format", scheme.format),
        *((f"exception {rule.modules}", _override(rule.bits, rule.group_size)) for rule in scheme.overrides),
        *((key.replace("_", " "), str(value)) for key, value in made.settings.items()),
        ("damping", ", ".join(f"{count} modules at {step}" for step, count in made.damp.items()) or "unknown"),
        ("calibration", "unknown: made elsewhere, and adopted" if text is None else _text(manifest)),
        ("evaluation text", manifest.quality.dataset_sha256[:16]),
        *((name, f"{file.bytes:,} bytes, sha256 {file.sha256[:16]}…") for name, file in manifest.files.items()),
    ]
    facts = [part for name, value in rows for part in (element("dt", name), element("dd", value))]
    return element("details", element("summary", "How it was made"), element("dl", *facts))


def _text(manifest: Manifest) -> str:
    text = manifest.calibration
    assert text is not None
    told = f"{text.samples} samples, {text.tokens:,} tokens, {text.reasoning_tokens:,} of them reasoning"
    if text.skipped_rows:
        told += f"; invalid rows skipped: {text.skipped_rows}"
    return f"{told}; {text.generated} written by the base; seed {text.seed}; cut at {text.max_tokens:,} tokens"


def _override(bits: int | None, group_size: int | None) -> str:
    return "left as in the base" if bits is None else f"{bits} bits, group size {group_size or 'as the scheme has it'}"


def _visible(token: str) -> str:
    """Show line ends, and the spaces of a token that is nothing else."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    return shown if token.strip() else shown.replace(" ", "␣")
