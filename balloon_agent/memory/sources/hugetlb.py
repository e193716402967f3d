"""Huge pages of hugetlbfs as a source: the guest's pool is grown by what is taken, and by nothing else; and shrunk again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from balloon_agent.errors import GaveWay, Shortage
from balloon_agent.holder.allocate import HUGETLB_SIZES, PHASES
from balloon_agent.holder.cancellation import WHY
from balloon_agent.linux import huge_page_pools
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger.ledger import Extent, Ledger
from balloon_agent.memory.worker import Worker

from .held import HeldSource
from .source import Problems

# Growing a pool compacts all memory if need be. The kernel stops at a signal, and what has come until then counts.
GROW_DEADLINE = 30.0
_log = logging.getLogger(__name__)


class Pool:
    """What we have added to the guest's pool of huge pages of one size: ``added`` pages.

    ``record`` writes down outside this process, before anything changes, how many pages there were (``before``), and how many
    are ours.
    """

    def __init__(
        self,
        size: int,
        worker: Worker,
        record: Callable[[int, int], None],
        before: int | None = None,
        added: int = 0,
        root: str = huge_page_pools.HUGEPAGES_ROOT,
    ) -> None:
        self.size = size
        self._worker = worker
        self._record = record
        self._before = before
        self.added = added
        self._root = root
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def grow(self, count: int) -> int:
        """Add up to ``count`` pages; how many came. Shortage if none did, GaveWay if others need the memory."""
        if not huge_page_pools.exists(self._root, self.size):
            raise Shortage(f"this kernel has no huge pages of {self.size >> 10} kB")
        pages = huge_page_pools.pages(self._root, self.size)
        if self._before is None:
            self._before = pages
        self._record(self._before, self.added + count)
        problem = self._set(pages + count)
        came = max(0, min(count, huge_page_pools.pages(self._root, self.size) - pages))
        self.added += came
        self._note()
        if came == 0 and self._worker.gave_way:
            raise GaveWay(WHY)
        if came == 0:
            raise Shortage(problem or f"the pool of huge pages does not grow beyond {pages}: memory is fragmented")
        return came

    def shrink(self, count: int) -> None:
        """Take ``count`` pages that were added out of the pool again. Those that somebody uses go when they are free."""
        count = min(count, self.added)
        if count == 0:
            return
        now = huge_page_pools.pages(self._root, self.size)
        # Somebody else may have made it smaller meanwhile: what is not ours stays.
        then = min(now, max(self._before or 0, now - count))
        problem = self._set(then) if then != now else None
        if problem is not None:
            # They stay on record, for whoever comes next.
            _log.error("%d huge pages of %d kB stay in the guest's pool: %s", count, self.size >> 10, problem)
            return
        self.added -= count
        self._note()

    def reconcile(self, held: int) -> None:
        """Shrink to what is ``held``: an earlier agent may have died before, or after, what it had written down."""
        if self._before is None:
            return
        came = max(0, min(self.added, huge_page_pools.pages(self._root, self.size) - self._before))
        self.added = max(came, held)
        self.shrink(self.added - held)
        self._note()

    def _note(self) -> None:
        try:
            self._record(self._before or 0, self.added)
        except OSError as error:
            _log.error("cannot record that %d huge pages of %d kB were added: %s", self.added, self.size >> 10, error)
        if self.added == 0:
            self._before = None

    def _set(self, pages: int) -> str | None:
        """Have the worker change the pool. None if it did, else what happened; how far it got is to be read back."""
        grows = pages > huge_page_pools.pages(self._root, self.size)
        answer = self._worker.ask({"op": "pool", "bytes": self.size, "pages": pages}, GROW_DEADLINE, takes=grows)
        if isinstance(answer, str):
            return answer
        for phase, seconds in answer["seconds"].items():
            self.seconds[phase] += seconds
        return None


class HugetlbSource(HeldSource):
    """``hugetlb`` (2 MiB) and ``hugetlb-1g``: as HeldSource, but that the pool they come from is ours to grow and to shrink."""

    def __init__(
        self,
        name: str,
        holders: Holders,
        ledger: Ledger,
        holder_capacity: int,
        pool: Pool,
        clock: Callable[[], float] = time.monotonic,
        *,
        obstacle: str | None = None,
        pinned: bool = True,
    ) -> None:
        super().__init__(
            name, HUGETLB_SIZES[name], holders, ledger, holder_capacity, clock=clock, obstacle=obstacle, pinned=pinned
        )
        self.pool = pool
        # The pool's time is the source's.
        pool.seconds = self.seconds

    def _take(self, size: int, *, compact: bool = True) -> Extent:
        came = self.pool.grow(size // self._unit)
        added = self.pool.added
        try:
            return super()._take(came * self._unit)
        except BaseException:
            # Unless they have gone already, with an extent that could not be guarded.
            self.pool.shrink(came - (added - self.pool.added))
            raise

    def give_back(self, extents: Sequence[Extent]) -> Problems:
        problems = super().give_back(extents)
        # Also what a dead holder had: its pages are free in the pool now.
        self.pool.shrink(sum(extent.size for extent in extents) // self._unit)
        return problems
