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


def device_lock(address: str, folder: Path = LOCK_DIR) -> Path:
    """The file that is locked by who drives the PCI function at ``address``."""
    return folder / f"balloon-agent-{address}.lock"


def run_dir_lock(folder: Path) -> Path:
    """The file that is locked by whose the sockets, the holders and the state in ``folder`` are."""
    return folder / "lock"


def lock_device(address: str, folder: Path = LOCK_DIR) -> Lock:
    """The right to drive the PCI function at ``address``."""
    return Lock(device_lock(address, folder), address)


def lock_run_dir(folder: Path) -> Lock:
    """The right to the sockets, the holders and the state in ``folder``."""
    return Lock(run_dir_lock(folder), str(folder))


def who_locks(path: Path, proc_root: Path = Path("/proc")) -> int | None:
    """The process that has a lock; None if nobody has. To try it would keep it, for a moment, from who starts just then.

    Source: lock_get_status() in fs/locks.c.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in (proc_root / "locks").read_text().splitlines():
        match line.split():
            # Who waits for a lock has an arrow in front.
            case [_, "FLOCK", _, _, pid, where, *_] if where == wanted:
                return int(pid)
    return None
