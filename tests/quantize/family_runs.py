"""One family and one scheme: planned, solved, checked and read back, all in this process.

`python -m tests.quantize.family_runs [FAMILY ...]` runs the families, or all, with every scheme and writes their rows
of the table quantize/families.md; a quarter of an hour on two cores. The tests run every family with one scheme.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantize.backends.gptqmodel import job_of
from quantize.backends.protocol import ExpertFallback, SolveJob
from quantize.base import BaseModel, read_base
from quantize.calibration.samples import Samples
from quantize.errors import QuantizeError
from quantize.module_tree import is_plain
from quantize.modules import direct_tree
from quantize.options import RunOptions
from quantize.planning.plan import settled_scheme, settled_settings
from quantize.planning.recipe import Budget, Recipe, installed_backend
from quantize.planning.request import Request
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.stage_store import stage_key, stage_store
from quantize.running.worker import child_environ
from quantize.schemes.scheme import preset
from quantize.schemes.settings import SETTINGS
from quantize.stages.checkpoint import writing_job
from quantize.stages.search import solve_or_search
from quantize.stages.tokens import Tokens
from quantize.stages.variant_run import VariantRun
from quantize.variants.lint import lint
from tests.quantize.chats import chat
from tests.quantize.families import FAMILIES, write_family

TABLE = Path(__file__).resolve().parents[2] / "quantize" / "families.md"
WORKS = "yes"
# Column -> scheme and solver.
COLUMNS: Mapping[str, tuple[str, str]] = {
    "w4a16-g128": ("w4a16-g128", "best"),
    "w4a16-g128, classic": ("w4a16-g128", "classic"),
    "w4a16-asym": ("w4a16-asym", "best"),
    "w8a16-g128": ("w8a16-g128", "best"),
    "w8a8": ("w8a8", "best"),
    "auto": ("auto", "best"),
}
# Of random weights, after solving on random tokens: an order of magnitude above what comes out.
_MOST_KL = {"w4a16-g128": 0.5, "w8a16-g128": 0.05, "w8a8": 0.05}
_MOST_ERROR = 0.3
_SAMPLES, _TOKENS = 8, 64
# They come later, with the manifest.
_LATER = frozenset({"stray"})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case: `yes`, or the reason why it was refused before any work."""

    result: str
    modules: int = 0
    undersampled: int = 0


class Listener:
    """Stands at the parent's end of a worker's channel."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def progress(self, done: int, total: int) -> None:
        """Ignore the progress."""

    def event(self, value: dict[str, Any]) -> None:
        """Keep an event."""
        self.events.append(value)


def base_of(directory: Path) -> BaseModel:
    """Read a base with its module tree, without a child process."""
    from quantize.backends.module_tree_child import read_tree  # noqa: PLC0415

    base = read_base(directory, digested=False)
    with TemporaryDirectory() as scratch:
        tree = direct_tree(base.shapes) if is_plain(base) else read_tree(directory, Path(scratch))
    return replace(base, shapes=tree.shapes, tree=tree)


def samples_of(count: int = _SAMPLES, tokens: int = _TOKENS) -> list[dict[str, Any]]:
    """Random token samples, the same ones every time."""
    import torch  # noqa: PLC0415

    generator = torch.Generator().manual_seed(1)
    return [
        {"ids": torch.randint(2, 256, (tokens,), generator=generator).tolist(), "where": f"sample {number}"}
        for number in range(count)
    ]


def run_case(base: BaseModel, column: str, folder: Path) -> Outcome:
    """Make the variant of a base into `folder / "variant"` and check it; AssertionError if it is wrong."""
    scheme, solver = COLUMNS[column]
    budget = Budget(max_kl=1.0)
    request = Request(
        base=base.directory,
        scheme=budget if scheme == "auto" else preset(scheme),
        engine="cuda",
        out=folder,
        settings=SETTINGS[solver],
    )
    try:
        recipe = recipe_of(request, base)
    except QuantizeError as error:
        return Outcome(str(error).partition(": ")[2].rpartition("doesn't fit: ")[2])
    if recipe.budget:
        recipe, modules = _searched(recipe, folder)
        _require_right(recipe, folder / "variant", column)
        return Outcome(WORKS, modules)
    events = solve(recipe, samples_of(), folder)
    _require_right(recipe, folder / "variant", column)
    return Outcome(WORKS, len(events), sum(event["undersampled"] for event in events))


def recipe_of(request: Request, base: BaseModel) -> Recipe:
    """Plan as the command does, from a base that is read already."""
    return Recipe(
        base=base,
        scheme=settled_scheme(request, base),
        datasets=(),
        samples=_SAMPLES,
        max_tokens=_TOKENS,
        seed=0,
        settings=settled_settings(request.settings, base),
        backend=installed_backend(),
        budget=request.scheme if isinstance(request.scheme, Budget) else None,
    )


def solve(
    recipe: Recipe, samples: list[dict[str, Any]], folder: Path, expert_fallback: ExpertFallback = "rtn"
) -> list[dict[str, Any]]:
    """Solve into `folder / "variant"`; give the events of all modules."""
    from quantize.backends.gptqmodel_child import quantize  # noqa: PLC0415
    from quantize.backends.writing_child import write  # noqa: PLC0415

    for name in ("variant", "work", "layers"):
        (folder / name).mkdir(parents=True)
    job = SolveJob(folder / "layers", folder / "work", environ={}, expert_fallback=expert_fallback)
    listener = Listener()
    result = quantize(job_of(recipe, samples, job), listener)  # type: ignore[arg-type]
    bits = {module["module"]: module["bits"] for module in result["modules"]}
    write(writing_job(recipe, folder / "layers", bits, folder / "variant"), listener)  # type: ignore[arg-type]
    return listener.events


def _searched(recipe: Recipe, folder: Path) -> tuple[Recipe, int]:
    """Search and solve in child processes, into `folder / "variant"`; give the recipe found, and count its modules."""
    from quantize.backends.writing_child import write  # noqa: PLC0415

    (folder / "search").mkdir(parents=True)
    (folder / "variant").mkdir()
    environ = child_environ({**os.environ, "QUANTGATE_HOME": str(folder / "home")})
    progress = ProgressReporter(sys.stderr)
    options = RunOptions(environ, progress, engine="cuda")
    run = VariantRun(recipe, options, RunContext(folder / "search", environ, progress), stage_store(environ))
    told = {"reasoning_tokens": 0, "language": "en", "generated": False, "cut_tokens": 0}
    samples = [{**sample, **told, "dedup_key": sample["where"]} for sample in samples_of()]
    found, solved = solve_or_search(run, Tokens(Samples(samples, []), stage_key("tokens")))
    bits = {module.module: module.bits for module in solved.result.modules}
    write(writing_job(found.recipe, solved.directory, bits, folder / "variant"), Listener())  # type: ignore[arg-type]
    return found.recipe, len(bits)


def _require_right(recipe: Recipe, variant: Path, column: str) -> None:
    import torch  # noqa: PLC0415

    from quantize.dense_models import load_base, load_variant  # noqa: PLC0415

    findings = [str(found) for found in lint(variant, recipe.base, recipe.scheme) if found.check not in _LATER]
    assert findings == []
    _require_same_weights(recipe.base.directory, variant)
    if any(layer.expert is not None for layer in recipe.base.modules.layers):
        return  # GPTQModel has changed this family's classes in transformers: the parent can't be loaded here any more
    ids = torch.tensor([samples_of(1)[0]["ids"]])
    with torch.no_grad():
        expected = load_base(recipe.base.directory)(input_ids=ids).logits.float().log_softmax(-1)
        found = load_variant(variant, recipe.base.directory)(input_ids=ids).logits.float().log_softmax(-1)
    divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert 0 < divergence < _MOST_KL.get(column, _MOST_KL["w4a16-g128"]), f"{column}: KL {divergence}"


def _require_same_weights(base: Path, variant: Path) -> None:
    """Dense weights are the parent's but for rounding, and what isn't quantized is equal."""
    from quantize.variants.weights import lazy_dense, read_tensors, with_base_matrices  # noqa: PLC0415

    expected = dict(read_tensors(base))
    found = with_base_matrices(lazy_dense(variant)[0], expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = float((found[name][...].float() - tensor.float()).norm() / tensor.float().norm().clamp(min=1e-6))
        assert error < _MOST_ERROR, f"{name}: relative error {error}"


def table_of(outcomes: Mapping[str, Mapping[str, str]]) -> str:
    """Write the page: a row for each family, a column for each scheme, reasons below."""
    reasons = sorted({result for row in outcomes.values() for result in row.values() if result != WORKS})
    cells = {reason: f"no [{number}]" for number, reason in enumerate(reasons, 1)} | {WORKS: WORKS}
    lines = [_HEAD, f"| family | experts | {' | '.join(COLUMNS)} |", f"| --- | --- |{' --- |' * len(COLUMNS)}"]
    lines += [
        f"| {name} | {FAMILIES[name].experts or ''} | {' | '.join(cells[row[column]] for column in COLUMNS)} |"
        for name, row in outcomes.items()
    ]
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), "", _FOOT]
    return "\n".join(lines)


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Read a page back: family -> column -> result."""
    lines = text.splitlines()
    reasons = {line.partition(". ")[0]: line.partition(". ")[2] for line in lines if line[:1].isdigit()}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    columns = rows[0][2:]
    return {
        row[0]: {
            column: cell if cell == WORKS else reasons[cell.removeprefix("no [").removesuffix("]")]
            for column, cell in zip(columns, row[2:], strict=True)
        }
        for row in rows[2:]
    }


def write_families(folder: Path, names: Sequence[str] = tuple(FAMILIES)) -> Iterator[tuple[str, Path]]:
    """Write the tiny models one after the other."""
    text = [message["content"] for number in range(20) for message in chat(number)["messages"]]
    for name in names:
        yield name, write_family(folder / name, name, text)


def main(names: Sequence[str]) -> int:
    """Run all cases of the named families, or of all, and write their rows."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # GPTQModel cannot load models with one worker
    with TemporaryDirectory(prefix="families-") as folder:
        for name, directory in write_families(Path(folder), names or tuple(FAMILIES)):
            base = base_of(directory)
            row: dict[str, str] = {}
            for column in COLUMNS:
                row[column] = run_case(base, column, Path(folder, f"{name}-{column}")).result
                print(f"@@ {name:<22} {column:<20} {row[column]}", flush=True)
            outcomes = (read_table(TABLE.read_text()) if TABLE.is_file() else {}) | {name: row}
            TABLE.write_text(table_of({known: outcomes[known] for known in FAMILIES if known in outcomes}))
    return 0


_HEAD = """\
# Families and schemes

Written by `python -m tests.quantize.family_runs`: a tiny random model of each family is planned for a GPU, solved,
checked (`quantgate variants lint`) and compared with its parent, on a CPU. *Stacked*: all experts of a block in one
tensor. *NextN*: with the layer that predicts a second token, as it is published.
"""
_FOOT = """\
Routers, the projections of MLA that every GPU holds whole (`q_a_proj`, `kv_a_proj_with_mqa`), linear attention, layers
that predict further tokens and vision towers are never quantized. With experts GPTAQ is off. vLLM 0.32 loads quantized
experts on GPUs and on CPUs with AMX; `--plan` says so. A family that is not here is quantized, too, if GPTQModel knows
it.
"""

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
