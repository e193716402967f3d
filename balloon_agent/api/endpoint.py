"""Serves /metrics over HTTP/1.1, from one thread and within fixed bounds, whoever asks and whatever is sent.

All memory of the agent is locked, and what a thread's stack or heap has grown to does not come back: so clients get no threads,
but one takes turns with all. There are at most MOST_CLIENTS, and of each MOST_HEAD bytes are kept before anything is parsed. A
client has SCRAPE_DEADLINE seconds for all of it. If others wait it may lose its place sooner, unless it is being answered.
"""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from itertools import takewhile
from typing import TypeVar
from urllib.parse import urlsplit

from balloon_agent.errors import BadInput
from balloon_agent.guest.statistics import GuestStatistics
from balloon_agent.options import parse_listen

from .metrics import Page, Pages
from .snapshot import Board
from .threads import ACCEPT_PAUSE
from .tls import Security

MOST_CLIENTS = 16
MOST_HEAD = 8192  # bytes of a request up to its empty line
SCRAPE_DEADLINE = 30.0  # seconds that a client may take
# Nobody loses a place sooner than that: time enough to shake hands and to ask, in the middle of a flood of connections, too.
LEAST_STAY = 0.25
# A connection closed with unread data is reset, and its client may never see the answer: so much is thrown away before.
MOST_IGNORED = 1 << 16
_BACKLOG = 128
_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Refused(Exception):
    """A request that gets no metrics: the status, and what to say."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


def parse(head: bytes) -> tuple[str, dict[str, str]]:
    """The method of a request for /metrics, and its headers by their names in lower case. Refused for any other request."""
    line, *lines = (line.strip() for line in head.decode("latin-1").split("\n"))
    words = line.split()
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise Refused(HTTPStatus.BAD_REQUEST, "a request begins with GET /metrics HTTP/1.1")
    method, target, _ = words
    if method not in ("GET", "HEAD"):
        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered")
    try:
        path = urlsplit(target).path
    except ValueError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
    if path != "/metrics":
        raise Refused(HTTPStatus.NOT_FOUND, "metrics are at /metrics")
    headers: dict[str, str] = {}
    for line in takewhile(bool, lines):
        name, colon, value = line.partition(":")
        if not colon:
            raise Refused(HTTPStatus.BAD_REQUEST, "a header line has no colon")
        name = name.strip().lower()
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    return method, headers


def respond(status: HTTPStatus, page: Page, *, with_body: bool = True) -> bytes:
    """A whole response."""
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {page.content_type}",
        f"Content-Length: {len(page.body)}",
        "Connection: close",
    ]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD")
    if page.encoding is not None:
        lines.append(f"Content-Encoding: {page.encoding}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (page.body if with_body else b"")


class _Client:
    """A connection, and how far its request has come."""

    def __init__(self, connection: socket.socket, pages: Pages, context: ssl.SSLContext | None) -> None:
        self.connection = connection
        self.since = time.monotonic()
        self.is_being_answered = False
        self._pages = pages
        self._context = context
        self.turns = self._serve()

    def _serve(self) -> Generator[int, None, None]:
        self.connection.setblocking(False)
        if self._context is not None:
            secured = self._context.wrap_socket(self.connection, server_side=True, do_handshake_on_connect=False)
            self.connection = secured
            yield from _when_ready(secured.do_handshake)
        head = yield from self._receive_head()
        if not head:
            return
        self.is_being_answered = True
        yield from self._send(self._answer(head))
        self.is_being_answered = False
        self.connection.shutdown(socket.SHUT_WR)
        ignored = 0
        while ignored < MOST_IGNORED:
            received = yield from self._receive(MOST_HEAD)
            if not received:
                return
            ignored += len(received)

    def _receive_head(self) -> Generator[int, None, bytes]:
        """All of it, or the first MOST_HEAD bytes if it is longer; nothing if the client has hung up before."""
        head = bytearray()
        while not _is_whole(head) and len(head) < MOST_HEAD:
            received = yield from self._receive(MOST_HEAD - len(head))
            if not received:
                return b""
            head += received
        return bytes(head)

    def _receive(self, most: int) -> Generator[int, None, bytes]:
        return (yield from _when_ready(lambda: self.connection.recv(most)))

    def _send(self, response: bytes) -> Generator[int, None, None]:
        sent = 0
        while sent < len(response):
            left = memoryview(response)[sent:]
            sent += yield from _when_ready(partial(self.connection.send, left), selectors.EVENT_WRITE)

    def _answer(self, head: bytes) -> bytes:
        try:
            if not _is_whole(head):
                raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {MOST_HEAD} bytes, and no empty line")
            method, headers = parse(head)
            page = self._pages.get(headers.get("accept", ""), headers.get("accept-encoding", ""))
        except Refused as refused:
            return respond(refused.status, Page("text/plain; charset=utf-8", f"{refused}\n".encode()))
        except Exception as error:
            # Prometheus takes it as down, and shows it.
            _log.debug("a scrape came to nothing", exc_info=True)
            text = f"the metrics cannot be told: {error or type(error).__name__}\n"
            return respond(HTTPStatus.INTERNAL_SERVER_ERROR, Page("text/plain; charset=utf-8", text.encode()))
        return respond(HTTPStatus.OK, page, with_body=method == "GET")


class Endpoint:
    """/metrics, served from construction until ``stop``; at ``url``. BadInput if it cannot be."""

    def __init__(
        self, board: Board, listen: str, security: Security | None = None, statistics: GuestStatistics | None = None
    ) -> None:
        host, port = parse_listen(listen)
        self._security = security
        self._context = None if security is None else security.context()
        self._pages = Pages(board, statistics)
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
            self._listener = socket.create_server((host, int(address[1])), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
        except OSError as error:
            raise BadInput(
                f"cannot serve metrics on {listen}: {error.strerror}; choose another --metrics-listen HOST:PORT"
            ) from error
        self._listener.setblocking(False)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http{'' if security is None else 's'}://{shown}:{self._listener.getsockname()[1]}/metrics"
        self._clients: list[_Client] = []  # the one that has been here longest first
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._hears = True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def read_certificates(self) -> None:
        """Use what is in the files now, for who comes from now on. BadInput, and the ones before are kept."""
        if self._security is not None:
            # A new one: an authority that was trusted is not any more.
            self._context = self._security.context()

    def stop(self) -> None:
        """Hang up on everybody."""
        self._stopping.set()
        # Wakes the thread: what it waits for on the socket has come to an end.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=5)
        self._listener.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            pause = self._let_in()
            if self._clients:
                left = max(0.0, self._clients[0].since + SCRAPE_DEADLINE - time.monotonic())
                pause = left if pause is None else min(left, pause)
            # For ever, if there are no clients: nothing wakes up for nothing.
            for key, _ in self._selector.select(pause):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.data in self._clients:
                    self._take_turn(key.data)
            while self._clients and self._clients[0].since + SCRAPE_DEADLINE <= time.monotonic():
                self._drop(self._clients[0])
        for client in [*self._clients]:
            self._drop(client)
        self._selector.close()

    def _let_in(self) -> float | None:
        """Hear of who knocks if there is a place, or will be one. Otherwise they wait: returns for how many seconds at most."""
        full = len(self._clients) >= MOST_CLIENTS
        wait = max(0.0, self._next_to_go(self._clients).since + LEAST_STAY - time.monotonic()) if full else 0.0
        if wait and self._hears:
            self._selector.unregister(self._listener)
        elif not wait and not self._hears:
            self._selector.register(self._listener, selectors.EVENT_READ)
        self._hears = not wait
        return wait or None

    @staticmethod
    def _next_to_go(clients: list[_Client]) -> _Client:
        return next((client for client in clients if not client.is_being_answered), clients[0])

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if not self._stopping.is_set():
                # No descriptor, or no memory. The client stays in the kernel's queue, and would be tried again at once.
                _log.debug("no client can be let in for now: %s", error)
                self._stopping.wait(ACCEPT_PAUSE)
            return
        client = _Client(connection, self._pages, self._context)
        self._clients.append(client)
        # Its request is here already, most often: then it needs nobody else's place.
        self._take_turn(client)
        if len(self._clients) > MOST_CLIENTS:
            self._drop(self._next_to_go(self._clients[:-1]))

    def _take_turn(self, client: _Client) -> None:
        try:
            self._wait(client, next(client.turns))
        except StopIteration:
            self._drop(client)
        except Exception as error:
            # A client's failure, however it fails, is the client's: others are served, and no line is logged for each.
            _log.debug("a client's request came to nothing: %s", error)
            self._drop(client)

    def _wait(self, client: _Client, events: int) -> None:
        known = self._selector.get_map().get(client.connection)
        if known is None:
            self._selector.register(client.connection, events, client)
        elif known.events != events:
            self._selector.modify(client.connection, events, client)

    def _drop(self, client: _Client) -> None:
        self._clients.remove(client)
        with suppress(KeyError, ValueError):
            self._selector.unregister(client.connection)
        client.turns.close()
        client.connection.close()


def _is_whole(head: bytes | bytearray) -> bool:
    return b"\r\n\r\n" in head or b"\n\n" in head


def _when_ready(call: Callable[[], Result], waits_for: int = selectors.EVENT_READ) -> Generator[int, None, Result]:
    """The result of a call on a socket that does not block, as soon as there is one."""
    while True:
        try:
            return call()
        except BlockingIOError:
            yield waits_for
        except ssl.SSLWantReadError:
            yield selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            yield selectors.EVENT_WRITE
