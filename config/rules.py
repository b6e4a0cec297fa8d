"""What the tables of one file owe each other: names that exist, GPUs used once, an open port that has keys."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from config.reserved_flags import OWN_FLAGS, own_flag
from config.schema import LOOPBACK, ReplicaSettings, Settings

Location = tuple[str | int, ...]
CERTIFICATES = ("ca", "certificate", "key_file")


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that the file breaks, and where."""

    location: Location
    what: str
    hint: str = ""


def closest(name: str, known: Iterable[str]) -> str:
    """Phrase the hint for a name that isn't known: the nearest one, or all there are."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names)}" if names else "there are none"


def violations(settings: Settings) -> list[Violation]:
    """List every broken rule in the order of the file."""
    return [*_gateway(settings), *_variants(settings), *_replicas(settings), *_gpus(settings), *_aliases(settings)]


def _gateway(settings: Settings) -> Iterator[Violation]:
    gateway = settings.gateway
    host, _, port = gateway.listen.rpartition(":")
    if host not in LOOPBACK and gateway.keys is None:
        yield Violation(
            ("gateway", "listen"),
            f"{gateway.listen} is reachable from other machines, but there are no keys",
            "set gateway.keys, or listen on 127.0.0.1",
        )
    if gateway.admin.rpartition(":")[0] not in LOOPBACK and gateway.admin_key is None:
        yield Violation(
            ("gateway", "admin"),
            f"{gateway.admin} is reachable from other machines, but there is no admin_key",
            "set gateway.admin_key, or use 127.0.0.1",
        )
    if gateway.listen == gateway.admin and port != "0":
        yield Violation(("gateway", "admin"), "the same address as gateway.listen", "choose another port")


def _variants(settings: Settings) -> Iterator[Violation]:
    for name, variant in settings.variants.items():
        where = ("variants", name)
        if variant.path is not None and variant.quality is not None:
            yield Violation((*where, "quality"), "declared beside a path, whose manifest says it", "remove it")
        if variant.path is None and variant.precision is None:
            yield Violation(where, "has neither path nor precision", "name its directory, or declare its precision")


def _replicas(settings: Settings) -> Iterator[Violation]:
    for index, replica in enumerate(settings.replicas):
        where = ("replicas", index)
        variant = settings.variants.get(replica.variant)
        if variant is None:
            hint = closest(replica.variant, settings.variants)
            yield Violation((*where, "variant"), f"there is no variant {replica.variant!r}", hint)
        elif replica.url is None and variant.path is None:
            what = f"variant {replica.variant!r} has no path, so it can't be started here"
            yield Violation(where, what, "give the replica a url, or the variant a path")
        yield from _own_or_foreign(where, replica)
        yield from _certificates(where, replica)
        yield from _arguments(where, replica)


def _own_or_foreign(where: Location, replica: ReplicaSettings) -> Iterator[Violation]:
    if replica.url is not None:
        defaults = ReplicaSettings(variant=replica.variant)
        own = ReplicaSettings.model_fields.keys() - {"variant", "url", "api_key", "max_in_flight", *CERTIFICATES}
        for field in sorted(name for name in own if getattr(replica, name) != getattr(defaults, name)):
            yield Violation((*where, field), "says how to start a replica, but this one has a url", "remove one")
    wanted = replica.count * replica.tensor_parallel
    if replica.gpus and len(replica.gpus) != wanted:
        yield Violation(
            (*where, "gpus"),
            f"{len(replica.gpus)} GPUs for {replica.count} x tensor_parallel {replica.tensor_parallel}",
            f"name {wanted} GPUs",
        )


def _certificates(where: Location, replica: ReplicaSettings) -> Iterator[Violation]:
    for option in CERTIFICATES:
        if getattr(replica, option) is not None and not (replica.url or "").startswith("https://"):
            yield Violation((*where, option), "is for a replica whose url begins with https://", "remove it")
    if replica.key_file is not None and replica.certificate is None:
        yield Violation((*where, "key_file"), "is the key of no certificate", "name the certificate, too")


def _arguments(where: Location, replica: ReplicaSettings) -> Iterator[Violation]:
    for place, argument in enumerate(replica.args):
        flag = own_flag(argument)
        if flag is not None:
            yield Violation((*where, "args", place), f"{argument!r} is set by quantgate", OWN_FLAGS[flag])


def _gpus(settings: Settings) -> Iterator[Violation]:
    owner: dict[int, str] = {}
    for index, replica in enumerate(settings.replicas):
        for place, gpu in enumerate(replica.gpus):
            if gpu in owner:
                yield Violation(("replicas", index, "gpus", place), f"GPU {gpu} is already used by {owner[gpu]}")
            owner.setdefault(gpu, f"replicas.{index}")


def _aliases(settings: Settings) -> Iterator[Violation]:
    for name, alias in settings.aliases.items():
        where: Location = ("aliases", name)
        if name in settings.variants:
            yield Violation(where, "is also the name of a variant, which clients use to pin it", "rename one")
        for rung, variant in enumerate(alias.ladder):
            if variant not in settings.variants:
                hint = closest(variant, settings.variants)
                yield Violation((*where, "ladder", rung), f"there is no variant {variant!r}", hint)
            elif variant in alias.ladder[:rung]:
                yield Violation((*where, "ladder", rung), f"{variant!r} is on the ladder twice", "remove one")
        if alias.spill.return_below_seconds > alias.spill.after_seconds:
            what = "is above after_seconds, so it would return before it spills"
            yield Violation((*where, "spill", "return_below_seconds"), what, "choose a smaller number")
