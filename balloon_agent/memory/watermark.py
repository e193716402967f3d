"""vm.min_free_kbytes follows what the balloon leaves of the guest.

For the sake of huge pages the kernel keeps 22 MiB free in each zone, but never more than 5 % of the memory that it has. It
reckons with memory that goes offline, and cannot with what a process holds: of a guest of 1 GiB with 600 MiB left it would
keep 44 MiB to itself, where 27 MiB are its own rule. So that rule is applied here. A value that is not the kernel's own choice
is left alone. Source: set_recommended_min_free_kbytes() in mm/khugepaged.c.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from .sysfs import read_file, write_file

NAME = "vm.min_free_kbytes"
# Two page blocks of 2 MiB, and one for each pair of the three common migrate types.
_KIB_PER_ZONE = (2 + 3 * 3) * 2048
# Memory of the whole that the rule may keep, as a divisor.
_SHARE = 20
# Smaller changes are not worth a write.
_GRAIN_KIB = 1024
_ZONE = re.compile(r"^Node \d+, zone\s+(\S+)(.*?)(?=^Node|\Z)", re.MULTILINE | re.DOTALL)
_MANAGED = re.compile(r"^\s+managed\s+([1-9]\d*)", re.MULTILINE)
_log = logging.getLogger(__name__)


def recommended_kib(zoneinfo: str) -> int:
    """What the kernel wants to keep free for huge pages where there is plenty: so much for each zone of ordinary memory."""
    zones = sum(1 for zone, text in _ZONE.findall(zoneinfo) if zone not in ("Movable", "Device") and _MANAGED.search(text))
    return zones * _KIB_PER_ZONE


class Watermark:
    """Lowers vm.min_free_kbytes as memory is held, and puts it back as that goes back.

    ``record`` notes outside this process what it was, in KiB, before it is changed; None when it is so again.
    """

    def __init__(
        self,
        record: Callable[[int | None], None],
        before: int | None = None,
        proc_root: Path = Path("/proc"),
        page_kib: int = 4,
    ) -> None:
        self._record = record
        self._path = str(proc_root / "sys/vm/min_free_kbytes")
        self._zoneinfo = proc_root / "zoneinfo"
        self._page_kib = page_kib
        self._recorded = before is not None
        # Before anything was held.
        self._first = 0
        self._now = -1
        self._failed = False
        self._look(before)

    def _look(self, before: int | None = None) -> None:
        """Begin with the value that is there: the kernel has chosen it anew, or somebody else has."""
        zoneinfo = self._zoneinfo.read_text()
        self._total = sum(int(pages) for pages in _MANAGED.findall(zoneinfo)) * self._page_kib
        self._now = int(read_file(self._path))
        self._original = self._now if before is None else before
        most = self._total // _SHARE
        # Of that share the kernel leaves out a little that depends on the watermarks themselves.
        self._is_kernels = self._original == recommended_kib(zoneinfo) or most * 4 // 5 <= self._original <= most
        # What the kernel chose while its other watermarks were moved is not what it would choose without that.
        self._first = max(self._first, self._original) if self._is_kernels else self._original
        if before is None and self._recorded:
            self._record(None)
            self._recorded = False

    def follow(self, held: int, offline: int = 0) -> None:
        """``held`` bytes are in the balloon that the kernel believes to be in use, and ``offline`` that it knows of."""
        try:
            if int(read_file(self._path)) != self._now:
                self._look()
            wanted = min(self._original, max(0, self._total - (held >> 10)) // _SHARE)
            if is_over := not held and not offline:
                wanted = self._first
            small = abs(wanted - self._now) < _GRAIN_KIB and wanted != self._original and not is_over
            if wanted == self._now or small or not self._is_kernels or (self._failed and wanted < self._now):
                return
            if not self._recorded:
                self._record(self._original)
                self._recorded = True
            write_file(self._path, str(wanted))
            self._now, self._failed = wanted, False
            if wanted == self._original or is_over:
                self._record(None)
                self._recorded, self._original = False, wanted
        except OSError as error:
            if not self._failed:
                _log.warning("%s stays as it is: %s", NAME, error)
            # No further down; but back it goes, if that can be done.
            self._failed = True
