"""Signals that stop an agent before its daemon listens: noted, and nothing is interrupted half-way."""

from __future__ import annotations

import os
import signal

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopping:
    """From its construction on these signals are only noted. The daemon's own handlers replace that, and ask ``is_asked`` once.

    An exception out of a handler could come between taking something and noting that it was taken.
    """

    def __init__(self) -> None:
        self.is_asked = False
        # Open until the process ends: a signal may write to it at any time.
        self._readable, self._waking = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in STOPPING:
            signal.signal(number, self._note)
        # A handler runs only when Python does; who sleeps in the kernel just then is woken up by this.
        signal.set_wakeup_fd(self._waking, warn_on_full_buffer=False)

    def fileno(self) -> int:
        """Readable once a signal has come."""
        return self._readable

    def _note(self, *_: object) -> None:
        self.is_asked = True
