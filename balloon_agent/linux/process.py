"""A process of ours: a pidfd, and its number where the kernel knows numbers only.

A number is free for any other process as soon as its own has ended and was waited for; a pidfd stays what it is. So signals go
by the pidfd, and what goes by the number is checked against it: a process that has not ended afterwards had its number all the
time.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress


class Process:
    """Owns a pidfd until closed. ProcessLookupError if no process has that number.

    Nothing but the caller can know that it is the right process: see ``HolderClient`` and ``is_listened_to``.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended by then; if 0, by now."""
        return is_readable(self.pidfd, seconds)

    def signal(self, number: int) -> None:
        """Send a signal, if there is still anybody to hear it."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def open(self, name: str, flags: int) -> int:
        """A descriptor of a file in its folder in /proc, which then stands for it alone. ProcessLookupError if it has ended."""
        try:
            fd = os.open(f"/proc/{self.pid}/{name}", flags | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ProcessLookupError(f"process {self.pid} has ended") from error
        if self.ends_within(0):
            os.close(fd)
            raise ProcessLookupError(f"process {self.pid} has ended")
        return fd

    def close(self) -> None:
        os.close(self.pidfd)


def is_readable(fd: int, seconds: float) -> bool:
    """Whether it is within so many seconds; a pidfd is when its process has ended."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0.0, seconds) * 1000))
