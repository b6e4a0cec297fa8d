"""Everything that can be known before work, checked before work: cheap things first, reading every byte last."""

from pathlib import Path

from config.manifest import Scheme
from quantize.backends import autogptq
from quantize.base import BaseModel, read_base, with_digest
from quantize.calibration.datasets import CalibrationSplit, read_datasets, shipped_files
from quantize.calibration.self_generation import chosen
from quantize.errors import RecipeError
from quantize.evaluation.evaluate import EvaluationPlan
from quantize.evaluation.tasks import read_questions
from quantize.evaluation.verdict import limits_for
from quantize.load_report import check_base
from quantize.module_tree import with_module_tree
from quantize.options import RunOptions
from quantize.planning.dry_run import lowest_bits
from quantize.planning.plan import calibration_split, check_numbers, settled_request, settled_scheme
from quantize.planning.recipe import chosen_backend
from quantize.planning.request import Request, TextFile
from quantize.planning.run_costs import require_room, run_costs
from quantize.planning.transforms import planned_base, transform_bytes
from quantize.running.memory import Machine
from quantize.running.stage_store import stage_store
from quantize.schemes.forecast import disk_bytes, predicted_bytes
from quantize.schemes.makers import is_data_free
from quantize.variants.store import require_space, require_target


def check_request(request: Request, options: RunOptions, machine: Machine) -> BaseModel:
    """Check a request and return its base with its digest; UsageError says what is wrong, and nothing was written.

    1. numbers, backend, `--out`, limits, task file; 2. headers of the base's files; 3. calibration data; 4. the layers
    that the solver finds in the base, with their names on disk; 5. scheme and tensor-parallel degree; 6. memory for
    every stage; 7. free disk space; 8. tensors that are missing or unexpected, as transformers reports them (seconds);
    9. the digest, which reads every byte.
    """
    check_numbers(request)
    check_backend(request)
    require_target(request.out)
    check_evaluation(request.evaluation, lowest_bits(request.scheme) if isinstance(request.scheme, Scheme) else 4)
    base = read_base(request.base, digested=False)
    split = check_data(request)
    base = with_module_tree(base, options.environ)
    scheme = settled_scheme(request, base)
    settled = settled_request(request, base, scheme)
    require_room(run_costs(settled, base, scheme, split, machine, engine=machine.engine))
    transforms = settled.transforms or ()
    planned = planned_base(base, transforms)
    require_space(
        {
            stage_store(options.environ).root: (
                disk_bytes(planned, scheme, request.most_solves) + transform_bytes(base, transforms),
                "set QUANTGATE_HOME to a directory on a larger disk"
                + (", or pass --transform none" if transforms else ""),
            ),
            request.out: (predicted_bytes(planned, scheme), "choose another --out"),
        }
    )
    if not request.out.exists():  # else it is this variant, which is reused, or something in the way
        check_base(base, options.environ, options.progress)
    return with_digest(base)


def check_backend(request: Request) -> None:
    """Reject a backend that is not installed, and recipes that use features which it lacks."""
    if isinstance(request.scheme, Scheme) and is_data_free(request.scheme):
        return
    chosen_backend(request.backend)
    if request.backend != "auto-gptq":
        return
    if not isinstance(request.scheme, Scheme):
        raise RecipeError("auto-gptq quantizes all modules alike, and `scheme: auto` doesn't; use --backend gptqmodel")
    autogptq.require_solvable(request.scheme, request.settings)


def check_evaluation(plan: EvaluationPlan, bits: int) -> None:
    """Read the task file and look up the limits, which are not used before everything else is done."""
    limits_for(bits, plan.limits)
    if plan.tasks:
        read_questions(plan.tasks)


def check_data(request: Request) -> CalibrationSplit:
    """Read the calibration data and split it; of completions that are still to be generated only their prompts."""
    if not request.self_generate:
        return calibration_split(request)[1]
    _, records = read_datasets([file.path for file in prompt_files(request)], max_bad=request.max_bad)
    chosen(records, request.self_generate, 0, request.seed)
    return CalibrationSplit((), ())


def prompt_files(request: Request) -> tuple[TextFile, ...]:
    """Return the files whose prompts the base answers; without the user's own, the shipped ones.

    The shipped answers then only evaluate.
    """
    return request.data or tuple(TextFile(Path(path), weight=0.0) for path in shipped_files())
