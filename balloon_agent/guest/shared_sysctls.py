"""What all agents of a machine want of the kernel's settings: a file that they share, for each has a device of its own.

Without it each would put back what it has found, which another agent may have written. What a setting was before is what it was
before the first of them, and it is as high as any of them wants. Agents that died count as long as their state is on record.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_LONGEST = 1 << 16
# Seconds.
_LOCK_DEADLINE, _LOCK_LOOK = 1.0, 0.01


class Changed(NamedTuple):
    """Of a setting: what it was, and what it was made of that: the last two values while that is under way, or else one.

    None are known of one that an earlier version has changed.
    """

    before: int
    written: tuple[int, ...] = ()


@dataclass
class Wants:
    """Of one setting: what it was before anybody changed it, and what each agent wants, by its run directory."""

    before: int = 0
    by_agent: dict[str, int] = field(default_factory=dict)

    def others(self, agent: str) -> int | None:
        """The highest that another agent wants; None if there is none."""
        return max((value for other, value in self.by_agent.items() if other != agent), default=None)


class SharedSettings:
    """``agent`` is the run directory of who asks. Nothing is open between two calls."""

    def __init__(self, path: Path, agent: str) -> None:
        self._path = path
        self.agent = agent

    @contextmanager
    def of(self, name: str) -> Iterator[tuple[Wants, Callable[[], None]]]:
        """What is wanted of a setting, for this process alone, and what writes a change of it down.

        OSError if another agent keeps the file for itself, or if somebody else than root may write to it.
        """
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            found = os.fstat(fd)
            # Nor by another name: what is there is believed, and written over.
            is_ours = found.st_uid == os.geteuid() and found.st_nlink == 1 and not found.st_mode & 0o022
            if not stat.S_ISREG(found.st_mode) or not is_ours:
                raise OSError(errno.EPERM, "not a file of root's alone: remove it", str(self._path))
            self._lock(fd)
            content = _parse(os.pread(fd, _LONGEST, 0))
            wants = content.setdefault(name, Wants())

            def save() -> None:
                data = json.dumps({each: vars(some) for each, some in content.items() if some.by_agent}).encode()
                os.pwrite(fd, data, 0)
                os.ftruncate(fd, len(data))

            yield wants, save
        finally:
            os.close(fd)

    def _lock(self, fd: int) -> None:
        # Others have it for a few reads and writes; one that was stopped meanwhile is not waited for.
        end = time.monotonic() + _LOCK_DEADLINE
        while True:
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise OSError(errno.EBUSY, "another agent does not let go of it", str(self._path)) from error
            time.sleep(_LOCK_LOOK)


def _parse(data: bytes) -> dict[str, Wants]:
    """What is damaged is as if it was not there: each agent has on record, too, what a setting was before it came."""
    try:
        content = json.loads(data)
        return {
            str(name): Wants(int(wants["before"]), {str(a): int(v) for a, v in wants["by_agent"].items() if _is_on_record(a)})
            for name, wants in content.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_on_record(agent: str) -> bool:
    return (Path(agent) / "state.json").exists()
