"""The interface of the sources that guest memory is taken from.

A source takes memory as an extent, says why when it cannot, and gives extents back. What must not be done in the agent
(owning memory, writing to a block's state) is done by a holder.
"""

from __future__ import annotations

from typing import Protocol

from .ledger import Extent

# All there are, coarse to fine.
SOURCE_NAMES = ("blocks", "thp", "pages")


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
