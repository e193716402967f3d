"""What a step costs the ledger does not depend on how much is in the balloon. Counted, not timed: no clock is asked here."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest

from balloon_agent.frames import FRAMES_PER_HUGE, Run
from balloon_agent.memory.ledger.frame_index import CHUNK, Places
from balloon_agent.memory.ledger.ledger import Extent, Ledger
from contrib.benchmarks.ledger import FINEST_FIRST, RUNS_PER_STEP, STEP, extent, fill, shuffled

GIB_STEPS = (1 << 30) // STEP


def lines_of(work: Callable[[], object]) -> int:
    """How many lines of Python run."""
    lines = 0

    def trace(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def memory_for(work: Callable[[], object]) -> int:
    """The most bytes that it needs at any time, beyond what was there: a copy or a sorted list of everything shows here."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def filled(gib: int) -> tuple[Ledger, list[int]]:
    """A ledger, and the numbers of 32 huge pages in places of their own that are not in it."""
    places = shuffled((gib * GIB_STEPS + 1) * RUNS_PER_STEP, random.Random(gib))
    return fill(gib * GIB_STEPS, places), list(places[-RUNS_PER_STEP:])


@pytest.mark.parametrize("count", [lines_of, memory_for])
def test_a_step_costs_the_same_however_much_is_held(count: Callable[[Callable[[], object]], int]) -> None:
    small, large = (costs_of_a_step(count, gib) for gib in (1, 256))
    for name, cost in large.items():
        # Not quite the same: some places have a neighbour, and some have none. What grew with the ledger would be 256 times as
        # much: 32 KiB for a mere list of all extents.
        assert cost <= 1.5 * small[name] + (2048 if count is memory_for else 0), name


def costs_of_a_step(count: Callable[[Callable[[], object]], int], gib: int) -> dict[str, int]:
    ledger, free = filled(gib)
    oldest, older, *_, latest = [held.name for held in ledger]
    # As in operation, where something went before something comes: tables do not grow just now.
    ledger.remove(older)
    new = extent(1 << 20, free)
    operations: dict[str, Callable[[], object]] = {
        "overlapping": lambda: ledger.overlapping(new.runs),
        "add": lambda: ledger.add(new),
        "refuse": lambda: refuse(ledger, Extent("a", "thp", [*new.runs[:20], *new.runs])),
        "size": lambda: ledger.size,
        "by_source": ledger.by_source,
        "held_by": lambda: ledger.held_by("holder-0"),
        "choose": lambda: ledger.choose(STEP, FINEST_FIRST),
        "first of many": lambda: next(ledger.candidates(ledger.size, FINEST_FIRST)),
        "remove the latest": lambda: ledger.remove(latest),
        "remove the oldest": lambda: ledger.remove(oldest),
    }
    return {name: count(operation) for name, operation in operations.items()}


def refuse(ledger: Ledger, extent: Extent) -> None:
    with suppress(ValueError):
        ledger.add(extent)


def test_lists_that_are_searched_and_moved_are_short_however_much_is_held() -> None:
    """Insertion into a list moves what is behind it, which no count of lines shows."""
    for gib in (1, 256):
        places = Places()
        for number, place in enumerate(shuffled(gib * GIB_STEPS * RUNS_PER_STEP, random.Random(1))):
            places.enter([Run(place * FRAMES_PER_HUGE, FRAMES_PER_HUGE)], number)
        assert places.longest() == CHUNK // FRAMES_PER_HUGE
    places = Places()
    places.enter([Run(frame, 1) for frame in range(0, 3 * CHUNK, 2)], 1)
    assert places.longest() == CHUNK // 2


def test_a_balloon_of_1_tib_is_kept_in_less_than_60_mib() -> None:
    """Counted for 128 GiB of it: an eighth."""
    places = shuffled(128 * GIB_STEPS * RUNS_PER_STEP, random.Random(1))
    ledgers: list[Ledger] = []
    assert memory_for(lambda: ledgers.append(fill(128 * GIB_STEPS, places))) * 8 < 60 << 20
    assert ledgers[0].size == 128 << 30
