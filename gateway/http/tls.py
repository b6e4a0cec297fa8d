"""TLS on the clients' port: its certificate, and how a renewed one comes into use without a restart.

TLS 1.2 and later with the ciphers of Python's `ssl`, and HTTP/1.1 by ALPN. Clients show no certificates.
"""

import ssl
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from config.rules import Location
from config.schema import TlsSettings
from serving.tls import expiration_seconds, load_pair, pem_content

TLS: Location = ("gateway", "tls")


@dataclass(frozen=True, slots=True)
class ServerTls:
    """A certificate and its key as read from their files.

    `certificate` is the file's name in the configuration, and `expiration` when its first certificate expires, in
    seconds since 1970. `open_key` is the key's file if every user of the machine can read it.
    """

    certificate: str
    expiration: float
    context: ssl.SSLContext = field(repr=False, compare=False)
    open_key: Path | None = None


def read_server_tls(settings: TlsSettings, folder: Path) -> ServerTls:
    """Read the files, relative to the configuration's folder; OptionError if one is missing or they don't match."""
    certificate = folder / settings.certificate
    key = folder / settings.key_file if settings.key_file else None
    content = pem_content(certificate, (*TLS, "certificate"))
    if key is not None:
        pem_content(key, (*TLS, "key_file"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load_pair(context, certificate, key, (*TLS, "certificate"))
    context.set_alpn_protocols(["http/1.1"])
    secret = key or certificate
    is_open = secret.stat().st_mode & stat.S_IROTH
    return ServerTls(settings.certificate, expiration_seconds(content), context, secret if is_open else None)


def context_with(current: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """Return the context of a listening socket: each handshake uses the certificate that is current then.

    OpenSSL calls back in every handshake, also if the client names no server (SNI).
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])

    def use_current(handshake: ssl.SSLObject, _server_name: str | None, _context: ssl.SSLContext) -> None:
        handshake.context = current()

    context.sni_callback = use_current
    return context
