"""Settings for all tests."""

from hypothesis import settings

from tests.bytecode import use_bytecode

# No deadline: on a shared machine a slow example is not a defect.
settings.register_profile("quantgate", deadline=None)
settings.load_profile("quantgate")
use_bytecode()
