"""Rules across the tables of a configuration file: existing names, GPUs and ports used once, keys for an open port."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from config.field_types import LAST_PORT, is_loopback
from config.lora import lora_variant
from config.reserved_flags import RESERVED_FLAGS, reserved_flag
from config.schema import LoraSettings, ReplicaSettings, Settings, VariantSettings

Location = tuple[str | int, ...]
CERTIFICATES = ("ca", "certificate", "key_file")


@dataclass(frozen=True, slots=True)
class Violation:
    """A violated rule: location in the file, problem and fix."""

    location: Location
    what: str
    hint: str = ""


def closest(name: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the closest known name, or all known names."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if matches:
        return f"did you mean {matches[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none is configured"


def violations(settings: Settings) -> list[Violation]:
    """Return all violations, table by table."""
    return [
        *_gateway(settings),
        *_file_names(settings),
        *_variants(settings),
        *_replicas(settings),
        *_urls(settings),
        *_services(settings),
        *_ports(settings),
        *_gpus(settings),
        *_aliases(settings),
    ]


def _gateway(settings: Settings) -> Iterator[Violation]:
    gateway = settings.gateway
    host, _, port = gateway.listen.rpartition(":")
    if not is_loopback(host) and gateway.keys is None:
        yield Violation(
            ("gateway", "listen"),
            f"{gateway.listen} is reachable from other machines, but gateway.keys is not set",
            "set gateway.keys, or use 127.0.0.1",
        )
    if not is_loopback(gateway.admin.rpartition(":")[0]) and gateway.admin_key is None:
        yield Violation(
            ("gateway", "admin"),
            f"{gateway.admin} is reachable from other machines, but gateway.admin_key is not set",
            "set gateway.admin_key, or use 127.0.0.1",
        )
    if gateway.listen == gateway.admin and port != "0":
        yield Violation(("gateway", "admin"), "is the same address as gateway.listen", "choose another port")


def _file_names(settings: Settings) -> Iterator[Violation]:
    """Shells replace `$HOME` in a path, quantgate does not."""
    names: list[tuple[Location, str | None]] = [(("gateway", "keys"), settings.gateway.keys)]
    if (tls := settings.gateway.tls) is not None:
        names += [(("gateway", "tls", "certificate"), tls.certificate), (("gateway", "tls", "key_file"), tls.key_file)]
    cluster = settings.gateway.kubernetes
    names += [(("gateway", "kubernetes", option), getattr(cluster, option)) for option in ("ca", "token_file")]
    for variant_name, variant in settings.variants.items():
        where = ("variants", variant_name)
        names.append(((*where, "path"), variant.path))
        names += [((*where, "lora", adapter), lora.path) for adapter, lora in variant.lora.items()]
    for index, replica in enumerate(settings.replicas):
        names += [(("replicas", index, option), getattr(replica, option)) for option in CERTIFICATES]
    for location, name in names:
        variable = re.search(r"\$([A-Za-z_][A-Za-z0-9_]*)", name or "")
        if variable:
            yield Violation(location, f"{variable[0]} is not replaced", f"write ${{env:{variable[1]}}}")


def _variants(settings: Settings) -> Iterator[Violation]:
    for name, variant in settings.variants.items():
        where = ("variants", name)
        if variant.path is not None and variant.quality is not None:
            yield Violation(
                (*where, "quality"), "is set together with path; the quality comes from its manifest", "remove one"
            )
        if variant.path is None and variant.precision is None and variant.external is None:
            yield Violation(where, "has neither path nor precision", "set one")
        yield from _external(where, variant)
        for adapter, lora in variant.lora.items():
            yield from _lora((*where, "lora", adapter), lora, name, settings)


# Options of a variant that has replicas, and those of an external model.
OF_DIRECTORIES, OF_EXTERNAL = ("path", "precision", "lora"), ("api_key", "base_url", "credentials", "budget", "price")


def _external(where: Location, variant: VariantSettings) -> Iterator[Violation]:
    if variant.external is not None:
        for option in OF_DIRECTORIES:
            if getattr(variant, option):
                yield Violation((*where, option), "is set together with external", "remove one")
        return
    for option in (*OF_EXTERNAL, "max_in_flight"):
        if option in variant.model_fields_set:
            yield Violation((*where, option), "is an option of external models, but external is not set", "remove it")


def _lora(where: Location, lora: LoraSettings, base: str, settings: Settings) -> Iterator[Violation]:
    """The name of an adapter is unique, both in its engine and among variants."""
    adapter = str(where[-1])
    if lora.path is None and any(each.variant == base and each.supervised for each in settings.replicas):
        yield Violation((*where, "path"), "is missing, but quantgate starts replicas of its base", "set it")
    # vLLM serves the base under its variant's name and under the replica's id.
    if re.fullmatch(rf"{re.escape(base)}(-\d+b?)?", adapter):
        yield Violation(where, f"{adapter!r} is also a name of the base model in vLLM", "rename the adapter")
    name = lora_variant(base, adapter)
    if name in settings.variants or settings.loras[name] != (base, adapter):
        yield Violation(where, f"is the variant {name!r}, which exists already", "rename one")


def _replicas(settings: Settings) -> Iterator[Violation]:
    for index, replica in enumerate(settings.replicas):
        where = ("replicas", index)
        variant = settings.variants.get(replica.variant)
        if replica.variant in settings.loras:
            base, adapter = settings.loras[replica.variant]
            what = f"{replica.variant!r} is the adapter {adapter!r} of {base!r}, whose replicas serve it"
            yield Violation((*where, "variant"), what, f"use {base!r}")
        elif variant is None:
            hint = closest(replica.variant, settings.variants)
            yield Violation((*where, "variant"), f"unknown variant {replica.variant!r}", hint)
        elif variant.external is not None:
            what = f"{replica.variant!r} is an external model, which needs no replica"
            yield Violation((*where, "variant"), what, "remove this entry")
        elif replica.supervised and variant.path is None:
            what = f"variant {replica.variant!r} has no path, so quantgate cannot start it"
            yield Violation(where, what, "set the replica's url or kubernetes, or the variant's path")
        yield from _pods((*where, "kubernetes"), replica)
        yield from _launch_options(where, replica)
        yield from _certificates(where, replica)
        yield from _arguments(where, replica)


# Kinds of parallelism that are named only where they are used.
PARALLEL = ("pipeline_parallel", "data_parallel")
# Options that apply to servers that quantgate does not start, too.
NOT_FOR_STARTING = frozenset(
    {"variant", "url", "kubernetes", "api_key", "max_in_flight", "tool_calling", *CERTIFICATES}
)


def _pods(where: Location, replica: ReplicaSettings) -> Iterator[Violation]:
    """An entry has one way to find its servers, and one to find its pods."""
    pods = replica.kubernetes
    if pods is None:
        return
    if replica.url is not None:
        yield Violation(where, "is set together with url", "remove one")
    if pods.service is not None and pods.selector is not None:
        yield Violation((*where, "selector"), "is set together with service", "remove one")
    if pods.service is None and pods.selector is None:
        yield Violation(where, "has neither service nor selector", "set one")


def _launch_options(where: Location, replica: ReplicaSettings) -> Iterator[Violation]:
    if not replica.supervised:
        defaults = ReplicaSettings(variant=replica.variant)
        options = ReplicaSettings.model_fields.keys() - NOT_FOR_STARTING
        found = "url" if replica.url is not None else "kubernetes"
        for field in sorted(name for name in options if getattr(replica, name) != getattr(defaults, name)):
            what = f"is an option for starting a replica, but {found} is set, too"
            yield Violation((*where, field), what, "remove one")
    needed = replica.count * replica.ranks
    if replica.gpus and len(replica.gpus) != needed:
        named = {name: getattr(replica, name) for name in ("count", "tensor_parallel", *PARALLEL)}
        factors = " x ".join(f"{name} {value}" for name, value in named.items() if value > 1 or name not in PARALLEL)
        yield Violation((*where, "gpus"), f"has {len(replica.gpus)} GPUs for {factors}", f"list {needed} GPUs")
    if replica.speculative is not None and "num_speculative_tokens" not in replica.speculative:
        yield Violation(
            (*where, "speculative"),
            "has no num_speculative_tokens",
            "set it, and a method: {method: ngram, num_speculative_tokens: 4, prompt_lookup_max: 4}",
        )


def _certificates(where: Location, replica: ReplicaSettings) -> Iterator[Violation]:
    for option in CERTIFICATES:
        if getattr(replica, option) is not None and not (replica.url or "").startswith("https://"):
            yield Violation((*where, option), "applies only to a url with https://", "remove it")
    if replica.key_file is not None and replica.certificate is None:
        yield Violation((*where, "key_file"), "is set without certificate", "set certificate, too")


def _arguments(where: Location, replica: ReplicaSettings) -> Iterator[Violation]:
    for position, argument in enumerate(replica.args):
        flag = reserved_flag(argument)
        if flag is not None:
            yield Violation((*where, "args", position), f"{argument!r} is set by quantgate", RESERVED_FLAGS[flag])


def _urls(settings: Settings) -> Iterator[Violation]:
    """No server stands behind two entries, or is this gateway."""
    gateway, owner = settings.gateway, dict[str, str]()
    own = {_endpoint(f"http://{address}"): option for option, address in _addresses(settings)}
    for index, replica in enumerate(settings.replicas):
        if replica.url is None:
            continue
        where: Location = ("replicas", index, "url")
        if replica.url in owner:
            yield Violation(where, f"is the url of {owner[replica.url]}, too", "remove one: both are one server")
        owner.setdefault(replica.url, f"replicas.{index}")
        option = own.get(_endpoint(replica.url))
        if option is not None and gateway.listen != gateway.admin:
            yield Violation(where, f"is the gateway itself ({option})", "write the address of a vLLM server")


def _services(settings: Settings) -> Iterator[Violation]:
    """No pod is found by two entries with the same EndpointSlices, and no workload is scaled for two entries."""
    owner, scaler = dict[tuple[str | None, str], int](), dict[tuple[str | None, str], int]()
    for index, replica in enumerate(settings.replicas):
        pods = replica.kubernetes
        if pods is None:
            continue
        first = owner.setdefault((pods.namespace, pods.label_selector), index)
        if first != index:
            what = f"finds the same pods as replicas.{first}"
            yield Violation(("replicas", index, "kubernetes"), what, "remove one, or choose another Service")
        if pods.workload is None:
            continue
        first = scaler.setdefault((pods.namespace, pods.workload), index)
        if first != index:
            what = f"is the workload of replicas.{first}, too, so a rollout would scale it for both"
            yield Violation(("replicas", index, "kubernetes", "workload"), what, "name it in one entry only")


def _endpoint(url: str) -> tuple[str, int | None]:
    """Return host and port of an address; all that lead to this machine have the same host."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    local = is_loopback(host) or host in ("0.0.0.0", "::")  # noqa: S104 - compared, not listened on
    default = 443 if parts.scheme == "https" else 80
    return ("localhost" if local else host), (default if parts.port is None else parts.port or None)


def _is_external(variant: str, settings: Settings) -> bool:
    return variant in settings.variants and settings.variants[variant].external is not None


def _addresses(settings: Settings) -> tuple[tuple[str, str], ...]:
    return ("gateway.listen", settings.gateway.listen), ("gateway.admin", settings.gateway.admin)


def _ports(settings: Settings) -> Iterator[Violation]:
    """No two supervised replicas have the same port. `count` replicas take that many, from `port` on."""
    owner: dict[int, str] = {}
    # With a state database on a server, the gateway may run on another machine than the replicas.
    if settings.gateway.state.startswith("sqlite"):
        owner = {int(address.rpartition(":")[2]): option for option, address in _addresses(settings)}
    for index, replica in enumerate(settings.replicas):
        if replica.port is None or not replica.supervised:
            continue
        where: Location = ("replicas", index, "port")
        last = replica.port + replica.count - 1
        if last > LAST_PORT:
            what = f"count {replica.count} takes the ports {replica.port} to {last}, beyond {LAST_PORT}"
            yield Violation(where, what, f"choose a port up to {LAST_PORT - replica.count + 1}")
        ports = range(replica.port, last + 1)
        taken = next((port for port in ports if port in owner), None)
        if taken is not None:
            yield Violation(where, f"port {taken} is already used by {owner[taken]}", "choose another port")
        owner = {**dict.fromkeys(ports, f"replicas.{index}"), **owner}


def _gpus(settings: Settings) -> Iterator[Violation]:
    owner: dict[int, str] = {}
    for index, replica in enumerate(settings.replicas):
        for position, gpu in enumerate(replica.gpus):
            if gpu in owner:
                what = f"GPU {gpu} is already used by {owner[gpu]}"
                yield Violation(("replicas", index, "gpus", position), what, "choose another GPU")
            owner.setdefault(gpu, f"replicas.{index}")


def _aliases(settings: Settings) -> Iterator[Violation]:
    names = {*settings.variants, *settings.loras}
    for name, alias in settings.aliases.items():
        where: Location = ("aliases", name)
        if name in names:
            yield Violation(
                where, "is also the name of a variant, by which clients request the variant itself", "rename one"
            )
        for rung, variant in enumerate(alias.ladder):
            if variant not in names:
                hint = closest(variant, names)
                yield Violation((*where, "ladder", rung), f"unknown variant {variant!r}", hint)
            elif variant in alias.ladder[:rung]:
                yield Violation((*where, "ladder", rung), f"{variant!r} is on the ladder twice", "remove one")
            elif rung and not _is_external(variant, settings) and _is_external(alias.ladder[rung - 1], settings):
                what = f"{variant!r} is behind an external model, which only takes what no replica can"
                yield Violation((*where, "ladder", rung), what, "put external models last")
        if alias.spill.return_below_seconds > alias.spill.after_seconds:
            what = "is greater than after_seconds"
            yield Violation((*where, "spill", "return_below_seconds"), what, "choose a smaller number")
