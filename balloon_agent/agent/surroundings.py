"""The guest around the agent at its start: its RAM, and the events that tell of memory pressure."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import psutil

from balloon_agent.errors import NotPermitted
from balloon_agent.guest.pressure_events import KswapdWakeups, Stalls
from balloon_agent.linux import memory_blocks
from balloon_agent.takeover.state import StateFile

_log = logging.getLogger(__name__)


def signs_of_need(stack: ExitStack) -> tuple[KswapdWakeups | None, Stalls | None]:
    """Memory pressure's events, and those of thrashing, as far as the kernel has them here; the stack closes both."""
    demand: KswapdWakeups | None = None
    try:
        demand = KswapdWakeups()
        stack.callback(demand.close)
    except (NotPermitted, OSError) as error:
        _log.warning("need of memory is looked for, since it cannot be heard of: %s", error)
    stalls: Stalls | None = None
    try:
        stalls = Stalls()
        stack.callback(stalls.close)
    except NotPermitted as error:
        _log.warning("thrashing is not noticed: %s", error)
    return demand, stalls


def ram_of(state: StateFile) -> int:
    """The guest's RAM in bytes, with the blocks that an earlier agent has taken offline: MemTotal leaves them out."""
    size = memory_blocks.block_size() or 0
    offline = sum(1 for number in state.blocks if memory_blocks.state(memory_blocks.MEMORY_ROOT, number) == "offline")
    return int(psutil.virtual_memory().total) + offline * size
