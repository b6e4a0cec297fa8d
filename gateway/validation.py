"""What is wrong with a configuration: one validation, for `config check`, `doctor`, `gateway` and `up`."""

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from config.errors import OptionError, Problem, SettingsError
from config.load import LoadedFile, load_settings_file
from config.rules import Location
from config.schema import AliasSettings, Settings
from config.variant import read_variants
from gateway.deployment import Deployment, load_deployment
from gateway.keys import Keys
from gateway.routing.target import Catalog
from serving.errors import LaunchRefused
from serving.machine import installed_engine
from serving.validation import launch_problems


@dataclass(frozen=True, slots=True)
class Notice:
    """A part of a valid configuration without effect, or a risk; `unservable`: a model name that nobody can answer."""

    location: Location
    what: str
    hint: str
    unservable: bool = False

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.location))}: {self.what}; {self.hint}"


@dataclass(frozen=True, slots=True)
class Report:
    """All that is wrong with a configuration file.

    `errors` keep the gateway from starting, `launches` the replicas of this machine; `unservable` are model names that
    nobody can answer, `warnings` parts without effect. `settings` is None if the file itself is invalid.
    """

    settings: Settings | None
    errors: tuple[Problem, ...] = ()
    launches: tuple[Problem, ...] = ()
    unservable: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()


def validate(path: Path, *, file_only: bool = False) -> Report:
    """Check a configuration file and, unless `file_only`, the files, addresses and models that it names.

    Ports that are in use and memory that is not free are not checked: they say nothing about the configuration.
    """
    try:
        file = load_settings_file(path)
    except SettingsError as error:
        return Report(None, tuple(error.problems))
    if file_only:
        return _with_notices(Report(file.settings), file, _declared(file.settings))
    deployment, problems = load_deployment(file, path)
    problems += _addresses(file)
    try:
        launches = tuple(launch_problems(file, deployment.variants, installed_engine()))
    except LaunchRefused:
        launches = ()  # no vLLM here: the replicas run on another machine, or `doctor` and `up` tell of it
    report = Report(file.settings, tuple(problems), launches)
    if problems:
        return report
    report = _with_notices(report, file, deployment)
    return replace(report, warnings=(*report.warnings, *_cluster_warnings(file, deployment)))


def notices(deployment: Deployment) -> Iterator[Notice]:
    """Yield aliases and variants that nobody can answer, rungs that are never chosen, and readable keys; pure."""
    settings = deployment.settings
    catalog = Catalog(settings.aliases, deployment.variants)
    served = settings.served_variants
    if "state" in settings.gateway.model_fields_set:
        served = frozenset(deployment.variants)  # other processes may publish replicas in the state database
    reported = set[str]()
    if (tls := deployment.server_tls) is not None and tls.open_key is not None:
        what = f"every user of this machine can read the private key in {tls.open_key}"
        yield Notice(("gateway", "tls"), what, f"chmod o= {tls.open_key}")
    for name, alias in settings.aliases.items():
        target = catalog.resolve(name)
        permitted = [rung.name for rung in target.permitted]
        if not permitted:
            rejected = "; ".join(map(str, target.filter((), None).rejected))
            what = f"no variant is good enough ({rejected})"
            yield Notice(("aliases", name), what, "lower the floor, or add a better variant", unservable=True)
            continue
        yield from _rejected_rungs(name, alias, catalog)
        if served.isdisjoint(permitted):
            what = f"no replica serves {' or '.join(permitted)}"
            yield Notice(("aliases", name), what, "add one under replicas", unservable=True)
            reported.update(permitted)
    for name in settings.variants:
        if name not in served | reported:
            hint = "add one under replicas, or remove the variant"
            yield Notice(("variants", name), "no replica serves it", hint)
    yield from _unmeasured_caches(deployment)


def _rejected_rungs(name: str, alias: AliasSettings, catalog: Catalog) -> Iterator[Notice]:
    for rejection in catalog.resolve(name).filter((), None).rejected:
        rung = alias.ladder.index(rejection.variant.name)
        what = f"{rejection.variant.name!r} is never chosen: {rejection.why}"
        yield Notice(("aliases", name, "ladder", rung), what, "remove it from the ladder")


def _unmeasured_caches(deployment: Deployment) -> Iterator[Notice]:
    """Yield replicas with an FP8 KV cache whose variant has no part of it in its figures: floors don't see its cost."""
    for number, replica in enumerate(deployment.settings.replicas):
        variant = deployment.variants.get(replica.variant)
        if variant is None or not replica.kv_cache_dtype.startswith("fp8"):
            continue
        if variant.manifest is None or variant.manifest.scheme.kv_cache is None:
            what = f"the quality of {variant.name!r} was measured without an FP8 KV cache, which costs some, too"
            hint = "quantize with --kv-cache fp8, or measure it: quantgate evaluate --replica"
            yield Notice(("replicas", number, "kv_cache_dtype"), what, hint)


def _with_notices(report: Report, file: LoadedFile[Settings], deployment: Deployment) -> Report:
    found = [*notices(deployment)]
    unservable = [file.problem(each.location, each.what, each.hint) for each in found if each.unservable]
    warnings = [file.problem(each.location, each.what, each.hint) for each in found if not each.unservable]
    return Report(report.settings, report.errors, report.launches, tuple(unservable), tuple(warnings))


def _declared(settings: Settings) -> Deployment:
    """The part of a configuration that needs no other file: without variants that have a path, and their aliases."""
    declared = {name: variant for name, variant in settings.variants.items() if variant.path is None}
    aliases = {name: alias for name, alias in settings.aliases.items() if declared.keys() >= set(alias.ladder)}
    known = settings.model_copy(update={"variants": declared, "aliases": aliases})
    return Deployment(known, read_variants(declared, Path()), Keys())


def _cluster_warnings(file: LoadedFile[Settings], deployment: Deployment) -> Iterator[Problem]:
    """Yield what keeps a gateway on this machine from finding pods; the file may be meant for another machine."""
    if not deployment.wanted.pods:
        return
    try:
        deployment.wanted.cluster_access()
    except OptionError as error:
        yield file.problem(error.location, error.what, f"run the gateway in a pod, or {error.hint}")


def _addresses(file: LoadedFile[Settings]) -> list[Problem]:
    """Report the addresses that are not of this machine."""
    gateway = file.settings.gateway
    found = []
    for option, address in (("listen", gateway.listen), ("admin", gateway.admin)):
        host = address.rpartition(":")[0].strip("[]")
        if reason := _foreign(host):
            hint = "write an address of this machine, such as 127.0.0.1 or 0.0.0.0"
            found.append(file.problem(("gateway", option), f"can't listen on {host}: {reason}", hint))
    return found


def _foreign(host: str) -> str | None:
    """Return why nothing on this machine can listen on a host; None if it can. No port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            return error.strerror if error.errno != errno.EADDRNOTAVAIL else "it is not an address of this machine"
        except UnicodeError:
            return "it is not a host name"
    return None
