"""Short files of the kernel's, as in sysfs, without a layer between: they are read and written by the hundred."""

from __future__ import annotations

import os

_LONGEST = 4096


def read_file(path: str) -> str:
    """What a file says, without the line's end. OSError with its path."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _LONGEST).decode("ascii").strip()
    finally:
        os.close(fd)


def write_file(path: str, text: str) -> None:
    """Write a file in one go. OSError, with its path, from the write itself."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.close(fd)
