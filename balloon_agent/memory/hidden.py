"""Hidden memory: holes of huge pages that are neither free nor in MemAvailable, see ``holes``; and how the guest gets it back.

The kernel's own counters tell how much there is: pages of anonymous memory that are on its LRU lists, and that no process maps.
It is freed by splitting the huge pages with debugfs, which evicts nothing. Where that is not to be had (lockdown, no debugfs),
the kernel is asked to reclaim a little of the control groups in question, which evicts some cache and takes longer; or, where
there is no cgroup v2 and the kernel can do that (Linux 6.17), of the NUMA node. In version 1 there is memory.force_empty alone,
which evicts all of a group, and is left alone.
Sources: page_remove_rmap() in mm/rmap.c, memory.reclaim in Documentation/admin-guide/cgroup-v2.rst, node's reclaim in
Documentation/ABI/stable/sysfs-devices-node.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from balloon_agent.frames import FRAME

from .worker import Worker

CGROUP_ROOT, NODE_ROOT = Path("/sys/fs/cgroup"), Path("/sys/devices/system/node")
# Bytes: less than this is not looked for, nor what the counters of many processors may be wrong by.
LEAST = 4 << 20
# Seconds that a step may look and split: between two steps events are heard. The worker may hang in another process's locks.
STEP_SECONDS, DEADLINE = 0.4, 10.0
# Seconds and deadline while a program waits for memory: the balloon cannot shrink for it before this is over.
SECONDS_AT_NEED, DEADLINE_AT_NEED = 0.05, 0.5
# Seconds for which it is believed that a means is not to be had: debugfs can be mounted later.
MEANS_KNOWN = 600.0
# A search that has not gone on for so many seconds begins anew.
STALE = 5.0
# Bytes that are freed beyond what is wanted: to empty blocks the kernel needs room, and without that goes on for long.
ROOM = 128 << 20
# After all processes were looked through, what is left hidden is left alone for so long, twice as long each time.
FIRST_REST, LONGEST_REST = 10.0, 3600.0
# Bytes that the kernel is to reclaim at once, and how often in a row that may free nothing that hides.
RECLAIMED, MOST_IN_VAIN = 1 << 20, 4
# The gentlest first.
MEANS = ("split", "reclaim")
_log = logging.getLogger(__name__)


def hidden_pages(vmstat: str, locked_files: int = 0) -> int:
    """Pages of anonymous memory that no process maps. ``locked_files`` pages of files are locked, and counted with others."""
    on_lists = _count(vmstat, "nr_active_anon") + _count(vmstat, "nr_inactive_anon") - _count(vmstat, "nr_shmem")
    if "\nnr_swapcached " in vmstat:
        on_lists -= _count(vmstat, "nr_swapcached")
    # Locked pages are on the unevictable list instead, those of files included.
    mapped = _count(vmstat, "nr_anon_pages") - max(0, _count(vmstat, "nr_unevictable") - locked_files)
    return max(0, on_lists - max(0, mapped))


def _count(vmstat: str, name: str) -> int:
    """A counter; ValueError if there is none. Searched for and not parsed: the text is read at every step."""
    at = vmstat.index(f"\n{name} ") + len(name) + 2
    return int(vmstat[at : vmstat.index("\n", at)])


def hidden_in(stat: str) -> int:
    """Bytes of anonymous memory that no process maps, by a control group's memory.stat, the groups inside it included."""
    count = {name: int(value) for name, _, value in (line.partition(" ") for line in stat.splitlines())}
    on_lists = count["active_anon"] + count["inactive_anon"] - count["shmem"] - count.get("swapcached", 0)
    return max(0, on_lists - max(0, count["anon"] - count["unevictable"]))


def reclaim_file(cgroup_root: Path, node_root: Path) -> Path | None:
    """File to ask the kernel for reclaim: of the deepest control group in which most hides; without cgroup v2, of the node."""
    group = cgroup_root
    if not (group / "memory.reclaim").exists():
        nodes = _sizes(node_root.glob("node*/reclaim"), "vmstat", lambda text: hidden_pages(text) * FRAME)
        fullest = max(nodes, key=lambda each: nodes[each], default=None)
        return None if fullest is None else fullest / "reclaim"
    while True:
        # A group that is delegated to a user cannot be written to without CAP_DAC_OVERRIDE.
        ours = (file for file in group.glob("*/memory.reclaim") if os.access(file, os.W_OK))
        groups = _sizes(ours, "memory.stat", hidden_in)
        inner = max(groups, key=lambda each: groups[each], default=None)
        if inner is None or groups[inner] < LEAST:
            return group / "memory.reclaim"
        group = inner


def _sizes(files: Iterable[Path], name: str, size_in: Callable[[str], int]) -> dict[Path, int]:
    """How much hides in each folder that one of these lies in, by the file of this ``name`` beside it."""
    sizes: dict[Path, int] = {}
    for file in files:
        # Groups come and go.
        with suppress(OSError, KeyError, ValueError):
            sizes[file.parent] = size_in((file.parent / name).read_text())
    return sizes


class Hidden:
    """Finds hidden memory and frees it, step by step. ``skip`` names processes that have none: those that hold the balloon.

    ``freed`` counts bytes by each means. ``note`` says, in words, why memory still hides, or is None.
    """

    def __init__(
        self,
        worker: Worker,
        skip: Callable[[], Collection[int]],
        clock: Callable[[], float] = time.monotonic,
        proc_root: Path = Path("/proc"),
        cgroup_root: Path = CGROUP_ROOT,
        node_root: Path = NODE_ROOT,
    ) -> None:
        self._worker = worker
        self._skip = skip
        self._clock = clock
        self._proc_root = proc_root
        self._cgroup_root = cgroup_root
        self._node_root = node_root
        self.freed = dict.fromkeys(MEANS, 0)
        self.note: str | None = None
        # The means that is in use: from the first step to the last one of a search.
        self._means: str | None = None
        self._is_walking = False
        self._walked_at = -math.inf
        # Processes that the last search could not look through.
        self._denied = 0
        # At the beginning of the search: bytes freed. In it: how often in a row reclaim has freed nothing.
        self._freed_before = self._in_vain = 0
        # Left by the last search, for how long that is left alone, and how long it will be the next time.
        self._left = 0
        self._rests_until = -math.inf
        self._rest = FIRST_REST
        # In words, why a means is not to be had here, and until when that is believed.
        self._cannot: dict[str, str] = {}
        self._known_until = -math.inf
        self._has_swappiness = True

    @property
    def size(self) -> int:
        """Bytes that hide now. OSError, KeyError or ValueError if that cannot be told."""
        status = (self._proc_root / "self/status").read_text()
        locked = int(status.partition("\nRssFile:")[2].split(None, 1)[0]) // (FRAME >> 10)
        return hidden_pages((self._proc_root / "vmstat").read_text(), locked) * FRAME

    def free(self, wanted: int, *, at_need: bool = False) -> bool:
        """Free some of it: a step towards ``wanted`` bytes. True if more may be free now, or after the next step.

        With ``at_need``, while a program waits for memory, the step is short, evicts nothing, and starts no worker.
        """
        try:
            hidden, now = self.size, self._clock()
            if self._means is None and not self._begins(hidden):
                return False
            if at_need and (self._means == "reclaim" or not self._worker.is_up):
                return False
            is_complete = True
            if self._means == "split":
                # A list of processes that is older than that is not gone on with.
                self._is_walking = self._is_walking and now < self._walked_at + STALE
                is_complete = self._split(wanted + ROOM, hidden, at_need)
                self._walked_at = self._clock()
            elif self._means == "reclaim":
                is_complete = self._reclaim(hidden)
            if self._means is None:
                self._end(is_complete=is_complete)
        except (OSError, LookupError, ValueError) as error:
            _log.debug("it cannot be told how much memory hides: %s", error)
            self._means = None
            return False
        return True

    def _begins(self, hidden: int) -> bool:
        self._left = min(self._left, hidden)
        if hidden < LEAST:
            self.note = None
            return False
        now = self._clock()
        if hidden < self._left + LEAST and now < self._rests_until:
            return False
        if now >= self._known_until:
            self._cannot.clear()
            self._known_until = now + MEANS_KNOWN
        self._freed_before, self._in_vain, self._is_walking = sum(self.freed.values()), 0, False
        self._means = self._next_means(MEANS)
        # Without any means a search only says so, once.
        return self._means is not None or self.note is None

    def _next_means(self, means: Sequence[str]) -> str | None:
        return next((each for each in means if each not in self._cannot), None)

    def _split(self, wanted: int, hidden: int, at_need: bool) -> bool:
        """Split some. False if enough is free before all processes have been looked through."""
        # Less than LEAST may stay hidden: looking through the remaining processes for it takes up to 0.5 s.
        enough = min(wanted, max(hidden - LEAST // 2, FRAME))
        request = {"op": "split", "begin": not self._is_walking, "skip": [*self._skip()], "frames": -(-enough // FRAME)}
        request["seconds"] = SECONDS_AT_NEED if at_need else STEP_SECONDS
        answer = self._worker.ask(request, DEADLINE_AT_NEED if at_need else DEADLINE, short=True, kills=not at_need)
        self._is_walking = isinstance(answer, dict) and not answer["done"]
        if isinstance(answer, str):
            # Stuck in somebody's lock, or dead. Later, perhaps.
            self.note, self._means = answer, None
            return True
        freed = answer["freed"] * FRAME
        self.freed["split"] += freed
        self._denied = answer["denied"]
        if answer["problem"] is not None:
            self._cannot["split"] = answer["problem"]
        if self.size < LEAST:
            self._means = None
        elif self._is_walking and freed >= wanted:
            # The next search begins anew.
            self._means = None
            return False
        elif not self._is_walking:
            # Pinned or locked huge pages stay whole, and small holes are not split: reclaim may get some of those.
            self._means = self._next_means(MEANS[1:])
        return True

    def _reclaim(self, hidden: int) -> bool:
        """Reclaim RECLAIMED bytes. False if that was given up because the guest is in need."""
        path = reclaim_file(self._cgroup_root, self._node_root)
        text = f"{RECLAIMED} swappiness=0" if self._has_swappiness else str(RECLAIMED)
        if path is None:
            self._cannot["reclaim"] = (
                f"neither a memory.reclaim below {self._cgroup_root} nor one of a node below {self._node_root}"
            )
        elif not self._has_swappiness and self._swaps():
            self._cannot["reclaim"] = f"{path} knows no swappiness= on this kernel, and would swap out"
        else:
            answer = self._worker.ask({"op": "reclaim", "path": str(path), "text": text}, DEADLINE, takes=True)
            if self._worker.gave_way:
                self._means = None
                return False
            if isinstance(answer, str):
                self.note, self._means = answer, None
                return True
            if answer["problem"] == errno.EINVAL and self._has_swappiness:
                self._has_swappiness = False
                return True
            if answer["problem"] not in (None, errno.ENOENT, errno.ENODEV):
                self._cannot["reclaim"] = f"{path}: {os.strerror(answer['problem'])}"
            # ENOENT, ENODEV: the group has just been removed.
            freed = hidden - self.size if answer["problem"] is None else 0
            self.freed["reclaim"] += max(0, freed)
            self._in_vain = 0 if freed >= RECLAIMED else self._in_vain + 1
        if "reclaim" in self._cannot or self._in_vain >= MOST_IN_VAIN or self.size < LEAST:
            self._means = None
        return True

    def _swaps(self) -> bool:
        # A line of titles, and one for each.
        return len((self._proc_root / "swaps").read_text().splitlines()) > 1

    def _end(self, *, is_complete: bool) -> None:
        freed = sum(self.freed.values()) - self._freed_before
        if freed:
            _log.info("%d MiB hid in holes of huge pages, and are free now", freed >> 20)
        if not is_complete:
            return
        self._left = self.size
        if self._left < LEAST:
            self.note, self._rest = None, FIRST_REST
            return
        if len(self._cannot) == len(MEANS):
            self.note = "; ".join(self._cannot.values())
        elif self._denied:
            self.note = f"{self._denied} processes may not be looked through, which needs CAP_DAC_READ_SEARCH"
        self._rests_until = self._clock() + self._rest
        self._rest = min(2 * self._rest, LONGEST_REST)
