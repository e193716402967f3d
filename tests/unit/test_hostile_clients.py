"""Clients that mean harm: however many come, and whatever they send, what it costs for good is next to nothing."""

from __future__ import annotations

import random
import re
import resource
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from balloon_agent.api.client import ask
from tests.unit.test_metrics import client, papers, scrape

__all__ = ["papers"]
TIMES = 1000
AT_ONCE = 16
FOR_GOOD = 4 << 20  # bytes
HANDSHAKE = 0x16
Connect = Callable[[], socket.socket]
Harm = Callable[[socket.socket], None]


@dataclass
class Victim:
    process: subprocess.Popen[str]
    url: str
    control: Path
    at_first: int = 0

    @property
    def resident(self) -> int:
        """Bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) << 10

    def metrics(self) -> socket.socket:
        host, _, port = self.url.split("/")[2].rpartition(":")
        return socket.create_connection((host, int(port)), 60)

    def controlled(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(60)
        connection.connect(str(self.control))
        return connection


@contextmanager
def victim(folder: Path, *papers: Path) -> Iterator[Victim]:
    argv = [sys.executable, "-m", "tests.unit.served", str(folder), *map(str, papers)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        try:
            yield Victim(process, process.stdout.readline().strip(), folder / "control")
        finally:
            process.kill()


def exhaust(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def nothing(connection: socket.socket) -> None:
    pass


def sending(data: bytes, *, wait: bool = True) -> Harm:
    def harm(connection: socket.socket) -> None:
        connection.sendall(data)
        if wait:
            connection.shutdown(socket.SHUT_WR)
            exhaust(connection)

    return harm


GET = b"GET /metrics HTTP/1.1\r\n"
GARBAGE = random.Random(1).randbytes(1 << 16)
HTTP: dict[str, Harm] = {
    "goes away": nothing,
    "half a request": sending(GET, wait=False),
    "half a request, and the end": sending(GET + b"Host: a"),
    "a hundred lines of 64 KiB": sending(GET + (b"a: " + b"b" * 65000 + b"\r\n") * 100 + b"\r\n"),
    "ten thousand lines": sending(GET + b"a: b\r\n" * 10000 + b"\r\n"),
    "a line without an end": sending(b"GET /" + b"a" * (1 << 20)),
    "a long path": sending(b"GET /" + b"a" * 4000 + b" HTTP/1.1\r\n\r\n"),
    "garbage": sending(GARBAGE),
    "nothing but ends of lines": sending(b"\r\n" * 4000),
    "a greeting of TLS": sending(bytes([HANDSHAKE, 3, 1, 2, 0]) + GARBAGE[:512]),
    "a body": sending(b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n" + b"a" * (1 << 18)),
    "requests without end": sending((GET + b"\r\n") * 1000),
    "no ear for the answer": sending(GET + b"\r\n", wait=False),
    "a version each": sending(GET + b"Accept: application/openmetrics-text; version=1.0.9\r\n\r\n"),
}
CONTROL: dict[str, Harm] = {
    "goes away": nothing,
    "half a request": sending(b'{"op":', wait=False),
    "a line without an end": sending(b"a" * (1 << 20)),
    "deep": sending(b"[" * 4000 + b"\n"),
    "garbage": sending(GARBAGE),
    "no ear for the answer": sending(b'{"op":"map","cell_bytes":2097152}\n' * 20, wait=False),
    "a map": sending(b'{"op":"map","cell_bytes":2097152}\n'),
    "many at once": sending(b'{"op":"status"}\n' * 100),
}


def attack(connect: Connect, harm: Harm, times: int = TIMES) -> None:
    """So many clients, a few of them at a time. That they are cut off is what they have to expect."""

    def one(_: int) -> None:
        with suppress(OSError), connect() as connection:
            harm(connection)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, range(times)))


def costs_nothing_for_good(
    victim: Victim, connect: Callable[[], socket.socket], harm: Harm, check: Callable[[], object]
) -> None:
    """Neither memory, with all the kinds before, nor somebody else's answer, then and meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        attacking = pool.submit(attack, connect, harm)
        check()
        while not attacking.done():
            check()
        attacking.result()
    check()
    grown = victim.resident - victim.at_first
    assert grown <= FOR_GOOD, f"{victim.at_first >> 10} KiB have grown by {grown >> 10} KiB"


@contextmanager
def warm(folder: Path, *papers: Path, context: ssl.SSLContext | None = None) -> Iterator[Victim]:
    with victim(folder, *papers) as served:
        for _ in range(20):
            scrape(served.url, context)
            ask(served.control, {"op": "map", "cell_bytes": 2 << 20}, 60)
        served.at_first = served.resident
        yield served


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with warm(tmp_path_factory.mktemp("clear")) as served:
        yield served


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, papers: Path) -> Iterator[Victim]:
    with warm(
        tmp_path_factory.mktemp("secure"), papers / "server.pem", papers / "server.key", context=client(papers)
    ) as served:
        yield served


@pytest.mark.slow
@pytest.mark.parametrize("kind", HTTP)
def test_a_thousand_hostile_scrapes_cost_nothing_for_good(clear: Victim, kind: str) -> None:
    costs_nothing_for_good(clear, clear.metrics, HTTP[kind], lambda: scrape(clear.url))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["goes away", "half a request", "garbage", "a greeting of TLS", "a line without an end"])
def test_a_thousand_that_cannot_shake_hands_cost_nothing_for_good(secure: Victim, papers: Path, kind: str) -> None:
    context = client(papers)
    costs_nothing_for_good(secure, secure.metrics, HTTP[kind], lambda: scrape(secure.url, context))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "newest"),
    [
        ("goes away", ssl.TLSVersion.TLSv1_2),
        ("half a request", ssl.TLSVersion.TLSv1_3),
        ("ten thousand lines", ssl.TLSVersion.TLSv1_3),
        ("no ear for the answer", ssl.TLSVersion.TLSv1_3),
    ],
)
def test_a_thousand_that_shake_hands_cost_nothing_for_good(
    secure: Victim, papers: Path, kind: str, newest: ssl.TLSVersion
) -> None:
    context, hostile = client(papers), client(papers)
    hostile.maximum_version = newest

    def connect() -> socket.socket:
        return hostile.wrap_socket(secure.metrics(), server_hostname="localhost")

    costs_nothing_for_good(secure, connect, HTTP[kind], lambda: scrape(secure.url, context))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTROL)
def test_a_thousand_hostile_commands_cost_nothing_for_good(clear: Victim, kind: str) -> None:
    costs_nothing_for_good(clear, clear.controlled, CONTROL[kind], lambda: ask(clear.control, {"op": "status"}, 60))


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Victim]:
    """Without clients before: one that has not gone yet would leave its descriptor to those who come."""
    with victim(tmp_path) as served:
        yield served


def test_who_comes_while_there_are_no_descriptors_is_served_as_soon_as_there_are(quiet: Victim) -> None:
    pid = quiet.process.pid
    taken = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    free = next(number for number in count() if number not in taken)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with quiet.metrics() as scraping, quiet.controlled() as asking:
        scraping.sendall(GET + b"\r\n")
        asking.sendall(b'{"op":"status"}\n')
        for connection in (scraping, asking):
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(60)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert scraping.recv(12) == b"HTTP/1.1 200"
        assert asking.recv(10) == b'{"ok":true'
