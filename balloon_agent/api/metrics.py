"""Prometheus metrics: the latest snapshot, in Prometheus' words. A scrape never waits for the balloon."""

from __future__ import annotations

import gzip
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from balloon_agent.balloon.tally import DONE, FAILED, Histogram
from balloon_agent.balloon.wire import StatisticTag as Tag
from balloon_agent.guest.statistics import GuestStatistics
from balloon_agent.memory.sources.source import SOURCE_NAMES
from balloon_agent.sizing.governor import Mode

from .snapshot import Board, Snapshot, State

FRESH = 0.1  # seconds
_OPENMETRICS = "application/openmetrics-text; version=1.0.0"
# Of the guest's statistics, those that are bytes at this moment.
_MEMORY = {
    Tag.FREE_MEMORY: "free",
    Tag.TOTAL_MEMORY: "total",
    Tag.AVAILABLE_MEMORY: "available",
    Tag.CACHES: "caches",
}
# Those that are bytes so far.
_RECLAIM = (Tag.SWAP_IN, Tag.SWAP_OUT, Tag.ASYNC_SCANNED, Tag.DIRECT_SCANNED, Tag.ASYNC_RECLAIMED, Tag.DIRECT_RECLAIMED)


class BalloonCollector(Collector):
    """Turns the snapshot on a board into metric families, and with it what the guest's kernel counts."""

    def __init__(self, board: Board, statistics: GuestStatistics | None = None) -> None:
        self._board = board
        self._statistics = statistics

    def collect(self) -> Iterable[Metric]:
        now = self._board.latest
        yield from _sizes(now)
        yield from _work(now)
        yield from _condition(now)
        yield from _troubles(now)
        yield from _identity(now)
        if self._statistics is not None:
            yield from _guest(self._statistics.read())


def _sizes(now: Snapshot) -> Iterable[Metric]:
    gauges = (
        ("host_target", "Size that the host asks the balloon to have.", now.host_target_bytes),
        ("target", "Size that the balloon is to have, by the host or by hand.", now.target_bytes),
        ("wanted", "Size that it would be to have, but for the guest's need of memory.", now.wanted_bytes),
        ("actual", "Size that the balloon has, as told to the host.", now.actual_bytes),
        ("reserve", "Memory that inflating leaves available to the guest.", now.reserve_bytes),
        ("shortfall", "What is missing from the target, where it cannot be reached for now.", now.shortfall_bytes),
    )
    if now.machine_bytes:
        yield GaugeMetricFamily("balloon_machine_bytes", "Memory of the machine, as the host counts it.", now.machine_bytes)
    for name, text, size in gauges:
        yield GaugeMetricFamily(f"balloon_{name}_bytes", text, size)
    held = GaugeMetricFamily("balloon_held_bytes", "Memory in the balloon by the source it was taken from.", labels=["source"])
    for source in SOURCE_NAMES:
        held.add_metric([source], now.held_bytes.get(source, 0))
    yield held


def _work(now: Snapshot) -> Iterable[Metric]:
    moved = CounterMetricFamily("balloon_moved_bytes", "Memory handed over, by direction.", labels=["direction"])
    moved.add_metric(["inflate"], now.inflated_bytes_total)
    moved.add_metric(["deflate"], now.deflated_bytes_total)
    yield moved
    labels = ["queue", "outcome"]
    operations = CounterMetricFamily("balloon_queue_operations", "What was posted on a queue, and how it went.", labels=labels)
    sizes = CounterMetricFamily("balloon_queue_bytes", "Memory that was posted on a queue.", labels=labels)
    for queue, counts in now.queues.items():
        for outcome in (DONE, FAILED):
            operations.add_metric([queue, outcome], counts[f"{outcome}_operations"])
            sizes.add_metric([queue, outcome], counts[f"{outcome}_bytes"])
    yield operations
    yield sizes
    times = HistogramMetricFamily(
        "balloon_queue_seconds", "What posting on a queue took, until the host's acknowledgement.", labels=["queue"]
    )
    for queue, time_taken in now.queue_seconds.items():
        times.add_metric([queue], _buckets(time_taken), time_taken.seconds)
    yield times
    runs = HistogramMetricFamily("balloon_run_bytes", "Sizes of the runs that the host was told of.", labels=["direction"])
    for direction, run in now.run_sizes.items():
        runs.add_metric([direction], _buckets(run), run.bytes)
    yield runs
    seconds = CounterMetricFamily("balloon_phase_seconds", "Time spent by the steps of the work.", labels=["phase"])
    for phase, value in now.phase_seconds_total.items():
        seconds.add_metric([phase], value)
    yield seconds


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*(floatToGoString(bound) for bound in histogram.bounds), "+Inf"]  # type: ignore[no-untyped-call]
    return list(zip(bounds, histogram.cumulative, strict=True))


def _condition(now: Snapshot) -> Iterable[Metric]:
    # One series for each value that there can be: what is 0 now was there before it became 1.
    for name, text, values, current in (
        ("state", "What the balloon does now.", State, now.state),
        ("mode", "Whom the balloon obeys: the host, or who has set or held its size.", Mode, now.mode),
    ):
        family = GaugeMetricFamily(f"balloon_{name}", text, labels=[name])
        for value in values:
            family.add_metric([value], float(value == current))
        yield family
    empty = GaugeMetricFamily(
        "balloon_source_empty", "Whether a source had nothing to give when it was last asked.", labels=["source"]
    )
    for source in SOURCE_NAMES:
        empty.add_metric([source], float(source in now.source_notes))
    yield empty


def _troubles(now: Snapshot) -> Iterable[Metric]:
    yield GaugeMetricFamily("balloon_short", "Whether the target cannot be reached for now.", float(now.state == State.SHORT))
    yield CounterMetricFamily(
        "balloon_verify_failures", "Extents that were not in place after they were posted.", now.moved_extents_total
    )
    yield CounterMetricFamily(
        "balloon_holders_lost", "Holder processes that died with memory of the balloon.", now.holders_lost_total
    )
    yield CounterMetricFamily(
        "balloon_blocks_lost",
        "Memory blocks of the balloon that somebody else brought online, or removed.",
        now.blocks_lost_total,
    )
    freed = CounterMetricFamily(
        "balloon_hidden_freed_bytes", "Memory in holes of huge pages that was freed for the balloon.", labels=["means"]
    )
    for means, size in now.hidden_freed_bytes_total.items():
        freed.add_metric([means], size)
    yield freed
    faults = CounterMetricFamily("balloon_device_faults", "What the device did that it must not do.", labels=["kind"])
    for kind, count in now.device_faults_total.items():
        faults.add_metric([kind], count)
    yield faults
    yield CounterMetricFamily(
        "balloon_targets_rejected", "Targets of the host's beyond what the machine has.", now.targets_rejected_total
    )
    yield GaugeMetricFamily(
        "balloon_target_rejected", "Whether the host's target of now is one of those.", float(now.target_rejected)
    )
    yield CounterMetricFamily(
        "balloon_pressure_reliefs", "How often the balloon had to shrink for want of memory.", now.reliefs_total
    )
    yield GaugeMetricFamily(
        "balloon_relief_active", "Whether the balloon is kept smaller for want of memory.", float(now.relief_active)
    )
    yield GaugeMetricFamily("balloon_unpinned", "Whether memory is held without a pin.", float(now.unpinned))
    yield GaugeMetricFamily("balloon_device_up", "Whether the device can be used.", float(now.state.device_up))


def _identity(now: Snapshot) -> Iterable[Metric]:
    # Gauges that are always 1, as Prometheus has it: an info metric has no name of its own in the text format.
    build = GaugeMetricFamily("balloon_build_info", "The agent that runs.", labels=["version", "python"])
    build.add_metric([now.version, platform.python_version()], 1)
    yield build
    device = GaugeMetricFamily(
        "balloon_device_info", "The device, and how it is driven.", labels=["device", "driver", "channel", "features"]
    )
    device.add_metric([now.device, now.driver, now.channel, f"{now.negotiated_features:#x}"], 1)
    yield device


def _guest(statistics: dict[Tag, int]) -> Iterable[Metric]:
    moved = CounterMetricFamily(
        "balloon_guest_reclaim_bytes", "What its kernel scanned, reclaimed and swapped.", labels=["kind"]
    )
    memory = GaugeMetricFamily("balloon_guest_memory_bytes", "The guest's memory, as the host is told.", labels=["kind"])
    events = CounterMetricFamily(
        "balloon_guest_events", "What the guest's kernel counts, as the host is told.", labels=["event"]
    )
    for tag, value in statistics.items():
        if tag in _MEMORY:
            memory.add_metric([_MEMORY[tag]], value)
        elif tag in _RECLAIM:
            moved.add_metric([tag.name.lower()], value)
        else:
            events.add_metric([tag.name.lower()], value)
    yield memory
    yield moved
    yield events


@dataclass(frozen=True)
class Page:
    """What a scrape gets."""

    content_type: str
    body: bytes
    encoding: str | None = None


class Pages:
    """Renders the metrics, once for all scrapes within FRESH seconds: ten times a second at most, however many ask.

    Used by one thread.
    """

    def __init__(
        self, board: Board, statistics: GuestStatistics | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(BalloonCollector(board, statistics))
        ProcessCollector(registry=self._registry)
        self._clock = clock
        self._kept: dict[tuple[bool, bool], Page] = {}
        self._stale_at = 0.0

    def get(self, accept: str, accept_encoding: str) -> Page:
        """The metrics in a format that such headers ask for."""
        if self._clock() >= self._stale_at:
            self._kept.clear()
        # Two formats, each packed or not: with a client's own parameters in them there would be no end of them.
        wanted = _speaks_openmetrics(accept), "gzip" in accept_encoding
        if wanted not in self._kept:
            self._kept[wanted] = self._render(*wanted)
            if len(self._kept) == 1:
                self._stale_at = self._clock() + FRESH
        return self._kept[wanted]

    def _render(self, openmetrics: bool, packed: bool) -> Page:
        render, content_type = choose_encoder(_OPENMETRICS if openmetrics else "")
        body = render(self._registry)
        return Page(content_type, gzip.compress(body, 1), "gzip") if packed else Page(content_type, body)


def _speaks_openmetrics(accept: str) -> bool:
    try:
        _, content_type = choose_encoder(accept)
    except Exception:
        # A version that is none: which exception that is differs with the library's version.
        return False
    return content_type.startswith("application/openmetrics-text")
