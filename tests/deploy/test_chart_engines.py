"""vLLM's command line and environment in the chart are those of `serving/command.py`, and known to the tested vLLM."""

import json
from pathlib import Path
from typing import Any

import pytest

from config.reserved_flags import RESERVED_FLAGS
from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from deploy.helm.schema import ADAPTER_FLAGS, ENGINE_OPTIONS
from serving.command import Command, Machine, build_command
from serving.replica import Launch, Thinking
from tests.contract.reliances import FINDERS, Kind, Reliance
from tests.contract.sources import NoSources, Sources, installed_sources
from tests.deploy.chart import CHART, EXAMPLES, MINIMAL, Chart, Object, Pod, values_of

examples = pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
TEMPLATE = "/etc/quantgate/chat-template.jinja"
# Of pods that are part of a group, in this order at the end.
GROUP_FLAGS = frozenset({"--nnodes", "--node-rank", "--master-addr", "--headless"})
# Of the environment of a pod, not of vLLM or of a launch.
POD_VARIABLES = frozenset({"HOME", "USER", "OMP_NUM_THREADS"})
ALL_OPTIONS: Object = {
    "tensor_parallel": 2,
    "pipeline_parallel": 2,
    "data_parallel": 2,
    "expert_parallel": True,
    "dtype": "float16",
    "max_model_len": 1_048_576,
    "max_num_seqs": 1_000_000,
    "max_queued": 7,
    "max_in_flight": 9,
    "kv_cache_bytes": "24GiB",
    "kv_cache_dtype": "fp8",
    "speculative": {"method": "ngram", "num_speculative_tokens": 4},
    "prefix_caching": False,
    "cores": "0-3",
    "start_timeout_seconds": 61.5,
    "drain_seconds": 0.5,
    "args": ["--enforce-eager", "--block-size", "32"],
}


def launched(chart_values: Object, name: str) -> Command:
    """How quantgate itself would start a variant of the chart."""
    variant = chart_values["variants"][name]
    directory = Path(chart_values["models"]["mountPath"], variant["path"] or name)
    engine = chart_values["engines"][variant["engine"]]
    options = {"cores": "nobind", **variant["options"]} if variant["engine"] == "cpu" else variant["options"]
    launch = Launch(
        name,
        Variant(name, variant["precision"] or "bf16", PARENT_QUALITY, directory),
        variant["engine"],
        ReplicaSettings.model_validate({"variant": name, **options}),
        thinking=Thinking(
            variant["reasoningParser"] or None,
            Path(TEMPLATE) if variant["chatTemplate"] else None,
            variant["templateDefaults"].get("enable_thinking"),
        ),
        tool_parser=variant["toolParser"] or None,
        media_domains=tuple(chart_values["config"]["gateway"].get("media_domains", ())),
    )
    machine = Machine(engine["command"][0], Path("/cache"), 2, {}, tuple(engine["command"][1:]))
    return build_command(launch, 8000, machine)


def flags(arguments: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Values by flag; the empty flag has what comes before the first one. JSON is parsed."""
    found: dict[str, Any] = {}
    flag = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument
            assert flag not in found, f"{flag} twice"
        found.setdefault(flag, [])
        if argument != flag:
            found[flag].append(json.loads(argument) if argument.startswith("{") else argument)
    return found


def check_arguments(pod: Pod, command: Command, fingerprint: str) -> None:
    """Compare flags, with what differs in a pod: it listens on its address, and has no id of a replica."""
    expected = flags(command.argv[len(pod.container["command"]) :])
    name = pod.variant
    assert expected["--served-model-name"] == [name, name]
    changed = {"--host": ["0.0.0.0"], "--served-model-name": [name], "--fingerprint-value": [fingerprint]}
    given = {flag: value for flag, value in flags(pod.arguments()).items() if flag not in GROUP_FLAGS}
    assert given == {**expected, **changed}


@examples
def test_arguments(chart: Chart, values: Path) -> None:
    """Each pod of each example has the flags that quantgate would give vLLM."""
    merged = values_of(values)
    for pod in chart.rendered(values).engines():
        assert pod.variant is not None
        fingerprint = merged["variants"][pod.variant]["fingerprint"] or pod.variant
        check_arguments(pod, launched(merged, pod.variant), fingerprint)


@examples
def test_environment(chart: Chart, values: Path) -> None:
    """The same for the environment."""
    merged = values_of(values)
    for pod in chart.rendered(values).engines():
        assert pod.variant is not None
        variant = merged["variants"][pod.variant]
        own = {each["name"] for each in variant["env"]} | POD_VARIABLES
        given = {each["name"]: each.get("value") for each in pod.container["env"] if each["name"] not in own}
        key = {"VLLM_API_KEY": None} if merged["engines"]["apiKey"]["existingSecret"] else {}
        assert given == launched(merged, pod.variant).environment | key


@pytest.mark.parametrize("engine", ["cuda", "cpu"])
def test_every_option_has_its_flag(chart: Chart, engine: str, tmp_path: Path) -> None:
    """All options at once, beside media domains and defaults of the chat template."""
    assert ALL_OPTIONS.keys() == ENGINE_OPTIONS
    changed: Object = {
        "variants": {"all": {"engine": engine, "options": ALL_OPTIONS, "templateDefaults": {"enable_thinking": False}}},
        "config": {"gateway": {"media_domains": ["a.example", "b.example"]}, "aliases": {"all": {"ladder": ["all"]}}},
    }
    path = tmp_path / "values.yaml"
    path.write_text(json.dumps({"gateway": {"existingSecret": "s"}, "models": {"volume": {"emptyDir": {}}}, **changed}))
    (pod,) = chart.rendered(path).engines()
    command = launched(values_of(path), "all")
    check_arguments(pod, command, "all")
    assert pod.arguments()[-3:] == ALL_OPTIONS["args"]
    assert {each["name"] for each in pod.container["env"]} - POD_VARIABLES == command.environment.keys()
    assert pod.container["startupProbe"]["failureThreshold"] * 5 >= ALL_OPTIONS["start_timeout_seconds"]
    (entry,) = chart.rendered(path).config()["replicas"]
    assert entry["max_in_flight"] == ALL_OPTIONS["max_in_flight"]


def test_gpus_of_a_pod(chart: Chart) -> None:
    """One for each rank, as request and limit; none on a CPU."""
    rendered = chart.rendered(changes={"variants.qwq-int4.options": {"tensor_parallel": 2, "data_parallel": 4}})
    (pod,) = rendered.engines()
    resources = pod.container["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 8
    (pod,) = chart.rendered(changes={"variants.qwq-int4.engine": "cpu"}).engines()
    assert "nvidia.com/gpu" not in pod.container["resources"]["limits"]


@pytest.mark.parametrize("flag", sorted(RESERVED_FLAGS.keys() - ADAPTER_FLAGS))
def test_reserved_flags_are_refused(flag: str) -> None:
    """Arguments cannot override what the chart sets."""
    pattern = json.loads((CHART / "values.schema.json").read_text())["$defs"]["EngineOptions"]["properties"]["args"]
    assert f"{flag}|" in pattern["items"]["not"]["pattern"].replace(")", "|")


def test_vllm_knows_all_of_it(chart: Chart) -> None:
    """Flags, parsers and variables are in the sources of the installed vLLM."""
    try:
        sources = installed_sources()
    except NoSources as error:
        pytest.skip(str(error))
    wanted = {*wanted_of(chart, MINIMAL)}.union(*(wanted_of(chart, path) for path in EXAMPLES))
    assert [each for each in sorted(wanted) if not known(sources, *each)] == []
    assert not known(sources, "flag", "--no-such-flag")


def wanted_of(chart: Chart, values: Path) -> set[tuple[Kind, str]]:
    """What the pods of an example need of vLLM."""
    wanted: set[tuple[Kind, str]] = set()
    for pod in chart.rendered(values).engines():
        given = flags(pod.arguments())
        wanted |= {("flag", flag) for flag in given if flag}
        wanted |= {("reasoning parser", name) for name in given.get("--reasoning-parser", ())}
        wanted |= {("tool parser", name) for name in given.get("--tool-call-parser", ())}
        wanted |= {("variable", each["name"]) for each in pod.container["env"] if each["name"].startswith("VLLM_")}
    return wanted


def known(sources: Sources, kind: Kind, name: str) -> bool:
    """Whether vLLM has it."""
    return FINDERS[kind](sources, Reliance(kind, name, "the chart"))
