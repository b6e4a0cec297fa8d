"""State databases of both kinds, for rollouts."""

from tests.serving.state.conftest import postgresql, state

__all__ = ["postgresql", "state"]
