"""State databases of both kinds, for usage."""

from tests.serving.state.conftest import postgresql, state

__all__ = ["postgresql", "state"]
