"""One agent to a device, and one to a run directory: locks that go with their process, however that ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from balloon_agent.errors import DeviceBusy

# The same for every agent on this machine, whatever its run directory.
LOCK_DIR = Path("/run/lock")


class Lock:
    """Held from construction until ``close``. DeviceBusy, with the holder's process, if another agent has it."""

    def __init__(self, path: Path, what: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise DeviceBusy(
                f"{what} is used by another agent already, process {pid}: stop that one first (kill {pid})"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        # The file stays: removing it would let a third process lock a new one while a second waits for the old.
        os.close(self._fd)


def lock_device(address: str, folder: Path = LOCK_DIR) -> Lock:
    """The right to drive the PCI function at ``address``."""
    return Lock(_path_of(address, folder), address)


def _path_of(address: str, folder: Path) -> Path:
    return folder / f"balloon-agent-{address}.lock"


def user_of_device(address: str, folder: Path = LOCK_DIR, locks: Path = Path("/proc/locks")) -> int | None:
    """The process of the agent that drives the function at ``address``, or None if none does.

    The kernel's list is read (proc(5), /proc/locks): to try the lock would be in the way of an agent that is just starting.
    """
    try:
        inode = _path_of(address, folder).stat().st_ino
    except FileNotFoundError:
        return None
    for line in locks.read_text().splitlines():
        words = line.split()
        if "FLOCK" in words and words[-3].rpartition(":")[2] == str(inode):
            return int(words[-4])
    return None


def lock_run_dir(folder: Path) -> Lock:
    """The right to the sockets, the holders and the state in ``folder``."""
    return Lock(folder / "lock", str(folder))
