"""The sources of memory that an agent has, and the size of its holders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from balloon_agent.frames import FRAME, HUGE
from balloon_agent.holder.allocate import HUGETLB_SIZES
from balloon_agent.linux import memory_blocks
from balloon_agent.memory.holders import Holders
from balloon_agent.memory.ledger.ledger import Ledger
from balloon_agent.memory.sources.blocks import BlockSource
from balloon_agent.memory.sources.held import HeldSource
from balloon_agent.memory.sources.hugetlb import HugetlbSource, Pool
from balloon_agent.memory.sources.source import Source
from balloon_agent.memory.worker import Worker
from balloon_agent.options import (
    Options,
)
from balloon_agent.takeover.device_slot import Seat
from balloon_agent.takeover.state import StateFile

# Several holders of moderate size: the loss of one is the loss of a part.
HOLDER_CAPACITY = 1 << 30
# Smaller ones where they are on the fuse: the OOM killer should not take much more than is needed, and where it does not wait
# for what it has won (see holder/oom_victim.py) it should find another holder, and no program.
LEAST_CAPACITY, CAPACITY_SHARE = 128 << 20, 16


def sources_of(
    holders: Holders,
    worker: Worker,
    ledger: Ledger,
    seat: Seat,
    state: StateFile,
    room: Callable[[], int],
    obstacle: str | None,
    options: Options,
) -> list[Source]:
    """Sources, coarse to fine: those that are off, too, which may hold memory that an earlier agent took."""

    def ours() -> set[int]:
        # Offlining a block with pinned memory in it would go on until it is stopped.
        frames = (memory_blocks.block_size() or FRAME) // FRAME
        return {frame // frames for frame in seat.frames} | ledger.parts(frames)

    def record(which: Sequence[memory_blocks.Block]) -> None:
        state.record_blocks({block.number: block.zone for block in which})

    def huge(name: str) -> HugetlbSource:
        size = HUGETLB_SIZES[name]
        pool = Pool(size, worker, partial(state.record_pool, size), *state.pools.get(size, (None, 0)))
        return HugetlbSource(name, holders, ledger, HOLDER_CAPACITY, pool, obstacle=blocked, pinned=pinned)

    pinned = obstacle is None
    blocked = None if options.allow_unpinned else obstacle
    whole = BlockSource(worker, ours, record, state.forget_blocks, room)
    held = partial(HeldSource, holders=holders, ledger=ledger, holder_capacity=HOLDER_CAPACITY, obstacle=blocked, pinned=pinned)
    # By emptying a block for a moment, if need be: also where none is to be taken for good.
    thp = held("thp", HUGE, make_room=whole.make_room)
    return [huge("hugetlb-1g"), whole, huge("hugetlb"), thp, held("pages", FRAME)]


def holder_capacity(ram: int, *, bears_loss: bool) -> int:
    """Bytes that one holder has at most; less where it may be lost to the OOM killer."""
    return max(LEAST_CAPACITY, ram // CAPACITY_SHARE) if bears_loss else HOLDER_CAPACITY
