"""Every command line that we build is one that the installed vLLM's own parser takes, and reads as it was meant."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config.reserved_flags import RESERVED_FLAGS, reserved_flag
from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.command import Machine, build_command
from serving.replica import Launch, Thinking

pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
ROOT = Path(__file__).resolve().parents[2]
VARIANT = Variant("int4", "int4", PARENT_QUALITY, Path("/models/int4"))
MACHINE = Machine("python", Path("/cache"), 2, {}, ("-m", "vllm"))
LAUNCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "dtype": "float16",
        "tensor_parallel": 2,
        "pipeline_parallel": 2,
        "data_parallel": 2,
        "expert_parallel": True,
        "kv_cache_dtype": "fp8",
        "speculative": {"method": "ngram", "num_speculative_tokens": 4},
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_queued": 16,
        "kv_cache_bytes": "1GiB",
        "prefix_caching": False,
        "drain_seconds": 0.5,
        "args": ("--enforce-eager", "--block-size", "32"),
    },
}
# One process reads all of them: importing vLLM takes most of the time.
PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
asked = json.load(sys.stdin)
told = [vars(parser.parse_args(arguments)) for arguments in asked]
flags = [flag for action in parser._actions for flag in action.option_strings]
print("TOLD" + json.dumps({"told": told, "flags": flags}, default=str))
"""


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    """What vLLM's parser makes of each launch, and every flag that it knows."""
    asked = []
    for settings in LAUNCHES.values():
        launch = Launch(
            "int4-1",
            VARIANT,
            "cpu",
            ReplicaSettings(variant="int4", **settings),
            thinking=Thinking("qwen3", Path("/think.jinja")),
            tool_parser="hermes",
        )
        argv = build_command(launch, 8101, dataclasses.replace(MACHINE, log_format="json")).argv
        asked.append(argv[argv.index("--model") :])
    done = subprocess.run(
        [sys.executable, "-c", PARSE], cwd=ROOT, input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.rpartition("TOLD")[2])
    return answer


@pytest.mark.timeout(300)
def test_the_parser_reads_what_was_meant(answer: dict[str, Any]) -> None:
    """Every option arrives under vLLM's own name for it, with the value that the configuration gave it."""
    plain, all_of_them = answer["told"]
    assert plain["served_model_name"] == ["int4-1", "int4"]
    assert (plain["model"], plain["host"], plain["port"]) == ("/models/int4", "127.0.0.1", 8101)
    assert (plain["dtype"], plain["generation_config"], plain["fingerprint_value"]) == ("auto", "vllm", "int4")
    assert (plain["reasoning_parser"], plain["chat_template"]) == ("qwen3", "/think.jinja")
    assert (plain["enable_auto_tool_choice"], plain["tool_call_parser"]) == (True, "hermes")
    assert plain["enable_request_id_headers"]
    assert plain["enable_server_load_tracking"]
    assert "json" in str(plain["logging_config"])
    assert plain["enable_prefix_caching"] is not False
    assert all_of_them["enable_prefix_caching"] is False
    assert all_of_them["tensor_parallel_size"] == 2
    assert (all_of_them["pipeline_parallel_size"], all_of_them["data_parallel_size"]) == (2, 2)
    assert all_of_them["enable_expert_parallel"]
    assert all_of_them["kv_cache_dtype"] == "fp8"
    assert all_of_them["speculative_config"] == {"method": "ngram", "num_speculative_tokens": 4}
    assert (all_of_them["max_model_len"], all_of_them["max_num_seqs"]) == (4096, 8)
    assert (all_of_them["max_num_queued_reqs"], all_of_them["kv_cache_memory_bytes"]) == (16, 2**30)
    assert (all_of_them["shutdown_timeout"], all_of_them["block_size"]) == (31, 32)


@pytest.mark.timeout(300)
def test_flags_of_ours_exist_and_others_are_free(answer: dict[str, Any]) -> None:
    """What is refused in `args` is a flag of vLLM, and no other flag of vLLM is refused by likeness."""
    known = set(answer["flags"])
    assert set(RESERVED_FLAGS) <= known
    refused = {flag for flag in known if reserved_flag(flag)}
    assert {flag.replace("--no-", "--") for flag in refused} <= set(RESERVED_FLAGS)
