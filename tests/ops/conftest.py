"""Settings of the property tests."""

from hypothesis import settings

# A loaded machine is no failure.
settings.register_profile("ops", deadline=None)
settings.load_profile("ops")
