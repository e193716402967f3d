"""One agent to a device: a lock that goes with its process, however that ends, and names its holder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from balloon_agent.errors import DeviceBusy


class DeviceLock:
    """Held from construction until ``close``. DeviceBusy if another agent has it."""

    def __init__(self, folder: Path, address: str) -> None:
        self._fd = os.open(folder / f"{address}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise DeviceBusy(
                f"{address} is driven by another agent already, process {pid}: stop that one first (kill {pid})"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        # The file stays: removing it would let a third process lock a new one while a second waits for the old.
        os.close(self._fd)
