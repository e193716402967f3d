"""Which virtqueue is which. Devices do not agree, so this is worked out from what one offers, and checked.

The specification gives each queue a fixed number (5.5.2). QEMU numbers queues in the order in which it creates them:
inflate, deflate, stats always, then free page hinting and reporting if *offered*, and the cont pair last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from balloon_agent.errors import DeviceMisbehaved

from .wire import BalloonFeature

# The numbers in the RFC's copy of the kernel's enum, where every queue has a place of its own.
_FIXED_INFLATE_CONT, _FIXED_DEFLATE_CONT = 5, 6


@dataclass(frozen=True)
class ContQueues:
    """The numbers of the two cont queues."""

    inflate: int
    deflate: int


def cont_queues(offered: int, sizes: Sequence[int]) -> ContQueues:
    """The cont pair among the queues whose ``sizes`` the device shows (0 = not there), given the bits it *offers*.

    DeviceMisbehaved, with what was seen, if they cannot be told.
    """
    features = BalloonFeature(offered & 0x7F)
    optional = (BalloonFeature.FREE_PAGE_HINT, BalloonFeature.REPORTING)
    in_order = 3 + sum(1 for feature in optional if features & feature) + 2
    present = next((number for number, size in enumerate(sizes) if size == 0), len(sizes))
    # One more than offered: QEMU creates the hinting queue and then withdraws the bit if it has no iothread.
    if present == len(sizes) and present in (in_order, in_order + 1):
        return ContQueues(present - 2, present - 1)
    if len(sizes) > _FIXED_DEFLATE_CONT and sizes[_FIXED_INFLATE_CONT] and sizes[_FIXED_DEFLATE_CONT]:
        return ContQueues(_FIXED_INFLATE_CONT, _FIXED_DEFLATE_CONT)
    raise DeviceMisbehaved(
        f"cannot tell which queues carry runs: features {offered:#x}, {len(sizes)} queues of sizes {list(sizes)}; "
        f"expected {in_order} in the order of creation, or the fixed numbers {_FIXED_INFLATE_CONT} and {_FIXED_DEFLATE_CONT}"
    )
