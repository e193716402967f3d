"""The agent's end of its holders: start them, talk to them, notice their death, find those that an earlier agent left."""

from __future__ import annotations

import errno
import logging
import math
import os
import secrets
import signal
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
from balloon_agent.holder import cancellation
from balloon_agent.holder.protocol import (
    UNDERSTOOD,
    VERSION,
    LineReader,
    encode,
)
from balloon_agent.holder.server import (
    FIRST_CHOICE,
    PROTECTED,
    SYSCALLS,
    listen,
)
from balloon_agent.linux.libc import syscall_number
from balloon_agent.linux.niceness import AHEAD, ORDINARY, give_priority
from balloon_agent.linux.pagemap import Pagemap
from balloon_agent.linux.pin import duplicate_from
from balloon_agent.linux.process import Process, is_readable

from . import left_behind
from .left_behind import HOLDER, Greeted

START_DEADLINE = 60.0  # seconds: a Python interpreter starts in a fraction of one, but not on every machine
ANSWER_DEADLINE = 60.0  # taking 64 MiB out of fragmented memory can mean compacting all of it
AHEAD_FOR = 1.0  # seconds that what should be short runs ahead of others: it may take for ever after all
FORK_DEADLINE = 5.0  # a holder with nothing else to do forks at once; and there are others, or a new one
MOST_PARENTS = 3  # that are asked to fork, one after the other
# Seconds until the first look at whether somebody else needs the memory that is being taken, and between two looks at most:
# what is taken may be gone from what is free only a moment later.
LOOK, LONGEST_LOOK = 0.02, 0.1
_log = logging.getLogger(__name__)


class HolderClient:
    """A connection to one holder. What the holder owns outlives this object, and this process.

    A holder that was just started is not waited for until it is asked something; one that was found has answered ``hello``. One
    without ``holds_memory`` only does what may block, and can be killed without a loss.
    """

    def __init__(
        self,
        name: str,
        connection: socket.socket,
        holds_memory: bool,
        pid: int,
        child: subprocess.Popen[bytes] | None = None,
        *,
        dial: Callable[[], socket.socket],
        hello: dict[str, Any] | None = None,
        leeway: Callable[[], float] = lambda: math.inf,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._alive = alive
        self.name = name
        self._leeway = leeway
        # Whether it was asked to give up its last request, or the present one.
        self.gave_way = False
        self.holds_memory = holds_memory
        # Whether it owes an answer that is not waited for any more.
        self.is_slow = False
        self._dial = dial
        self._connection = connection
        self._reader = LineReader(connection)
        self._child = child
        self._greeted = hello is not None
        self._broken = False
        self._is_fuse: bool | None = None  # unknown, of one that was found
        self._stays_as_it_is = False
        # What it held when it was found; whoever enters that into a ledger empties the list.
        self.extents: list[dict[str, Any]] = [] if hello is None else hello["extents"]
        # An older holder keeps what it has and gives it back. It is not asked for more, nor for children that would be as old.
        self.is_older = hello is not None and hello["version"] != VERSION
        self._pagemap: Pagemap | None = None
        self.process = Process(pid)
        # A connection that is still there now was its all the time, and so was its number. It says nothing unless it is asked.
        if is_readable(connection.fileno(), 0):
            self.process.close()
            raise HolderLost(f"holder {self.name} has died")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def pidfd(self) -> int:
        """Readable when it has ended."""
        return self.process.pidfd

    def _greet(self) -> None:
        """Wait for one that was just started to come up."""
        self._greeted = True
        self.request({"op": "hello"}, START_DEADLINE)

    def request(
        self,
        message: dict[str, Any],
        deadline: float = ANSWER_DEADLINE,
        *,
        short: bool = False,
        takes: bool = False,
        kills: bool = True,
    ) -> dict[str, Any]:
        """One request's answer, good or bad. HolderLost if none comes within ``deadline`` seconds, or the holder died.

        What is bound to be ``short`` is done ahead of other processes. What ``takes`` memory from the guest gives way if
        somebody else turns out to need it meanwhile.
        A holder that does not answer in time is killed: a late answer would be taken for the next request's, and a stuck
        system call is a process to kill. What it held is the guest's then, as after any other death. Without ``kills`` it is
        called anew for the next request instead, and what it answers to this one it tells nobody.
        """
        if self._broken:
            raise HolderLost(f"holder {self.name} is lost")
        if not self._greeted:
            self._greet()
        self._alive()
        end, self.gave_way = time.monotonic() + deadline, False
        try:
            if self.is_slow:
                self._connection.close()
                self._connection = self._dial()
                self._reader = LineReader(self._connection)
                self._alive()
            self._connection.settimeout(deadline)
            self._connection.sendall(encode(message))
            if short:
                give_priority(AHEAD, self.process)
                self._wait(min(AHEAD_FOR, deadline), takes=takes)
                if not self.gave_way:
                    give_priority(ORDINARY, self.process)
            if takes:
                self._wait(end - time.monotonic(), takes=True)
            self._connection.settimeout(max(LOOK, end - time.monotonic()))
            answer = self._reader.read()
            if self.gave_way:
                give_priority(ORDINARY, self.process)
        except TimeoutError as error:
            if not kills:
                self.is_slow = True
                return {"ok": False, "error": f"no answer within {deadline:g} s"}
            self._abandon()
            raise HolderLost(f"holder {self.name} gave no answer to {message['op']} within {deadline:g} s") from error
        except (OSError, ValueError) as error:
            self._abandon()
            raise HolderLost(f"holder {self.name} is lost at {message['op']}: {error}") from error
        if answer is None:
            self._abandon()
            raise HolderLost(f"holder {self.name} died at {message['op']}")
        self.is_slow = False
        return answer

    def _wait(self, seconds: float, *, takes: bool) -> None:
        """For an answer, so many seconds at most. What ``takes`` is asked to give way when it should."""
        end = time.monotonic() + seconds
        interval = LOOK if takes else seconds
        while not is_readable(self._connection.fileno(), min(interval, end - time.monotonic())):
            if time.monotonic() >= end:
                return
            if takes and not self.gave_way:
                leeway = self._leeway()
                interval = min(leeway, LONGEST_LOOK)
                if leeway <= 0:
                    self.gave_way, interval = True, LOOK
                    # The sooner it is out of this, the better for whoever waits for memory.
                    give_priority(AHEAD, self.process)
            if self.gave_way:
                # Again and again: it may not even have begun, and what was asked before that does not count.
                self.process.signal(cancellation.SIGNAL)

    def _abandon(self) -> None:
        self._broken = True
        self.process.signal(signal.SIGKILL)

    def duplicate(self, fd: int) -> int:
        """A duplicate of one of the holder's descriptors. HolderLost if the holder is gone, OSError if it is not permitted."""
        try:
            return duplicate_from(self.pidfd, fd)
        except OSError as error:
            # What is on its way out has no descriptors any more, before it is gone.
            if error.errno not in (errno.ESRCH, errno.EBADF):
                raise
            raise HolderLost(f"holder {self.name} died before its pin could be duplicated") from error

    @property
    def pagemap(self) -> Pagemap:
        """What is behind its addresses, without asking it. HolderLost if it is gone."""
        if self._pagemap is None:
            try:
                pagemap = Pagemap(process=self.pid)
            except (FileNotFoundError, ProcessLookupError) as error:
                raise HolderLost(f"holder {self.name} has died") from error
            if self.process.ends_within(0):
                # Then its number may have been another's when that was opened.
                pagemap.close()
                raise HolderLost(f"holder {self.name} has died")
            self._pagemap = pagemap
        return self._pagemap

    def set_fuse(self, on: bool) -> None:
        """Whether the OOM killer should take this process first, and the memory that it holds, or never.

        HolderLost if it died before it came up; OSError where it cannot be taken off the fuse.
        """
        if on == self._is_fuse or self._stays_as_it_is:
            return
        if on and not self._greeted:
            # The first that it does when it is up is to protect itself.
            self._greet()
        if on and self._is_fuse is None:
            # To make it the first choice is always permitted, to take that back is not.
            self.set_fuse(False)
            if self._stays_as_it_is:
                return
        try:
            with open(self.process.open("oom_score_adj", os.O_WRONLY), "w", encoding="ascii") as file:
                file.write(f"{FIRST_CHOICE if on else PROTECTED}\n")
            self._is_fuse = on
        except ProcessLookupError:
            pass  # it has died, which is dealt with as the event that it is
        except PermissionError as error:
            # Who could not be protected is not offered either: there would be no way back.
            if not self._stays_as_it_is:
                _log.warning("holder %s cannot be protected from the OOM killer: %s", self.name, error.strerror)
            self._stays_as_it_is = True
        except OSError as error:
            if not on:
                raise
            _log.debug("holder %s is not on the fuse: %s", self.name, error)

    def kill(self) -> bool:
        """End the holder, and with it everything that it holds; wait until it is gone. Whether it is."""
        self.process.signal(signal.SIGKILL)
        return self._reap()

    def close(self) -> None:
        """Hang up. The holder ends by itself if it holds nothing, and stays otherwise."""
        self.hang_up()
        self._drop_descriptors()

    def hang_up(self) -> None:
        """As ``close``, for who waits for its end afterwards."""
        self._connection.close()

    def end(self, seconds: float) -> bool:
        """After ``hang_up`` on a holder that holds nothing: close everything when it is gone. Whether it went in time."""
        ended = self._reap(seconds)
        self._drop_descriptors()
        return ended

    def _drop_descriptors(self) -> None:
        self.process.close()
        if self._pagemap is not None:
            self._pagemap.close()
            self._pagemap = None

    def _reap(self, seconds: float = START_DEADLINE) -> bool:
        self._alive()
        if not self.process.ends_within(seconds):
            _log.warning("holder %s (process %d) does not end", self.name, self.pid)
            return False
        if self._child is not None:
            self._child.wait()
        return True


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
    return f"import sys; sys.path[:] = {known!r}; from balloon_agent.holder.server import main; sys.exit(main(sys.argv[2:]))"
