"""Whole memory blocks as a source: taken offline in a process that can be killed, and brought back to their zone."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile

from balloon_agent.errors import (
    GaveWay,
    Shortage,
    StillHeld,
    Unfinished,
)
from balloon_agent.holder.allocate import PHASES
from balloon_agent.holder.cancellation import WHY
from balloon_agent.linux import memory_blocks
from balloon_agent.memory.ledger.ledger import Extent
from balloon_agent.memory.worker import Worker

from .block_choice import BlockChoice
from .block_costs import Survey
from .intrusions import Intrusions
from .source import Problems

# Offlining a block means moving up to 32768 pages. One with pinned pages would go on until a signal arrives.
OFFLINE_DEADLINE = 15.0
# A step takes as many blocks as go within this time, and one in any case: more is too long for whoever waits for an answer.
STEP_SECONDS = 0.4
BLOCKS_A_STEP = 32
# So many blocks may fail in one step; then others have their turn before the next ones are tried.
TRIES_A_STEP = 4
# What the kernel means: see offline_pages() in mm/memory_hotplug.c.
_REASONS = {
    errno.EBUSY: "in it is memory that cannot be moved",
    errno.EINVAL: "it has holes, or lies in several zones",
}
INTRUDED = "somebody else brings it online while it is in the balloon"
_log = logging.getLogger(__name__)


class BlockSource:
    """Whole memory blocks, taken offline.

    ``record`` and ``forget`` note blocks outside this process before their state changes and after it has changed back.
    ``untouchable`` tells which blocks hold memory of ours that is pinned, ``room`` how many bytes the guest can do without.
    """

    name = "blocks"

    def __init__(
        self,
        worker: Worker,
        untouchable: Callable[[], set[int]],
        record: Callable[[Sequence[memory_blocks.Block]], None],
        forget: Callable[[Sequence[int]], None],
        room: Callable[[], int],
        root: str = memory_blocks.MEMORY_ROOT,
        clock: Callable[[], float] = time.monotonic,
        survey: Survey | None = None,
    ) -> None:
        self._worker = worker
        self._untouchable = untouchable
        self._record = record
        self._forget = forget
        self._room = room
        self._stranded: list[memory_blocks.Block] = []
        self._root = root
        self._clock = clock
        self._size = memory_blocks.block_size(root)
        self._zones: dict[str, memory_blocks.Block] = {}
        self._choice = BlockChoice(root, self._ours, survey or Survey(), clock)
        self._intrusions = Intrusions(clock)
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @staticmethod
    def extent(block: memory_blocks.Block) -> Extent:
        return Extent(f"block-{block.number}", BlockSource.name, (block.run,))

    def adopt(self, block: memory_blocks.Block) -> Extent:
        """A block that an earlier agent took offline, and that is so still."""
        extent = self.extent(block)
        self._zones[extent.name] = block
        return extent

    def adopt_left(self, block: memory_blocks.Block) -> Extent | None:
        """As ``adopt``. None for a block that a worker may change yet: it is neither kept nor posted until that shows."""
        if self._worker.has_ended and memory_blocks.state(self._root, block.number) == "offline":
            return self.adopt(block)
        self._stranded.append(block)
        return None

    def portion(self, wanted: int, room: int, step: int) -> int:
        # Their free pages are not touched, so that it costs the host nothing to be asked for more than a step at once.
        return 0 if self._size is None else min(min(wanted, room) // self._size, BLOCKS_A_STEP) * self._size

    def take(self, size: int, of: int = 0) -> list[Extent]:
        assert self._size is not None
        if (insistence := self._intrusions.insistence) is not None:
            raise Shortage(insistence)
        return [self.adopt(block) for block in self._take(size // self._size)]

    def make_room(self) -> int:
        """Empty a block by taking it offline and back: it comes back as so many free huge pages. Its bytes, or 0 if none was.

        Where memory is so scattered that compaction fails, offlining still succeeds: it moves whatever is movable in one place.
        Meanwhile a block's worth of memory is missing, so it is not tried where the guest cannot spare that. Unfinished if none
        went, and there are more to try.
        """
        if self._size is None or self._room() < self._size or self._intrusions.insistence is not None:
            return 0
        try:
            # A free one is of no use here.
            taken = self._take(1, least_cost=1)
        except Unfinished:
            raise
        except (Shortage, OSError) as error:
            _log.info("no block could be emptied to make huge pages: %s", error)
            return 0
        try:
            problems = self._online(taken)
        except BaseException:
            self._stranded += taken
            raise
        for block in taken:
            if block.number in problems:
                _log.error("%s; it is kept for the balloon", problems[block.number])
                self._stranded.append(block)
            else:
                _log.info("memory%d was emptied to make huge pages", block.number)
        return 0 if problems else self._size

    def restore_stranded(self) -> None:
        """Bring back blocks that did not come back when they should have. Those that still do not stay on record."""
        self._stranded = self._not_back(self._stranded)
        problems = self._online(self._stranded)
        for problem in problems.values():
            _log.error("%s", problem)
        self._stranded = [block for block in self._stranded if block.number in problems]

    # -- offline -------------------------------------------------------------------------------------------------------

    def _take(self, most: int, least_cost: int = 0) -> list[memory_blocks.Block]:
        """Take up to ``most`` blocks offline. Shortage with the reasons if none can be, Unfinished if there are more to try.

        GaveWay if none was since somebody else needs the memory.
        """
        # Somebody else may have brought them back since; while a worker has not ended they may be on their way still.
        self._stranded = self._not_back(self._stranded)
        for block in self._stranded:
            if self._worker.has_ended and memory_blocks.state(self._root, block.number) == "offline":
                self._stranded.remove(block)
                return [block]
        begin, tries = self._clock(), 0
        while tries < TRIES_A_STEP and self._clock() - begin <= STEP_SECONDS:
            tries += 1
            candidates = self._choice.next(most, least_cost)
            if not candidates:
                raise Shortage(self._choice.reasons() or "every other memory block is in use")
            is_free = candidates[0].cost == 0
            several = list(takewhile(lambda each: each.cost == 0, candidates)) if is_free else candidates[:1]
            batch = [candidate.block for candidate in several]
            self._record(batch)
            try:
                taken, others = self._offline(batch, most, free=is_free)
            except BaseException:
                # Whatever it was: what is offline is ours, and must not be forgotten.
                self._sort_out(batch)
                raise
            if not is_free:
                self._choice.doubt()
            if others:
                self._note_back(others)
            if taken:
                return taken
            if self._worker.gave_way:
                raise GaveWay(WHY)
        if self._choice.next(1, least_cost):
            raise Unfinished(self._choice.reasons())
        raise Shortage(self._choice.reasons())

    def _sort_out(self, which: Sequence[memory_blocks.Block]) -> None:
        """Of blocks of which nobody told how they fared: those that are not back are ours, or will be."""
        self._stranded += [block for block in self._not_back(which) if block not in self._stranded]

    def _not_back(self, which: Sequence[memory_blocks.Block]) -> list[memory_blocks.Block]:
        """Those that are not the guest's again; the others come off the record."""
        back = [block for block in which if memory_blocks.state(self._root, block.number) in memory_blocks.BACK]
        self._note_back(back)
        return [block for block in which if block not in back]

    def _ours(self) -> set[int]:
        return self._untouchable() | {block.number for block in self._zones.values()}

    def _offline(
        self, batch: Sequence[memory_blocks.Block], most: int, *, free: bool
    ) -> tuple[list[memory_blocks.Block], list[memory_blocks.Block]]:
        """Have them taken offline one after the other, up to the first that does not go: those that were, and those not.

        While a block changes its state the kernel does without its per-CPU lists of free pages, and udev hears of each that
        has: where nothing has to be moved (``free``), all of it is over before others have their turn.
        """
        request = {"op": "offline", "blocks": [block.number for block in batch], "most": most, "seconds": STEP_SECONDS}
        answer = self._worker.ask(request, OFFLINE_DEADLINE, short=free, takes=True)
        failed: memory_blocks.Block | None = None
        if isinstance(answer, str):
            # Who was killed in the middle may have got anywhere: the state decides, once the worker has ended. The first not
            # offline took too long.
            final = self._worker.has_ended
            taken = [block for block in batch if final and memory_blocks.state(self._root, block.number) == "offline"]
            unclear = [block for block in batch if block not in taken]
            failed = next(iter(unclear), None)
            why = answer
            self._sort_out(unclear)
            others = []
        else:
            for phase, seconds in answer["seconds"].items():
                self.seconds[phase] += seconds
            done = set(answer["done"])
            taken = [block for block in batch if block.number in done]
            others = [block for block in batch if block.number not in done]
            if answer["failed"] is not None:
                number, error, words = answer["failed"]
                failed = next(block for block in batch if block.number == number)
                why = _REASONS.get(error, words)
        if self._worker.gave_way:
            # Whatever became of it, it was not the block's fault.
            failed = None
        if failed is not None:
            self._choice.failed(failed, why)
        self._choice.taken(taken)
        return taken, others

    def _note_back(self, which: Sequence[memory_blocks.Block]) -> None:
        """The record is for an agent that follows: that it cannot be written now changes nothing about the blocks."""
        if not which:
            return
        try:
            self._forget([block.number for block in which])
        except OSError as error:
            _log.error("cannot record that %s is online: %s", memory_blocks.names([block.number for block in which]), error)

    # -- at rest, and back ---------------------------------------------------------------------------------------------

    def is_ours(self, extent: Extent) -> bool:
        return self.in_place(extent)

    def lost(self, numbers: Collection[int] | None) -> list[str]:
        """Of the blocks with these numbers (None: of all), the extents that others have brought online, or removed."""
        return [
            name
            for name, block in self._zones.items()
            if (numbers is None or block.number in numbers)
            and memory_blocks.state(self._root, block.number) in memory_blocks.BACK
        ]

    def in_place(self, extent: Extent) -> bool:
        return memory_blocks.state(self._root, self._zones[extent.name].number) == "offline"

    def guard(self, extent: Extent) -> None:
        """An offline block needs no guard: no process has it, so none can lose it."""

    def settle(self, extent: Extent) -> None:
        """See ``guard``."""

    def rest(self, may_be_lost: bool) -> None:
        """An offline block is nobody's: no OOM killer can bring it back."""

    def give_back(self, extents: Sequence[Extent]) -> Problems:
        which = {extent.name: self._zones[extent.name] for extent in extents}
        left = self._not_back(list(which.values()))
        self._note_intrusions([block for block in which.values() if block not in left])
        problems = self._online(left)
        held: dict[str, StillHeld] = {}
        for name, block in which.items():
            if block.number in problems and block not in self._stranded:
                held[name] = StillHeld(problems[block.number])
            else:
                del self._zones[name]
        return held

    def _online(self, which: Sequence[memory_blocks.Block]) -> dict[int, str]:
        """Bring blocks back to their zones. Why those that did not come are offline still: they stay on record as ours.

        If the worker has not ended it may bring one online yet, at any time. Then they are stranded until that shows.
        """
        if not which:
            return {}
        request = {"op": "online", "blocks": [(block.number, block.online_state) for block in which]}
        answer = self._worker.ask(request, OFFLINE_DEADLINE + len(which), short=True)
        problems: dict[int, str] = {}
        for block in which:
            why = answer if isinstance(answer, str) else answer["failed"].get(str(block.number))
            if why is not None and memory_blocks.state(self._root, block.number) not in memory_blocks.BACK:
                problems[block.number] = f"memory{block.number} does not come back: {why}"
        still = [block for block in which if block.number in problems]
        if not self._worker.has_ended:
            self._stranded += [block for block in still if block not in self._stranded]
        back = [block for block in which if block not in still]
        self._note_back(back)
        self._choice.came_back(back)
        return problems

    def _note_intrusions(self, which: Sequence[memory_blocks.Block]) -> None:
        """Blocks of ours that are the guest's again, and not by us. What was unplugged is nobody's."""
        brought = [block for block in which if memory_blocks.state(self._root, block.number) != "gone"]
        for block in brought:
            self._choice.leave_alone(block, INTRUDED)
        if brought and self._intrusions.note(block.number for block in brought):
            _log.warning("%s", self._intrusions.insistence)
