"""Whole memory blocks as a source: taken offline in a process that can be killed, and brought back to their zone."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import Any

from balloon_agent.errors import HolderLost, Shortage, StillHeld, Unfinished

from . import blocks
from .frames import Run
from .holders import HolderClient, Holders
from .ledger import Extent

# A block that could not be taken is left alone for so long: what is unmovable in it rarely goes away.
FAILED_BLOCK_REST = 60.0
# Offlining a block means moving up to 32768 pages. One with pinned pages would go on until a signal arrives.
OFFLINE_DEADLINE = 15.0
# So many blocks may fail in one step; then others have their turn before the next ones are tried.
TRIES_A_STEP = 4
_log = logging.getLogger(__name__)


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
