"""The log, which nobody waits for: whoever reads it may be slow, or stuck, just when memory is short.

Standard error is a pipe or a socket of the journal's as a rule, and full when its reader does not come to read. A write would
then wait without a deadline, and with it the thread that owns the device. So what cannot be written now is kept, and written
with what is logged next, or at the end; of too much the oldest is kept, and the number of the rest.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from collections import deque
from contextlib import suppress

# Lines that are kept.
MOST_LINES = 1000
# Bytes of a line. What is writable at all takes so many at once (man 7 pipe, PIPE_BUF; a pipe has a page for it).
MOST_BYTES = select.PIPE_BUF
# Seconds that the end waits for the reader.
END_DEADLINE = 1.0


class PatientHandler(logging.Handler):
    """Writes to a descriptor, and never waits for it; ``lost`` lines there was no room for since the last that was written."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lines: deque[bytes] = deque()
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if len(self._lines) < MOST_LINES:
            self._lines.append(_line(text))
        else:
            self.lost += 1
        self._write(0.0)

    def flush(self) -> None:
        """What is left, as far as it is read in time. Called at the end of the process."""
        self.acquire()
        try:
            self._write(END_DEADLINE)
        finally:
            self.release()

    def _write(self, seconds: float) -> None:
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        end = time.monotonic() + seconds
        while self._lines and poller.poll(max(0.0, end - time.monotonic()) * 1000):
            try:
                os.write(self._fd, self._lines[0])
            except OSError:
                # Nobody is there to read: the next line may find somebody.
                self._lines.clear()
                self.lost = 0
                return
            self._lines.popleft()
            if self.lost and not self._lines:
                self._lines.append(_line(f"balloon-agent: {self.lost} more lines were not written: nobody read them"))
                self.lost = 0


def _line(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")[: MOST_BYTES - 1] + b"\n"


def to_stderr() -> logging.Handler:
    """A handler for standard error, or for what stands in its place in this program."""
    with suppress(OSError, AttributeError, ValueError):
        return PatientHandler(sys.stderr.fileno())
    return logging.StreamHandler()
