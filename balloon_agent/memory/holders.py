"""The agent's end of its holders: start them, talk to them, notice their death, find those that an earlier agent left."""

from __future__ import annotations

import logging
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from balloon_agent.errors import HolderLost

from .holder import SYSCALLS, listen
from .libc import syscall_number
from .pin import duplicate_from
from .protocol import VERSION, LineReader, encode

START_DEADLINE = 60.0  # seconds: a Python interpreter starts in a fraction of one, but not on every machine
ANSWER_DEADLINE = 60.0  # taking 64 MiB out of fragmented memory can mean compacting all of it
_HOLDER = "balloon_agent.memory.holder"
_log = logging.getLogger(__name__)


class HolderClient:
    """A connection to one holder. What the holder owns outlives this object, and this process.

    A holder that was just started is not waited for until it is asked something. One without ``holds_memory`` only does what
    may block, and can be killed without a loss.
    """

    def __init__(
        self,
        name: str,
        connection: socket.socket,
        holds_memory: bool,
        process: subprocess.Popen[bytes] | None = None,
        pid: int | None = None,
    ) -> None:
        self.name = name
        self.holds_memory = holds_memory
        self._connection = connection
        self._reader = LineReader(connection)
        self._process = process
        self._greeted = False
        self.extents: list[dict[str, Any]] = []
        self.pid = process.pid if process is not None else pid if pid is not None else self._greet()
        self.pidfd = os.pidfd_open(self.pid)

    def _greet(self) -> int:
        self._greeted = True
        hello = self.request({"op": "hello"}, START_DEADLINE)
        if hello["version"] != VERSION:
            raise HolderLost(
                f"holder {self.name} speaks version {hello['version']}, not {VERSION}: finish with the agent that started it"
            )
        self.extents = hello["extents"]
        return int(hello["pid"])

    def request(self, message: dict[str, Any], deadline: float = ANSWER_DEADLINE) -> dict[str, Any]:
        """One request's answer, good or bad. HolderLost if none comes within ``deadline`` seconds, or the holder died."""
        if not self._greeted:
            self._greet()
        self._connection.settimeout(deadline)
        try:
            self._connection.sendall(encode(message))
            answer = self._reader.read()
        except TimeoutError as error:
            raise HolderLost(f"holder {self.name} gave no answer to {message['op']} within {deadline:g} s") from error
        except (OSError, ValueError) as error:
            raise HolderLost(f"holder {self.name} is lost at {message['op']}: {error}") from error
        if answer is None:
            raise HolderLost(f"holder {self.name} died at {message['op']}")
        return answer

    def duplicate(self, fd: int) -> int:
        """A duplicate of one of the holder's descriptors. HolderLost if the holder is gone, OSError if it is not permitted."""
        try:
            return duplicate_from(self.pidfd, fd)
        except ProcessLookupError as error:
            raise HolderLost(f"holder {self.name} died before its pin could be duplicated") from error

    def kill(self) -> None:
        """End the holder, and with it everything that it holds; wait until it is gone."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self._reap()

    def close(self) -> None:
        """Hang up. The holder ends by itself if it holds nothing, and stays otherwise."""
        self._connection.close()
        os.close(self.pidfd)

    def end(self) -> None:
        """Hang up on a holder that holds nothing, and wait until it is gone."""
        self._connection.close()
        self._reap()
        os.close(self.pidfd)

    def _reap(self) -> None:
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        if not poller.poll(START_DEADLINE * 1000):
            _log.warning("holder %s (process %d) does not end", self.name, self.pid)
        elif self._process is not None:
            self._process.wait()


class Holders:
    """All holders of one agent. Their sockets lie in ``folder``, one each, which only root can enter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clients: dict[str, HolderClient] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[HolderClient]:
        return iter(list(self._clients.values()))

    def __getitem__(self, name: str) -> HolderClient:
        if name not in self._clients:
            raise HolderLost(f"there is no holder {name}")
        return self._clients[name]

    def __contains__(self, name: object) -> bool:
        return name in self._clients

    def start(self, *, holds_memory: bool = True) -> HolderClient:
        """Start a holder. It comes up while others work: only the first request waits for it."""
        path = self._folder / secrets.token_hex(4)
        for parent in self:
            # A fork of a holder is up at once, and shares most of its memory.
            answer = parent.request({"op": "fork", "socket": str(path)})
            if answer["ok"]:
                return self._connect(path, holds_memory, pid=answer["pid"])
            _log.warning("holder %s does not fork: %s", parent.name, answer["error"])
        with listen(str(path)) as listener:
            numbers = [f"{name}={syscall_number(name)}" for name in SYSCALLS]
            process = subprocess.Popen(
                # Without site packages' start-up code, which the search path makes up for: faster, and smaller.
                [sys.executable, "-S", "-s", "-m", _HOLDER, str(path), str(listener.fileno()), *numbers],
                pass_fds=[listener.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._connect(path, holds_memory, process=process)

    def warm_up(self) -> None:
        """Start the first holder if there is none, without waiting for it: whoever needs one later forks it off that."""
        if not self._clients:
            self.start()

    def adopt(self) -> list[HolderClient]:
        """Connect to the holders that an earlier agent has left. Sockets that nobody listens on are removed."""
        found = []
        for path in sorted(self._folder.iterdir()):
            try:
                found.append(self._connect(path, holds_memory=True))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
        return found

    def _connect(
        self, path: Path, holds_memory: bool, *, process: subprocess.Popen[bytes] | None = None, pid: int | None = None
    ) -> HolderClient:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(START_DEADLINE)
            connection.connect(str(path))
            client = HolderClient(path.name, connection, holds_memory, process, pid)
        except BaseException:
            connection.close()
            raise
        self._clients[client.name] = client
        return client

    def kill(self, name: str) -> None:
        """End a holder that does not answer, or has died already, and forget it."""
        client = self._clients.pop(name)
        client.kill()
        client.close()
        (self._folder / name).unlink(missing_ok=True)

    def close(self, is_empty: Callable[[str], bool]) -> None:
        """Hang up on all. Those that hold nothing end, and are waited for."""
        for client in self:
            if is_empty(client.name):
                client.end()
            else:
                client.close()
        self._clients.clear()
