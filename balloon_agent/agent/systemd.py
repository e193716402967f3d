"""Telling systemd how it goes: ready, in what state, reloading, stopping, still alive. Silent where nobody listens.

Source: sd_notify(3), systemd.service(5) on Type=notify and WatchdogSec=.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping

_log = logging.getLogger(__name__)


class Notifier:
    """Takes what systemd has left in the environment out of it: what this process starts has nothing to say there.

    ``watchdog`` is how often, in seconds, to say ``alive`` at least; None if nobody watches.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ, pid: int | None = None) -> None:
        path = environment.pop("NOTIFY_SOCKET", "")
        watched = environment.pop("WATCHDOG_PID", "")
        interval = environment.pop("WATCHDOG_USEC", "")
        # A name that begins with @ lies in no directory.
        self._path = f"\0{path[1:]}" if path.startswith("@") else path
        self._due = 0.0
        mine = not watched or watched == str(os.getpid() if pid is None else pid)
        # Twice as often as has to be, as systemd recommends.
        self.watchdog = int(interval) / 2e6 if self._path and interval.isdecimal() and int(interval) and mine else None

    def ready(self) -> None:
        """Also after a reload."""
        self._send("READY=1")

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def beat(self) -> None:
        """``alive``, if it is time: before each wait of the thread that owns the device, as one step can be of many."""
        self.stay_alive(time.monotonic(), None)

    def stay_alive(self, now: float, pause: float | None) -> float | None:
        """Say that the thread which calls this lives, if it is time. Returns its ``pause``, or until that is due again."""
        if self.watchdog is None:
            return pause
        if now >= self._due:
            self.alive()
            self._due = now + self.watchdog
        return self._due - now if pause is None else min(pause, self._due - now)

    def reloading(self) -> None:
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._path:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
                # The owner thread waits for nobody.
                connection.setblocking(False)
                connection.sendto(text.encode(), self._path)
        except OSError as error:
            _log.debug("systemd does not hear %s: %s", text, error)
