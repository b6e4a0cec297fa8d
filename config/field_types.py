"""Types of the options in the configuration file: sizes, addresses, names, and bounded numbers.

A value that is not valid is a ValueError whose message says what to write.
"""

import ipaddress
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal
from urllib.parse import unquote_to_bytes

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, WithJsonSchema

SIZE_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# RFC 1123 host names and underscores. Resolvers differ in how they handle others, so they are rejected here.
HOST_NAME = r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?"
LAST_PORT = 65535
SOCKET_PATH_BYTES = 107  # unix(7): 108 with the terminating null byte
# Upper bounds of numbers. A larger one is a slip of the keyboard, and would exhaust memory or overflow a timer.
MAX_BYTES = 2**50
MAX_SECONDS = 366 * 86400.0
MAX_COUNT = 10**6
MAX_SERVERS = 1024  # of one entry in `replicas`; also its GPUs

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"
STATE_PATTERN = r"^(sqlite|postgresql(\+\w+)?)://"
ENDPOINT_PATTERN = r"^https?://[^\s?#]+[^\s?#/]$"
CORES_PATTERN = r"^(nobind|auto|[\d,|-]+)$"
TOOL_PARSER_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
EXTERNAL_PATTERN = r"^[a-z0-9_]+/[A-Za-z0-9][A-Za-z0-9._:/@-]*$"
PROVIDER_URL_PATTERN = r"^https?://[^\s?#/@]+(?:/[^\s?#]*)?$"
# Kubernetes: RFC 1123 subdomains (objects) and labels (namespaces), and label selectors.
OBJECT_PATTERN = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
NAMESPACE_PATTERN = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
SELECTOR_PATTERN = r"^[A-Za-z0-9!][A-Za-z0-9._/=!,() -]*$"
WORKLOAD_PATTERN = r"^(deployment|leaderworkerset)/[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
# Of each pattern: what text that does not match it is not, and what to write.
PATTERNS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        NAME_PATTERN: ("is not a valid name", "use letters, digits and . _ : / -"),
        STATE_PATTERN: ("is not a database URL", "write sqlite:///state.db, or postgresql://USER:PASSWORD@HOST/NAME"),
        ENDPOINT_PATTERN: ("is not a valid endpoint", "write http://host:port, without a slash at the end"),
        TOOL_PARSER_PATTERN: ("is not a tool parser", "write auto, off, or the name of one of vLLM's tool parsers"),
        EXTERNAL_PATTERN: (
            "is not an external model",
            "write PROVIDER/MODEL as litellm names it, such as openai/gpt-4.1",
        ),
        PROVIDER_URL_PATTERN: (
            "is not a valid URL",
            "write http(s)://host/path without user and password, such as https://api.openai.com/v1",
        ),
        OBJECT_PATTERN: ("is not a name in Kubernetes", "use lower-case letters, digits, - and ."),
        NAMESPACE_PATTERN: ("is not a namespace", "use lower-case letters, digits and -"),
        SELECTOR_PATTERN: ("is not a label selector", "write KEY=VALUE, several of them with commas"),
        WORKLOAD_PATTERN: ("is not a workload", "write deployment/NAME or leaderworkerset/NAME"),
        CORES_PATTERN: ("is not a list of cores", "write auto, nobind, or cores such as 0-3 or 0-3|4-7"),
    }
)


def is_loopback(host: str) -> bool:
    """Return whether a host, as in `listen` or a URL, can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_host(host: str) -> bool:
    """Return whether text is a host name, an IPv4 address, or an IPv6 address in brackets."""
    if not host.startswith("["):
        return re.fullmatch(HOST_NAME, host) is not None
    try:
        return host.endswith("]") and bool(ipaddress.IPv6Address(host[1:-1]))
    except ValueError:
        return False


def parse_size_bytes(value: object) -> object:
    """Parse `32MiB`, `4GB` or a number as bytes; ValueError for other text. Other types are left to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMG]i?B|B|)", value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a valid size; write a number with {', '.join(filter(None, SIZE_UNITS))}")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def check_address(value: str) -> str:
    """Require `host:port`: a port is never implied. ValueError otherwise."""
    host, _, port = value.rpartition(":")
    if ":" in host.strip("[]") and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{value!r} is not a valid address; write an IPv6 address in brackets, [{host}]:{port}")
    if not _is_host(host) or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > LAST_PORT:
        raise ValueError(f"{value!r} is not a valid address; write host:port, for example 127.0.0.1:8000")
    return value


def _number_as_text(value: object) -> object:
    """Leave it to `check_address` to say what a port alone lacks."""
    return str(value) if isinstance(value, int) else value


def check_url(value: str) -> str:
    """Require `http(s)://host[:port]` without a path, or `unix:///path`; ValueError otherwise."""
    if re.fullmatch(r"unix:///[^\s?#]+", value):
        path = unquote_to_bytes(value.removeprefix("unix://"))
        if len(path) > SOCKET_PATH_BYTES or b"\0" in path:
            raise ValueError(
                f"{value!r} is not a valid replica URL; the path of a socket has at most {SOCKET_PATH_BYTES} bytes"
            )
        return value
    match = re.fullmatch(rf"https?://({HOST_NAME}|\[[0-9A-Fa-f:.]+\])(?::(\d{{1,5}}))?", value.rstrip("/"))
    if match is None or not _is_host(match[1]) or not 0 < int(match[2] or 80) <= LAST_PORT:
        raise ValueError(f"{value!r} is not a valid replica URL; write http://host:port, without /v1, or unix:///path")
    return value.rstrip("/")


def check_origin(value: str) -> str:
    """Require an origin as browsers send it, or `*`; ValueError otherwise."""
    match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^\s/?#@A-Z]+)", value)
    default_port = {"http": ":80", "https": ":443"}.get(match[1], "/") if match else ""
    if value != "*" and (match is None or match[2].endswith(default_port)):
        raise ValueError(
            f"{value!r} is not a valid origin; write scheme://host, lower case, without path and default port, "
            "for example https://chat.example.com"
        )
    return value


def check_domain(value: str) -> str:
    """Require a host name or IPv4 address without scheme and port; ValueError otherwise."""
    if re.fullmatch(HOST_NAME, value) is None:
        raise ValueError(f"{value!r} is not a valid host name; write the name alone, for example images.example.com")
    return value.lower().rstrip(".")


def check_service_port(value: int | str) -> int | str:
    """Require the number of a port, or its name in a Service (RFC 6335); ValueError otherwise."""
    named = isinstance(value, str) and re.fullmatch(r"[a-z0-9-]*[a-z][a-z0-9-]*", value) is not None
    if not named and not (isinstance(value, int) and 0 < value <= LAST_PORT):
        raise ValueError(
            f"{value!r} is not a port; write its number, or its name in the Service: lower-case letters, digits, -"
        )
    return value


SizeBytes = Annotated[
    int, Field(ge=0, le=MAX_BYTES), BeforeValidator(parse_size_bytes, json_schema_input_type=int | str)
]
Address = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(check_address)]
Origin = Annotated[str, AfterValidator(check_origin)]
Domain = Annotated[str, AfterValidator(check_domain)]
ReplicaUrl = Annotated[str, AfterValidator(check_url)]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=128)]
FileName = Annotated[str, Field(min_length=1)]
# Empty, such as from a variable without a value, it would protect nothing.
Secret = Annotated[SecretStr, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# `auto`, `off`, or the name of one of vLLM's tool parsers.
ToolCalling = Annotated[str, Field(pattern=TOOL_PARSER_PATTERN)]
Entries = Annotated[int, Field(ge=1, le=65536)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
# A value in a configuration of the engine that is passed on as it is.
EngineValue = str | bool | Annotated[int, Field(ge=0, le=MAX_COUNT)] | float
ExternalModelName = Annotated[str, Field(pattern=EXTERNAL_PATTERN, max_length=256)]
ProviderUrl = Annotated[str, Field(pattern=PROVIDER_URL_PATTERN)]
# What litellm's providers take besides an API key. Anything else of litellm's parameters would change what it does.
Credential = Literal[
    "api_version",
    "organization",
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "aws_region_name",
    "aws_profile_name",
    "aws_role_name",
    "aws_session_name",
    "azure_ad_token",
    "tenant_id",
    "client_id",
    "client_secret",
    "vertex_project",
    "vertex_location",
    "vertex_credentials",
]
ObjectName = Annotated[str, Field(pattern=OBJECT_PATTERN, max_length=253)]
Namespace = Annotated[str, Field(pattern=NAMESPACE_PATTERN, max_length=63)]
ServicePort = Annotated[
    int | str,
    AfterValidator(check_service_port),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": LAST_PORT}, {"type": "string"}]}),
]
LabelSelector = Annotated[str, Field(pattern=SELECTOR_PATTERN, max_length=1024)]
Workload = Annotated[str, Field(pattern=WORKLOAD_PATTERN, max_length=280)]
Servers = Annotated[int, Field(ge=1, le=MAX_SERVERS)]
