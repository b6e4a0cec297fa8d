"""AutoGPTQ in its own environment: what it refuses, how the environment comes to be, and a tiny model through it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config.load import home_directory
from config.manifest import Override, Scheme
from quantize.backends.autogptq import PINS, older_config, require_solvable, solve, write_older_base
from quantize.backends.isolation import Pins, environment_of, fitting_python, isolated_python, making
from quantize.backends.protocol import QuantizeResult, SolveJob
from quantize.base import read_base
from quantize.errors import QuantizeError, RecipeError, SolveError, WorkerError
from quantize.model_files.kept_files import kept_files
from quantize.planning.recipe import Backend, Recipe
from quantize.running.worker import child_environ, run_worker
from quantize.schemes.scheme import PRESETS
from quantize.schemes.settings import SETTINGS, SolverSettings
from quantize.stages.checkpoint import writing_job
from tests.quantize.command_line import environ
from tests.quantize.models import write_hollow_model

# One of torch's own libraries has it, seen wherever no byte-code is cached.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")

CLASSIC = SETTINGS["classic"]
INT4 = PRESETS["w4a16-g64"]
MIXED = INT4.model_copy(update={"overrides": (Override(modules="*.down_proj", bits=8),)})
# Before the tests have a home of their own.
HOME = home_directory()


@pytest.mark.parametrize(
    "scheme,settings,word",
    [
        (INT4, CLASSIC, ""),
        (PRESETS["w8a8"], CLASSIC, ""),
        (INT4, replace(CLASSIC, damp=(0.01, 0.1), true_sequential=False), ""),
        (MIXED, CLASSIC, "overrides"),
        (INT4, SETTINGS["best"], "--solver classic"),
        (INT4, replace(CLASSIC, group_order=True), "--solver classic"),
        (INT4, replace(CLASSIC, weighted_scales=True), "--solver classic"),
        (INT4, replace(CLASSIC, scale_norm=2.4), "--solver classic"),
        (INT4, replace(CLASSIC, gptaq=0.25), "--solver classic"),
    ],
)
def test_what_autogptq_has_not_is_refused(scheme: Scheme, settings: SolverSettings, word: str) -> None:
    """Exceptions by module and the better solver settings are gptqmodel's, and the refusal says so in one line."""
    if not word:
        require_solvable(scheme, settings)
        return
    with pytest.raises(RecipeError, match=word) as refusal:
        require_solvable(scheme, settings)
    assert "--backend gptqmodel" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "newer,older",
    [
        ({"torch_dtype": "bfloat16", "rope_theta": 1e6}, {"torch_dtype": "bfloat16", "rope_theta": 1e6}),
        ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"rope_theta": 1e6, "rope_scaling": None},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, {"rope_theta": 5e5, "rope_scaling": None}),
        ({"model_type": "qwen2", "auto_map": {"AutoConfig": "code.Config"}}, {"model_type": "qwen2"}),
    ],
)
def test_a_config_of_transformers_5_reads_the_same_in_4(newer: dict[str, Any], older: dict[str, Any]) -> None:
    """Rotary base and dtype keep their meaning: version 4 would take its defaults for words that it doesn't know."""
    assert older_config(newer) == older


def test_the_older_base_links_to_the_weights(tmp_path: Path) -> None:
    """No weight is copied, and nothing but weights and configuration is there to be read."""
    base = write_hollow_model(tmp_path / "base")
    older = write_older_base(base, tmp_path / "older")
    assert {path.name for path in older.iterdir()} == {"config.json", "model.safetensors"}
    assert (older / "model.safetensors").resolve() == (base / "model.safetensors").resolve()
    assert json.loads((older / "config.json").read_bytes())["torch_dtype"] == "bfloat16"


def test_making_an_environment() -> None:
    """uv where it is there, a Python of the right version with its pip where not, and a plain answer without both."""
    uv = making(PINS, Path("/e"), "/bin/uv", None)
    pip = making(PINS, Path("/e"), None, "/bin/python3.11")
    assert uv[0] == ["/bin/uv", "venv", "--no-project", "--python", "3.11", "/e"]
    assert pip[0] == ["/bin/python3.11", "-I", "-m", "venv", "/e"]
    for _, install in (uv, pip):
        assert install[-4:] == ["-r", str(PINS.file), "--only-binary", ":all:"]
    with pytest.raises(RecipeError, match=r"Python 3\.11 only.*install python3\.11 or uv"):
        making(PINS, Path("/e"), None, None)


def test_the_fitting_python(tmp_path: Path) -> None:
    """This one if its version fits, else the first on the PATH."""
    older = tmp_path / "python3.1"
    older.touch(mode=0o755)
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert fitting_python(["3.1", mine], {"PATH": str(tmp_path)}) == sys.executable
    assert fitting_python(["3.0", "3.1"], {"PATH": str(tmp_path)}) == str(older)
    assert fitting_python(["3.0"], {"PATH": str(tmp_path)}) is None


def test_every_pin_is_exact() -> None:
    """The environment of one digest is the same one everywhere."""
    lines = [line for line in PINS.file.read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line and ";" not in line for line in lines)
    assert {"auto-gptq==0.7.1", "transformers==4.51.3", "peft==0.14.0"} <= set(lines)


@pytest.fixture
def mine(tmp_path: Path) -> Pins:
    """Pins for the running Python, of a program that needs nothing."""
    (tmp_path / "pins.txt").write_text("# nothing\n")
    return Pins("nothing 1", tmp_path / "pins.txt", (f"{sys.version_info.major}.{sys.version_info.minor}",))


def test_an_environment_is_made_once(tmp_path: Path, mine: Pins) -> None:
    """The second call finds it; other pins would be another one; nothing half-made stays beside it."""
    environment = _indoors(tmp_path)
    python = isolated_python(mine, environment, tmp_path / "log")
    before = python.lstat().st_mtime_ns
    assert isolated_python(mine, environment, tmp_path / "log") == python
    assert python.lstat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "home" / "environments").iterdir()] == [python.parents[1].name]
    told = subprocess.run(
        [python, "-I", "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == str(python.parents[1])
    mine.file.write_text("# something\n")
    assert environment_of(mine, tmp_path / "home") != python.parents[1]


def test_an_environment_that_fails_leaves_nothing(tmp_path: Path, mine: Pins) -> None:
    """The installer's last word is the error, and the next call starts anew."""
    mine.file.write_text("no-such-thing==1\n")
    offline = {**_indoors(tmp_path), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    with pytest.raises(WorkerError, match=r"nothing 1: its environment can't be made: .*no-such-thing") as failure:
        isolated_python(mine, offline, tmp_path / "log")
    assert "\n" not in str(failure.value)
    assert list((tmp_path / "home" / "environments").iterdir()) == []


def _indoors(folder: Path) -> dict[str, str]:
    """An environment whose home is in the test's folder, and that has no uv."""
    return {"PATH": "/usr/bin:/bin", "QUANTGATE_HOME": str(folder / "home"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


class Run:
    """One run of the real program on the tiny model, its CUDA calls answered by the CPU."""

    def __init__(self, base: Path, folder: Path, home: Path) -> None:
        self.folder, self.progress, self.events = folder, list[tuple[int, int]](), list[dict[str, Any]]()
        self.base, self.environ = base, {**child_environ(environ()), "QUANTGATE_HOME": str(home)}

    def solve(
        self, scheme: Scheme, samples: list[dict[str, Any]], settings: SolverSettings = CLASSIC
    ) -> QuantizeResult:
        """Quantize the base, and write `variant`."""
        recipe = Recipe(read_base(self.base), scheme, (), 16, 512, 0, settings, Backend("auto-gptq", "0.7.1"))
        variant, work, solved = (self.folder / name for name in ("variant", "work", "solved"))
        for place in (variant, work, solved):
            place.mkdir(parents=True)
        result = solve(
            recipe,
            samples,
            SolveJob(solved, work, self.environ),
            on_progress=lambda *pair: self.progress.append(pair),
            on_event=self.events.append,
        )
        bits = {module.module: module.bits for module in result.modules}
        job = writing_job(recipe, solved, bits, variant)
        child = "quantize.backends.writing_child"
        run_worker(child, job, folder=work, environ=self.environ, on_progress=lambda *_: None)
        return result


@pytest.fixture(scope="module")
def autogptq_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an interpreter that sees AutoGPTQ's real environment and no need of a GPU."""
    real = environment_of(PINS, HOME)
    if not (real / "bin" / "python").exists():
        pytest.skip(f"needs AutoGPTQ's environment (gigabytes), which `--backend auto-gptq` makes at {real}")
    folder = tmp_path_factory.mktemp("autogptq")
    overlay = environment_of(PINS, folder / "home")
    subprocess.run([real / "bin" / "python", "-I", "-m", "venv", "--without-pip", overlay], check=True)
    (packages,) = overlay.glob("lib/python*/site-packages")
    (packages / "overlay.pth").write_text(f"{real / packages.relative_to(overlay)}\nimport cuda_on_cpu\n")
    (packages / "cuda_on_cpu.py").symlink_to(Path(__file__).with_name("cuda_on_cpu.py"))
    return folder / "home"


@pytest.fixture
def bench(autogptq_home: Path, tiny_base: Path) -> tuple[Path, Path]:
    """The tiny base, and the home."""
    return tiny_base / "tiny", autogptq_home


def token_samples(count: int = 16) -> list[dict[str, Any]]:
    """Token samples of different lengths, the same ones every time."""
    return [
        {"ids": [(7 * place * (number + 3)) % 250 + 2 for place in range(60 + 5 * number)], "where": f"chats:{number}"}
        for number in range(count)
    ]


@pytest.mark.real_model
@pytest.mark.timeout(300)
@pytest.mark.parametrize("scheme", ["w4a16-g64", "w8a16-g128", "w8a8"])
def test_a_tiny_model_through_autogptq(tmp_path: Path, bench: tuple[Path, Path], scheme: str) -> None:
    """The variant has our files in the usual format, near to its base; progress and losses arrive by the layer."""
    import torch  # noqa: PLC0415

    from quantize.variants.weights import read_dense, read_tensors  # noqa: PLC0415

    base, home = bench
    run = Run(base, tmp_path, home)
    solved = run.solve(PRESETS[scheme], token_samples())
    assert run.progress[0] == (0, 2)
    assert run.progress[-1] == (2, 2)
    assert [event["module"] for event in run.events] == [module.module for module in solved.modules]
    assert len(solved.modules) == 14
    assert all(module.loss is not None and module.loss >= 0 for module in solved.modules)
    assert solved.damp == {"0.01": 14}
    for file in kept_files(base):
        assert (tmp_path / "variant" / file.name).read_bytes() == file.read_bytes()
    ours, layers = read_dense(tmp_path / "variant")
    theirs = dict(read_tensors(base))
    assert len(layers) == 14
    limit = 0.2 if scheme.startswith("w4") else 0.02
    for layer in layers:
        weight = theirs[f"{layer}.weight"].float()
        assert (ours[f"{layer}.weight"] - weight).norm() < limit * weight.norm(), layer
    assert {name for name in ours if torch.equal(ours[name], theirs[name])} == ours.keys() - {
        f"{x}.weight" for x in layers
    }


@pytest.mark.real_model
@pytest.mark.timeout(300)
def test_a_weight_that_is_no_number_is_found(tmp_path: Path, bench: tuple[Path, Path]) -> None:
    """The source's error, a Hessian that doesn't factor, is told by its cause: the first sample and the module."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    base, home = bench
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][300] = float("inf")  # no sample but the last one has this token
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    samples = token_samples()
    samples[11]["ids"][5] = 300
    with pytest.raises(SolveError, match=r"chats:11: gives model\.layers\.0\.self_attn\.\w_proj an input that is no"):
        Run(broken, tmp_path / "run", home).solve(INT4, samples)


@pytest.mark.real_model
@pytest.mark.timeout(300)
def test_without_cuda_it_says_so(tmp_path: Path, bench: tuple[Path, Path]) -> None:
    """The environment's own torch has the last word: no usable GPU is an error of usage, in one line."""
    base, home = bench
    (stub,) = home.glob("environments/*/lib/python*/site-packages/overlay.pth")
    within = stub.read_text()
    stub.write_text(within.replace("import cuda_on_cpu\n", ""))
    try:
        with pytest.raises(QuantizeError, match=r"needs CUDA.*use --backend gptqmodel") as refusal:
            Run(base, tmp_path, home).solve(INT4, token_samples())
    finally:
        stub.write_text(within)
    assert refusal.value.exit_code == 2
