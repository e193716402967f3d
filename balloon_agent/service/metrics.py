"""Prometheus metrics: the latest snapshot, in Prometheus' words. A scrape never waits for the balloon."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from balloon_agent.errors import BadInput
from balloon_agent.memory.sources import SOURCE_NAMES

from .serving import serve_in_thread
from .snapshot import Board

SCRAPE_DEADLINE = 30.0  # seconds that a client may take


class BalloonCollector(Collector):
    """Turns the snapshot on a board into metric families."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterable[Metric]:
        now = self._board.latest
        gauges = (
            ("host_target", "Size that the host asks the balloon to have.", now.host_target_bytes),
            ("target", "Size that the balloon is to have, by the host or by hand.", now.target_bytes),
            ("actual", "Size that the balloon has, as told to the host.", now.actual_bytes),
            ("reserve", "Memory that inflating leaves available to the guest.", now.reserve_bytes),
        )
        for name, text, size in gauges:
            yield GaugeMetricFamily(f"balloon_{name}_bytes", text, size)
        held = GaugeMetricFamily(
            "balloon_held_bytes", "Memory in the balloon by the source it was taken from.", labels=["source"]
        )
        for source in SOURCE_NAMES:
            held.add_metric([source], now.held_bytes.get(source, 0))
        yield held
        yield GaugeMetricFamily("balloon_short", "Whether the target cannot be reached for now.", float(now.state == "short"))
        moved = CounterMetricFamily("balloon_moved_bytes", "Memory handed over, by direction.", labels=["direction"])
        moved.add_metric(["inflate"], now.inflated_bytes_total)
        moved.add_metric(["deflate"], now.deflated_bytes_total)
        yield moved
        seconds = CounterMetricFamily("balloon_phase_seconds", "Time spent by the steps of the work.", labels=["phase"])
        for phase, value in now.phase_seconds_total.items():
            seconds.add_metric([phase], value)
        yield seconds
        yield CounterMetricFamily(
            "balloon_verify_failures", "Extents that were not in place after they were posted.", now.moved_extents_total
        )
        yield CounterMetricFamily(
            "balloon_holders_lost", "Holder processes that died with memory of the balloon.", now.holders_lost_total
        )
        faults = CounterMetricFamily("balloon_device_faults", "What the device did that it must not do.", labels=["kind"])
        for kind, count in now.device_faults_total.items():
            faults.add_metric([kind], count)
        yield faults
        yield CounterMetricFamily(
            "balloon_targets_rejected", "Targets of the host's beyond what the machine has.", now.targets_rejected_total
        )
        yield CounterMetricFamily(
            "balloon_pressure_reliefs", "How often the balloon had to shrink for want of memory.", now.reliefs_total
        )
        yield GaugeMetricFamily("balloon_unpinned", "Whether memory is held without a pin.", float(now.unpinned))
        yield GaugeMetricFamily("balloon_device_up", "Whether the device can be used.", float(now.device_up))
        yield InfoMetricFamily(
            "balloon_agent",
            "The agent and its device.",
            {"version": now.version, "device": now.device, "driver": now.driver, "channel": now.channel},
        )


class _MetricsServer(ThreadingMixIn, WSGIServer):
    """Each scrape in a thread of its own: a slow reader keeps nobody waiting."""

    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    """No line in the log for each scrape, and no client that holds a thread for ever."""

    timeout = SCRAPE_DEADLINE

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        pass


def parse_listen(text: str) -> tuple[str, int]:
    """``127.0.0.1:9758`` or ``[::1]:9758`` as host and port. BadInput for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise BadInput(f"{text!r} is no address to listen on: write HOST:PORT, such as 127.0.0.1:9758, with a port up to 65535")
    return host.strip("[]"), int(port)


def serve(board: Board, listen: str) -> tuple[str, Callable[[], None]]:
    """Serve /metrics from a thread. Returns the address in use, and how to stop it. BadInput if it cannot be listened on."""
    host, port = parse_listen(listen)
    registry = CollectorRegistry()
    registry.register(BalloonCollector(board))
    ProcessCollector(registry=registry)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        kind = type("_Server", (_MetricsServer,), {"address_family": family})
        server: WSGIServer = make_server(host, int(address[1]), make_wsgi_app(registry), kind, handler_class=_QuietHandler)
    except OSError as error:
        raise BadInput(
            f"cannot serve metrics on {listen}: {error.strerror}; choose another --metrics-listen HOST:PORT"
        ) from error
    return f"{host}:{server.server_port}", serve_in_thread(server, "metrics")
