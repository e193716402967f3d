"""Tests on the running kernel: a few megabytes of real memory, taken and given back. They need root."""

from __future__ import annotations

import os
import warnings

import pytest


@pytest.fixture(autouse=True)
def root() -> None:
    if os.geteuid() != 0:
        warnings.warn("machine tests are skipped: they need root", stacklevel=1)
        pytest.skip("needs root: frame numbers are hidden from others")
