"""What was posted, and how it went: operations, bytes and time by queue, and the sizes of the runs."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

from balloon_agent.frames import Run

DONE, FAILED = "done", "failed"
# Upper ends of the classes of run sizes, in bytes: a page, a transparent huge page and a memory block among them.
BOUNDS = tuple(1 << exponent for exponent in (12, 16, 20, 21, 23, 25, 27, 29, 32))
# Of what one operation takes, in seconds: the last is when a device counts as failed.
SECONDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True)
class Histogram:
    """``counts`` has a class for each of ``bounds``, of values up to it, and one more for larger values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def cumulative(self) -> list[int]:
        """As Prometheus counts: the values up to each bound, and at last all of them."""
        return list(accumulate(self.counts))


@dataclass(frozen=True)
class Durations(Histogram):
    """Seconds that operations took; ``seconds`` is their sum."""

    seconds: float


@dataclass(frozen=True)
class Sizes(Histogram):
    """Bytes of runs; ``bytes`` is their sum."""

    bytes: int


class Tally:
    """Only ever goes up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, list[int]] = {}
        self._spent: dict[str, float] = {}
        self._queues: dict[str, dict[str, int]] = {}
        self._runs = {direction: [0] * (len(BOUNDS) + 1) for direction in ("inflate", "deflate")}
        self._bytes = dict.fromkeys(self._runs, 0)

    def open(self, queue: str) -> None:
        """Count from zero: that a counter has gone up is seen of one that was there before."""
        if queue not in self._queues:
            self._queues[queue] = {f"{outcome}_{what}": 0 for outcome in (DONE, FAILED) for what in ("operations", "bytes")}
            self._seconds[queue] = [0] * (len(SECONDS) + 1)
            self._spent[queue] = 0.0

    @contextmanager
    def posting(self, queue: str, size: int) -> Iterator[None]:
        """One operation about so many bytes: failed if this is left by an exception."""
        self.open(queue)
        counts = self._queues[queue]
        outcome = FAILED
        begin = self._clock()
        try:
            yield
            outcome = DONE
        finally:
            counts[f"{outcome}_operations"] += 1
            counts[f"{outcome}_bytes"] += size
            seconds = self._clock() - begin
            self._seconds[queue][bisect_left(SECONDS, seconds)] += 1
            self._spent[queue] += seconds

    def count_runs(self, direction: str, runs: Sequence[Run]) -> None:
        classes = self._runs[direction]
        for run in runs:
            classes[bisect_left(BOUNDS, run.size)] += 1
            self._bytes[direction] += run.size

    def queues(self) -> Mapping[str, Mapping[str, int]]:
        """A picture of it: by queue, done_operations, done_bytes, failed_operations and failed_bytes."""
        return {name: dict(counts) for name, counts in self._queues.items()}

    def queue_seconds(self) -> Mapping[str, Durations]:
        """Durations of operations, by queue."""
        return {name: Durations(SECONDS, tuple(counts), self._spent[name]) for name, counts in self._seconds.items()}

    def run_sizes(self) -> Mapping[str, Sizes]:
        """Sizes of runs, by direction."""
        return {direction: Sizes(BOUNDS, tuple(counts), self._bytes[direction]) for direction, counts in self._runs.items()}
