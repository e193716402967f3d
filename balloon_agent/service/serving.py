"""Serving sockets from a thread that sleeps until somebody calls: socketserver's own loop wakes up twice a second."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from socketserver import TCPServer


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
