"""What was posted, and how it went: operations and bytes by queue, and the sizes of the runs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from balloon_agent.memory.frames import Run

DONE, FAILED = "done", "failed"
# Upper ends of the classes of run sizes, in bytes: a page, a transparent huge page and a memory block among them.
BOUNDS = tuple(1 << exponent for exponent in (12, 16, 20, 21, 23, 25, 27, 29, 32))


class Tally:
    """Only ever goes up."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[str, int]] = {}
        self._runs = {direction: [0] * (len(BOUNDS) + 1) for direction in ("inflate", "deflate")}
        self._bytes = dict.fromkeys(self._runs, 0)

    @contextmanager
    def posting(self, queue: str, size: int) -> Iterator[None]:
        """One operation about so many bytes: failed if this is left by an exception."""
        counts = self._queues.setdefault(
            queue, {f"{outcome}_{what}": 0 for outcome in (DONE, FAILED) for what in ("operations", "bytes")}
        )
        outcome = FAILED
        try:
            yield
            outcome = DONE
        finally:
            counts[f"{outcome}_operations"] += 1
            counts[f"{outcome}_bytes"] += size

    def count_runs(self, direction: str, runs: Sequence[Run]) -> None:
        classes = self._runs[direction]
        for run in runs:
            classes[bisect_left(BOUNDS, run.size)] += 1
            self._bytes[direction] += run.size

    def queues(self) -> Mapping[str, Mapping[str, int]]:
        """A picture of it: by queue, done_operations, done_bytes, failed_operations and failed_bytes."""
        return {name: dict(counts) for name, counts in self._queues.items()}

    def run_sizes(self) -> Mapping[str, Mapping[str, Any]]:
        """By direction: how many runs up to each of ``bounds``, and beyond the last, in one class each; and the bytes."""
        return {
            direction: {"bounds": BOUNDS, "counts": tuple(counts), "bytes": self._bytes[direction]}
            for direction, counts in self._runs.items()
        }
