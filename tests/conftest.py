"""What holds for all tests."""

from hypothesis import settings

# No deadline: this machine is shared, and a slow example is no defect.
settings.register_profile("quantgate", deadline=None)
settings.load_profile("quantgate")
