"""Settings of the kernel's that are other than usual while memory is held, each on record before it is changed.

- vm.min_free_kbytes: see watermark.
- vm.watermark_scale_factor: the distance between the min and the low watermark, in 1/10000 of a zone. By default it is so
  short that a program which takes memory fast is past it before anybody could help; here it is half of the reserve.
- vm.overcommit_memory: with 0 the kernel refuses a program any single mapping larger than MemTotal and swap together. Offline
  blocks are missing from MemTotal, though they would be given back as soon as the program used them.
Source: Documentation/admin-guide/sysctl/vm.rst.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from .sysfs import read_file, write_file
from .watermark import NAME as MIN_FREE
from .watermark import Watermark

SCALE_FACTOR, OVERCOMMIT = "vm.watermark_scale_factor", "vm.overcommit_memory"
# What the kernel begins with, and more than which nobody needs: a tenth of a zone.
LEAST_FACTOR, MOST_FACTOR = 10, 1000
HEURISTIC, ALWAYS = 0, 1
ALLOCATING_TASK = "vm.oom_kill_allocating_task"
# ``record(name, before)`` notes outside this process what a setting was, before it is changed; with None, that it is so again.
Record = Callable[[str, int | None], None]
_log = logging.getLogger(__name__)


def oom_killer_chooses(root: str = "/proc/sys") -> bool:
    """The OOM killer looks for the process with the highest score; else it takes the one that has asked for memory.

    Source: out_of_memory() in mm/oom_kill.c.
    """
    try:
        return int(read_file(f"{root}/{ALLOCATING_TASK.replace('.', '/')}")) == 0
    except FileNotFoundError:
        return True


class Setting:
    """One setting: whole numbers only. Somebody else's change of it is left alone."""

    def __init__(self, name: str, record: Record, before: int | None = None, root: str = "/proc/sys") -> None:
        self.name = name
        self._path = f"{root}/{name.replace('.', '/')}"
        self._record = partial(record, name)
        # What an earlier agent has written is not known, and need not be.
        self._before, self._ours = before, None if before is None else int(read_file(self._path))
        self._is_left_alone = False

    def change(self, choose: Callable[[int], int]) -> None:
        """Make it what ``choose`` makes of what it was before. OSError if that cannot be done."""
        now = int(read_file(self._path))
        if self._ours is not None and now != self._ours and not self._is_left_alone:
            _log.info("%s was changed to %d by somebody else, and stays so", self.name, now)
            self._is_left_alone = True
            self._forget()
        if self._is_left_alone:
            return
        before = now if self._before is None else self._before
        value = choose(before)
        if value == now:
            return
        if self._before is None:
            self._record(before)
            self._before = before
        write_file(self._path, str(value))
        self._ours = value

    def put_back(self) -> None:
        """Make it what it was before. OSError if that cannot be done: it stays on record then."""
        if self._before is not None:
            if int(read_file(self._path)) == self._ours:
                write_file(self._path, str(self._before))
            self._forget()
        self._is_left_alone = False

    def _forget(self) -> None:
        self._record(None)
        self._before = self._ours = None


class Held(Protocol):
    """How much is held, in bytes; of that, what the kernel believes to be in use, and not offline."""

    @property
    def size(self) -> int: ...

    @property
    def in_use(self) -> int: ...


class Settings:
    """All of them, as they have to be for what is ``held`` of ``ram`` bytes. ``before`` is what an earlier agent recorded."""

    def __init__(
        self,
        held: Held,
        ram: int,
        reserve: Callable[[], int],
        record: Record,
        before: dict[str, int],
        *,
        warns_early: bool = True,
        overcommits: bool = True,
        page_kib: int = 4,
        proc_root: Path = Path("/proc"),
    ) -> None:
        self._held = held
        self._ram = ram
        self._reserve = reserve
        self._minimum = Watermark(partial(record, MIN_FREE), before.get(MIN_FREE), proc_root, page_kib)
        root = str(proc_root / "sys")
        self._factor = Setting(SCALE_FACTOR, record, before.get(SCALE_FACTOR), root)
        self._overcommit = Setting(OVERCOMMIT, record, before.get(OVERCOMMIT), root)
        self._warns_early = warns_early
        self._overcommits = overcommits
        self._failed: set[str] = set()

    def follow(self) -> None:
        """Make them fit what is held now."""
        in_use, offline = self._held.in_use, self._held.size - self._held.in_use
        self._set(self._factor, partial(self._larger_factor, offline) if self._held.size and self._warns_early else None)
        self._set(self._overcommit, _always if offline and self._overcommits else None)
        self._minimum.follow(in_use, offline)

    def _larger_factor(self, offline: int, before: int) -> int:
        share: int = (self._reserve() // 2) * 10000 // max(1, self._ram - offline)
        # In steps of a tenth, so that it is not written anew at every step of the balloon.
        grain: int = 10 ** max(0, len(str(share)) - 2)
        return max(before, min(MOST_FACTOR, max(LEAST_FACTOR, share // grain * grain)))

    def _set(self, setting: Setting, choose: Callable[[int], int] | None) -> None:
        try:
            if choose is None:
                setting.put_back()
            else:
                setting.change(choose)
            self._failed.discard(setting.name)
        except OSError as error:
            if setting.name not in self._failed:
                _log.warning("%s stays as it is: %s", setting.name, error)
                self._failed.add(setting.name)


def _always(before: int) -> int:
    """2 is somebody's decision to count every byte, and stays."""
    return ALWAYS if before == HEURISTIC else before
