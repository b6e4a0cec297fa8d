"""The base of all models of JSON files."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of all models in JSON files: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
