"""The inbox of the thread that owns the balloon: commands and questions of other threads, and the wake-up for them."""

from __future__ import annotations

import os
import queue
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from balloon_agent.errors import BadInput, BalloonError
from balloon_agent.frames import FRAME
from balloon_agent.size import format_size
from balloon_agent.sizing.governor import Mode

from .questions import Question

# Seconds that another thread waits for an answer of the owner.
ANSWER_DEADLINE = 30.0


@dataclass(frozen=True)
class Command:
    """A change of the balloon's size by hand, in bytes. Commands are numbered in their order."""

    number: int
    mode: Mode
    size: int | None  # of mode manual


class Inbox:
    """Any thread may put something in; ``take`` is the owner's. ``ram`` bytes is the largest size of a balloon.

    ``doing`` says in a word what keeps the owner from an answer.
    """

    def __init__(self, ram: int, doing: Callable[[], str]) -> None:
        self._ram = ram
        self._doing = doing
        self._messages: queue.SimpleQueue[Command | Question] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._sent = 0
        # Open until the process ends: signals and other threads may write to it at any time.
        self._wakeup, self.waking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def close(self) -> None:
        """Once no thread and no signal uses it any more: an agent keeps it until its process ends."""
        os.close(self._wakeup)
        os.close(self.waking)

    # -- of other threads ------------------------------------------------------------------------------------------

    def command(self, mode: Mode, size: int | None) -> int:
        """Leave a change for the owner, and return its number. BadInput if the size is none for this guest."""
        if size is not None and (size < 0 or size % FRAME or size > self._ram):
            raise BadInput(
                f"{size} bytes is no size for this balloon: "
                f"a multiple of {FRAME} up to the guest's {self._ram} bytes ({format_size(self._ram)})"
            )
        with self._sending:
            self._sent += 1
            number = self._sent
            self._messages.put(Command(number, mode, size))
        self.wake()
        return number

    def locate(self, cell_bytes: int) -> bytes:
        """How much of each piece of memory of that size is in the balloon: the line to answer. BadInput if it is too long."""
        question = Question(cell_bytes, Future())
        self._messages.put(question)
        self.wake()
        try:
            return question.answer.result(ANSWER_DEADLINE)
        except TimeoutError as error:
            question.answer.cancel()
            raise BalloonError(f"the agent is busy with {self._doing()}", "try again later") from error

    def wake(self) -> None:
        """End the owner's sleep."""
        # A pipe that is full wakes the owner up as well.
        with suppress(BlockingIOError):
            os.write(self.waking, b"\0")

    # -- of the owner ------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when there may be something to take."""
        return self._wakeup

    def take(self) -> Iterator[Command | Question]:
        """Commands and questions that have come, in their order."""
        with suppress(BlockingIOError):
            os.read(self._wakeup, select.PIPE_BUF)
        with suppress(queue.Empty):
            while True:
                yield self._messages.get_nowait()
