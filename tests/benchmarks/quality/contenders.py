"""What is compared, and with which packages: a table. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    `stored_bytes.json`. `module` is a module of this project instead of a script.
    """

    name: str
    environment: Environment
    script: str = ""
    module: str = ""
    options: Mapping[str, object] = field(default_factory=dict)

    def argv(self, python: str, root: str, job_file: str) -> list[str]:
        """Give the command that makes the contender's model."""
        where = ["-m", self.module] if self.module else [f"{root}/{_SCRIPTS}/{self.script}"]
        return [python, *where, job_file]


def contenders(group_size: int) -> tuple[Contender, ...]:
    """List all contenders; those of 4 bits have the same group size."""
    group = {"group_size": group_size}

    def ours(solver: str, scheme: str) -> Contender:
        options = {"solver": solver, "scheme": scheme}
        return Contender(
            f"quantgate {solver}, {scheme}", PROJECT, module="tests.benchmarks.our_solver", options=options
        )

    def compressor(name: str, recipe: str) -> Contender:
        return Contender(
            f"llm-compressor {name}", LLM_COMPRESSOR, "llm_compressor.py", options={"recipe": recipe, **group}
        )

    def auto_round(iters: int) -> Contender:
        options = {"iters": iters, "batch_size": 2, **group}
        return Contender(f"AutoRound, {iters} iterations", AUTO_ROUND, "auto_round_int4.py", options=options)

    return (
        ours("best", f"w4a16-g{group_size}"),
        ours("classic", f"w4a16-g{group_size}"),
        Contender("GPTQModel defaults", PROJECT, "gptqmodel_defaults.py", options={"bits": 4, **group}),
        compressor("W4A16", "gptq"),
        auto_round(50),
        compressor("W4A16_ASYM", "gptq-asym"),
        compressor("AWQ", "awq"),
        compressor("SpinQuant R1 R2, GPTQ W4A16", "spinquant-gptq"),
        auto_round(200),
        Contender("llama.cpp Q4_K_M", GGML, "ggml_blocks.py", options={"format": "Q4_K_M"}),
        Contender("llama.cpp Q8_0", GGML, "ggml_blocks.py", options={"format": "Q8_0"}),
        ours("best", "w8a8"),
        compressor("SmoothQuant, GPTQ W8A8", "smoothquant-gptq"),
    )
