"""For all tests."""

from __future__ import annotations

from hypothesis import settings

# Machines are shared and noisy: how long one example takes says nothing about the code.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
