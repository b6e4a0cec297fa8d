"""The chart is complete: the real helm accepts and renders each example, and every object is valid."""

import json
import subprocess
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from deploy.helm.__main__ import main
from deploy.helm.schema import values_schema
from deploy.helm.values import ChartValues, Values
from tests.deploy.chart import CHART, EXAMPLES, Chart, Object, Rendered, run
from tests.deploy.custom_resources import SPECIFICATIONS, schema_of
from tests.deploy.prometheus import program
from tests.deploy.promql import DASHBOARDS, RULES
from tests.fakes.running import ROOT

KUBERNETES = "1.37"
examples = pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)


def test_the_schema_is_up_to_date() -> None:
    """`python -m deploy.helm` writes it."""
    assert main(["--check"]) == 0


def test_rules_and_dashboards_are_links() -> None:
    """The chart has the files of deploy/prometheus and deploy/grafana, through links that leave no repository."""
    for path in (*RULES, *DASHBOARDS):
        linked = CHART / "files" / path.parent.name
        assert linked.is_symlink()
        assert not linked.readlink().is_absolute()
        assert (linked / path.name).samefile(path)


def test_the_chart_has_the_version_of_the_project() -> None:
    """`appVersion` names the images of the gateway."""
    project = (ROOT / "pyproject.toml").read_text()
    chart_file = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{chart_file["appVersion"]}"' in project


@examples
def test_lint(chart: Chart, values: Path) -> None:
    """`helm lint --strict` has nothing to say."""
    result = run(chart.helm, "lint", "--strict", CHART, "--values", values)
    assert "1 chart(s) linted, 0 chart(s) failed" in result.stdout, result.stdout + result.stderr
    assert "[WARNING]" not in result.stdout


@examples
def test_objects_are_valid(chart: Chart, values: Path) -> None:
    """By the schemas of Kubernetes, which know every field, and of the custom resources."""
    for each in chart.rendered(values).objects:
        validate(each)


def validate(each: Object) -> None:
    """Validate an object by the schema of its kind."""
    try:
        schema = schema_of(each["apiVersion"], each["kind"])
    except KeyError:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    else:
        jsonschema.Draft202012Validator(schema).validate(each)


# YAML reads each of them as something other than text, if it is without quotes.
NUMBER_LIKE: dict[str, Any] = {
    "nameOverride": "on",
    "fullnameOverride": "true",
    "gateway.existingSecret": "4",
    "gateway.persistence": {"size": "20", "storageClassName": "21"},
    "gateway.tls.existingSecret": "7",
    "gateway.autoscaling.inFlight.metric": "yes",
    "engines.apiKey": {"existingSecret": "8", "key": "9"},
    "models": {"volume": None, "claim": {"create": True, "size": "10", "storageClassName": "11"}},
    "variantDefaults.runtimeClassName": "12",
    "variantDefaults.priorityClassName": "0x13",
    "variantDefaults.sharedMemory": "14",
    "variantDefaults.cacheSize": "15",
    "variants": {"4": {}, "true": {"nodes": 2, "options": {"tensor_parallel": 2}}, "null": {"chatTemplate": "16"}},
    "rollouts.scale": True,
    "inferencePool": {"enabled": True, "endpointPickerRef": {"name": "17"}},
}


SHARED = {"gateway.state": {"existingSecret": "5", "key": "6"}}
ALONE = {"gateway.state": {"existingSecret": ""}, "gateway.autoscaling.enabled": False}


@pytest.mark.parametrize("state", [SHARED, ALONE], ids=["shared", "alone"])
def test_names_are_text(chart: Chart, state: Object) -> None:
    """Kubernetes permits names of digits, and names such as `true`."""
    changes = {**NUMBER_LIKE, **state}
    options = [option for name, value in changes.items() for option in ("--set-json", f"{name}={json.dumps(value)}")]
    values = CHART / "examples" / "several-gateways.yaml"
    result = run(chart.helm, "template", "18", CHART, "--namespace", "19", "--values", values, *options)
    assert result.returncode == 0, result.stderr
    for each in Rendered(result.stdout).objects:
        validate(each)
        metadata = each["metadata"]
        assert {type(value) for value in (metadata["name"], metadata["namespace"])} == {str}
        assert {type(value) for value in metadata["labels"].values()} == {str}
    assert 'quantgate.io/variant: "4"' in result.stdout


@examples
def test_pods_of_groups_are_valid(chart: Chart, values: Path) -> None:
    """The templates of a LeaderWorkerSet are pods to Kubernetes."""
    for pod in chart.rendered(values).pods():
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"labels": dict(pod.labels)}, "spec": pod.spec}
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@examples
def test_kubectl_reads_all_objects(chart: Chart, values: Path, tmp_path: Path) -> None:
    """kubectl decodes them into its own types, and changes the image of each Deployment. `--local` needs no cluster."""
    rendered = chart.rendered(values)
    builtin = [each for each in rendered.objects if (each["apiVersion"], each["kind"]) not in SPECIFICATIONS]
    result = kubectl_reads(chart, builtin, tmp_path)
    assert "unable to decode" not in result.stderr
    assert result.stdout.splitlines() == [f"deployment.apps/{name}" for name in rendered.of("Deployment")]


def test_invalid_objects_are_found(chart: Chart, tmp_path: Path) -> None:
    """Both validations can fail: a port that is text, and a field that does not exist."""
    deployment = deepcopy(chart.rendered().of("Deployment")["qg-quantgate"])
    deployment["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "eighty"
    assert "cannot unmarshal string" in kubectl_reads(chart, [deployment], tmp_path).stderr
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)
    deployment = deepcopy(chart.rendered().of("Deployment")["qg-quantgate"])
    deployment["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES, strict=True)


def kubectl_reads(chart: Chart, objects: Sequence[Object], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Have kubectl decode objects; it prints the name of each that has containers."""
    path = folder / "objects.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    return run(chart.kubectl, "set", "image", "--local", "--filename", path, "*=checked:1", "--output", "name")


def test_every_kind_is_in_an_example(chart: Chart) -> None:
    """Nothing in the templates is left unvalidated."""
    kinds = {
        line.split()[1]
        for path in CHART.glob("templates/*.yaml")
        for line in path.read_text().splitlines()
        if line.startswith("kind:")
    }
    rendered = {each["kind"] for path in EXAMPLES for each in chart.rendered(path).objects}
    assert kinds == rendered


def test_the_values_file_has_all_values() -> None:
    """Each value of the schema has its default there; `global` is for charts that this one is a part of."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert missing_values(ChartValues, values) == []


def missing_values(model: type[BaseModel], values: Object, place: str = "") -> list[str]:
    """The names of values of the chart that are not in a file."""
    missing = []
    for name, option in model.model_fields.items():
        key = to_camel(name)
        if key not in values:
            missing.append(f"{place}{key}")
        elif isinstance(option.annotation, type) and issubclass(option.annotation, Values):
            missing += missing_values(option.annotation, values[key], f"{place}{key}.")
    return missing


def test_the_default_values_match_the_schema() -> None:
    """They lack an alias only, which is required."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    errors = jsonschema.Draft202012Validator(values_schema()).iter_errors(values)
    assert [list(error.absolute_path) for error in errors] == [["config", "aliases"]]


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"gatway": {}}, "'gatway' not allowed"),
        ({"gateway.replica": 2}, "'replica' not allowed"),
        ({"variants.qwq-int4.option": {}}, "'option' not allowed"),
        ({"variants.qwq-int4.options": {"tensor_paralel": 2}}, "'tensor_paralel' not allowed"),
        ({"variants.qwq-int4.options": {"hang_seconds": 2}}, "'hang_seconds' not allowed"),
        ({"variants.qwq-int4.options": {"args": ["--port=1"]}}, "'not' failed"),
        ({"variants.qwq-int4.options": {"kv_cache_bytes": "24GB"}}, "does not match pattern"),
        ({"variants.Q": {}}, "'Q' not allowed"),
        ({"variants.admin": {}}, "invalid propertyName 'admin'"),
        ({"variants.qwq-lws": {}}, "invalid propertyName 'qwq-lws'"),
        ({"config.variants": {"gpt": {"external": "openai/gpt", "api_key": "sk-1"}}}, "does not match pattern"),
        ({"config.variants": {"gpt": {"credentials": {"client_secret": "s${env:A}"}}}}, "does not match pattern"),
        ({"config.replicas": [{"variant": "a", "url": "http://a", "api_key": "sk-1"}]}, "does not match pattern"),
        ({"variants.qwq-int4.engine": "tpu"}, "value must be one of"),
        ({"config.aliases.qwq-32b.ladder": []}, "minItems"),
        ({"config.aliases.qwq-32b.spil": {}}, "'spil' not allowed"),
        ({"config.aliases": None}, "aliases"),
        ({"config.gateway": {"listen": "0.0.0.0:1"}}, "'listen' not allowed"),
        ({"engines.runAsUser": 0}, "minimum"),
        ({"gateway.image.tag": "a b"}, "does not match pattern"),
        ({"gateway.existingSecret": ""}, "name a Secret with admin-key and keys.yaml"),
        ({"gateway.replicas": 2}, "several gateways share a PostgreSQL database"),
        ({"gateway.autoscaling.enabled": True}, "several gateways share a PostgreSQL database"),
        ({"models.volume": None}, "models.volume: set it"),
        ({"models.mountInGateway": False}, "the gateway does not see its manifest"),
        (
            {"variants.qwq-int4.nodes": 2, "variants.qwq-int4.options": {"tensor_parallel": 3}},
            "3 GPUs cannot be divided equally among 2 nodes",
        ),
        ({"inferencePool.enabled": True}, "name the Service of the endpoint picker"),
        ({"variants.qwq-int4": {"autoscaled": True, "replicas": 0}}, "a new workload starts with 1 pod"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_refused_values(chart: Chart, changed: dict[str, Any], message: str) -> None:
    """Typos are refused by the schema, what does not fit together by the templates; both say what is wrong."""
    assert message in chart.refusal(changed)


def test_secrets_are_references() -> None:
    """No value is a secret itself: tables of quantgate.yaml are in a ConfigMap."""
    assert '"password"' not in json.dumps(values_schema())


def test_sizes_are_text_in_the_configuration(chart: Chart) -> None:
    """The tables of quantgate.yaml take what the gateway takes."""
    limits = {"limits": {"body_bytes": "8MiB"}, "memory_bytes": 2**28}
    assert chart.rendered(changes={"config.gateway": limits}).config()["gateway"]["limits"] == limits["limits"]


def test_the_rules_are_valid(chart: Chart, tmp_path: Path) -> None:
    """promtool accepts those in the PrometheusRule, which are the rules of deploy/prometheus, group by group."""
    (rule,) = chart.rendered(CHART / "examples" / "several-gateways.yaml").of("PrometheusRule").values()
    originals = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    assert rule["spec"]["groups"] == originals
    promtool = program("promtool")
    if promtool is None:
        pytest.skip("no promtool; `apt-get install prometheus` brings one")
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    result = run(promtool, "check", "rules", "--lint-fatal", path)
    assert "SUCCESS" in result.stdout, result.stderr


def test_the_dashboards_are_those_of_grafana(chart: Chart) -> None:
    """One ConfigMap each, that Grafana's sidecar finds by its label."""
    maps = chart.rendered(CHART / "examples" / "several-gateways.yaml").of("ConfigMap").values()
    found = {
        name: text
        for each in maps
        if "grafana_dashboard" in each["metadata"]["labels"]
        for name, text in each["data"].items()
    }
    originals = {path.name: path.read_text() for path in DASHBOARDS}
    assert found == originals
    assert all(json.loads(text)["uid"] == name.removesuffix(".json") for name, text in found.items())


def test_notes(chart: Chart) -> None:
    """What helm prints after the installation names the address, the models, and what is at risk."""
    options = ("--dry-run=client", "--namespace", "llm", "--values", CHART / "examples" / "cpu.yaml")
    result = run(chart.helm, "install", "qg", CHART, *options)
    assert result.returncode == 0, result.stderr
    notes = result.stdout.partition("NOTES:")[2]
    assert "http://qg-quantgate.llm:8000/v1" in notes
    assert "smol." in notes
    assert "WARNING: the state database is in the pod" in notes
