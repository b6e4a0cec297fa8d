"""How an https replica proves who it is, and how we prove it to the replica, where the machine's own trust won't do."""

import hashlib
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config.errors import OptionError
from config.rules import Location
from config.schema import ReplicaSettings


@dataclass(frozen=True, slots=True)
class Tls:
    """The certificates of a replica, as read from their files; equal if files and contents are equal.

    The context is shared by every connection: to make one takes milliseconds. `expirations` are the files with the
    time at which the first certificate in each expires, in seconds since 1970.
    """

    digest: str
    context: ssl.SSLContext = field(repr=False, compare=False)
    expirations: tuple[tuple[str, float], ...] = field(default=(), compare=False)


def read_tls(
    replicas: Sequence[ReplicaSettings], folder: Path, on_error: Callable[[OptionError], None] | None = None
) -> dict[int, Tls]:
    """Read the certificates that replicas are reached with, by the replica's place in the configuration.

    Files are relative to the configuration's folder; OptionError names the option of one that is missing or broken;
    with `on_error`, it is called instead.
    """
    known: dict[tuple[str | None, ...], Tls] = {}
    by_index = {}
    for index, settings in enumerate(replicas):
        named = (settings.ca, settings.certificate, settings.key_file)
        try:
            tls = known.get(named) or tls_of(settings, folder, ("replicas", index))
        except OptionError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        if tls is not None:
            by_index[index] = known[named] = tls
    return by_index


def tls_of(settings: ReplicaSettings, folder: Path, where: Location) -> Tls | None:
    """Read the certificates of one replica; None if it names none. `where` is the replica's place, for OptionError."""
    if not (settings.ca or settings.certificate):
        return None
    digest, contents = hashlib.sha256(), dict[str, bytes]()
    for option in ("ca", "certificate", "key_file"):
        named = getattr(settings, option)
        content = pem_content(folder / named, (*where, option)) if named else b""
        if named and option != "key_file":
            contents[named] = content
        digest.update(b"%s %s %d " % (option.encode(), str(named).encode(), len(content)) + content)
    # A `ca` takes the place of what the machine trusts; host names are checked either way.
    context = _trusting(folder / settings.ca, (*where, "ca")) if settings.ca else ssl.create_default_context()
    if settings.certificate:
        key = folder / settings.key_file if settings.key_file else None
        load_pair(context, folder / settings.certificate, key, (*where, "certificate"))
    expirations = tuple([(named, expiration_seconds(content)) for named, content in contents.items()])
    return Tls(digest.hexdigest(), context, expirations)


def pem_content(file: Path, option: Location) -> bytes:
    """Read a PEM file; OptionError names the option."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise OptionError(option, f"{file} can't be read: {error.strerror}", "name a PEM file") from error


def expiration_seconds(pem: bytes) -> float:
    """When the first of a file's certificates, which OpenSSL has accepted, expires."""
    # Imported where it is needed: it takes 0.1 s, and few configurations have certificates.
    from cryptography import x509  # noqa: PLC0415

    return min(each.not_valid_after_utc.timestamp() for each in x509.load_pem_x509_certificates(pem))


def _trusting(file: Path, option: Location) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:
        raise OptionError(option, f"{file} has no certificate that can be read ({error})", "name a PEM file") from error


def load_pair(context: ssl.SSLContext, certificate: Path, key: Path | None, option: Location) -> None:
    """Load a certificate into a context; OptionError if it does not match its key.

    OpenSSL would prompt for the password of a key that has one.
    """
    try:
        context.load_cert_chain(certificate, key, password="")
    except OSError as error:
        what = f"{certificate} and its key can't be used together ({error})"
        raise OptionError(option, what, "name a PEM certificate and its key, without a password") from error
