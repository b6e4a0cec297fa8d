"""`/admin/rollouts`: steer the rollout of an alias, as `quantgate rollout` does."""

from typing import Any, Literal, Protocol

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from config.errors import ConfigError
from gateway.rollout.machine import Phase, Preconditions, Refused
from serving.errors import RolloutChanged, StateAway

Command = Literal["pause", "resume", "promote", "abort"]


class RolloutControl(Protocol):
    """Reads and changes the rollouts of the state database."""

    async def refresh(self) -> None:
        """Read the rollouts again, unless that was a moment ago."""

    async def steer(self, alias: str, command: Command, reason: str, preconditions: Preconditions) -> dict[str, Any]:
        """Apply a command to the active rollout of an alias, and describe its state.

        ConfigError: there is no such alias, or no state database. Refused: not possible now. RolloutChanged: also if
        the preconditions do not hold. StateAway.
        """


class SteeringRequest(BaseModel):
    """Which alias, and why; `rollout`, `phase` and `step` as in the status, if the command is for no other state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: str = Field(max_length=200)
    reason: str = Field("", max_length=500)
    rollout: str | None = Field(None, max_length=200)
    phase: Phase | None = None
    step: int | None = Field(None, ge=0)


def add_rollouts(app: FastAPI, control: RolloutControl) -> None:
    """Add the endpoint to the app of the admin port."""
    described: dict[int | str, dict[str, Any]] = {
        404: {"description": "No such alias."},
        409: {"description": "Not possible now, or the rollout is not as the request says."},
        503: {"description": "The state database is away."},
    }

    @app.post("/admin/rollouts/{command}", responses=described)
    async def steer(command: Command, body: SteeringRequest) -> dict[str, Any]:
        """Pause, resume, promote (begin the next step now) or abort the active rollout of an alias."""
        try:
            preconditions = Preconditions(body.rollout, body.phase, body.step)
            return await control.steer(body.alias, command, body.reason, preconditions)
        except ConfigError as error:
            raise HTTPException(404, str(error)) from error
        except (Refused, RolloutChanged) as error:
            raise HTTPException(409, str(error)) from error
        except StateAway as error:
            raise HTTPException(503, str(error)) from error
