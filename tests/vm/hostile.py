"""Run in a guest, on the agent's control socket: a hundred clients at once, of which none behaves.

``hostile.py SOCKET MESSAGES``. Prints, as JSON, how many messages were sent, and how they were answered.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
import time

from balloon_agent.api.messages import Change, decode

CLIENTS = 100
DEADLINE = 240.0
PATTERNS = [
    b'{"op":"status"}',
    b'{"op":"set","size":4096}',
    b'{"op":"wait","timeout":0.1}',
    b'{"op":"next","after":0,"timeout":0.1}',
    b'{"op":"map","cell_bytes":2097152}',
    b'{"op":"stats"}',
    b'{"op":"follow"}',
    b'{"op":"hold"}',
    b"[" * 2000,
    b'{"op":' * 400,
    b'{"op":"set","size":1e400}',
    b'{"op":"set","size":-4096}',
    b'{"op":"map","cell_bytes":4096}',
    b'{"op":"\\ud800"}',
    b"\x00" * 100,
]


def message(source: random.Random) -> bytes:
    """One line that changes nothing, whatever it is."""
    while True:
        data = bytearray(source.choice(PATTERNS))
        for _ in range(source.randrange(6)):
            at = source.randrange(len(data))
            match source.randrange(4):
                case 0:
                    data[at] = source.randrange(256)
                case 1:
                    del data[at : at + source.randrange(1, 8)]
                case 2:
                    data[at:at] = source.randbytes(source.randrange(1, 40))
                case 3:
                    data[at:at] = bytes(data[: source.randrange(1, 200)])
            data = data or bytearray(b" ")
        line = bytes(data).replace(b"\n", b" ")
        try:
            if isinstance(decode(line), Change):
                continue
        except (ValueError, RecursionError):
            pass
        return line + b"\n"


class Crowd:
    """All clients, and what came of them."""

    def __init__(self, path: str, messages: int) -> None:
        self.path = path
        self.left = messages
        self.sent = self.good = self.refused = self.hung_up = 0
        self.lock = threading.Lock()
        self.deadline = time.monotonic() + DEADLINE

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(60)
        connection.connect(self.path)
        return connection

    def fuzz(self, seed: int) -> None:
        """Send messages and read the answers, anew after each one that ended the connection."""
        source = random.Random(seed)
        while True:
            with self.lock:
                if self.left <= 0 or time.monotonic() > self.deadline:
                    return
                self.left -= 1
            line = message(source)
            with self.connect() as connection:
                try:
                    connection.sendall(line)
                    answer = connection.makefile("rb").readline()
                except OSError:
                    answer = b""
            with self.lock:
                self.sent += 1
                if not answer:
                    self.hung_up += 1
                elif json.loads(answer)["ok"]:
                    self.good += 1
                else:
                    self.refused += 1

    def stall(self, seed: int) -> None:
        """Half a line and then nothing, until the others are done."""
        with self.connect() as connection:
            connection.sendall(b'{"op":"sta'[: seed % 10])
            self.wait()

    def deafen(self, _: int) -> None:
        """Ask, and never listen."""
        with self.connect() as connection:
            connection.settimeout(1)
            try:
                while self.left > 0:
                    connection.sendall(b'{"op":"status"}\n' * 10)
            except OSError:
                self.wait()

    def flood(self, _: int) -> None:
        """A line without an end."""
        while self.left > 0 and time.monotonic() < self.deadline:
            with self.connect() as connection:
                try:
                    while self.left > 0:
                        connection.sendall(b"x" * 65536)
                except OSError:
                    continue

    def wait(self) -> None:
        while self.left > 0 and time.monotonic() < self.deadline:
            threading.Event().wait(0.1)


def main() -> None:
    crowd = Crowd(sys.argv[1], int(sys.argv[2]))
    kinds = [crowd.fuzz] * 7 + [crowd.stall, crowd.deafen, crowd.flood]
    threads = [threading.Thread(target=kinds[number % len(kinds)], args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"sent": crowd.sent, "good": crowd.good, "refused": crowd.refused, "hung_up": crowd.hung_up}))


if __name__ == "__main__":
    main()
