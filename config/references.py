"""Replaces references inside a text: `${env:NAME}` by an environment variable, `${credential:NAME}` by a secret file.

Credentials are files in `$CREDENTIALS_DIRECTORY`, one per secret, as systemd (`LoadCredential=`), Docker Compose
(`secrets:`) and Kubernetes (volumes of Secrets) provide them. See https://systemd.io/CREDENTIALS.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

CREDENTIALS_DIRECTORY = "CREDENTIALS_DIRECTORY"
MAX_CREDENTIAL_BYTES = 2**20  # that of systemd

_REFERENCE = re.compile(
    r"\$\{(?:env:(?P<variable>[A-Za-z_][A-Za-z0-9_]*)|credential:(?P<credential>[A-Za-z0-9_.-]+))\}"
)
# References of other programs, and text that looks like a reference of quantgate.
_OTHER_REFERENCE = re.compile(r"\$\{(?:(?:env|credential):[^}]*|[A-Za-z_][A-Za-z0-9_]*)\}?")


def replace_references(text: str, environment: Mapping[str, str], report: Callable[[str, str], None]) -> str:
    """Return a text with its references replaced; `report` gets each problem with a hint, and the value is then empty.

    What replaces a reference is not searched for references again.
    """

    def value(match: re.Match[str]) -> str:
        if (variable := match["variable"]) is None:
            return _credential(match["credential"], environment, report)
        if variable not in environment:
            report(f"the environment variable {variable} is not set", f"export {variable}=...")
        return environment.get(variable, "")

    return _REFERENCE.sub(value, text)


def other_references(text: str) -> list[str]:
    """Return what looks like a reference in a text, but is none that is replaced."""
    return _OTHER_REFERENCE.findall(_REFERENCE.sub("", text))


def _credential(name: str, environment: Mapping[str, str], report: Callable[[str, str], None]) -> str:
    """Read a secret file, without the newline at its end."""
    directory = environment.get(CREDENTIALS_DIRECTORY)
    if directory is None:
        hint = f"set {CREDENTIALS_DIRECTORY} to the directory of the secret files"
        report(f"the credential {name} can't be read: {CREDENTIALS_DIRECTORY} is not set", hint)
        return ""
    path, content = Path(directory, name), ""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CREDENTIAL_BYTES).decode().rstrip("\r\n")
    except OSError as error:
        hint = "create the file" if isinstance(error, FileNotFoundError) else "check its permissions"
        report(f"the credential {name} can't be read: {path}: {error.strerror}", hint)
    except UnicodeDecodeError:
        report(f"the credential {name} can't be read: {path} is not UTF-8 text", "save it as UTF-8")
    else:
        if not content:
            report(f"the credential {name} is empty: {path}", "write the secret into the file")
    return content
