"""Giving way: a holder gives up what it is taking when the agent sees that somebody else needs the memory.

The agent asks for it by a signal, since a holder that is about to take memory hears nothing else. What a kernel does for
minutes on behalf of one system call, offlining a block above all, it gives up at a signal, too.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNAL = signal.SIGUSR1
WHY = "given up half-way: somebody else needs the memory"


class GivenWay(Exception):
    """What was being done has been given up."""


class GivingWay:
    """``asked`` says whether the present request is to be given up."""

    def __init__(self) -> None:
        self.asked = False
        self._interrupts = False

    def listen(self) -> None:
        """From now on this process hears of it; before that it would die of it. Children do, too."""
        signal.signal(SIGNAL, self._hear)

    def begin(self) -> None:
        """Another request: what was asked before was about an earlier one."""
        self.asked = False

    def check(self) -> None:
        """GivenWay if it is asked for."""
        if self.asked:
            raise GivenWay(WHY)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """As ``check``, also in the midst of a system call, which Python would begin anew otherwise."""
        self._interrupts = True
        try:
            self.check()
            yield
        finally:
            self._interrupts = False

    def _hear(self, _number: int, _frame: object) -> None:
        self.asked = True
        if self._interrupts:
            # Once: it is on its way out then.
            self._interrupts = False
            raise GivenWay(WHY)
