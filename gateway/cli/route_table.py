"""Prints the explanation of a routing decision as tables."""

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from gateway.routing.explain import Explanation, ReplicaExplanation, RungExplanation
from serving.duration import duration

TERMS = ("queue", "ahead", "kv", "reading", "cached", "answering", "total")
PIPE_WIDTH = 1000  # characters; for output that is piped to grep or less
RIGHT_ALIGNED = frozenset({"#", "wait", "goes down", "requests", *TERMS})


def show(explanation: Explanation, when: str) -> None:
    """Print an explanation; `when` says when it was recorded. Lines are only wrapped on a terminal."""
    out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    with out.capture() as captured:
        out.print(_headline(explanation), style="bold")
        out.print(f"  {explanation.because}")
        out.print(f"  {_request(explanation)}; {when}")
        for title, table in _tables(explanation):
            if table.row_count:
                out.print(f"\n{title}")
                out.print(table)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _headline(explanation: Explanation) -> str:
    chosen = explanation.chosen
    if chosen is None:
        return f"{explanation.model}: no replica"
    return f"{explanation.model}: {chosen.replica} ({chosen.variant}, {chosen.precision}), {chosen.reason}"


def _request(explanation: Explanation) -> str:
    answer = "any length" if explanation.answer_tokens is None else f"{explanation.answer_tokens} tokens at most"
    return f"a prompt of {explanation.prompt_tokens:.0f} tokens, an answer of {answer}"


def _tables(explanation: Explanation) -> Iterable[tuple[str, Table]]:
    rungs = ("variant", "precision", "wait", "gate", "goes down", "this request")
    yield "rungs, best first", _table(rungs, map(_rung_cells, explanation.rungs))
    replicas = ("#", "replica", "variant", "requests", *TERMS, "why not")
    yield (
        "replicas in the order of attempts, cost in seconds",
        _table(replicas, map(_candidate_cells, explanation.candidates)),
    )
    excluded = [(variant.variant, variant.precision, variant.why) for variant in explanation.refused]
    yield "variants that may not answer", _table(("variant", "precision", "why"), excluded)
    absent = [(replica.id, replica.variant, replica.state, replica.reason) for replica in explanation.absent]
    yield "replicas that are not ready", _table(("replica", "variant", "state", "reason"), absent)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="right" if column in RIGHT_ALIGNED else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _rung_cells(rung: RungExplanation) -> tuple[str, ...]:
    spilling = rung.spilling_seconds is not None
    return (
        rung.variant,
        rung.precision,
        "-" if rung.wait_seconds is None else f"{rung.wait_seconds:.3f}",
        f"spilling for {duration(rung.spilling_seconds or 0)}" if spilling else "closed",
        f"{rung.share_down:.0%}" if spilling else "-",
        rung.verdict,
    )


def _candidate_cells(candidate: ReplicaExplanation) -> tuple[str, ...]:
    terms = candidate.terms
    seconds = ["-" if terms is None else f"{getattr(terms, name):.3f}" for name in TERMS]
    notes = [candidate.why_not, "no recent poll" if candidate.stale else ""]
    rank = "-" if candidate.rank is None else str(candidate.rank)
    requests = f"{candidate.requests:.0f}"
    return (rank, candidate.replica, candidate.variant, requests, *seconds, "; ".join(filter(None, notes)))
