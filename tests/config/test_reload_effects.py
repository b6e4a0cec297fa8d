"""Each option takes effect at a reload, or a change of it is reported: checked over the schema."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from config.reload_effects import EFFECTS, effect, pending_options
from config.schema import ReplicaSettings, Settings
from config.variant import PARENT_QUALITY, Variant
from serving.identity import launch_digest
from serving.replica import plan_launches

README = Path(__file__).parents[2] / "gateway" / "README.md"


def options(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every option below a table of the schema, such as `replicas.url`."""
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        tables = [kind for kind in _types(info.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not tables:
            yield path
        for table in tables:
            yield from options(table, f"{path}.")


def _types(kind: Any) -> Iterator[Any]:
    yield kind
    for argument in get_args(kind):
        yield from _types(argument)


OPTIONS = [*options(Settings)]


def test_the_schema_is_walked() -> None:
    """Options in lists and in tables of named tables are found, too."""
    assert {"gateway.tracing.endpoint", "replicas.url", "aliases.floor.kl_mean", "serving.logs.keep"} <= {*OPTIONS}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_takes_effect_at_a_reload_or_says_so(option: str) -> None:
    """Each option has an entry; those of the gateway have one of their own, or of their table."""
    found = effect(option)
    assert found is not None
    assert found[0] == "start" or found[1], "how a reload applies it"


def test_no_entry_is_out_of_date() -> None:
    """Each entry is an option or a table of the schema."""
    known = {option.rsplit(".", depth)[0] for option in OPTIONS for depth in range(option.count(".") + 1)}
    assert EFFECTS.keys() <= known


def test_the_reference_has_the_table() -> None:
    """The table of the documentation is the one in the code."""
    words = {"start": "next start", "reload": "reload"}
    expected = [f"| `{option}` | {words[when]} | {how} |" for option, (when, how) in EFFECTS.items()]
    section = README.read_text().partition("## Changing the configuration")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `.*$", section, re.MULTILINE) == expected


CHANGES: dict[str, Any] = {
    "gateway.listen": "127.0.0.1:9",
    "gateway.admin": "127.0.0.1:9",
    "gateway.admin_key": "secret",
    "gateway.state": "sqlite:///other.db",
    "gateway.allowed_hosts": ["llm.example.com"],
    "gateway.access_log": "json",
    "gateway.tracing.sample_share": {"endpoint": "http://c:4318", "sample_share": 0.5},
    "gateway.kubernetes.server": "https://k:6443",
    "gateway.kubernetes.ca": "ca.pem",
    "gateway.kubernetes.token_file": "token",
    "gateway.tracing.endpoint": {"endpoint": "http://c:4318"},
    "serving.parallel_starts": 7,
    "serving.start_attempts": 7,
    "serving.logs.format": "json",
    "serving.logs.rotate_bytes": 7,
    "serving.logs.keep": 7,
}


@pytest.mark.parametrize("option", [option for option in OPTIONS if (effect(option) or [""])[0] == "start"])
def test_a_change_that_waits_for_the_next_start_is_reported(option: str) -> None:
    """A reload names the option, or its table."""
    table, *path = option.split(".")
    value: Any = CHANGES.get(option, True)
    for name in reversed(path if "tracing" not in path else path[:1]):
        value = {name: value}
    changed = Settings.model_validate({table: value})
    (pending,) = pending_options(Settings(), changed)
    assert option == pending or option.startswith(f"{pending}.")
    assert pending_options(changed, changed) == []


REPLICA_CHANGES: dict[str, Any] = {
    "variant": "b",
    "url": "http://h:1",
    "kubernetes": {"service": "a"},
    "api_key": "secret",
    "count": 2,
    "gpus": (1,),
    "tensor_parallel": 2,
    "pipeline_parallel": 2,
    "data_parallel": 2,
    "expert_parallel": True,
    "kv_cache_dtype": "fp8",
    "speculative": {"method": "ngram", "num_speculative_tokens": 4},
    "port": 8101,
    "dtype": "float16",
    "max_model_len": 512,
    "max_num_seqs": 3,
    "max_queued": 3,
    "max_in_flight": 3,
    "kv_cache_bytes": 2**30,
    "prefix_caching": False,
    "cores": "0",
    "args": ("--enforce-eager",),
}
PATIENCE = {"start_timeout_seconds", "drain_seconds", "hang_seconds"}
CERTIFICATES = {"ca", "certificate", "key_file"}  # of replicas with a url
RESOLVED = {"tool_calling"}  # the parser that it comes to counts instead


def digests(**options: Any) -> list[str]:
    """What makes the launches of one replica equal to others."""
    variants = {name: Variant(name, "bf16", PARENT_QUALITY) for name in "ab"}
    settings = ReplicaSettings.model_validate({"variant": "a", **options})
    return [launch_digest(launch) for launch in plan_launches((settings,), variants, "cpu")]


@pytest.mark.parametrize("option", sorted(ReplicaSettings.model_fields.keys() - PATIENCE - CERTIFICATES - RESOLVED))
def test_a_changed_replica_is_replaced(option: str) -> None:
    """Every option of a replica but its times makes another launch of it, so that a reload replaces it."""
    value = REPLICA_CHANGES.get(option, "auto")
    assert digests(**{option: value}) != digests()


def test_another_tool_parser_is_another_launch() -> None:
    """`tool_calling` counts by its result: a name that `auto` would find changes nothing."""
    (launch,) = plan_launches((ReplicaSettings(variant="a"),), {"a": Variant("a", "bf16", PARENT_QUALITY)}, "cpu")
    assert launch_digest(replace(launch, tool_parser="hermes")) != launch_digest(launch)
