"""The agent's end of its holders: start them, talk to them, notice their death, find those that an earlier agent left."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from balloon_agent.errors import HolderLost
from balloon_agent.holder.protocol import (
    UNDERSTOOD,
    VERSION,
)
from balloon_agent.holder.server import (
    SYSCALLS,
    listen,
)
from balloon_agent.linux.libc import syscall_number
from balloon_agent.linux.niceness import ORDINARY, give_priority

from . import left_behind
from .holder_client import START_DEADLINE, HolderClient
from .left_behind import HOLDER, Greeted

FORK_DEADLINE = 5.0  # a holder with nothing else to do forks at once; and there are others, or a new one
MOST_PARENTS = 3  # that are asked to fork, one after the other
_log = logging.getLogger(__name__)


class Holders:
    """All holders of one agent. Their sockets lie in ``folder``, one each, which only root can enter.

    ``leeway`` tells how many seconds it takes at least until somebody else needs the memory that a holder is about to take: 0
    if that is so now. ``alive`` is called before each wait for a holder, of which none is longer than a minute.
    """

    def __init__(
        self, folder: Path, leeway: Callable[[], float] = lambda: math.inf, alive: Callable[[], None] = lambda: None
    ) -> None:
        self._alive = alive
        # A holder's own folder is another one.
        self._folder = folder.absolute()
        self._leeway = leeway
        self._clients: dict[str, HolderClient] = {}
        # Sockets of those that were killed and had not ended by then.
        self._unended: set[str] = set()
        # Sockets of holders that were found, and gave no answer, or none that is understood.
        self._unclaimed: list[Path] = []
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
        parents = (holder for holder in self if not (holder.is_older or holder.is_slow))
        for parent in islice(parents, MOST_PARENTS):
            path = self._new_path()
            # A fork of a holder is up at once, and shares most of its memory. One that comes too late is not called, and ends.
            try:
                answer = parent.request({"op": "fork", "socket": str(path)}, FORK_DEADLINE, kills=False)
            except HolderLost as error:
                _log.warning("%s", error)
                continue
            if answer["ok"]:
                path = left_behind.rename(path, answer["pid"], holds_memory=holds_memory)
                return self._connect(path, holds_memory, answer["pid"])
            _log.warning("holder %s does not fork: %s", parent.name, answer["error"])
        path = self._new_path()
        with listen(str(path)) as listener:
            numbers = [f"{name}={syscall_number(name)}" for name in SYSCALLS]
            # Isolated: neither the folder that the agent was started in nor its environment is anywhere that modules come from.
            # Without site packages' start-up code, which the search path makes up for: faster, and smaller. Newer Pythons warn
            # of a fork where there is a second thread: that one has no lock that a child could miss.
            options = ["-I", "-S", "-W", "ignore::DeprecationWarning"]
            child = subprocess.Popen(
                [sys.executable, *options, "-c", _program(sys.path), HOLDER, str(path), str(listener.fileno()), *numbers],
                pass_fds=[listener.fileno()],
                cwd="/",
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        # Should the agent die, the next one need not ask a process that is stuck who it is.
        path = left_behind.rename(path, child.pid, holds_memory=holds_memory)
        client = self._connect(path, holds_memory, child.pid, child)
        # Unlike this process: what is done there may take long.
        give_priority(ORDINARY, client.process)
        return client

    def _new_path(self) -> Path:
        return self._folder / secrets.token_hex(4)

    def warm_up(self) -> None:
        """Start the first holder if there is none, without waiting for it: whoever needs one later forks it off that."""
        if all(client.is_older for client in self):
            self.start()

    def adopt(self, seconds: float = START_DEADLINE, waking: int | None = None) -> list[HolderClient]:
        """Connect to the holders that an earlier agent has left, once no device acts on what they hold. Its workers are ended.

        All are waited for at once, ``seconds`` in all, or until ``waking`` is readable. Those that did not answer by then, or
        whose version is not understood, are left for ``end_unclaimed``.
        """
        found = left_behind.sockets(self._folder)
        workers = [path for path in found if left_behind.is_worker(path)]
        for path in left_behind.end(workers, seconds)[1]:
            _log.error("worker %s does not end, and may change a memory block yet", path.name)
            self._unended.add(path.name)
        greeted, self._unclaimed = left_behind.greet([path for path in found if path not in workers], seconds, waking)
        adopted = []
        try:
            while greeted:
                client = self._adopt(greeted[-1])
                greeted.pop()
                if client is not None:
                    adopted.append(client)
        finally:
            for each in greeted:
                each.connection.close()
        return adopted

    def _adopt(self, greeted: Greeted) -> HolderClient | None:
        path, connection, hello = greeted
        try:
            if hello["version"] in UNDERSTOOD:
                path = left_behind.rename(path, hello["pid"], holds_memory=True)
                return self._client(path, connection, True, hello["pid"], hello=hello)
            _log.warning("holder %s speaks version %s, not %d", path.name, hello["version"], VERSION)
        except (KeyError, TypeError, ValueError, ProcessLookupError, FileNotFoundError, HolderLost) as error:
            _log.warning("holder %s is not understood: %r", path.name, error)
        connection.close()
        self._unclaimed.append(path)
        return None

    def end_unclaimed(self) -> list[str]:
        """After ``adopt``: kill the holders that were not adopted, and wait until they are gone.

        What they held is the guest's then. Returns in words which could not be ended: these hold memory yet.
        """
        ended, left = left_behind.end(self._unclaimed, START_DEADLINE)
        for pid in ended:
            _log.warning("holder process %d could not be adopted: it has been ended, and what it held is the guest's", pid)
        self._unclaimed = left
        return [_cannot_be_ended(path) for path in left]

    def end_all(self) -> tuple[list[int], list[str]]:
        """Kill every holder and worker that an earlier agent has left, whatever they hold or speak.

        Returns the process numbers of holders, and in words what could not be ended. What they held is the guest's at once:
        nobody must be about to discard it.
        """
        found = left_behind.sockets(self._folder)
        workers = [path for path in found if left_behind.is_worker(path)]
        _, stuck = left_behind.end(workers, START_DEADLINE)
        ended, left = left_behind.end([path for path in found if path not in workers], START_DEADLINE)
        return ended, [_cannot_be_ended(path) for path in (*stuck, *left)]

    def _connect(
        self, path: Path, holds_memory: bool, pid: int, process: subprocess.Popen[bytes] | None = None
    ) -> HolderClient:
        connection = _dial(path)
        try:
            return self._client(path, connection, holds_memory, pid, process)
        except BaseException:
            connection.close()
            raise

    def _client(
        self,
        path: Path,
        connection: socket.socket,
        holds_memory: bool,
        pid: int,
        process: subprocess.Popen[bytes] | None = None,
        hello: dict[str, Any] | None = None,
    ) -> HolderClient:
        client = HolderClient(
            path.name,
            connection,
            holds_memory,
            pid,
            process,
            dial=partial(_dial, path),
            hello=hello,
            leeway=self._leeway,
            alive=self._alive,
        )
        self._clients[client.name] = client
        return client

    def kill(self, name: str) -> None:
        """End a holder that does not answer, or has died already, and forget it."""
        client = self._clients.pop(name)
        gone = client.kill()
        # One that cannot be killed now may do yet what it was asked for: the next agent is to find it, and wait.
        if gone:
            (self._folder / name).unlink(missing_ok=True)
        else:
            self._unended.add(name)
        client.close()

    @property
    def unended_workers(self) -> set[str]:
        """Those that were killed and are not gone yet, an earlier agent's included: a system call of theirs goes on."""
        for path in [self._folder / name for name in self._unended]:
            if not left_behind.is_served(path):
                self._unended.remove(path.name)
                path.unlink(missing_ok=True)
        return {name for name in self._unended if left_behind.is_worker(self._folder / name)}

    def close(self, is_empty: Callable[[str], bool]) -> None:
        """Hang up on all. Those that hold nothing end, and are waited for under one deadline."""
        ending: list[HolderClient] = []
        for client in self:
            if client.extents or not is_empty(client.name):
                client.close()
            else:
                client.hang_up()
                ending.append(client)
        end = time.monotonic() + START_DEADLINE
        for client in ending:
            if client.end(max(0.0, end - time.monotonic())):
                # One that does not go holds something after all: the next agent is to find it.
                (self._folder / client.name).unlink(missing_ok=True)
        self._clients.clear()


def _dial(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(START_DEADLINE)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def _cannot_be_ended(path: Path) -> str:
    pid = left_behind.process_number(path) or "of unknown number"
    return f"holder process {pid} ({path}) cannot be ended: what it holds is missing until it is gone"


def _program(path: Sequence[str]) -> str:
    """What a holder's interpreter runs: as ``python -m`` would, with the same modules as this process and from nowhere else."""
    known = [entry for entry in path if os.path.isabs(entry)]
    return f"import sys; sys.path[:] = {known!r}; from balloon_agent.holder.__main__ import main; sys.exit(main(sys.argv[2:]))"
