"""Memory blocks: sysfs' pieces of guest memory (128 MiB on most machines) that can be taken offline whole.

An offline block is no process's: its frames are known, contiguous and out of everybody's reach. Its free pages are not
touched by offlining, its used ones are moved elsewhere. Source: Documentation/admin-guide/mm/memory-hotplug.rst.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

from balloon_agent.frames import FRAME, Run

from .files import read_file, write_file

MEMORY_ROOT = "/sys/devices/system/memory"
# How a block goes back to the zone that it came from. "online" alone would leave the choice to the kernel's policy.
_ONLINE = {"Movable": "online_movable"}
_ONLINE_KERNEL = "online_kernel"
# So many blocks are named in a reason.
MOST_NAMES = 8
# States of a block that nobody holds. One that is going offline, or may be, is held until one of these shows.
BACK = ("online", "gone")


class Block(NamedTuple):
    """One memory block: its number in sysfs, its frames, and the zone it is in."""

    number: int
    run: Run
    zone: str

    @property
    def online_state(self) -> str:
        """What to write to its state to bring it back to its zone."""
        return _ONLINE.get(self.zone, _ONLINE_KERNEL)


def block_size(root: str = MEMORY_ROOT) -> int | None:
    """Bytes in each block, or None if this kernel has none (CONFIG_MEMORY_HOTPLUG)."""
    try:
        return int(read_file(f"{root}/block_size_bytes"), 16)
    except OSError:
        return None


def block_run(number: int, size: int) -> Run:
    """The frames of a block, which lie where its number says: blocks are numbered by their place in memory."""
    frames = size // FRAME
    return Run(number * frames, frames)


def _numbers(root: str) -> list[int]:
    names = (name.removeprefix("memory") for name in os.listdir(root) if name.startswith("memory"))
    return [int(name) for name in names if name.isdigit()]


def count(root: str = MEMORY_ROOT) -> int:
    """How many blocks there are, in whatever state."""
    return len(_numbers(root))


def known_blocks(root: str = MEMORY_ROOT, left_out: Container[int] = ()) -> Iterator[Block]:
    """The blocks that could be taken offline as far as this knows, from the highest address down; but for those ``left_out``.

    None is in no single zone: the kernel would refuse it (EINVAL), as it does with one that is offline already or has a hole.
    That, or what unmovable memory it holds, shows only when it is tried.
    """
    size = block_size(root)
    if size is None:
        return
    for number in sorted(_numbers(root), reverse=True):
        if number in left_out:
            continue
        try:
            zone = read_file(f"{root}/memory{number}/valid_zones")
            # An offline block can have several zones to go to.
            if zone != "none" and " " not in zone:
                yield Block(number, block_run(number, size), zone)
        except FileNotFoundError:
            continue  # unplugged since


def names(numbers: Sequence[int]) -> str:
    """The blocks of these numbers, in words: as many as anybody reads."""
    shown = ", ".join(f"memory{number}" for number in numbers[:MOST_NAMES])
    return shown if len(numbers) <= MOST_NAMES else f"{shown} and {len(numbers) - MOST_NAMES} more"


def state(root: str, number: int) -> str:
    """A block's state: online, offline or going-offline; ``gone`` if there is no such block (any more)."""
    try:
        return read_file(f"{root}/memory{number}/state")
    except FileNotFoundError:
        return "gone"


def set_state(root: str, number: int, wanted: str) -> None:
    """Change a block's state. OSError EBUSY if something in it cannot be moved. May take until a signal arrives."""
    write_file(f"{root}/memory{number}/state", wanted)
