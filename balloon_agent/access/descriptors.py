"""The numbers of this process's descriptors: the device's is the highest, so that it is closed first if the agent dies.

When a process dies, Linux lets go of its files from the highest descriptor down, since each is put on a stack of work to be
done: close_files() in fs/file.c, fput() in fs/file_table.c, task_work_run() in kernel/task_work.c. The device must lose its
access to memory before the pins of the ring pages go.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource

# The kernel's table of a process's descriptors is as long as the highest one, 8 bytes each: 128 KiB. The unit allows as many.
MOST = 16384
# Fewer do not do: each holder takes three, and each step that is on its way a few more.
LEAST = 1024
# Devices that may be open at the same time, while one succeeds another.
_DEVICES = 4


def set_limit() -> None:
    """Allow this process, and its holders, as many descriptors as may be, up to MOST: none is ever above the device's."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST if hard == resource.RLIM_INFINITY else min(hard, MOST), hard))


def raise_above_all(fd: int) -> int:
    """Close a descriptor, and return a duplicate of it that has the highest number there can be."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = (MOST if soft == resource.RLIM_INFINITY else min(soft, MOST)) - 1
    try:
        for number in range(highest, highest - _DEVICES, -1):
            try:
                return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, number)
            except OSError as error:
                # EMFILE: this number is taken, and there is none above it.
                if error.errno != errno.EMFILE:
                    raise
        raise OSError(errno.EMFILE, f"descriptors {highest - _DEVICES + 1} to {highest} are taken, and one is the device's")
    finally:
        os.close(fd)
