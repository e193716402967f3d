"""One agent to a device, and one to a run directory: locks that go with their process, however that ends."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from balloon_agent.errors import BadInput, DeviceBusy
from balloon_agent.linux import private

# The same for every agent on this machine, whatever its run directory.
LOCK_DIR = Path("/run/balloon-agent-locks")
# Earlier agents lock the device here, where anybody may make files. One that runs yet is noticed.
OLD_LOCK_DIR = Path("/run/lock")


class Lock:
    """Held from construction until ``close``. DeviceBusy, with the holder's process, if another agent has it.

    BadInput if others than root may write to the directory: a lock of theirs would keep the agent out.
    """

    def __init__(self, path: Path, what: str) -> None:
        private.make(path.parent)
        if (obstacle := private.obstacle(path.parent)) is not None:
            raise BadInput(f"{obstacle}: {path.parent} must be root's alone; choose another, or remove it")
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            said = os.pread(self._fd, 32, 0).strip()
            os.close(self._fd)
            raise _busy(what, path, int(said) if said.isdigit() else None) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        # The file stays: removing it would let a third process lock a new one while a second waits for the old.
        os.close(self._fd)


def _busy(what: str, path: Path, pid: int | None) -> DeviceBusy:
    who = "process unknown" if pid is None else f"process {pid}"
    remedy = f"fuser -v {path} says which" if pid is None else f"kill {pid}"
    return DeviceBusy(f"{what} is used by another agent already, {who}: stop that one first ({remedy})")


def device_lock(address: str, folder: Path = LOCK_DIR) -> Path:
    """The file that is locked by who drives the PCI function at ``address``."""
    return folder / f"{address}.lock"


def run_dir_lock(folder: Path) -> Path:
    """The file that is locked by whose the sockets, the holders and the state in ``folder`` are."""
    return folder / "lock"


def lock_device(
    address: str, folder: Path = LOCK_DIR, old_folder: Path = OLD_LOCK_DIR, proc_root: Path = Path("/proc")
) -> Lock:
    """The right to drive the PCI function at ``address``."""
    lock = Lock(device_lock(address, folder), address)
    try:
        # Anybody may see which process that is, as doctor does; the locks themselves are root's to open. systemd has one mode
        # for all directories of a service.
        folder.chmod(private.READABLE)
        if (pid := _who_locks_the_old_way(address, old_folder, proc_root)) is not None:
            raise _busy(address, _old_lock(address, old_folder), pid)
    except BaseException:
        lock.close()
        raise
    return lock


def lock_run_dir(folder: Path) -> Lock:
    """The right to the sockets, the holders and the state in ``folder``."""
    return Lock(run_dir_lock(folder), str(folder))


def who_drives(
    address: str, folder: Path = LOCK_DIR, old_folder: Path = OLD_LOCK_DIR, proc_root: Path = Path("/proc")
) -> int | None:
    """The process that drives the PCI function at ``address``; None if nobody does."""
    pid = who_locks(device_lock(address, folder), proc_root)
    return _who_locks_the_old_way(address, old_folder, proc_root) if pid is None else pid


def who_locks(path: Path, proc_root: Path = Path("/proc")) -> int | None:
    """The process that has a lock; None if nobody has. To try it would keep it, for a moment, from who starts just then.

    Source: lock_get_status() in fs/locks.c.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in (proc_root / "locks").read_text().splitlines():
        match line.split():
            # Who waits for a lock has an arrow in front.
            case [_, "FLOCK", _, _, pid, where, *_] if where == wanted:
                return int(pid)
    return None


def _old_lock(address: str, folder: Path) -> Path:
    return folder / f"balloon-agent-{address}.lock"


def _who_locks_the_old_way(address: str, folder: Path, proc_root: Path) -> int | None:
    """The agent of an earlier version that drives the function. The lock is believed only if nobody but root could open it."""
    path = _old_lock(address, folder)
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    is_roots = found.st_uid in (0, os.geteuid()) and stat.S_ISREG(found.st_mode) and not found.st_mode & 0o077
    return who_locks(path, proc_root) if is_roots else None
