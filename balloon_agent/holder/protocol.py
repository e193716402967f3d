"""What the agent and its holders say to each other: one JSON object a line, over a unix socket, one answer a request.

A request has ``op`` and what belongs to it; an answer has ``ok``, and ``error`` where that is false. By a signal the agent
asks to give up what the present request is about (see ``giving_way``): the answer is what came of it. The first exchange
is ``hello``, which carries the version: a holder of an older one that is UNDERSTOOD gives back what it has, and takes no more.
"""

from __future__ import annotations

import json
import socket
from typing import Any

VERSION = 6
# Since 4 the answers to ``hello`` and ``give_back`` are the same. But a holder of version 4 would die of the signal, and one of
# version 5 splits no huge pages.
UNDERSTOOD = (4, 5, 6)
# The longest answer is to a hello: a gigabyte in single frames, each a piece of its own, is under 8 MiB of text.
LONGEST_LINE = 64 << 20


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class LineReader:
    """Lines from a stream socket. Its timeout is the caller's to set."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pending = bytearray()

    def read(self) -> dict[str, Any] | None:
        """The next message, or None at the end of the stream. ValueError if it is none, TimeoutError if it is late."""
        while (end := self._pending.find(b"\n")) < 0:
            if len(self._pending) > LONGEST_LINE:
                raise ValueError(f"a line of more than {LONGEST_LINE} bytes")
            data = self._connection.recv(65536)
            if not data:
                return None
            self._pending += data
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"not an object: {line[:80]!r}")
        return message
