"""Memory that is missing from the guest on an agent's account, whichever agent took it and whether this one knows of it."""

from __future__ import annotations

from pathlib import Path

from balloon_agent.linux import memory_blocks
from balloon_agent.memory import left_behind

from .state import StateFile

HOLDERS = "holders"  # the folder of their sockets, in the run directory


def what_is_held(state: StateFile, run_dir: Path, memory_root: str = memory_blocks.MEMORY_ROOT) -> str | None:
    """What is held, in words; None for nothing.

    Looked up each time in what lasts, and in nothing that an agent believes: blocks on record that are not back, and processes
    of holders and workers, which end when they hold nothing. A device goes back to the kernel's driver only when this is None:
    that driver begins with an empty balloon, and would inflate to the host's target on top of what is held.
    """
    taken = [number for number in state.blocks if memory_blocks.state(memory_root, number) not in memory_blocks.BACK]
    served = [path for path in left_behind.sockets(run_dir / HOLDERS) if left_behind.is_served(path)]
    found = [f"{noun}: {len(what)}" for what, noun in ((taken, "memory blocks"), (served, "holder processes")) if what]
    return ", ".join(found) or None
