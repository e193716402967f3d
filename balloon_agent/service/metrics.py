"""Prometheus metrics: the latest snapshot, in Prometheus' words. A scrape never waits for the balloon."""

from __future__ import annotations

import io
import platform
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from balloon_agent.balloon.tally import DONE, FAILED
from balloon_agent.balloon.wire import StatisticTag as Tag
from balloon_agent.errors import BadInput
from balloon_agent.memory.sources import SOURCE_NAMES
from balloon_agent.sizing.governor import FOLLOW, HOLD, MANUAL

from .options import Options, parse_listen
from .serving import BoundedThreads, serve_in_thread
from .snapshot import STATES, Board, Snapshot
from .statistics import GuestStatistics

SCRAPE_DEADLINE = 30.0  # seconds that a client may take
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
        times.add_metric([queue], _buckets(time_taken), time_taken["seconds"])
    yield times
    runs = HistogramMetricFamily("balloon_run_bytes", "Sizes of the runs that the host was told of.", labels=["direction"])
    for direction, run in now.run_sizes.items():
        runs.add_metric([direction], _buckets(run), run["bytes"])
    yield runs
    seconds = CounterMetricFamily("balloon_phase_seconds", "Time spent by the steps of the work.", labels=["phase"])
    for phase, value in now.phase_seconds_total.items():
        seconds.add_metric([phase], value)
    yield seconds


def _buckets(classes: Mapping[str, Any]) -> list[tuple[str, float]]:
    bounds = [*(floatToGoString(bound) for bound in classes["bounds"]), "+Inf"]  # type: ignore[no-untyped-call]
    return list(zip(bounds, accumulate(classes["counts"]), strict=True))


def _condition(now: Snapshot) -> Iterable[Metric]:
    # One series for each value that there can be: what is 0 now was there before it became 1.
    for name, text, values, current in (
        ("state", "What the balloon does now.", STATES, now.state),
        ("mode", "Whom the balloon obeys: the host, or who has set or held its size.", (FOLLOW, MANUAL, HOLD), now.mode),
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
    yield GaugeMetricFamily("balloon_short", "Whether the target cannot be reached for now.", float(now.state == "short"))
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
    yield GaugeMetricFamily("balloon_device_up", "Whether the device can be used.", float(now.device_up))


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
class Security:
    """TLS: the certificate, its key (None: in the same file), and the authority that clients' certificates must be of."""

    certificate: Path
    key: Path | None = None
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """What is in the files now. BadInput for one that cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise BadInput(
                f"metrics cannot be served by TLS with {self.certificate} and {self.key or 'the key in it'}: "
                f"{error.strerror or error}; both are PEM files, the key without a passphrase"
            ) from error
        if self.client_ca is None:
            return context
        try:
            context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise BadInput(
                f"{self.client_ca} is no authority for clients: {error.strerror or error}; it is a PEM file"
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
        return context


def security(options: Options) -> Security | None:
    """What the options say of it."""
    if options.metrics_certificate is None:
        return None
    return Security(options.metrics_certificate, options.metrics_key, options.metrics_client_ca)


class _Server(BoundedThreads, WSGIServer):
    context: ssl.SSLContext | None = None

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        connection.settimeout(SCRAPE_DEADLINE)
        return connection, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the client's own thread: who is slow to shake hands keeps nobody waiting.
        if self.context is None:
            super().finish_request(request, client_address)
            return
        with self.context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)


class _Patient(io.RawIOBase):
    """What a client sends, up to a deadline for all of it."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _QuietHandler(WSGIRequestHandler):
    """No line in the log for each scrape, and no client that holds a thread for ever, however little it sends at a time."""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Patient(self.request, time.monotonic() + SCRAPE_DEADLINE))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        pass


class Endpoint:
    """/metrics, served from construction until ``stop``; at ``url``. BadInput if it cannot be."""

    def __init__(
        self, board: Board, listen: str, security: Security | None = None, statistics: GuestStatistics | None = None
    ) -> None:
        host, port = parse_listen(listen)
        self._security = security
        context = None if security is None else security.context()
        registry = CollectorRegistry()
        registry.register(BalloonCollector(board, statistics))
        ProcessCollector(registry=registry)
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            kind = type("_Server", (_Server,), {"address_family": family, "context": context})
            self._server: _Server = make_server(
                host, int(address[1]), make_wsgi_app(registry), kind, handler_class=_QuietHandler
            )
        except OSError as error:
            raise BadInput(
                f"cannot serve metrics on {listen}: {error.strerror}; choose another --metrics-listen HOST:PORT"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http{'' if security is None else 's'}://{shown}:{self._server.server_port}/metrics"
        self.stop = serve_in_thread(self._server, "metrics")

    def read_certificates(self) -> None:
        """Use what is in the files now, for who comes from now on. BadInput, and the ones before are kept."""
        if self._security is not None:
            # A new one: an authority that was trusted is not any more.
            self._server.context = self._security.context()
