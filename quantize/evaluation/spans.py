"""Where reasoning is: in a sample's tokens, in a text that a model wrote, and in the prompt before it."""

from collections.abc import Iterable

from quantize.calibration.thinking import THINK, Markers

Range = tuple[int, int]


def flags(ranges: Iterable[Range], tokens: int) -> list[bool]:
    """Mark, for each predicted token (all but the first of `tokens`), whether it lies in one of the [start, end)."""
    marked = [False] * tokens
    for start, end in ranges:
        inside = range(tokens)[start:end]
        marked[start:end] = [True] * len(inside)
    return marked[1:]


def is_open(text: str, markers: Markers = THINK) -> bool:
    """Tell whether a text ends inside a think span that it opened."""
    return text.rfind(markers.start) > text.rfind(markers.end)


def last_prompt(text: str, header: str, markers: Markers = THINK) -> str | None:
    """Cut a rendered chat where its last answer begins, after `header`; None if that isn't in it.

    Where the template opens a think span for the answer, so does the prompt, though the text may not.
    """
    if markers.field and header + markers.start in text:
        # With channels, reasoning and answer begin with the header, each.
        return text[: text.rfind(header + markers.start) + len(header)]
    plain, opened, _ = header.partition(markers.start)
    if header and header in text:
        return text[: text.rfind(header) + len(header)]
    if opened and plain.strip() and plain in text:
        return text[: text.rfind(plain)] + header
    return None
