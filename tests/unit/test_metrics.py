"""What Prometheus gets, and how: in the clear or by TLS, whatever other clients do."""

from __future__ import annotations

import gzip
import re
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from balloon_agent.agent.recovery import fault_kinds
from balloon_agent.api import endpoint as endpoint_module
from balloon_agent.api import metrics
from balloon_agent.api.endpoint import (
    MOST_CLIENTS,
    MOST_HEAD,
    Endpoint,
    Refused,
    parse,
)
from balloon_agent.api.metrics import FRESH, Page, Pages
from balloon_agent.api.snapshot import Board, Snapshot, State
from balloon_agent.api.tls import Security
from balloon_agent.balloon.tally import Tally
from balloon_agent.errors import BadInput
from balloon_agent.frames import FRAME, Run
from balloon_agent.guest.statistics import GuestStatistics
from balloon_agent.memory.sources.source import SOURCE_NAMES
from balloon_agent.sizing.governor import Mode
from tests.device_model.agent import Agent
from tests.device_model.world import World
from tests.unit.test_service import MIB, SNAPSHOT

DESCRIPTION = Path(__file__).parents[2] / "docs/metrics.md"
Found = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@contextmanager
def serving(snapshot: Snapshot = SNAPSHOT, security: Security | None = None) -> Iterator[Endpoint]:
    endpoint = Endpoint(Board(snapshot), "localhost:0", security, GuestStatistics())
    try:
        yield endpoint
    finally:
        endpoint.stop()


def scrape(url: str, context: ssl.SSLContext | None = None) -> Found:
    with urllib.request.urlopen(url, timeout=60, context=context) as response:
        text = response.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def snapshot() -> Snapshot:
    """One with everything in it."""
    moments = iter([0.0, 0.0005, 1.0, 41.0])
    tally = Tally(lambda: next(moments))
    runs = [Run(0, 1), Run(512, 512), Run(1 << 20, 1 << 19)]
    with tally.posting("inflate_cont", sum(run.size for run in runs)):
        tally.count_runs("inflate", runs)
    with pytest.raises(OSError, match="gone"), tally.posting("inflate_cont", 4096):
        raise OSError("gone")
    return replace(
        SNAPSHOT,
        state=State.SHORT,
        target_bytes=12 * MIB,
        wanted_bytes=14 * MIB,
        machine_bytes=1024 * MIB,
        source_notes={"thp": "none to be had"},
        device_faults_total=dict.fromkeys(fault_kinds(), 0),
        hidden_freed_bytes_total={"split": 397 * MIB, "reclaim": 0},
        queues=tally.queues(),
        queue_seconds=tally.queue_seconds(),
        run_sizes=tally.run_sizes(),
    )


def test_metrics_carry_the_snapshot() -> None:
    with serving(snapshot()) as endpoint:
        found = scrape(endpoint.url)
    assert found["balloon_target_bytes", ()] == 12 * MIB
    assert found["balloon_actual_bytes", ()] == 10 * MIB
    assert found["balloon_shortfall_bytes", ()] == 2 * MIB
    assert found["balloon_held_bytes", (("source", "thp"),)] == 8 * MIB
    assert found["balloon_held_bytes", (("source", "pages"),)] == 2 * MIB
    assert found["balloon_held_bytes", (("source", "blocks"),)] == 0
    assert found["balloon_phase_seconds_total", (("phase", "take"),)] == 1.5
    assert found["balloon_short", ()] == 1
    done, failed = ((("outcome", outcome), ("queue", "inflate_cont")) for outcome in ("done", "failed"))
    assert found["balloon_queue_operations_total", done] == found["balloon_queue_operations_total", failed] == 1
    assert found["balloon_queue_bytes_total", failed] == 4096
    assert found["balloon_queue_bytes_total", done] == 4096 + 2 * MIB + 2048 * MIB
    below = buckets(found, "balloon_run_bytes", direction="inflate")
    assert (below["4096.0"], below["1.048576e+06"], below["2.097152e+06"], below["+Inf"]) == (1, 1, 2, 3)
    assert found["balloon_run_bytes_sum", (("direction", "inflate"),)] == 4096 + 2 * MIB + 2048 * MIB
    times = buckets(found, "balloon_queue_seconds", queue="inflate_cont")
    assert (times["0.0003"], times["0.001"], times["30.0"], times["+Inf"]) == (0, 1, 1, 2)
    assert found["balloon_queue_seconds_sum", (("queue", "inflate_cont"),)] == 40.0005
    assert found["balloon_wanted_bytes", ()] == 14 * MIB
    assert found["balloon_machine_bytes", ()] == 1024 * MIB
    assert found["balloon_hidden_freed_bytes_total", (("means", "split"),)] == 397 * MIB
    assert found["balloon_hidden_freed_bytes_total", (("means", "reclaim"),)] == 0
    assert found["balloon_guest_memory_bytes", (("kind", "total"),)] > 0
    assert [name for name, _ in found].count("balloon_device_info") == 1


def buckets(found: Found, name: str, **wanted: str) -> dict[str, float]:
    """Of a histogram: how many were up to each bound."""
    return {
        dict(labels)["le"]: value
        for (sample, labels), value in found.items()
        if sample == f"{name}_bucket" and wanted.items() <= dict(labels).items()
    }


def test_one_of_the_states_modes_and_empty_sources_is_true() -> None:
    ones = {
        ("balloon_state", (("state", "short"),)),
        ("balloon_mode", (("mode", "hold"),)),
        ("balloon_source_empty", (("source", "thp"),)),
        ("balloon_target_rejected", ()),
    }
    with serving(replace(snapshot(), mode=Mode.HOLD, target_rejected=True)) as endpoint:
        found = scrape(endpoint.url)
    ours = {key: value for key, value in found.items() if key[0] in (*dict(ones), "balloon_relief_active")}
    assert {key for key, value in ours.items() if value == 1} == ones
    assert len(ours) == len(State) + 3 + len(SOURCE_NAMES) + 2
    assert set(ours.values()) == {0, 1}


def test_how_large_the_machine_is_is_not_said_where_nobody_knows() -> None:
    with serving() as endpoint:
        assert ("balloon_machine_bytes", ()) not in scrape(endpoint.url)


def test_the_description_names_everything_that_is_exported_and_nothing_else() -> None:
    with serving(snapshot()) as endpoint:
        names = {re.sub(r"_(bucket|sum|count)$", "", name) for name, _ in scrape(endpoint.url)}
    said = set(re.findall(r"`(balloon_[a-z_]+)[`{]", DESCRIPTION.read_text()))
    assert said == {name for name in names if name.startswith("balloon_")}


def test_a_scrape_in_the_middle_of_a_step_waits_for_nothing() -> None:
    """The owner thread is in here: what waited for it would wait for ever."""
    world = World()
    agent = Agent(world)
    agent.start()
    endpoint = Endpoint(agent.daemon.board, "localhost:0")
    found: list[float] = []

    def during(step: Callable[..., object]) -> Callable[..., object]:
        def stepping(*arguments: object, **named: object) -> object:
            found.append(scrape(endpoint.url)["balloon_actual_bytes", ()])
            return step(*arguments, **named)

        return stepping

    try:
        for source in world.sources.values():
            source.take = during(source.take)  # type: ignore[method-assign, assignment]
            source.give_back = during(source.give_back)  # type: ignore[method-assign, assignment]
        world.device.inflate = during(world.device.inflate)  # type: ignore[method-assign, assignment]
        world.device.deflate = during(world.device.deflate)  # type: ignore[method-assign, assignment]
        for size in (8 * MIB, 0):
            begun = len(found)
            agent.model.ask_for(size // FRAME)
            agent.rest()
            assert agent.state.actual_bytes == size
            assert len(found) >= begun + 2
    finally:
        endpoint.stop()
        agent.close()


def test_an_address_in_use_is_refused_with_the_remedy() -> None:
    with serving() as endpoint:
        address = endpoint.url.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(BadInput, match=r"cannot serve metrics on .*--metrics-listen"):
            Endpoint(Board(SNAPSHOT), address)


def test_all_addresses_are_those_of_either_version() -> None:
    endpoint = Endpoint(Board(SNAPSHOT), "[::]:0")
    try:
        assert scrape(endpoint.url.replace("[::]", "127.0.0.1"))
    finally:
        endpoint.stop()


def address_of(endpoint: Endpoint) -> tuple[str, int]:
    host, _, port = endpoint.url.split("/")[2].rpartition(":")
    return host.strip("[]"), int(port)


def test_clients_that_say_nothing_keep_nobody_waiting_and_lose_their_places() -> None:
    with serving() as endpoint:
        silent = [socket.create_connection(address_of(endpoint), 60) for _ in range(MOST_CLIENTS)]
        for _ in range(3):
            assert scrape(endpoint.url)
        # The one that has been there longest is hung up on, and it alone.
        silent.append(socket.create_connection(address_of(endpoint), 60))
        assert silent[0].recv(1) == b""
        silent[-1].sendall(b"GET /metrics HTTP/1.0\n\n")
        assert silent[-1].recv(12) == b"HTTP/1.1 200"
        for connection in silent:
            connection.close()


def test_a_client_that_reads_nothing_keeps_its_place_and_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pages, "get", lambda *_: Page("text/plain", b"a" * (64 << 20)))
    with serving() as endpoint:
        deaf = [socket.create_connection(address_of(endpoint), 60) for _ in range(MOST_CLIENTS)]
        for connection in deaf:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in deaf)
        with socket.create_connection(address_of(endpoint), 60) as late:
            late.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert late.recv(12) == b"HTTP/1.1 200"
        for connection in deaf:
            connection.close()


def test_who_sends_little_by_little_has_no_more_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "SCRAPE_DEADLINE", 0.3)

    def dribble(connection: socket.socket) -> None:
        for _ in range(1000):
            connection.sendall(b"G")
            threading.Event().wait(0.02)

    ends = pytest.raises((BrokenPipeError, ConnectionResetError))
    with serving() as endpoint, socket.create_connection(address_of(endpoint), 60) as connection, ends:
        dribble(connection)


def asked(endpoint: Endpoint, request: bytes) -> tuple[bytes, bytes]:
    """The status line, and all the rest."""
    with socket.create_connection(address_of(endpoint), 60) as connection:
        connection.sendall(request)
        with connection.makefile("rb") as answer:
            return answer.readline().strip(), answer.read()


@pytest.mark.parametrize(
    ("request_text", "status", "words"),
    [
        (b"GET /metrics HTTP/1.0\r\n\r\n", b"200 OK", b"balloon_actual_bytes 1"),
        (b"GET http://here/metrics?a=b HTTP/1.1\n\n", b"200 OK", b"balloon_actual_bytes 1"),
        (b"HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n", b"200 OK", b"Content-Length: "),
        (b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=0\r\n\r\n", b"200 OK", b"text/plain"),
        (b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=no\r\n\r\n", b"200 OK", b"text/plain"),
        (b"GET /metrics HTTP/1.1\r\nACCEPT: a/b\r\naccept:application/openmetrics-text\r\n\r\n", b"200 OK", b"\n# EOF\n"),
        (b"GET /metrics HTTP/1.1\r\nAccept-Encoding: br, gzip\r\n\r\n", b"200 OK", b"Content-Encoding: gzip\r\n"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404 Not Found", b"metrics are at /metrics"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed", b"Allow: GET, HEAD\r\n"),
        (b"GET /metrics\r\n\r\n", b"400 Bad Request", b"begins with GET /metrics HTTP/1.1"),
        (b"GET http://[/metrics HTTP/1.1\r\n\r\n", b"400 Bad Request", b"Invalid"),
        (b"GET /metrics HTTP/1.1\r\nnothing\r\n\r\n", b"400 Bad Request", b"no colon"),
        (b"GET /metrics HTTP/1.1\r\na: " + b"b" * MOST_HEAD, b"431 Request Header Fields Too Large", b"more than 8192 bytes"),
    ],
)
def test_what_is_asked_is_answered_or_refused_in_words(request_text: bytes, status: bytes, words: bytes) -> None:
    with serving() as endpoint:
        said, rest = asked(endpoint, request_text)
    assert said == b"HTTP/1.1 " + status
    assert words in rest
    head, _, body = rest.partition(b"\r\n\r\n")
    length = int(re.findall(rb"Content-Length: (\d+)", head)[0])
    assert len(body) == (0 if request_text.startswith(b"HEAD") else length)


@given(st.binary(max_size=400), st.booleans())
def test_any_head_is_a_request_or_refused(data: bytes, begun: bool) -> None:
    head = (b"GET /metrics HTTP/1.1\r\n" if begun else b"") + data + b"\r\n\r\n"
    with suppress(Refused):
        parse(head)


def test_a_scrape_that_comes_to_nothing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> dict[str, int]:
        raise OSError("there is no vmstat")

    monkeypatch.setattr(GuestStatistics, "read", broken)
    with serving() as endpoint:
        said, rest = asked(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n")
    assert said == b"HTTP/1.1 500 Internal Server Error"
    assert rest.endswith(b"the metrics cannot be told: there is no vmstat\n")


def test_scrapes_of_one_moment_share_one_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    rendered: list[float] = []
    board = Board(SNAPSHOT)
    pages = Pages(board, clock=lambda: now[0])

    def sizes(_: Snapshot) -> list[Metric]:
        rendered.append(now[0])
        return []

    monkeypatch.setattr(metrics, "_sizes", sizes)
    versions = ["1.0.0", "1.0.1", "2.0.0"]
    first = [pages.get(f"application/openmetrics-text; version={version}", "gzip") for version in versions]
    assert first[0] is first[1] is first[2]
    plain = pages.get("", "")
    assert gzip.decompress(first[0].body) != plain.body
    assert rendered == [0.0, 0.0]
    now[0] = FRESH
    pages.get("", "")
    assert rendered == [0.0, 0.0, FRESH]


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates: an authority's, a server's and a client's by it, and one by nobody."""
    folder = tmp_path_factory.mktemp("papers")
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    for name in ("ca", "stranger"):
        openssl(folder, *new, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    for name in ("server", "client"):
        ours = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:localhost")
        openssl(folder, *new, *ours, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")
    return folder


def client(papers: Path, name: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(papers / "ca.pem"))
    if name is not None:
        context.load_cert_chain(papers / f"{name}.pem", papers / f"{name}.key")
    return context


def test_metrics_are_served_by_tls_to_who_has_a_certificate(papers: Path) -> None:
    with serving(security=Security(papers / "server.pem", papers / "server.key", papers / "ca.pem")) as endpoint:
        assert endpoint.url.startswith("https://")
        # Who does not begin to shake hands keeps nobody waiting.
        with socket.create_connection(address_of(endpoint), 60):
            assert scrape(endpoint.url, client(papers, "client"))["balloon_actual_bytes", ()] == 10 * MIB
        endpoint.read_certificates()
        assert scrape(endpoint.url, client(papers, "client"))
        # An authority that is trusted no longer.
        trusted = (papers / "ca.pem").read_bytes()
        (papers / "ca.pem").write_bytes((papers / "stranger.pem").read_bytes())
        endpoint.read_certificates()
        (papers / "ca.pem").write_bytes(trusted)
        with pytest.raises((urllib.error.URLError, OSError)):
            scrape(endpoint.url, client(papers, "client"))
        endpoint.read_certificates()
        for name in (None, "stranger"):
            with pytest.raises((urllib.error.URLError, OSError)):
                scrape(endpoint.url, client(papers, name))
        with pytest.raises((urllib.error.URLError, OSError)):
            scrape(endpoint.url.replace("https", "http"))


def test_without_an_authority_any_client_may_come_by_tls(papers: Path) -> None:
    with serving(security=Security(papers / "server.pem", papers / "server.key")) as endpoint:
        assert scrape(endpoint.url, client(papers))


@pytest.mark.parametrize(
    ("certificate", "key", "authority", "words"),
    [
        ("none.pem", "server.key", None, "none.pem .*No such file"),
        ("server.pem", "client.key", None, "server.pem and .*client.key"),
        ("server.pem", None, None, "the key in it"),
        ("server.pem", "server.key", "server.key", "server.key is no authority"),
    ],
)
def test_papers_that_cannot_be_used_are_named(
    papers: Path, certificate: str, key: str | None, authority: str | None, words: str
) -> None:
    security = Security(papers / certificate, papers / key if key else None, papers / authority if authority else None)
    with pytest.raises(BadInput, match=words) as caught:
        Endpoint(Board(SNAPSHOT), "127.0.0.1:0", security)
    assert "\n" not in str(caught.value)
