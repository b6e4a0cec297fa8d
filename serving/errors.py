"""Errors of starting, verifying and following replicas.

ServingError
├── LaunchRefused     the start would fail after minutes of loading, so it is not attempted (exit code 2)
├── StartFailed       the process ended, or was not ready in time; the message has the last lines of its log
├── NotAdopted        a replica of a dead supervisor is not as configured, so it was ended
├── UpdateFailed      a replacement did not become ready; the replica that it should replace keeps running
├── StopFailed        processes of a replica survived SIGKILL
├── ProbeFailed       a running replica did not answer a control request, or is not what it should be
├── MeasuringRefused  this target cannot be measured (exit code 2)
├── MeasuringFailed   all requests of a load level failed
├── StateAway         the state database is unavailable or not usable; callers continue with the last known state
├── TooMuchUsage      a report of usage would have too many rows
├── LockHeld          another supervisor uses this home directory (exit code 4)
├── RolloutExists     the alias has an active rollout (exit code 4)
├── RolloutChanged    a change of a rollout was made on an older version of it; read it again
├── LeaseLost         another process drives this rollout now
├── NoSuchReplica     the replica is not in the registry, or has left it
├── ControlRefused    a running process cannot do what is requested now
├── TakeoverRefused   no gateway can be taken over, or this process is not ready to (exit code 2)
├── NoAnswer          a running process does not answer on its control socket
├── KubernetesError   the API server of Kubernetes did not do what was asked
│   ├── ApiServerAway     it is not reachable, or answers something else
│   │   └── ApiServerFailed   it fails at this request (5xx), perhaps not at others, or not later
│   ├── ApiRejected       the request is not valid, so it will be refused again (400, 422 and other 4xx)
│   ├── ApiUnauthorized   it refuses the token (401)
│   ├── ApiForbidden      a role lacks a verb on a resource (403)
│   ├── ApiNotFound       there is no such object, or no such resource (404)
│   ├── ApiConflict       somebody else has changed the object (409); read it again
│   ├── ApiExpired        it has forgotten the version that a watch or page continues from (410); list again
│   ├── ApiThrottled      too many requests (429); ask again later
│   └── WorkloadAutoscaled  an autoscaler scales the workload; a rollout must not
└── ReplicaConflict   two sources use the same replica id; the registry keeps the replica of the first
"""


class ServingError(Exception):
    """An operation on a replica failed; the message says which one and why."""


class LaunchRefused(ServingError):
    """The start of this replica cannot succeed; the message says what to change."""


class StartFailed(ServingError):
    """A replica ended before it was ready, or exceeded its time limit."""


class NotAdopted(ServingError):
    """A replica that outlived its supervisor cannot be adopted."""


class UpdateFailed(ServingError):
    """An update stopped half-way; the message says at which replica and why."""


class StopFailed(ServingError):
    """Processes of a replica still exist after SIGKILL."""


class ProbeFailed(ServingError):
    """A replica did not answer a control request as expected."""


class TakeoverRefused(ServingError):
    """A running gateway cannot be taken over, so it goes on; the message says why."""


class MeasuringRefused(ServingError):
    """The target cannot be measured; the message says what to change."""


class MeasuringFailed(ServingError):
    """A server under load answered no request; the message says at which concurrency and why."""


class StateAway(ServingError):
    """The state database did not answer, or is not one of quantgate's; the message says which one and why."""


class TooMuchUsage(ServingError):
    """A report of usage would have too many rows; the message says what to do."""


class LockHeld(ServingError):
    """Another process is the supervisor of this home directory; there can be only one."""


class RolloutExists(ServingError):
    """An alias has one rollout at a time; the message says whose it is."""


class RolloutChanged(ServingError):
    """Another change of the rollout was written first."""


class LeaseLost(ServingError):
    """The lease of a rollout has another fencing number: another process has taken over."""


class NoSuchReplica(ServingError):
    """The replica is not in the registry; it may have left between the choice and the lease."""


class ControlRefused(ServingError):
    """A running process cannot do what is requested; the message says why."""


class NoAnswer(ServingError):
    """A running process did not answer on its control socket."""


class ReplicaConflict(ServingError):
    """A source wrote a replica id that another source owns; the message names both sources."""


class KubernetesError(ServingError):
    """The API server of Kubernetes did not do what was asked; the message names server, verb and resource."""


class ApiServerAway(KubernetesError):
    """The API server did not answer, or answered something that is not Kubernetes'."""


class ApiServerFailed(ApiServerAway):
    """The API server answered that it failed at this request, for example because a webhook did."""


class ApiRejected(KubernetesError):
    """The API server does not accept this request, and will not when it is repeated."""


class ApiUnauthorized(KubernetesError):
    """The token is refused, or its file can't be read."""


class ApiForbidden(KubernetesError):
    """The service account may not do this; the message has the verb and the resource that its role lacks."""


class ApiNotFound(KubernetesError):
    """There is no such object, or the cluster has no such resource."""


class ApiConflict(KubernetesError):
    """The object has another version than the one that the change is based on."""


class ApiExpired(KubernetesError):
    """The version that was to be continued from is too old: list again."""


class ApiThrottled(KubernetesError):
    """The API server has too much to do; `retry_after_seconds` is None if it does not say when to ask again."""

    def __init__(self, message: str, retry_after_seconds: float | None) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(message)


class WorkloadAutoscaled(KubernetesError):
    """An autoscaler changes the number of replicas of a workload; the message names it and what to do."""
