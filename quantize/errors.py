"""What can go wrong between a base and its variant.

QuantizeError                 exit code 1
├── UsageError                exit code 2: what was asked for can't be done here
│   ├── RecipeError           scheme, base, engine or an option
│   ├── RecipeFileError       the recipe file: every problem in it, each with its line
│   ├── CalibrationError      the calibration text: every problem in it, each with its line
│   ├── MachineError          this machine has too little memory
│   └── TargetError           the output directory is taken, or its disk is too small
├── BusyError                 exit code 4: another process makes the same variant
├── SpaceError                the disk filled up on the way
├── WorkerError               a child process ended without a result
├── ReplicaError              a running server can't be reached, refuses, dies, or serves another model
├── SolveError                GPTQ fell back or diverged in named modules
├── WeightFileError           a weight file is missing, damaged or truncated
└── VariantError              a variant directory can't be read back, or was altered
"""


class QuantizeError(Exception):
    """No variant; the message is one line: what happened, where, what to do."""

    exit_code = 1


class UsageError(QuantizeError):
    """What was asked for can't be done; another command line can."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe doesn't fit the base, the machine or the engine."""


class RecipeFileError(UsageError):
    """The recipe file doesn't say what it must."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class CalibrationError(UsageError):
    """The calibration text can't be used."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class MachineError(UsageError):
    """The machine has too little memory for the work."""


class TargetError(UsageError):
    """The output directory can't take the variant."""


class BusyError(QuantizeError):
    """Another process makes the same variant."""

    exit_code = 4


class SpaceError(QuantizeError):
    """The disk filled up on the way."""


class WorkerError(QuantizeError):
    """A child process ended without a result."""


class ReplicaError(QuantizeError):
    """A running server can't be measured; the message names its URL."""


class SolveError(QuantizeError):
    """The solver gave up on modules and rounded them to nearest, or its loss is no number."""


class WeightFileError(QuantizeError):
    """A safetensors file or its index is missing, damaged or truncated; names the file, not what to do."""


class VariantError(QuantizeError):
    """A variant directory can't be read back, or its bytes have changed."""
