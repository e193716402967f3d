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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from balloon_agent.linux.files import read_file, write_file

from .min_free import NAME as MIN_FREE
from .min_free import (
    THP_ENABLED,
    Watermark,
    is_of_agent,
    let_kernel_choose,
)
from .shared_sysctls import Changed, SharedSettings, Wants

SCALE_FACTOR, OVERCOMMIT = "vm.watermark_scale_factor", "vm.overcommit_memory"
# What the kernel begins with, and more than which nobody needs: a tenth of a zone.
LEAST_FACTOR, MOST_FACTOR = 10, 1000
HEURISTIC, ALWAYS = 0, 1
ALLOCATING_TASK = "vm.oom_kill_allocating_task"
# ``record(name, changed)`` notes it outside this process before it is done; with None, that the setting is as it was.
Record = Callable[[str, Changed | None], None]
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
    """One setting: whole numbers only. Somebody else's change of it is left alone, unless that is another agent."""

    def __init__(
        self, name: str, record: Record, shared: SharedSettings, left: Changed | None = None, root: str = "/proc/sys"
    ) -> None:
        self.name = name
        self._root, self._path = root, _path(root, name)
        self._record = partial(record, name)
        self._shared = shared
        self._changed = left
        if left is not None and not left.written:
            # An earlier version has not noted what it wrote: what is there is believed to be that.
            self._changed = Changed(left.before, (int(read_file(self._path)),))
        # What this agent wants it to be; another may want more.
        self._wanted: int | None = None
        self._is_left_alone = False

    def change(self, choose: Callable[[int], int]) -> None:
        """Make it what ``choose`` makes of what it was before. OSError if that cannot be done."""
        if self._is_left_alone or self._is_settled(choose):
            return
        with self._shared.of(self.name) as (wants, save):
            now, others = int(read_file(self._path)), wants.others(self._shared.agent)
            if self._changed is not None and not _is_agents(now, self._changed, wants):
                _log.info("%s was changed to %d by somebody else, and stays so", self.name, now)
                self._is_left_alone = True
                self._forget(wants, save)
                return
            before = self._changed.before if self._changed is not None else now if others is None else wants.before
            value = choose(before)
            target = value if others is None else max(value, others)
            if self._changed is None and value == before:
                return
            if self._changed is None or target != now:
                # What is there if this process dies before the write is ours, too.
                self._changed = Changed(before, (now, target))
                self._record(self._changed)
            if wants.by_agent.get(self._shared.agent) != value:
                wants.before, wants.by_agent[self._shared.agent] = before, value
                save()
            if target != now:
                write_file(self._path, str(target))
            self._changed, self._wanted = Changed(before, (target,)), value

    def _is_settled(self, choose: Callable[[int], int]) -> bool:
        """It is what it was last made, and no other is wanted: so it is at nearly all steps of the balloon."""
        if self._changed is None or choose(self._changed.before) != self._wanted:
            return False
        return int(read_file(self._path)) == self._changed.written[-1]

    def put_back(self) -> None:
        """Make it what it was before. OSError if that cannot be done: it stays on record then."""
        if self._changed is not None:
            put_back(self.name, self._changed, self._shared, self._root)
            self._record(None)
            self._changed = None
        self._is_left_alone = False

    def _forget(self, wants: Wants, save: Callable[[], None]) -> None:
        wants.by_agent.pop(self._shared.agent, None)
        save()
        self._record(None)
        self._changed = None


def put_back(
    name: str, changed: Changed, shared: SharedSettings, root: str = "/proc/sys", thp_enabled: str = THP_ENABLED
) -> int | None:
    """Undo what one agent has changed of a setting, as far as no other agent wants it so.

    Returns what it is then; None if somebody else has changed it since: that stays.
    """
    path = _path(root, name)
    with shared.of(name) as (wants, save):
        now, others = int(read_file(path)), wants.others(shared.agent)
        target: int | None = changed.before if others is None else max(changed.before, others)
        if name == MIN_FREE:
            target = let_kernel_choose(path, changed.before, thp_enabled) if is_of_agent(now, changed) else None
        elif not _is_agents(now, changed, wants):
            target = None
        elif now != target:
            write_file(path, str(target))
        wants.by_agent.pop(shared.agent, None)
        save()
    return target


def _is_agents(now: int, changed: Changed, wants: Wants) -> bool:
    """An agent has written what is there, this one or another; of an earlier version that is believed."""
    return not changed.written or now in changed.written or now == max(wants.by_agent.values(), default=None)


def _path(root: str, name: str) -> str:
    return f"{root}/{name.replace('.', '/')}"


class Held(Protocol):
    """How much is held, in bytes; of that, what the kernel believes to be in use, and not offline."""

    @property
    def size(self) -> int: ...

    @property
    def in_use(self) -> int: ...


class Settings:
    """All of them, as they have to be for what is ``held`` of ``ram`` bytes. ``left`` is what an earlier agent has recorded."""

    def __init__(
        self,
        held: Held,
        ram: int,
        reserve: Callable[[], int],
        record: Record,
        left: Mapping[str, Changed],
        shared: SharedSettings,
        *,
        warns_early: bool = True,
        overcommits: bool = True,
        page_kib: int = 4,
        proc_root: Path = Path("/proc"),
        thp_enabled: str = THP_ENABLED,
    ) -> None:
        self._held = held
        self._ram = ram
        self._reserve = reserve
        self._minimum = Watermark(partial(record, MIN_FREE), left.get(MIN_FREE), proc_root, page_kib, thp_enabled)
        root = str(proc_root / "sys")
        self._factor = Setting(SCALE_FACTOR, record, shared, left.get(SCALE_FACTOR), root)
        self._overcommit = Setting(OVERCOMMIT, record, shared, left.get(OVERCOMMIT), root)
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
