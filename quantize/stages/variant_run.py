"""What all stages of one run share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from quantize.options import RunOptions
from quantize.planning.recipe import Recipe
from quantize.running.context import RunContext
from quantize.running.stage_store import StageKey, StageResult, StageStore


@dataclass(frozen=True, slots=True)
class VariantRun:
    """One run of a recipe. Results of stages are in `store`; jobs and logs of children in the folder of `context`."""

    recipe: Recipe
    options: RunOptions
    context: RunContext
    store: StageStore

    def find(self, key: StageKey) -> StageResult | None:
        """Look a result of an earlier run up, and log that it is used."""
        found = self.store.find(key)
        if found is not None:
            self.context.progress.log(f"{key.name}: reusing {found.directory}")
        return found


@contextmanager
def kept_after_failure(run: VariantRun, what: str) -> Iterator[None]:
    """Log, whatever stops the body, what is kept for the next run."""
    try:
        yield
    except BaseException:
        run.context.progress.log(f"{what} kept in {run.store.root}; the same command continues after that")
        raise
