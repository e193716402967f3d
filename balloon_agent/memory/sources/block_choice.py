"""The choice of the next memory block to take: the easiest first, and none that has just failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from balloon_agent.linux import memory_blocks

from .block_costs import Survey

# A block that could not be taken is left alone for so long: what is unmovable in it rarely goes away.
FAILED_BLOCK_REST, LONGEST_REST = 60.0, 3600.0
# Seconds for which it is believed which blocks are easy to take.
SURVEY_HOLDS = 5.0
POOLED = "in it are huge pages of a pool, which would be smaller without it"
_log = logging.getLogger(__name__)


class _Failure(NamedTuple):
    """Until when a block is left alone, why, and how often it had failed before."""

    until: float
    why: str
    times: int


class Candidate(NamedTuple):
    """A block to try, and its cost: the number of pages to be moved out of a sample of it."""

    cost: int
    block: memory_blocks.Block

    @property
    def ease(self) -> tuple[bool, int, int]:
        """For sorting. Movable zones first: the kernel itself can use nothing of them. Then the cheapest, from the top."""
        return self.block.zone != "Movable", self.cost, -self.block.number


class BlockChoice:
    """Candidates by their costs, and blocks that are left alone. ``ours`` tells the numbers of blocks with memory of ours."""

    def __init__(
        self,
        root: str,
        ours: Callable[[], set[int]],
        survey: Survey,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._ours = ours
        self._survey = survey
        self._clock = clock
        # Left to try, the easiest first; and until when their costs are believed.
        self._candidates: list[Candidate] = []
        self._believed_until = 0.0
        self._failed: dict[int, _Failure] = {}

    def next(self, count: int, least_cost: int = 0) -> list[Candidate]:
        """Up to ``count`` blocks to try, the easiest first: online, and with nothing of ours in them. They stay candidates."""
        now = self._clock()
        if now < self._believed_until and (likely := self._likely(count, least_cost)):
            return likely
        self._look_around(now)
        return self._likely(count, least_cost)

    def _likely(self, count: int, least_cost: int) -> list[Candidate]:
        # A block's cost is believed for a while; its content has to be known: memory may have been pinned in it since.
        ours = self._ours()
        smallest = self._survey.smallest_pooled()
        likely: list[Candidate] = []
        for candidate in self._candidates:
            block = candidate.block
            if len(likely) == count:
                break
            if candidate.cost < least_cost or block.number in ours:
                continue
            if memory_blocks.state(self._root, block.number) != "online":
                continue
            if smallest is not None and self._survey.has_pooled(block.run, smallest):
                # The kernel would dissolve them for good, free ones and those that it finds a free one in exchange for.
                self.leave_alone(block, POOLED)
                continue
            likely.append(candidate)
        return likely

    def _look_around(self, now: float) -> None:
        left_out = self._ours() | {number for number, failure in self._failed.items() if failure.until > now}
        found = list(memory_blocks.known_blocks(self._root, left_out))
        costs = self._survey.costs([block.run for block in found])
        self._candidates = sorted(map(Candidate, costs, found), key=lambda candidate: candidate.ease)
        self._believed_until = now + SURVEY_HOLDS

    def doubt(self) -> None:
        """Pages have moved into free pages of other blocks: the costs known of those are out of date."""
        self._believed_until = self._clock()

    def taken(self, which: Collection[memory_blocks.Block]) -> None:
        """Strike out blocks that are in the balloon now."""
        for block in which:
            self._failed.pop(block.number, None)
        self._candidates = [candidate for candidate in self._candidates if candidate.block not in which]

    def failed(self, block: memory_blocks.Block, why: str) -> None:
        """Leave a block alone that could not be taken, for this reason."""
        _log.debug("memory%d: %s", block.number, why)
        self.leave_alone(block, why)

    def came_back(self, which: Collection[memory_blocks.Block]) -> None:
        """Take up blocks that are the guest's again: they are empty."""
        others = [candidate for candidate in self._candidates if candidate.block not in which]
        back = [Candidate(0, block) for block in which]
        self._candidates = sorted([*others, *back], key=lambda candidate: candidate.ease)

    def leave_alone(self, block: memory_blocks.Block, why: str) -> None:
        """For a while, and longer each time: to try all of them may take longer than a single rest."""
        times = self._failed[block.number].times + 1 if block.number in self._failed else 0
        rest = min(FAILED_BLOCK_REST * 2 ** min(times, 10), LONGEST_REST)
        self._failed[block.number] = _Failure(self._clock() + rest, why, times)
        self._candidates = [other for other in self._candidates if other.block.number != block.number]

    def reasons(self) -> str:
        """In words, the reasons for which blocks could not be taken, a while ago at most; the same reason once."""
        now = self._clock()
        numbers: dict[str, list[int]] = {}
        for number, failure in sorted(self._failed.items()):
            if failure.until > now:
                numbers.setdefault(failure.why, []).append(number)
        return "; ".join(f"{memory_blocks.names(which)}: {why}" for why, which in numbers.items())
