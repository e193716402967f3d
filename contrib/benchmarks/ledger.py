"""Measure the ledger: what a step of 64 MiB costs it, and the memory it needs, with terabytes in the balloon.

It is filled with huge pages in extents of 64 MiB, as ``thp`` takes them, but with no two pages next to each other: their places
are shuffled over the whole of memory. No memory is taken, and no privileges are needed.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import random
import statistics
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil

from balloon_agent.frames import FRAMES_PER_HUGE, HUGE, Run
from balloon_agent.memory.ledger.ledger import Extent, Ledger

STEP = 64 << 20
RUNS_PER_STEP = STEP // HUGE
STEPS = 400
# As many as a terabyte has at 16 GiB each.
EXTENTS_PER_HOLDER = (16 << 30) // STEP
FINEST_FIRST = ("pages", "thp", "blocks")
SEED = 1


def measure(tib: int = 1) -> dict[str, Any]:
    """Figures for a ledger of so many TiB, from a process of its own: milliseconds, MiB, numbers."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_measure, (tib << 40) // STEP).result()


def extent(number: int, places: Sequence[int]) -> Extent:
    """An extent of huge pages, given by their numbers."""
    runs = tuple(Run(place * FRAMES_PER_HUGE, FRAMES_PER_HUGE) for place in places)
    return Extent(f"thp-{number:08x}", "thp", runs, f"holder-{number // EXTENTS_PER_HOLDER}")


def shuffled(count: int, chance: random.Random) -> array[int]:
    """The numbers of so many huge pages in any order, packed: this is to need little beside the ledger."""
    places = array("Q", range(count))
    chance.shuffle(places)
    return places


def fill(extents: int, places: Sequence[int]) -> Ledger:
    """A ledger with so many extents."""
    ledger = Ledger()
    for number in range(extents):
        ledger.add(extent(number, places[number * RUNS_PER_STEP : (number + 1) * RUNS_PER_STEP]))
    return ledger


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    ascending = sorted(seconds)
    p99 = ascending[math.ceil(len(ascending) * 0.99) - 1]
    return {"median": round(statistics.median(ascending) * 1e3, 4), "p99": round(p99 * 1e3, 4)}


def _measure(extents: int) -> dict[str, Any]:
    chance = random.Random(SEED)
    process = psutil.Process()
    places = shuffled(extents * RUNS_PER_STEP, chance)
    gc.collect()
    before = process.memory_info().rss
    begin = time.perf_counter()
    ledger = fill(extents, places)
    filled = time.perf_counter() - begin
    rss = process.memory_info().rss - before

    names = [held.name for held in ledger]
    times: dict[str, list[float]] = {"choose": [], "remove": [], "add": []}
    for step in range(STEPS):
        # The ledger is full each time one of these is timed, but for the step that was just taken out.
        begin = time.perf_counter()
        chosen = ledger.choose(STEP, FINEST_FIRST)
        times["choose"].append(time.perf_counter() - begin)
        assert [held.size for held in chosen] == [STEP]
        # Half of them what would be given back, the rest anything: that is not in the processor's caches.
        at = chance.randrange(len(names))
        name = chosen[0].name if step % 2 else names[at]
        begin = time.perf_counter()
        removed = ledger.remove(name)
        times["remove"].append(time.perf_counter() - begin)
        free = [run.first // FRAMES_PER_HUGE for run in removed.runs]
        anew = extent(int(name.removeprefix("thp-"), 16), chance.sample(free, len(free)))
        begin = time.perf_counter()
        ledger.add(anew)
        times["add"].append(time.perf_counter() - begin)
    assert ledger.size == extents * STEP
    return {
        "tib": extents * STEP / (1 << 40),
        "runs": extents * RUNS_PER_STEP,
        "extents": extents,
        "steps": STEPS,
        "fill_seconds": round(filled, 3),
        "rss_mib": round(rss / (1 << 20), 1),
        **{f"{operation}_ms": _spread(seconds) for operation, seconds in times.items()},
    }
