"""The interface of the sources that guest memory is taken from.

A source takes memory as extents, says why when it cannot, and gives extents back. What must not be done in the agent
(owning memory, writing to a block's state) is done by a holder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from balloon_agent.errors import BalloonError
from balloon_agent.memory.ledger.ledger import Extent

# All there are, coarse to fine; and those that are used unless somebody says otherwise. Huge pages of hugetlbfs are zeroed like
# transparent ones, but belong to a pool that the whole guest shares: whoever wants them used says so.
SOURCE_NAMES = ("hugetlb-1g", "blocks", "hugetlb", "thp", "pages")
DEFAULT_SOURCES = ("blocks", "thp", "pages")
# The last resort: single pages cost the host huge pages, and both sides time.
FINEST = "pages"
# To give back, most bytes a second first: huge pages are just unmapped, a block has to be brought online, and of single pages
# the host hears one by one.
QUICKEST_FIRST = ("hugetlb-1g", "hugetlb", "thp", "blocks", "pages")
# What lies scattered is taken, and given back, in pieces of so many runs: each costs some microseconds, and until the last one
# has been told of, nobody has any of it.
MOST_RUNS = 4096
# Outcomes of giving back by extent: HolderLost, or StillHeld if the guest provably did not take it. Others went back.
Problems = Mapping[str, BalloonError]


class Source(Protocol):
    """Where memory comes from. All sizes are in bytes.

    ``seconds`` is the time spent so far by phase: ``populate`` is the kernel's work of mapping, finding and zeroing memory, or
    of taking a block offline; ``pin`` of keeping it where it is; ``translate`` that of looking up its frames.
    """

    seconds: dict[str, float]

    @property
    def name(self) -> str: ...

    def portion(self, wanted: int, room: int, step: int) -> int:
        """What to ask ``take`` for, with so much wanted, so much that the guest can spare, and the limit of a step; or 0."""
        ...

    def take(self, size: int, of: int = 0) -> Sequence[Extent]:
        """Take at most ``size``: held, pinned, translated, and guarded by this process too until ``settle``. Never nothing.

        ``of`` is what all steps together are to take, if that is more.

        Shortage if there is nothing to be had, HolderLost if whoever was to hold it died; Unfinished if there is more to try,
        GaveWay if somebody else turned out to need the memory.
        """
        ...

    def guard(self, extent: Extent) -> None:
        """Guard again, before it is posted anew, and off the OOM fuse until ``rest``. HolderLost if it is nobody's any more."""
        ...

    def is_ours(self, extent: Extent) -> bool:
        """Whether the guest has not taken it back: a glance, right before and after each notification that names it."""
        ...

    def in_place(self, extent: Extent) -> bool:
        """Whether its frames are where they were. HolderLost if nobody can tell."""
        ...

    def settle(self, extent: Extent) -> None:
        """The host has acknowledged it: from now on the holder alone guards it."""
        ...

    def rest(self, may_be_lost: bool) -> None:
        """The host has acknowledged all there is. If it may be told of a loss afterwards, the OOM killer may have it.

        Said when nothing moves, and before more is taken.
        """
        ...

    def give_back(self, extents: Sequence[Extent]) -> Problems:
        """Return extents to the guest. The host must have acknowledged the deflate.

        What is StillHeld the guest provably did not take. After anything else, HolderLost included, it may be the guest's.
        """
        ...
