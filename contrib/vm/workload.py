"""The program that uses memory inside a VM, compiled once."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from .cache import REPOSITORY, MissingPart, cache_root

_SOURCE = REPOSITORY / "contrib/workload/guestmem.c"


def guestmem() -> Path:
    """The binary of contrib/workload/guestmem.c, at a path that guests see too."""
    key = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    binary = cache_root() / "workload" / f"guestmem-{key}"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        # Somebody else may be at it too: whoever is last wins, and both have it whole.
        part = binary.with_suffix(f".{os.getpid()}")
        result = subprocess.run(
            ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", part, _SOURCE],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise MissingPart(f"gcc did not compile {_SOURCE}:\n{result.stderr}")
        part.rename(binary)
    return binary
