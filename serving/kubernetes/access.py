"""Where the API server of a Kubernetes cluster is, and how to prove who we are."""

import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from config.errors import OptionError
from config.schema import ClusterSettings

# What Kubernetes mounts into every pod whose service account has a token.
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
HOST, PORT = "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"
OPTION = ("gateway", "kubernetes")


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """The URL of the API server, the file with its CA, the file with the token, and the namespace of this pod.

    `ca` None: the CAs of the machine; `token_file` None: no authentication.
    """

    server: str
    ca: Path | None = None
    token_file: Path | None = None
    namespace: str = "default"

    def context(self) -> ssl.SSLContext:
        """Return what the server's certificate is checked against; OptionError if the file is not usable."""
        try:
            return ssl.create_default_context(cafile=self.ca)
        except OSError as error:
            what = f"{self.ca} has no certificate that can be read ({error.strerror or error})"
            raise OptionError((*OPTION, "ca"), what, "name a PEM file") from error


def cluster_access(
    settings: ClusterSettings, folder: Path, environment: Mapping[str, str], mounted: Path = SERVICE_ACCOUNT
) -> ClusterAccess:
    """Return the access that is configured, and for what is omitted, that of the pod that this process runs in.

    Files are relative to `folder`. `mounted` is the folder of the pod's service account. The pod's credentials are
    never sent to a configured server. OptionError: no server is configured, and this is no pod.
    """
    namespace = _content(mounted / "namespace") or "default"
    ca = folder / settings.ca if settings.ca else None
    token_file = folder / settings.token_file if settings.token_file else None
    if settings.server is not None:
        return ClusterAccess(settings.server, ca, token_file, namespace)
    host = environment.get(HOST)
    if not host:
        what = f"is missing, and this process runs in no pod ({HOST} is not set)"
        raise OptionError((*OPTION, "server"), what, "set it, with ca and token_file")
    server = f"https://{f'[{host}]' if ':' in host else host}:{environment.get(PORT) or 443}"
    return ClusterAccess(server, ca or mounted / "ca.crt", token_file or mounted / "token", namespace)


def access_problems(settings: ClusterSettings, folder: Path) -> Iterator[OptionError]:
    """Yield the configured files that can't be used."""
    if settings.ca is not None:
        try:
            ClusterAccess("", folder / settings.ca).context()
        except OptionError as error:
            yield error
    if settings.token_file is not None and not _content(folder / settings.token_file):
        what = f"{folder / settings.token_file} is empty or can't be read"
        yield OptionError((*OPTION, "token_file"), what, "name a file with a bearer token")


def _content(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
