"""The faults that a test has asked for: refused requests, other tokens, silence."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.http_server import Request
from tests.fakes.kubernetes.failures import REASONS, ApiFailure


@dataclass(slots=True)
class Refusal:
    """Answers of one status, for some verbs of some resources (all if empty), `times` times."""

    status: int
    times: int
    verbs: Sequence[str] = ()
    resources: Sequence[str] = ()
    retry_after: str | None = None

    def applies(self, verb: str, resource: str) -> bool:
        """Whether this request is refused."""
        return (
            self.times > 0
            and (not self.verbs or verb in self.verbs)
            and (not self.resources or resource in self.resources)
        )


@dataclass(slots=True)
class Faults:
    """What goes wrong from now on."""

    tokens: frozenset[str] = frozenset()  # any token is good if empty
    refusals: list[Refusal] = field(default_factory=list)
    lose_answers: frozenset[str] = frozenset()  # verbs that are carried out without an answer
    expire_by_event: bool = False  # a watch from a forgotten version begins, and then says 410
    _speaking: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._speaking.set()

    def change(self, asked: Mapping[str, Any]) -> None:
        """Set what is named; the rest stays."""
        if "tokens" in asked:
            self.tokens = frozenset(asked["tokens"])
        if "refusals" in asked:
            self.refusals = [Refusal(**each) for each in asked["refusals"]]
        if "lose_answers" in asked:
            self.lose_answers = frozenset(asked["lose_answers"])
        if "expire_by_event" in asked:
            self.expire_by_event = asked["expire_by_event"]
        if "silent" in asked:
            (self._speaking.clear if asked["silent"] else self._speaking.set)()
        if "silence_seconds" in asked:
            self._speaking.clear()
            asyncio.get_running_loop().call_later(asked["silence_seconds"], self._speaking.set)

    async def silence(self) -> None:
        """Return when the server is not silent: nothing is written before."""
        await self._speaking.wait()

    def check_token(self, request: Request) -> None:
        """Raise ApiFailure 401 for a token that is not known."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if self.tokens and not (scheme == "Bearer" and token in self.tokens):
            raise ApiFailure(401, "Unauthorized")

    def check_refusals(self, verb: str, resource: str) -> None:
        """Raise ApiFailure if a test wants this request to be refused."""
        for refusal in self.refusals:
            if refusal.applies(verb, resource):
                refusal.times -= 1
                raise _failure(refusal, verb, resource)


def _failure(refusal: Refusal, verb: str, resource: str) -> ApiFailure:
    plural, _, rest = resource.partition(".")
    group, slash, subresource = rest.partition("/")
    messages = {
        403: f'{resource} is forbidden: User "system:serviceaccount:default:quantgate" cannot {verb} resource '
        f'"{plural}{slash}{subresource}" in API group "{group}"',
        429: "too many requests, please try again later",
    }
    headers = {} if refusal.retry_after is None else {"retry-after": refusal.retry_after}
    return ApiFailure(refusal.status, messages.get(refusal.status, REASONS[refusal.status]), headers)
