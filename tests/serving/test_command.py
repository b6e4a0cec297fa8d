"""The command line of a replica, as a table."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from config.hardware import Core
from config.lora import Lora
from config.reserved_flags import reserved_flag
from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.command import Command, Machine, build_command
from serving.replica import Launch, Thinking

VARIANT = Variant("qwq-int4", "int4", PARENT_QUALITY, Path("/models/qwq-int4"))


MACHINE = Machine("/usr/bin/python3", Path("/cache"), 2, {"PATH": "/bin", "PYTHONDONTWRITEBYTECODE": "1"})


def built(
    engine: Any = "cpu", gpus: tuple[int, ...] = (), machine: dict[str, Any] | None = None, **settings: Any
) -> Command:
    """The command for a launch with these settings, on a machine that differs like this from the usual one."""
    launch = Launch("qwq-int4-2", VARIANT, engine, ReplicaSettings(variant="qwq-int4", **settings), gpus)
    return build_command(launch, 8101, dataclasses.replace(MACHINE, **machine or {}))


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
        ({}, "--pipeline-parallel-size", None),
        ({"pipeline_parallel": 2}, "--pipeline-parallel-size", "2"),
        ({}, "--data-parallel-size", None),
        ({"data_parallel": 2}, "--data-parallel-size", "2"),
        ({}, "--kv-cache-dtype", None),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype", "fp8"),
        ({}, "--speculative-config", None),
        ({"speculative": {"method": "ngram"}}, "--speculative-config", '{"method": "ngram"}'),
        ({"drain_seconds": 60}, "--shutdown-timeout", "90"),
        ({"drain_seconds": 0}, "--shutdown-timeout", "30"),
        ({"dtype": "float16"}, "--dtype", "float16"),
        ({}, "--logging-config.formatter", None),
    ],
)
def test_option(settings: dict[str, Any], flag: str, value: str | None) -> None:
    """Each setting becomes its flag, and no flag is given where vLLM's default is wanted."""
    assert option(built(**settings), flag) == value


@pytest.mark.parametrize(
    "settings,variable,value",
    [
        ({}, "VLLM_CPU_OMP_THREADS_BIND", "0-1"),
        ({"machine": {"cpu_count": 1}}, "VLLM_CPU_OMP_THREADS_BIND", "0"),
        ({"machine": {"cores": (Core(0, (4, 6)), Core(0, (5,)))}}, "VLLM_CPU_OMP_THREADS_BIND", "4-6"),
        ({"cores": "1"}, "VLLM_CPU_OMP_THREADS_BIND", "1"),
        ({"tensor_parallel": 2, "machine": {"cpu_count": 8}}, "VLLM_CPU_OMP_THREADS_BIND", "0-7|0-7"),
        ({"data_parallel": 2, "machine": {"cpu_count": 8}}, "VLLM_CPU_OMP_THREADS_BIND", "0-7|0-7"),
        ({"engine": "cuda"}, "VLLM_CPU_OMP_THREADS_BIND", None),
        ({"engine": "cuda", "gpus": (2, 5)}, "CUDA_VISIBLE_DEVICES", "2,5"),
        ({"engine": "cuda"}, "CUDA_VISIBLE_DEVICES", None),
        ({"engine": "cuda"}, "CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        ({}, "LD_PRELOAD", None),
        ({"machine": {"preload": (Path("/lib/libtcmalloc.so.4"),)}}, "LD_PRELOAD", "/lib/libtcmalloc.so.4"),
        (
            {"machine": {"preload": (Path("/a.so"),), "environment": {"LD_PRELOAD": "/b.so"}}},
            "LD_PRELOAD",
            "/a.so:/b.so",
        ),
        ({"engine": "cuda", "machine": {"preload": (Path("/a.so"),)}}, "LD_PRELOAD", None),
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


def test_the_command_takes_the_model_first_where_it_works() -> None:
    """`vllm serve MODEL`: only its module knows `--model`."""
    command = built(machine={"program": ("/venv/bin/vllm", "serve")})
    assert command.argv[:4] == ("/usr/bin/python3", "/venv/bin/vllm", "serve", "/models/qwq-int4")
    assert "--model" not in command.argv


def test_prefix_caching_and_json_logs_are_chosen() -> None:
    """What is on in vLLM by itself is switched off by name; logs are JSON where the configuration says so."""
    assert "--no-enable-prefix-caching" not in built().argv
    command = built(prefix_caching=False, machine={"log_format": "json"})
    assert "--no-enable-prefix-caching" in command.argv
    assert option(command, "--logging-config.formatter") == "json"


def test_a_share_of_the_cores_gives_way_to_the_configuration() -> None:
    """A replica computes on its share of the machine, unless the configuration says where."""
    launch = Launch("a-1", VARIANT, "cpu", ReplicaSettings(variant="a"), cores="2-3")
    assert build_command(launch, 1, MACHINE).environment["VLLM_CPU_OMP_THREADS_BIND"] == "2-3"
    bound = dataclasses.replace(launch, settings=ReplicaSettings(variant="a", cores="nobind"))
    assert build_command(bound, 1, MACHINE).environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_media_domains() -> None:
    """vLLM gets the gateway's list, as several words before the next flag, and then follows no redirects."""
    launch = Launch("a-1", VARIANT, "cpu", ReplicaSettings(variant="a"))
    assert option(build_command(launch, 1, MACHINE), "--allowed-media-domains") is None
    command = build_command(dataclasses.replace(launch, media_domains=("a.example", "b.example")), 1, MACHINE)
    place = command.argv.index("--allowed-media-domains")
    assert command.argv[place + 1 : place + 4] == ("a.example", "b.example", "--enable-request-id-headers")
    assert command.environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert "VLLM_MEDIA_URL_ALLOW_REDIRECTS" not in build_command(launch, 1, MACHINE).environment


def test_every_flag_of_ours_is_kept_from_the_configuration() -> None:
    """Whatever the builder sets can't be set twice, but for thinking and tools: the operator has the last word."""
    launch = Launch(
        "a-1",
        VARIANT,
        "cpu",
        ReplicaSettings(variant="a", prefix_caching=False, max_model_len=64, max_num_seqs=1),
        thinking=Thinking("qwen3", Path("/think.jinja")),
        tool_parser="hermes",
        media_domains=("images.example.com",),
    )
    argv = build_command(launch, 1, dataclasses.replace(MACHINE, log_format="json")).argv
    flags = {argument for argument in argv if argument.startswith("--")}
    assert {flag for flag in flags if reserved_flag(flag) is None} == {
        *("--reasoning-parser", "--chat-template", "--enable-auto-tool-choice", "--tool-call-parser"),
    }


def test_the_tool_parser() -> None:
    """With a parser vLLM takes tools; without one neither flag is given, as one of them alone stops it."""
    launch = Launch("a-1", VARIANT, "cpu", ReplicaSettings(variant="a"), tool_parser="hermes")
    command = build_command(launch, 1, MACHINE)
    assert option(command, "--tool-call-parser") == "hermes"
    assert "--enable-auto-tool-choice" in command.argv
    assert not {"--tool-call-parser", "--enable-auto-tool-choice"} & set(built().argv)


@pytest.mark.parametrize(
    "loras,flags",
    [
        ((), ()),
        (
            (Lora("math", Path("/m"), 8),),
            ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "1", "--lora-modules", "math=/m"),
        ),
        (
            (Lora("math", Path("/m"), 8), Lora("law", Path("/l"), 20)),
            ("--enable-lora", "--max-lora-rank", "32", "--max-loras", "2", "--lora-modules", "math=/m", "law=/l"),
        ),
    ],
)
def test_lora_adapters(loras: tuple[Lora, ...], flags: tuple[str, ...]) -> None:
    """All adapters of a variant, and room for the largest of them."""
    variant = dataclasses.replace(VARIANT, loras=loras)
    argv = build_command(Launch("qwq-int4-2", variant, "cuda", ReplicaSettings(variant="qwq-int4")), 8101, MACHINE).argv
    found = argv[argv.index("--enable-lora") :] if loras else ()
    assert found[: len(flags)] == flags
    assert ("--enable-lora" in argv) is bool(loras)


def test_a_batch_mixes_no_more_adapters_than_it_has_memory_for() -> None:
    """vLLM reserves memory for each."""
    loras = tuple([Lora(f"a{number}", Path("/m"), 8) for number in range(40)])
    launch = Launch(
        "qwq-int4-2", dataclasses.replace(VARIANT, loras=loras), "cuda", ReplicaSettings(variant="qwq-int4")
    )
    assert option(build_command(launch, 8101, MACHINE), "--max-loras") == "8"
