"""What is compared, and with which packages: a table. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

_SCRIPTS = "tests/benchmarks/quality/scripts"


@dataclass(frozen=True, slots=True)
class Environment:
    """Packages of a virtual environment of its own, exact versions; without any it is the project's own."""

    name: str
    requirements: tuple[str, ...] = ()


# GPTQModel in the version that the project tests, and ours: both are in the extra `quantize`.
PROJECT = Environment("project")
LLM_COMPRESSOR = Environment(
    "llmcompressor",
    ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0", "torch==2.13.0+cpu"),
)
AUTO_ROUND = Environment("autoround", ("auto-round==0.16.1", "transformers==5.17.0", "torch==2.13.0+cpu"))
GGML = Environment(
    "ggml",
    ("xllamacpp==2026.10.11549", "gguf==0.19.0", "safetensors==0.8.0", "numpy==2.4.6", "torch==2.13.0+cpu"),
)


@dataclass(frozen=True, slots=True)
class Contender:
    """One row of the table: a script, which gets a job file, and its options.

    A script writes a model directory: GPTQ, compressed-tensors, or dense weights with the bytes that they stand for in
    `stored_bytes.json`. `module` is a module of this project instead of a script. `against` is the row of ours with the
    same bits, and the same kind of grid, that its KL is compared with.
    """

    name: str
    environment: Environment
    script: str = ""
    module: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    against: str = ""

    def argv(self, python: str, root: str, job_file: str) -> list[str]:
        """Give the command that makes the contender's model."""
        where = ["-m", self.module] if self.module else [f"{root}/{_SCRIPTS}/{self.script}"]
        return [python, *where, job_file]


# Our schemes with zero points, by group size.
_ASYMMETRIC = MappingProxyType({64: "w4a16-asym-g64", 128: "w4a16-asym"})


def contenders(group_size: int) -> tuple[Contender, ...]:
    """List all contenders; those of 4 bits have the same group size."""
    group = {"group_size": group_size}
    int4, int4_asymmetric = f"w4a16-g{group_size}", _ASYMMETRIC.get(group_size)
    best, best_int8 = ours(int4), ours("w8a8")
    best_asymmetric = ours(int4_asymmetric) if int4_asymmetric else best
    symmetric = (
        without(int4, "residual"),
        without(int4, "shrinkage"),
        ours(int4, "classic"),
        Contender("GPTQModel defaults", PROJECT, "gptqmodel_defaults.py", options={"bits": 4, **group}),
        _compressor("W4A16", "gptq", group_size),
        _auto_round(50, group_size),
        _auto_round(200, group_size),
        _compressor("SpinQuant R1 R2, GPTQ W4A16", "spinquant-gptq", group_size),
    )
    asymmetric = (
        _compressor("W4A16_ASYM", "gptq-asym", group_size),
        _compressor("AWQ", "awq", group_size),
        _ggml("Q4_K_M"),
    )
    int8 = (_compressor("SmoothQuant, GPTQ W8A8", "smoothquant-gptq", group_size), _ggml("Q8_0"))
    return (
        best,
        *([best_asymmetric] if int4_asymmetric else []),
        *(replace(one, against=best.name) for one in symmetric),
        *(replace(one, against=best_asymmetric.name) for one in asymmetric),
        best_int8,
        *(replace(one, against=best_int8.name) for one in int8),
    )


def ours(scheme: str, solver: str = "best") -> Contender:
    """Make a row by our pipeline with its defaults."""
    return _pipeline(f"quantgate {solver}, {scheme}", "--scheme", scheme, "--solver", solver)


def without(scheme: str, part: str) -> Contender:
    """Make a row by our pipeline that leaves out one part of the solver."""
    return _pipeline(f"quantgate best without {part}, {scheme}", "--scheme", scheme, f"--{part}", "0")


def _pipeline(name: str, *flags: str) -> Contender:
    return Contender(name, PROJECT, module="tests.benchmarks.quality.our_pipeline", options={"flags": flags})


def _compressor(name: str, recipe: str, group_size: int) -> Contender:
    options = {"recipe": recipe, "group_size": group_size}
    return Contender(f"llm-compressor {name}", LLM_COMPRESSOR, "llm_compressor.py", options=options)


def _auto_round(iters: int, group_size: int) -> Contender:
    options = {"iters": iters, "batch_size": 2, "group_size": group_size}
    return Contender(f"AutoRound, {iters} iterations", AUTO_ROUND, "auto_round_int4.py", options=options)


def _ggml(form: str) -> Contender:
    return Contender(f"llama.cpp {form}", GGML, "ggml_blocks.py", options={"format": form})
