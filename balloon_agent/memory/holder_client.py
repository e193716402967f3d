"""The agent's end of one holder: requests under a deadline, its place in the OOM killer's choice, its end."""

from __future__ import annotations

import errno
import logging
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from balloon_agent.errors import HolderLost
from balloon_agent.holder import cancellation
from balloon_agent.holder.protocol import (
    VERSION,
    LineReader,
    encode,
)
from balloon_agent.linux.niceness import AHEAD, ORDINARY, give_priority
from balloon_agent.linux.oom_score import FIRST_CHOICE, PROTECTED
from balloon_agent.linux.pagemap import Pagemap
from balloon_agent.linux.pin import duplicate_from
from balloon_agent.linux.process import Process, is_readable

START_DEADLINE = 60.0  # seconds: a Python interpreter starts in a fraction of one, but not on every machine
ANSWER_DEADLINE = 60.0  # taking 64 MiB out of fragmented memory can mean compacting all of it
AHEAD_FOR = 1.0  # seconds that what should be short runs ahead of others: it may take for ever after all
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
        # True if the holder was asked to give up its last request, or the present one.
        self.gave_way = False
        self.holds_memory = holds_memory
        # True while the holder owes an answer that is not waited for any more.
        self.is_slow = False
        self._dial = dial
        self._connection = connection
        self._reader = LineReader(connection)
        self._child = child
        self._greeted = hello is not None
        self._broken = False
        self._is_fuse: bool | None = None  # unknown, of one that was found
        self._stays_as_it_is = False
        # Extents that the holder had when it was found; the list is emptied as they are entered into a ledger.
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
        """The answer to a request, good or bad. HolderLost if none comes within ``deadline`` seconds, or the holder died.

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
            # A process on its way out has no descriptors any more, before it is gone.
            if error.errno not in (errno.ESRCH, errno.EBADF):
                raise
            raise HolderLost(f"holder {self.name} died before its pin could be duplicated") from error

    @property
    def pagemap(self) -> Pagemap:
        """The holder's page table, without asking it. HolderLost if the holder is gone."""
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
        """Have the OOM killer take this process first, with the memory that it holds, or never.

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
            # A holder that could not be protected is not offered either: there would be no way back.
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
