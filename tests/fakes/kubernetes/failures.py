"""The Status objects with which an API server refuses, in its own words."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


@dataclass(slots=True)
class ApiFailure(Exception):
    """A request that is answered with a Status."""

    code: int
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def status(self) -> dict[str, Any]:
        """Give the Status object, which is the body of an answer or the object of an ERROR event."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": REASONS[self.code],
            "code": self.code,
        }


def expired(version: int, oldest: int) -> ApiFailure:
    """Refuse a watch from a version whose history is gone."""
    return ApiFailure(410, f"too old resource version: {version} ({oldest})")


def conflict(resource: str, name: str) -> ApiFailure:
    """Refuse a change of a version that is not the latest."""
    return ApiFailure(
        409,
        f'Operation cannot be fulfilled on {resource} "{name}": the object has been modified; '
        "please apply your changes to the latest version and try again",
    )
