"""Loads a configuration together with the files it refers to: manifests, keys, certificates, measured speeds."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from config.capacity import FILE_NAME, LAUNCH_OPTIONS, Setup, read_capacity
from config.errors import CapacityError, OptionError, Problem, SettingsError
from config.external_prices import is_priced, litellm_directory
from config.load import LoadedFile, load_settings_file
from config.schema import ReplicaSettings, Settings
from config.variant import Variant
from gateway.http.tls import ServerTls, read_server_tls
from gateway.keys import UNKNOWN_KEYS, Keys, read_keys
from gateway.routing.speed import SpeedProfile
from serving.app import Wanted, wanted_of
from serving.tls import Tls
from serving.validation import read_named_files


@dataclass(frozen=True, slots=True)
class Deployment:
    """A configuration and the contents of the files it refers to; `folder` is the configuration's directory.

    `keys` are unknown if they are in the state database: a gateway follows them there.
    """

    settings: Settings
    variants: Mapping[str, Variant]
    keys: Keys
    state: str | None = None  # URL of the state database; None: not used
    folder: Path = Path()
    tls: Mapping[int, Tls] = field(default_factory=dict)  # by the replica's index in the configuration
    speeds: Mapping[str, SpeedProfile] = field(default_factory=dict)  # by variant, if measured
    server_tls: ServerTls | None = None  # of the clients' port; None: it has none

    @property
    def wanted(self) -> Wanted:
        """The part that `serving` needs to run replicas."""
        return Wanted(self.settings, self.variants, self.state, self.folder, self.tls)


def read_deployment(path: Path) -> Deployment:
    """Load a configuration file and all files it refers to; SettingsError lists all problems of all of them."""
    deployment, problems = load_deployment(load_settings_file(path), path)
    if problems:
        raise SettingsError(problems)
    return deployment


def load_deployment(file: LoadedFile[Settings], path: Path) -> tuple[Deployment, list[Problem]]:
    """Load the files that a valid configuration file refers to, as far as they can be used, and list the problems."""
    settings, named = file.settings, read_named_files(file, path.parent)
    problems = list(named.problems)
    keys = UNKNOWN_KEYS if settings.gateway.keys_in_database else Keys()
    if settings.gateway.keys_file:
        try:
            keys = read_keys(path.parent / settings.gateway.keys_file)
        except SettingsError as error:
            problems += [problem if problem.line else _at_keys(file, problem) for problem in error.problems]
    server_tls = None
    if settings.gateway.tls is not None:
        try:
            server_tls = read_server_tls(settings.gateway.tls, path.parent)
        except OptionError as error:
            problems.append(file.problem(error.location, error.what, error.hint))
    speeds = {}
    for name, variant in named.variants.items():
        try:
            speeds.update(read_speeds(settings, {name: variant}))
        except CapacityError as error:
            what, _, hint = str(error).partition("; ")
            problems.append(file.problem(("variants", name, "path"), what, hint or "remove the file"))
    problems += external_problems(file)
    wanted = wanted_of(settings, named, path)
    deployment = Deployment(settings, named.variants, keys, wanted.state, wanted.folder, wanted.tls, speeds, server_tls)
    return deployment, problems


def external_problems(file: LoadedFile[Settings]) -> Iterator[Problem]:
    """Yield why external models could not be asked, or not be held to their budgets."""
    directory = litellm_directory()
    for name, variant in file.settings.variants.items():
        if variant.external is None:
            continue
        if directory is None:
            what = "external models need litellm, which is not installed"
            yield file.problem(("variants", name, "external"), what, "install quantgate[external]")
        elif variant.budget is not None and variant.price is None and not is_priced(variant.external, directory):
            what = f"litellm knows no price of {variant.external}, so nothing would be counted"
            yield file.problem(("variants", name, "budget"), what, "set price, or remove budget")


def _at_keys(file: LoadedFile[Settings], problem: Problem) -> Problem:
    """Place a problem of the whole keys file at the option that names it."""
    return file.problem(("gateway", "keys"), f"{problem.file}: {problem.what}", problem.hint)


def read_speeds(settings: Settings, variants: Mapping[str, Variant]) -> dict[str, SpeedProfile]:
    """Read the measured speed of each variant that has a `capacity.json`; ConfigError if one is invalid.

    Of several measurements, the newest with the launch settings of a configured replica counts, otherwise the newest.
    A replica's deviation from it is learned at runtime.
    """
    speeds = {}
    for name, variant in variants.items():
        if variant.path is None:
            continue
        measurements = read_capacity(variant.path / FILE_NAME).measurements
        replicas = [replica for replica in settings.replicas if replica.variant == name]
        by_relevance = sorted(measurements, key=lambda entry: (_has_setup_of(replicas, entry.setup), entry.measured))
        speed = SpeedProfile.measured(by_relevance[-1]) if by_relevance else None
        if speed is not None:
            speeds[name] = speed
    return speeds


def _has_setup_of(replicas: Iterable[ReplicaSettings], setup: Setup) -> bool:
    """Whether a measurement was made with the launch settings of one of the replicas."""
    return any(all(getattr(setup, name) == getattr(replica, name) for name in LAUNCH_OPTIONS) for replica in replicas)
