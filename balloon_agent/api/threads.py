"""Serving sockets from threads that sleep until somebody calls: socketserver's own loop wakes up twice a second."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from socketserver import BaseServer, TCPServer, ThreadingMixIn
from typing import Any

# Seconds until a client is looked for again, for which there was no descriptor or no memory.
ACCEPT_PAUSE = 1.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_log = logging.getLogger(__name__)


class BoundedThreads(ThreadingMixIn):
    """A thread for each client, so that a slow one keeps nobody waiting; and no more than ``most_clients`` of them."""

    daemon_threads = True
    most_clients = 16

    def get_request(self) -> Any:
        try:
            return super().get_request()  # type: ignore[misc]
        except OSError as error:
            if error.errno in _EXHAUSTED:
                # The client stays in the kernel's queue, and would be tried again at once, over and over.
                time.sleep(ACCEPT_PAUSE)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        assert isinstance(self, BaseServer)
        if not self._enter(request):
            _log.debug("a client is turned away: there are enough")
            with suppress(OSError):
                self.turn_away(request)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            # No thread could be started.
            self._leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def _enter(self, request: Any) -> bool:
        kind = self.kind_of(request)
        slots = self._slots.setdefault(kind, threading.BoundedSemaphore(self.most_clients))
        if not slots.acquire(blocking=False):
            return False
        self._taken[id(request)] = slots
        return True

    def _leave(self, request: Any) -> None:
        self._taken.pop(id(request)).release()

    @cached_property
    def _slots(self) -> dict[str, threading.BoundedSemaphore]:
        return {}

    @cached_property
    def _taken(self) -> dict[int, threading.BoundedSemaphore]:
        return {}

    def kind_of(self, request: Any) -> str:
        """Of each kind there may be so many: one does not keep another out."""
        return ""

    def turn_away(self, request: Any) -> None:
        """What to say to one too many, without waiting for it."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client's failure is the client's: no traceback on stderr for each."""
        _log.debug("a client's request came to nothing", exc_info=True)


def serve_in_thread(server: TCPServer, name: str) -> Callable[[], None]:
    """Answer requests until the returned function is called, which ends the thread and closes the server."""
    stopping = threading.Event()

    def answer() -> None:
        while not stopping.is_set():
            server.handle_request()

    thread = threading.Thread(target=answer, name=name, daemon=True)
    thread.start()

    def stop() -> None:
        stopping.set()
        # Wakes the thread: what it waits for on the socket has come to an end.
        with suppress(OSError):
            server.socket.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=5)
        server.server_close()

    return stop
