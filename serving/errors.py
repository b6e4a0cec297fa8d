"""What can go wrong between a variant and an answering replica.

ServingError
├── LaunchRefused     would fail after minutes of loading, so it isn't started (exit code 2)
├── StartFailed       the process ended, or wasn't ready in time; carries the engine's own last words
├── StopFailed        processes of a replica survived SIGKILL
├── ProbeFailed       a running replica didn't answer, or isn't what it should be
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


class StopFailed(ServingError):
    """Processes of a replica are still there, though they were killed."""


class ProbeFailed(ServingError):
    """A replica didn't answer a control request as it should."""


class StateAway(ServingError):
    """The state database didn't answer, or isn't ours; the message says which and why."""


class LockHeld(ServingError):
    """There is one supervisor per home directory, and it is another process."""


class NoSuchReplica(ServingError):
    """The replica left the registry between the choice and the lease."""
