"""What can go wrong between a variant and an answering replica.

ServingError
├── LaunchRefused     would fail after minutes of loading, so it isn't started (exit code 2)
├── StartFailed       the process ended, or wasn't ready in time; carries the engine's own last words
├── NotAdopted        a replica that a dead supervisor left isn't what is wanted, so it was ended
├── UpdateFailed      a replacement didn't get ready; what it should have replaced goes on
├── StopFailed        processes of a replica survived SIGKILL
├── ProbeFailed       a running replica didn't answer, or isn't what it should be
├── MeasuringRefused  what should be measured can't be (exit code 2)
├── MeasuringFailed   not one request of a level was answered
├── StateAway         the state database can't be used now; whoever meets it goes on with what it knows
├── LockHeld          another supervisor works in this home directory (exit code 4)
└── NoSuchReplica     a lease for a replica that has left the registry
"""


class ServingError(Exception):
    """A replica can't do what was asked; the message says which one and why."""


class LaunchRefused(ServingError):
    """Starting this replica can't succeed; the message says what to change."""


class StartFailed(ServingError):
    """A replica ended before it was ready, or took too long."""


class NotAdopted(ServingError):
    """A replica that outlived its supervisor can't be taken over."""


class UpdateFailed(ServingError):
    """An update stopped half-way; the message says at which replica and why."""


class StopFailed(ServingError):
    """Processes of a replica are still there, though they were killed."""


class ProbeFailed(ServingError):
    """A replica didn't answer a control request as it should."""


class MeasuringRefused(ServingError):
    """What is asked for can't be measured; the message says what to change."""


class MeasuringFailed(ServingError):
    """A server under load answered nothing; the message says at which concurrency and why."""


class StateAway(ServingError):
    """The state database didn't answer, or isn't ours; the message says which and why."""


class LockHeld(ServingError):
    """There is one supervisor per home directory, and it is another process."""


class NoSuchReplica(ServingError):
    """The replica left the registry between the choice and the lease."""
