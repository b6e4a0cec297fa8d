"""What may happen to an API server, as steps of a test: how it begins, and how it ends."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.fakes.kubernetes.running import Action, FakeCluster
from tests.fakes.kubernetes.workloads import SLICES

Step = Callable[[FakeCluster], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault; `end` is None if it ends by itself. `answers`: the test itself can ask the server meanwhile."""

    name: str
    begin: Step
    end: Step | None = None
    answers: bool = True


async def die(cluster: FakeCluster) -> None:
    """The API server is killed."""
    await cluster.kill()


async def start(cluster: FakeCluster) -> None:
    """It is there again, and knows what it knew."""
    await cluster.start()


async def refuse_token(cluster: FakeCluster) -> None:
    """The token is not accepted any more, and the watch ends."""
    await cluster.set_tokens("second")
    await cluster.streams("end")


async def replace_token(cluster: FakeCluster) -> None:
    """The pod gets the new token."""
    cluster.token_file.write_text("second")


def refuse(status: int, retry_after: str | None = None) -> Step:
    """Return a step after which EndpointSlices are refused; the watch ends."""

    async def begin(cluster: FakeCluster) -> None:
        await cluster.refuse(status, resources=[SLICES], retry_after=retry_after)
        await cluster.streams("end")

    return begin


async def accept(cluster: FakeCluster) -> None:
    """Nothing is refused any more."""
    await cluster.accept()


def compact(by_event: bool) -> Step:
    """Return a step after which the watch goes on from a version that is too old, and is told by status or event."""

    async def end(cluster: FakeCluster) -> None:
        await cluster.compact(by_event=by_event)
        await cluster.accept()

    return end


async def hush(cluster: FakeCluster) -> None:
    """The watch is cut, and the server does not answer."""
    await cluster.streams("cut")
    await cluster.silence()


async def speak(cluster: FakeCluster) -> None:
    """It answers again."""
    await cluster.speak()


def streams(action: Action) -> Step:
    """Return a step in which every open watch does something."""
    return lambda cluster: cluster.streams(action)


FAULTS = (
    Fault("away", die, start, answers=False),
    Fault("silent", hush, speak, answers=False),
    Fault("401", refuse_token, replace_token),
    Fault("403", refuse(403), accept),
    Fault("429", refuse(429, retry_after="0"), accept),
    Fault("503", refuse(503), accept),
    Fault("410-status", refuse(503), compact(by_event=False)),
    Fault("410-event", refuse(503), compact(by_event=True)),
    Fault("expire", streams("expire")),
    Fault("error", streams("error")),
    Fault("cut", streams("cut")),
    Fault("end", streams("end")),
    Fault("half-line", streams("half_line")),
    Fault("duplicate", streams("duplicate")),
)
