"""Property-based tests look for wrong answers, and the time of one example says nothing there."""

from hypothesis import settings

settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
