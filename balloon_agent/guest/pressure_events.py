"""Memory demand as an event: the kernel wakes kswapd up when free memory falls below a zone's low watermark.

That is early: what programs can still have then, down to the min watermarks, is what the agent has for its answer. Pressure
stall information (PSI) comes too late, for nothing stalls until memory has gone. It is heard through the tracepoint
vmscan:mm_vmscan_wakeup_kswapd, with one perf event for each processor. While nobody is in need there is no event; nor is there
one while kswapd has given up (``Spare.hopeless``): need has to be looked for then.
Sources: wakeup_kswapd() in mm/vmscan.c, perf_event_open(2), include/uapi/linux/perf_event.h.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from balloon_agent.errors import NotPermitted
from balloon_agent.linux import libc

TRACEPOINT = "vmscan/mm_vmscan_wakeup_kswapd"
# The last word before the OOM killer's: kswapd is no longer woken up once it has found nothing to reclaim so often.
LATE_TRACEPOINT = "vmscan/mm_vmscan_direct_reclaim_begin"
# Where tracefs is mounted, on new systems and on old ones.
TRACEFS = ("sys/kernel/tracing", "sys/kernel/debug/tracing")
_TYPE_TRACEPOINT = 2
_FLAG_CLOEXEC = 8
# struct perf_event_attr, its first published size: type, size, config, sample_period, sample_type, read_format, flags,
# wakeup_events, bp_type, config1.
_ATTRIBUTES = struct.Struct("=IIQQQQQIIQ")
# struct perf_event_mmap_page: how far the kernel has written, and how far it has been read.
_DATA_HEAD, _DATA_TAIL = 1024, 1032
_PAGES = 2


def parse_cpus(text: str) -> list[int]:
    """A list of processors as sysfs writes it: 0-3,5."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


class KswapdWakeups:
    """Open from construction to ``close``. ``fds`` become readable when there is need; ``consume`` takes the news in.

    NotPermitted, with the remedy, where it cannot be heard of: no tracefs, or perf is forbidden (lockdown, a seccomp filter).
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._buffers: dict[int, mmap.mmap] = {}
        numbers = [_tracepoint(root, TRACEPOINT), _tracepoint(root, LATE_TRACEPOINT)]
        try:
            for cpu in parse_cpus((root / "sys/devices/system/cpu/online").read_text()):
                for number in numbers:
                    self._open(number, cpu)
        except BaseException:
            self.close()
            raise

    @property
    def fds(self) -> Collection[int]:
        return self._buffers.keys()

    def _open(self, number: int, cpu: int) -> None:
        # Each wake-up is a sample, and each sample is told of.
        attributes = _ATTRIBUTES.pack(_TYPE_TRACEPOINT, _ATTRIBUTES.size, number, 1, 0, 0, 0, 1, 0, 0)
        try:
            fd = libc.perf_event_open(attributes, cpu, _FLAG_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
                raise NotPermitted(
                    f"perf events are not to be had ({error.strerror})", "that takes CAP_PERFMON and no kernel lockdown"
                ) from error
            raise
        try:
            self._buffers[fd] = mmap.mmap(fd, _PAGES * mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(fd)
            raise

    def consume(self) -> bool:
        """Take in all there is: the next wake-up is told of again. Whether there was any."""
        found = False
        for buffer in self._buffers.values():
            head = buffer[_DATA_HEAD : _DATA_HEAD + 8]
            if buffer[_DATA_TAIL : _DATA_TAIL + 8] != head:
                buffer[_DATA_TAIL : _DATA_TAIL + 8] = head
                found = True
        return found

    def drop(self, fds: Collection[int]) -> None:
        """Close descriptors that have failed: poll would return at once for ever."""
        for fd in fds:
            self._buffers.pop(fd).close()
            # It may be closed already: POLLNVAL.
            with suppress(OSError):
                os.close(fd)

    def close(self) -> None:
        self.drop(list(self._buffers))


def _tracepoint(root: Path, name: str) -> int:
    for folder in TRACEFS:
        try:
            return int((root / folder / "events" / name / "id").read_text())
        except FileNotFoundError:
            continue
        except PermissionError as error:
            raise NotPermitted(f"{error.filename}: {error.strerror}") from error
    raise NotPermitted(f"tracepoint {name} is not to be found", "mount -t tracefs none /sys/kernel/tracing")


class Stalls:
    """Thrashing: processes wait for memory a fifth of the time, though some could be had. Pressure stall information tells.

    ``fd`` has POLLPRI then, once a second at most. NotPermitted where the kernel has no such thing.
    Source: Documentation/accounting/psi.rst.
    """

    TRIGGER = b"some 200000 1000000\0"

    def __init__(self, root: Path = Path("/")) -> None:
        path = root / "proc/pressure/memory"
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise NotPermitted(f"{path}: {error.strerror}", "boot with psi=1") from error
        try:
            os.write(self.fd, self.TRIGGER)
        except OSError as error:
            os.close(self.fd)
            raise NotPermitted(f"{path} takes no trigger: {error.strerror}") from error

    def close(self) -> None:
        os.close(self.fd)
