"""The sources that guest memory is taken from, behind one interface, as the agent sees them.

A source takes memory as an extent, says why when it cannot, and gives extents back. What must not be done in the agent
(owning memory, writing to a block's state) is done by a holder.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import Any, Protocol

from balloon_agent.errors import HolderLost, Shortage, StillHeld, Unfinished

from . import blocks
from .frames import Run
from .holders import HolderClient, Holders
from .ledger import Extent, Ledger

# A block that could not be taken is left alone for so long: what is unmovable in it rarely goes away.
FAILED_BLOCK_REST = 60.0
# Offlining a block means moving up to 32768 pages. One with pinned pages would go on until a signal arrives.
OFFLINE_DEADLINE = 15.0
# So many blocks may fail in one step; then others have their turn before the next ones are tried.
TRIES_A_STEP = 4
_log = logging.getLogger(__name__)


class Source(Protocol):
    """Where memory comes from. All sizes are in bytes."""

    @property
    def name(self) -> str: ...

    def portion(self, wanted: int, room: int, step: int) -> int:
        """What to ask ``take`` for, with so much wanted, so much that the guest can spare, and the limit of a step; or 0."""
        ...

    def take(self, size: int) -> Extent:
        """Take at most ``size``: held, pinned, translated, and guarded by this process too until ``settle``.

        Shortage if there is nothing to be had, HolderLost if whoever was to hold it died.
        """
        ...

    def guard(self, extent: Extent) -> None:
        """Guard again, before it is posted anew. HolderLost if it is nobody's any more."""
        ...

    def in_place(self, extent: Extent) -> bool:
        """Whether its frames are where they were. HolderLost if nobody can tell."""
        ...

    def settle(self, extent: Extent) -> None:
        """The host has acknowledged it: from now on the holder alone guards it."""
        ...

    def give_back(self, extent: Extent) -> None:
        """Return it to the guest. The host must have acknowledged the deflate.

        StillHeld if the guest provably did not take it. After anything else, HolderLost included, it may be the guest's.
        """
        ...


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if not answer["ok"]:
        raise Shortage(answer["error"])
    return answer


def extent_of(description: dict[str, Any], holder: str) -> Extent:
    """An extent as its holder describes it."""
    runs = tuple(Run(first, count) for first, count in description["runs"])
    return Extent(description["name"], description["source"], runs, holder)


class HeldSource:
    """Memory that a holder maps: ``thp`` in pieces of 2 MiB, ``pages`` of 4096 bytes.

    ``make_room`` is asked once for huge pages where there are none; it says whether it made any.
    """

    def __init__(
        self,
        name: str,
        unit: int,
        holders: Holders,
        ledger: Ledger,
        holder_capacity: int,
        make_room: Callable[[], bool] | None = None,
    ) -> None:
        self.name = name
        self._unit = unit
        self._holders = holders
        self._ledger = ledger
        self._capacity = holder_capacity
        self._make_room = make_room
        self._pins: dict[str, int] = {}  # each extent's pin, by its number in the holder
        self._guards: dict[str, int] = {}

    def portion(self, wanted: int, room: int, step: int) -> int:
        return min(wanted, room, step) // self._unit * self._unit

    def take(self, size: int) -> Extent:
        try:
            return self._take(size)
        except Shortage:
            if self._make_room is None or not self._make_room():
                raise
        return self._take(size)

    def _take(self, size: int) -> Extent:
        holder = self._holder_with_room(size)
        name = f"{self.name}-{secrets.token_hex(4)}"
        request = {"op": "take", "name": name, "source": self.name, "count": size // self._unit}
        extent = self.adopt(_checked(holder.request(request)), holder.name)
        try:
            # From here to the host's answer, the death of the holder must not free frames that are on their way to the host.
            self.guard(extent)
        except OSError as error:
            # Without a guard nothing may be posted, so nothing is to be kept either.
            self.give_back(extent)
            raise Shortage(f"a pin cannot be duplicated: {error.strerror}") from error
        return extent

    def adopt(self, description: dict[str, Any], holder: str) -> Extent:
        """An extent that a holder has, as it describes it. Not guarded yet."""
        extent = extent_of(description, holder)
        self._pins[extent.name] = description["pin"]
        return extent

    def guard(self, extent: Extent) -> None:
        self._guards[extent.name] = self._owner(extent).duplicate(self._pins[extent.name])

    def _holder_with_room(self, size: int) -> HolderClient:
        for holder in self._holders:
            held = sum(extent.size for extent in self._ledger.of_holder(holder.name))
            if holder.holds_memory and held + size <= self._capacity:
                return holder
        return self._holders.start()

    def _owner(self, extent: Extent) -> HolderClient:
        assert extent.holder is not None
        return self._holders[extent.holder]

    def in_place(self, extent: Extent) -> bool:
        answer = self._owner(extent).request({"op": "verify", "name": extent.name})
        return bool(answer.get("in_place", False))

    def settle(self, extent: Extent) -> None:
        guard = self._guards.pop(extent.name, None)
        if guard is not None:
            os.close(guard)

    def give_back(self, extent: Extent) -> None:
        self.settle(extent)
        self._pins.pop(extent.name, None)
        answer = self._owner(extent).request({"op": "give_back", "name": extent.name})
        if not answer["ok"]:
            # Some of it may be the guest's already: it must not be posted again. At worst it is lost to both until we end.
            _log.error("%s was not given back whole: %s", extent.name, answer["error"])


class BlockSource:
    """Whole memory blocks, taken offline.

    ``record`` and ``forget`` note blocks outside this process before their state changes and after it has changed back.
    ``untouchable`` tells which runs hold memory of ours that is pinned, ``room`` how many bytes the guest can do without.
    """

    name = "blocks"

    def __init__(
        self,
        holders: Holders,
        untouchable: Callable[[Run], bool],
        record: Callable[[blocks.Block], None],
        forget: Callable[[int], None],
        room: Callable[[], int],
        root: str = blocks.MEMORY_ROOT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._holders = holders
        self._untouchable = untouchable
        self._record = record
        self._forget = forget
        self._room = room
        self._stranded: list[blocks.Block] = []
        self._root = root
        self._clock = clock
        self._size = blocks.block_size(root)
        self._worker: HolderClient | None = None
        self._zones: dict[str, blocks.Block] = {}
        self._failed: dict[int, float] = {}

    @staticmethod
    def extent(block: blocks.Block) -> Extent:
        return Extent(f"block-{block.number}", BlockSource.name, (block.run,))

    def adopt(self, block: blocks.Block) -> Extent:
        """A block that an earlier agent took offline, and that is so still."""
        extent = self.extent(block)
        self._zones[extent.name] = block
        return extent

    def portion(self, wanted: int, room: int, step: int) -> int:
        # A block is a step of its own: its free pages are not touched, so that a larger one costs the host nothing.
        return self._size if self._size is not None and min(wanted, room) >= self._size else 0

    def take(self, size: int) -> Extent:
        block = self._take_any()
        extent = self.extent(block)
        self._zones[extent.name] = block
        return extent

    def make_room(self) -> bool:
        """Empty a block by taking it offline and back: it comes back as so many free huge pages. Whether one could be.

        Where memory is so scattered that compaction fails, offlining still succeeds: it moves whatever is movable in one place.
        Meanwhile a block's worth of memory is missing, so it is not tried where the guest cannot spare that.
        """
        if self._size is None or self._room() < self._size:
            return False
        try:
            block = self._take_any()
        except Shortage as error:
            _log.info("no block could be emptied to make huge pages: %s", error)
            return False
        problem = self._online(block)
        if problem is not None:
            _log.error("%s; it is kept for the balloon", problem)
            self._stranded.append(block)
            return False
        _log.info("memory%d was emptied to make huge pages", block.number)
        return True

    def restore_stranded(self) -> None:
        """Bring back blocks that did not come back when they should have. Those that still do not stay on record."""
        for block in list(self._stranded):
            problem = self._online(block)
            if problem is None:
                self._stranded.remove(block)
            else:
                _log.error("%s", problem)

    def _take_any(self) -> blocks.Block:
        """Take some block offline. Shortage with the reasons if none can be, Unfinished if there are more to try."""
        if self._stranded:
            return self._stranded.pop()
        reasons: list[str] = []
        for block in blocks.online_blocks(self._root):
            if self._failed.get(block.number, 0.0) > self._clock() or self._untouchable(block.run):
                continue
            if len(reasons) == TRIES_A_STEP:
                raise Unfinished("; ".join(reasons))
            self._record(block)
            problem = self._offline(block)
            if problem is None:
                return block
            self._note_back(block)
            self._failed[block.number] = self._clock() + FAILED_BLOCK_REST
            reasons.append(f"memory{block.number}: {problem}")
        raise Shortage("; ".join(reasons) or "every other memory block is in use, or failed less than a minute ago")

    def _note_back(self, block: blocks.Block) -> None:
        """The record is for an agent that follows: that it cannot be written now changes nothing about the block."""
        try:
            self._forget(block.number)
        except OSError as error:
            _log.error("cannot record that memory%d is online: %s", block.number, error)

    def _offline(self, block: blocks.Block) -> str | None:
        """None if the block is offline now, else why not."""
        problem = self._ask({"op": "offline", "block": block.number}, OFFLINE_DEADLINE)
        # The state decides: who was killed in the middle may have got there all the same.
        if blocks.state(self._root, block.number) == "offline":
            return None
        return problem or "the kernel says it is done, but the block is not offline"

    def _ask(self, message: dict[str, Any], deadline: float) -> str | None:
        """Have the worker do something. None if it did; else what happened. A worker that hangs is killed: it owns nothing."""
        try:
            if self._worker is None or self._worker.name not in self._holders:
                self._worker = self._holders.start(holds_memory=False)
            answer = self._worker.request(message, deadline)
        except (HolderLost, OSError) as error:
            if self._worker is not None and self._worker.name in self._holders:
                self._holders.kill(self._worker.name)
            self._worker = None
            return f"given up: {error}"
        if answer["ok"]:
            return None
        return "in it is memory that cannot be moved" if answer.get("errno") == errno.EBUSY else str(answer["error"])

    def in_place(self, extent: Extent) -> bool:
        return blocks.state(self._root, self._zones[extent.name].number) == "offline"

    def guard(self, extent: Extent) -> None:
        """An offline block needs no guard: no process has it, so none can lose it."""

    def settle(self, extent: Extent) -> None:
        """See ``guard``."""

    def give_back(self, extent: Extent) -> None:
        problem = self._online(self._zones[extent.name])
        if problem is not None:
            raise StillHeld(problem)
        del self._zones[extent.name]

    def _online(self, block: blocks.Block) -> str | None:
        """None if the block is back in its zone, else why it is offline still: then it stays on record as ours."""
        problem = self._ask({"op": "online", "block": block.number, "state": block.online_state}, OFFLINE_DEADLINE)
        if blocks.state(self._root, block.number) == "offline":
            return f"memory{block.number} does not come back: {problem or 'its state stays offline'}"
        self._note_back(block)
        return None


SOURCE_NAMES = ("blocks", "thp", "pages")
