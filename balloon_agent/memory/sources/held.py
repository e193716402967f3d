"""Memory that holders map: transparent huge pages, and single pages."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from balloon_agent.errors import (
    BalloonError,
    GaveWay,
    HolderLost,
    Shortage,
)
from balloon_agent.frames import Run, join
from balloon_agent.holder.allocate import NOT_PINNED, PHASES
from balloon_agent.holder.mapping import Pieces
from balloon_agent.linux.files import read_file
from balloon_agent.linux.pagemap import MemoryGone
from balloon_agent.memory.holder_client import HolderClient
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger.ledger import Extent, Ledger

from .source import MOST_RUNS, Problems

# After room was made and no huge page came of it, none is made for so many seconds.
USELESS_ROOM_REST = 60.0
THP_ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"
_log = logging.getLogger(__name__)


def extent_of(description: dict[str, Any], holder: str) -> Extent:
    """An extent as its holder describes it."""
    runs = join(Run(first, frames) for _, first, frames in description["pieces"])
    return Extent(description["name"], description["source"], runs, holder)


class _HolderFull(Exception):
    """A holder has as many descriptors as it may have, and each extent takes one."""


class HeldSource:
    """Memory that a holder maps: ``thp`` in pieces of 2 MiB, ``pages`` of 4096 bytes.

    ``make_room`` is asked for huge pages where there are none; it says how many bytes it made, or 0. An ``obstacle``, in words,
    is why nothing can be taken here at all. Without ``pinned`` the kernel may move what is taken: for experiments only.
    """

    def __init__(
        self,
        name: str,
        unit: int,
        holders: Holders,
        ledger: Ledger,
        holder_capacity: int,
        make_room: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        obstacle: str | None = None,
        pinned: bool = True,
        thp_enabled: str = THP_ENABLED,
    ) -> None:
        self._thp_enabled = thp_enabled
        self.name = name
        self._unit = unit
        self._holders = holders
        self._ledger = ledger
        self.holder_capacity = holder_capacity
        self._make_room = make_room
        self._clock = clock
        self._obstacle = obstacle
        self._pinned = pinned
        self._no_room_before = 0.0
        # Bytes that MOST_RUNS had, of what was taken last: memory that is scattered is taken in smaller portions.
        self._largest = MOST_RUNS * unit
        # Bytes: room for huge pages that is still to be made.
        self._to_make = 0
        # Holders that had no descriptor left for another pin, and what they held then: less than that, and they have one again.
        self._full: dict[str, int] = {}
        self._pins: dict[str, int] = {}  # each extent's pin, by its number in the holder, until it is given back
        self._guards: dict[str, int] = {}
        self._pieces: dict[str, Pieces] = {}  # where it is mapped, until it is given back
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def portion(self, wanted: int, room: int, step: int) -> int:
        # What is larger than a step and cannot be divided is a step of its own.
        return min(wanted, room, max(min(step, self._largest), self._unit)) // self._unit * self._unit

    def take(self, size: int, of: int = 0) -> list[Extent]:
        if self._obstacle is not None:
            raise Shortage(self._obstacle)
        if self._make_room is None:
            return [self._take(size)]
        return [self._take_with_room(size, max(size, of), self._make_room)]

    def _take_with_room(self, size: int, wanted: int, make_room: Callable[[], int]) -> Extent:
        """What lies ready first; then what emptying blocks makes ready; and last, slowly, what compaction finds.

        Once there is need for it, room is made faster than it is used up, as long as more is wanted: later the guest may have
        no block to spare for a moment.
        """
        mode = self._thp_mode()
        if mode == "never":
            raise Shortage(f"transparent huge pages are switched off: write madvise to {self._thp_enabled}")
        self._to_make = min(self._to_make, wanted)
        # By madvise the kernel gives huge pages only to those who ask for them, and these it compacts for.
        compact = mode != "always"
        if self._to_make <= 0:
            try:
                return self._take(size, compact=compact)
            except GaveWay:
                raise
            except Shortage:
                self._to_make = wanted if self._clock() >= self._no_room_before else 0
        if self._to_make > 0:
            made = make_room()
            self._to_make = self._to_make - made if made else 0
            if made:
                try:
                    return self._take(size, compact=compact)
                except GaveWay:
                    raise
                except Shortage:
                    # Room was not what was missing: do not go on emptying blocks for nothing.
                    self._to_make = 0
                    self._no_room_before = self._clock() + USELESS_ROOM_REST
        return self._take(size)

    def _thp_mode(self) -> str:
        """Of always, madvise and never, what the kernel is set to."""
        try:
            return read_file(self._thp_enabled).partition("[")[2].partition("]")[0]
        except FileNotFoundError:
            return "never"

    def _take(self, size: int, *, compact: bool = True) -> Extent:
        while True:
            holder = self._holder_with_room(size)
            try:
                return self._take_from(holder, size, compact=compact)
            except _HolderFull as error:
                held = self._ledger.held_by(holder.name)
                if not held:
                    raise Shortage(str(error)) from error
                _log.info("holder %s takes no more: %s", holder.name, error)
                self._full[holder.name] = held

    def _take_from(self, holder: HolderClient, size: int, *, compact: bool) -> Extent:
        is_empty = not self._ledger.held_by(holder.name)
        if is_empty:
            # Until the frames are known, none can be on its way to the host.
            holder.set_fuse(True)
        name = f"{self.name}-{secrets.token_hex(4)}"
        request = {"op": "take", "name": name, "source": self.name, "count": size // self._unit}
        request |= {"pinned": self._pinned, "compact": compact}
        answer = holder.request(request, takes=True)
        if not answer["ok"]:
            if is_empty:
                holder.set_fuse(False)
            if answer.get("errno") == errno.EMFILE:
                raise _HolderFull(answer["error"])
            raise (GaveWay if holder.gave_way else Shortage)(answer["error"])
        for phase, seconds in answer["seconds"].items():
            self.seconds[phase] += seconds
        extent = self.adopt(answer, holder.name)
        self._largest = MOST_RUNS * (extent.size // len(extent.runs))
        try:
            # From here to the host's answer, the death of the holder must not free frames that are on their way to the host.
            self.guard(extent)
            # And it must be possible to see whether they are still in place.
            _ = holder.pagemap
        except HolderLost:
            # Nothing of it has been posted.
            self.give_back([extent])
            raise
        except OSError as error:
            # Without either nothing may be posted, so nothing is to be kept.
            self.give_back([extent])
            raise Shortage(f"a holder's pin or page table is not to be had: {error.strerror}") from error
        return extent

    def adopt(self, description: dict[str, Any], holder: str) -> Extent:
        """An extent that a holder has, as it describes it. Not guarded yet."""
        extent = extent_of(description, holder)
        self._pins[extent.name] = description["pin"]
        self._pieces[extent.name] = Pieces(description["pieces"])
        return extent

    def guard(self, extent: Extent) -> None:
        # What is on its way to the host is never on the fuse.
        self._owner(extent).set_fuse(False)
        # What was on its way when the device failed is guarded still. What is not pinned cannot be guarded.
        pin = self._pins[extent.name]
        if extent.name not in self._guards and pin != NOT_PINNED:
            self._guards[extent.name] = self._owner(extent).duplicate(pin)

    def _holder_with_room(self, size: int) -> HolderClient:
        for holder in self._holders:
            held = self._ledger.held_by(holder.name)
            if not holder.holds_memory or holder.is_older or held >= self._full.get(holder.name, held + 1):
                continue
            if held + size <= self.holder_capacity or held == 0:
                self._full.pop(holder.name, None)
                return holder
        return self._holders.start()

    def _owner(self, extent: Extent) -> HolderClient:
        assert extent.holder is not None
        return self._holders[extent.holder]

    def is_ours(self, extent: Extent) -> bool:
        # This process guards it: not even the death of its holder would free a frame.
        return True

    def in_place(self, extent: Extent) -> bool:
        # Looked up from here: who holds it need not be believed, nor woken up.
        owner = self._owner(extent)
        try:
            if self._pieces[extent.name].are_in_place(owner.pagemap, self._unit):
                return True
        except MemoryGone as error:
            raise HolderLost(f"holder {owner.name} has died") from error
        # What is not there may have been taken from one that is about to die, by the OOM killer: that one does not answer.
        owner.request({"op": "hello"})
        return False

    def settle(self, extent: Extent) -> None:
        guard = self._guards.pop(extent.name, None)
        if guard is not None:
            os.close(guard)

    def rest(self, may_be_lost: bool) -> None:
        for holder in self._holders:
            if holder.holds_memory and self._ledger.held_by(holder.name):
                holder.set_fuse(may_be_lost)

    def give_back(self, extents: Sequence[Extent]) -> Problems:
        problems: dict[str, BalloonError] = {}
        by_holder: dict[str, list[str]] = {}
        for extent in extents:
            self.settle(extent)
            self._pins.pop(extent.name, None)
            self._pieces.pop(extent.name, None)
            by_holder.setdefault(str(extent.holder), []).append(extent.name)
        for holder, names in by_holder.items():
            try:
                answer = self._holders[holder].request({"op": "give_back", "names": names})
            except HolderLost as error:
                problems |= dict.fromkeys(names, error)
                continue
            failed = answer["failed"] if answer["ok"] else dict.fromkeys(names, answer["error"])
            for name, why in failed.items():
                # Some of it may be the guest's already: it must not be posted again. At worst it is lost to both until we end.
                _log.error("%s was not given back whole: %s", name, why)
        return problems
