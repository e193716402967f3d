"""vm.min_free_kbytes follows what the balloon leaves of the guest.

For the sake of huge pages the kernel keeps 22 MiB free in each zone, but never more than 5 % of the memory that it has. It
reckons with memory that goes offline, and cannot with what a process holds: of a guest of 1 GiB with 600 MiB left it would
keep 44 MiB to itself, where 27 MiB are its own rule. So that rule is applied here. A value that is not the kernel's own choice
is left alone, and smaller differences are, too: what is written is no longer the kernel's to change, see ``let_kernel_choose``.
Sources: set_recommended_min_free_kbytes() in mm/khugepaged.c, calculate_min_free_kbytes() in mm/page_alloc.c.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from balloon_agent.linux.files import read_file, write_file

from .shared_sysctls import Changed

NAME = "vm.min_free_kbytes"
# Two page blocks of 2 MiB, and one for each pair of the three common migrate types.
_KIB_PER_ZONE = (2 + 3 * 3) * 2048
# Memory of the whole that the rule may keep, as a divisor.
_SHARE = 20
# Smaller changes are not worth a write: an eighth of the least reserve.
_GRAIN_KIB = 8192
# Less than the kernel's own choice for any guest of 64 MiB and more (the root of sixteen times its KiB), and enough for the
# moment until the kernel makes that.
WISH_KIB = 1000
THP_ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"
_ZONE = re.compile(r"^Node \d+, zone\s+(\S+)(.*?)(?=^Node|\Z)", re.MULTILINE | re.DOTALL)
_MANAGED = re.compile(r"^\s+managed\s+([1-9]\d*)", re.MULTILINE)
_log = logging.getLogger(__name__)


def recommended_kib(zoneinfo: str) -> int:
    """What the kernel wants to keep free for huge pages where there is plenty: so much for each zone of ordinary memory."""
    zones = sum(1 for zone, text in _ZONE.findall(zoneinfo) if zone not in ("Movable", "Device") and _MANAGED.search(text))
    return zones * _KIB_PER_ZONE


class Watermark:
    """Lowers vm.min_free_kbytes as memory is held, and has the kernel choose it again as that goes back.

    ``record`` notes beforehand, outside this process, what it was and is made, in KiB; None when it is the kernel's again.
    """

    def __init__(
        self,
        record: Callable[[Changed | None], None],
        left: Changed | None = None,
        proc_root: Path = Path("/proc"),
        page_kib: int = 4,
        thp_enabled: str = THP_ENABLED,
    ) -> None:
        self._record = record
        self._path = str(proc_root / "sys/vm/min_free_kbytes")
        self._zoneinfo = proc_root / "zoneinfo"
        self._page_kib = page_kib
        self._thp_enabled = thp_enabled
        # What is on record: the value is the user's for the kernel as long as there is something.
        self._changed = left
        # Before anything was held.
        self._first = 0
        # Something is, or was until now, by whichever agent.
        self._has_held = False
        self._now = -1
        self._failed = False
        self._look()

    def _look(self) -> None:
        """Begin with the value that is there: the kernel has chosen it anew, or somebody else has."""
        zoneinfo = self._zoneinfo.read_text()
        self._total = sum(int(pages) for pages in _MANAGED.findall(zoneinfo)) * self._page_kib
        self._now = int(read_file(self._path))
        is_ours = self._changed is not None and is_of_agent(self._now, self._changed)
        self._original = self._changed.before if self._changed is not None and is_ours else self._now
        most = self._total // _SHARE
        # Of that share the kernel leaves out a little that depends on the watermarks themselves.
        self._is_kernels = self._original == recommended_kib(zoneinfo) or most * 4 // 5 <= self._original <= most
        # What the kernel chose while its other watermarks were moved is not what it would choose without that.
        self._first = max(self._first, self._original) if self._is_kernels else self._original
        if self._changed is not None and not is_ours and not self._is_kernels:
            _log.info("%s was changed to %d by somebody else, and stays so", NAME, self._now)
            self._record(None)
            self._changed = None

    def follow(self, held: int, offline: int = 0) -> None:
        """``held`` bytes are in the balloon that the kernel believes to be in use, and ``offline`` that it knows of."""
        try:
            if int(read_file(self._path)) != self._now:
                self._look()
            if not held:
                self._leave_to_kernel(is_over=not offline)
                self._has_held = bool(offline)
                return
            self._has_held = True
            wanted = min(self._original, max(0, self._total - (held >> 10)) // _SHARE)
            small = abs(wanted - self._now) < _GRAIN_KIB
            if small or not self._is_kernels or (self._failed and wanted < self._now):
                return
            changed = Changed(self._original, (self._now, wanted))
            self._record(changed)
            self._changed = changed
            write_file(self._path, str(wanted))
            self._now, self._failed = wanted, False
        except OSError as error:
            if not self._failed:
                _log.warning("%s stays as it is: %s", NAME, error)
            # No further down; but back it goes, if that can be done.
            self._failed = True

    def _leave_to_kernel(self, *, is_over: bool) -> None:
        if self._changed is not None:
            self._now = let_kernel_choose(self._path, self._first, self._thp_enabled)
            self._record(None)
            self._changed = None
        elif is_over and self._is_kernels and self._has_held:
            # Its last choice was made while its other watermarks were moved.
            _recompute(self._thp_enabled)
        else:
            return
        self._now = self._original = int(read_file(self._path))
        if is_over:
            self._first = self._now
        self._failed = False


def is_of_agent(now: int, changed: Changed) -> bool:
    """An agent has written this value, and may have died before the kernel chose another one."""
    return not changed.written or now in (*changed.written, WISH_KIB)


def let_kernel_choose(path: str, before: int, thp_enabled: str = THP_ENABLED) -> int:
    """Undo what was written: the kernel chooses the value now, and whenever memory comes and goes. Else it is ``before``.

    A value that was written is the user's wish for the kernel, which chooses no lower one from then on
    (user_min_free_kbytes). There is no way to take that back; but above a wish that is low enough the kernel is free.
    """
    write_file(path, str(WISH_KIB))
    _recompute(thp_enabled)
    if int(read_file(path)) == WISH_KIB:
        write_file(path, str(before))
    return int(read_file(path))


def _recompute(thp_enabled: str) -> None:
    """Have the kernel choose anew: it does so whenever somebody writes how huge pages are given out, though it be the same."""
    with suppress(OSError):
        write_file(thp_enabled, read_file(thp_enabled).partition("[")[2].partition("]")[0])
