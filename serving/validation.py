"""Reads the files that a configuration names, and reports all that is wrong with them at once, each at its option."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from config.errors import ManifestError, OptionError, Problem
from config.load import LoadedFile
from config.manifest import Engine
from config.schema import Settings
from config.variant import Variant, read_variants
from serving.errors import LaunchRefused
from serving.kubernetes.access import access_problems
from serving.preflight import check_servable
from serving.replica import plan_launches
from serving.tls import Tls, read_tls


@dataclass(frozen=True, slots=True)
class NamedFiles:
    """The manifests and certificates that a configuration names, and the problems of files that can't be used."""

    variants: Mapping[str, Variant]
    tls: Mapping[int, Tls] = field(default_factory=dict)  # by the replica's index in the configuration
    problems: tuple[Problem, ...] = ()


def read_named_files(file: LoadedFile[Settings], folder: Path) -> NamedFiles:
    """Read manifests and certificates; relative paths are resolved against `folder`."""
    problems: list[Problem] = []

    def on_variant_error(location: tuple[str, ...], error: ManifestError) -> None:
        what, _, hint = str(error).partition("; ")
        problems.append(file.problem(("variants", *location), what, hint or "restore the directory"))

    variants = read_variants(file.settings.variants, folder, on_variant_error)
    problems += [problem for variant in variants.values() if (problem := _contradiction(file, variant))]

    def on_tls_error(error: OptionError) -> None:
        problems.append(file.problem(error.location, error.what, error.hint))

    if any(replica.kubernetes for replica in file.settings.replicas):
        for each in access_problems(file.settings.gateway.kubernetes, folder):
            problems.append(file.problem(each.location, each.what, each.hint))
    return NamedFiles(variants, read_tls(file.settings.replicas, folder, on_tls_error), tuple(problems))


def _contradiction(file: LoadedFile[Settings], variant: Variant) -> Problem | None:
    """Requests choose a variant by its precision, so a wrong one would mislead them."""
    if variant.lora is not None:
        return None  # it has its base's
    stated = file.settings.variants[variant.name].precision
    measured = variant.manifest.scheme.precision if variant.manifest else None
    if stated is None or measured is None or stated == measured:
        return None
    what = f"is {stated}, but the manifest of {variant.path} says {measured}"
    return file.problem(("variants", variant.name, "precision"), what, "remove precision")


def launch_problems(file: LoadedFile[Settings], variants: Mapping[str, Variant], engine: Engine) -> Iterator[Problem]:
    """Report the replicas that vLLM can't serve as configured, whatever else runs on the machine."""
    for index, replica in enumerate(file.settings.replicas):
        if not replica.supervised or replica.variant not in variants:
            continue
        try:
            check_servable(plan_launches((replica,), dict(variants), engine)[0])
        except LaunchRefused as refusal:
            what, _, hint = str(refusal).partition(": ")[2].rpartition("; ")
            yield file.problem(("replicas", index), what or hint, hint if what else "change the replica")
