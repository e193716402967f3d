"""Which virtqueue is which. Devices do not agree, so this is worked out from what one offers, and checked.

- The specification gives each queue a fixed number (5.5.2), and leaves holes for those that are not there.
- QEMU numbers queues in the order in which it creates them: inflate, deflate and statistics always, then free page hinting and
  reporting if *offered*, and the cont pair of the proposal last.
- Linux expects, and other hosts have, the same order with every queue left out that is not offered, statistics too.

In the last two a hinting queue can be there although its bit is not: some QEMUs withdraw the bit after they made the queue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from balloon_agent.errors import ConfigurationInvalid

from .wire import BalloonFeature

# In the order of the specification's numbers and of the proposal's enum; the number is the place.
_ORDER = ("inflate", "deflate", "stats", "free_page", "reporting", "inflate_cont", "deflate_cont")
_OFFERED_BY = {
    "stats": BalloonFeature.STATS_VQ,
    "free_page": BalloonFeature.FREE_PAGE_HINT,
    "reporting": BalloonFeature.REPORTING,
    "inflate_cont": BalloonFeature.CONT_PAGES,
    "deflate_cont": BalloonFeature.CONT_PAGES,
}


@dataclass(frozen=True)
class QueueNumbers:
    """The number of each queue that the device offers; None for one that it does not."""

    inflate: int
    deflate: int
    stats: int | None = None
    free_page: int | None = None
    reporting: int | None = None
    inflate_cont: int | None = None
    deflate_cont: int | None = None


def queue_numbers(offered: int, sizes: Sequence[int]) -> QueueNumbers:
    """The queues by name, for a device that *offers* these feature bits and shows queues of these ``sizes`` (0 = not there).

    ConfigurationInvalid, with what was seen, if no way of numbering fits exactly.
    """
    wanted = [name for name in _ORDER if name not in _OFFERED_BY or offered & _OFFERED_BY[name]]
    for present in _numberings(wanted, sizes):
        if all(present.get(name) is not None for name in wanted):
            return QueueNumbers(**{name: present[name] for name in wanted})
    raise ConfigurationInvalid(
        f"cannot tell which queue is which: features {offered:#x}, num_queues {len(sizes)} with queue_size {list(sizes)}; "
        "the host numbers them in a way that this agent does not know; "
        f"it knows {', '.join(wanted)}, in this order or at the numbers {', '.join(str(_ORDER.index(name)) for name in wanted)}"
    )


def _numberings(wanted: Sequence[str], sizes: Sequence[int]) -> Iterator[dict[str, int]]:
    """Every way of numbering that explains each queue that is there, the most common one first."""
    # Without holes: statistics always there (QEMU) or only if offered; hinting only if offered, or withdrawn.
    for always in ({"stats"}, set(), {"stats", "free_page"}, {"free_page"}):
        order = [name for name in _ORDER if name in wanted or name in always]
        if len(order) == len(sizes) and all(sizes):
            yield {name: number for number, name in enumerate(order)}
    # With holes: each at its own number. What is there without being offered can only be one of those two.
    if len(sizes) <= len(_ORDER):
        there = {name: number for number, name in enumerate(_ORDER[: len(sizes)]) if sizes[number]}
        if there.keys() <= {*wanted, "stats", "free_page"}:
            yield there
