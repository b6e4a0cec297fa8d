"""The command line of a replica, as a table."""

from pathlib import Path
from typing import Any

import pytest

from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.command import Command, Machine, build_command
from serving.replica import Launch

VARIANT = Variant("qwq-int4", "int4", PARENT_QUALITY, Path("/models/qwq-int4"))


def built(engine: Any = "cpu", cpu_count: int = 2, gpus: tuple[int, ...] = (), **settings: Any) -> Command:
    """The command for a launch with these settings."""
    launch = Launch("qwq-int4-2", VARIANT, engine, ReplicaSettings(variant="qwq-int4", **settings), gpus)
    machine = Machine("/usr/bin/python3", Path("/cache"), cpu_count, {"PATH": "/bin", "PYTHONDONTWRITEBYTECODE": "1"})
    return build_command(launch, 8101, machine)


def option(command: Command, flag: str) -> str | None:
    """The word after a flag."""
    return command.argv[command.argv.index(flag) + 1] if flag in command.argv else None


@pytest.mark.parametrize(
    "settings,flag,value",
    [
        ({}, "--model", "/models/qwq-int4"),
        ({}, "--host", "127.0.0.1"),
        ({}, "--port", "8101"),
        ({}, "--served-model-name", "qwq-int4-2"),
        ({}, "--generation-config", "vllm"),
        ({}, "--fingerprint-value", "qwq-int4"),
        ({}, "--kv-cache-memory-bytes", str(512 * 2**20)),
        ({"kv_cache_bytes": "1GiB"}, "--kv-cache-memory-bytes", str(2**30)),
        ({"engine": "cuda"}, "--kv-cache-memory-bytes", None),
        ({}, "--max-model-len", None),
        ({"max_model_len": 4096}, "--max-model-len", "4096"),
        ({}, "--max-num-seqs", None),
        ({"max_num_seqs": 16}, "--max-num-seqs", "16"),
        ({}, "--max-num-queued-reqs", "256"),
        ({"max_queued": 8}, "--max-num-queued-reqs", "8"),
        ({"tensor_parallel": 4}, "--tensor-parallel-size", "4"),
        ({"drain_seconds": 60}, "--shutdown-timeout", "60"),
    ],
)
def test_option(settings: dict[str, Any], flag: str, value: str | None) -> None:
    """Each setting becomes its flag, and no flag is given where vLLM's default is wanted."""
    assert option(built(**settings), flag) == value


@pytest.mark.parametrize(
    "settings,variable,value",
    [
        ({}, "VLLM_CPU_OMP_THREADS_BIND", "0-1"),
        ({"cpu_count": 1}, "VLLM_CPU_OMP_THREADS_BIND", "0"),
        ({"cores": "1"}, "VLLM_CPU_OMP_THREADS_BIND", "1"),
        ({"tensor_parallel": 2, "cpu_count": 8}, "VLLM_CPU_OMP_THREADS_BIND", "0-7|0-7"),
        ({"engine": "cuda"}, "VLLM_CPU_OMP_THREADS_BIND", None),
        ({"engine": "cuda", "gpus": (2, 5)}, "CUDA_VISIBLE_DEVICES", "2,5"),
        ({"engine": "cuda"}, "CUDA_VISIBLE_DEVICES", None),
        ({"api_key": "s3cret"}, "VLLM_API_KEY", "s3cret"),
        ({}, "VLLM_API_KEY", None),
        ({}, "PYTHONDONTWRITEBYTECODE", None),
        ({}, "PYTHONPYCACHEPREFIX", "/cache/bytecode"),
        ({}, "PATH", "/bin"),
    ],
)
def test_environment(settings: dict[str, Any], variable: str, value: str | None) -> None:
    """The environment binds cores or GPUs, keeps byte-code, and carries the key, which `ps` would show otherwise."""
    command = built(**settings)
    assert command.environment.get(variable) == value
    assert "s3cret" not in command.argv


def test_free_arguments_come_last_but_for_nothing() -> None:
    """What the configuration adds is passed on as it is."""
    command = built(args=("--enforce-eager", "--block-size", "32"))
    assert command.argv[:3] == ("/usr/bin/python3", "-m", "vllm.entrypoints.openai.api_server")
    assert command.argv[-3:] == ("--enforce-eager", "--block-size", "32")
