"""What becomes of a device that fails: it is reset and told anew what the balloon holds, or else left alone.

One that was unplugged takes the balloon with it: nobody acts on that memory any more, and it is the guest's again at once. What
is plugged in later takes its place. Otherwise what the balloon holds stays held, whatever the device does, and a device that
cannot be reset is cut off from memory and not believed any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.errors import (
    BalloonError,
    DeviceFailed,
    DeviceGone,
    DeviceNotFound,
    DeviceNotReady,
    DeviceWanted,
)
from balloon_agent.size import format_size
from balloon_agent.sizing.balloon import Balloon

# A device is brought back at once, and one that fails again after ever longer pauses, up to this one.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
# After so many seconds without a fault it counts as sound again.
SOUND_AFTER = 300.0
# So many different faults are logged until then; a device that lies can do so in endless ways. All are counted.
MOST_SAID = 20
_log = logging.getLogger(__name__)


def fault_kinds() -> tuple[str, ...]:
    """Every kind of fault that can be counted."""
    kinds: set[str] = set()
    classes: list[type[DeviceFailed]] = [DeviceFailed]
    while classes:
        kind = classes.pop()
        kinds.add(kind.kind)
        classes += kind.__subclasses__()
    return tuple(sorted(kinds))


class Successor(Protocol):
    """Where there can be another device after this one."""

    def part(self) -> bool:
        """Let go of a device that is gone, or that the kernel asks for, and of all that is held for it.

        Whether that is so: it is not if the device may act on memory yet.
        """
        ...

    def find(self) -> str:
        """Have another device in hand, and return its address. DeviceNotFound if there is none yet."""
        ...


class Recovery:
    """Counts the faults of a device, logs each once, and brings the device back.

    ``started`` is called whenever it has been started again, before it is told anything.
    """

    def __init__(
        self,
        device: BalloonDevice,
        balloon: Balloon,
        clock: Callable[[], float] = time.monotonic,
        successor: Successor | None = None,
        started: Callable[[], None] = lambda: None,
    ) -> None:
        self._device = device
        self._successor = successor
        self._started = started
        # Whether there is no device at all, for now.
        self.absent = False
        self._balloon = balloon
        self._clock = clock
        self.faults = dict.fromkeys(fault_kinds(), 0)
        # Why the device is not to be used for now; None while it works.
        self.problem: str | None = None
        # It has been started again, and is being told what the balloon holds.
        self._announcement: Iterator[None] | None = None
        self._said: set[str] = set()
        self._news = False
        self._pause = 0.0
        self._next_try: float | None = 0.0
        self._last_fault = 0.0

    def count(self, kind: str, text: str) -> None:
        """Note a fault. The same words are logged once, until the device has been sound for a while."""
        now = self._clock()
        if now - self._last_fault > SOUND_AFTER:
            self._said.clear()
            self._pause = 0.0
        self._last_fault = now
        self.faults[kind] += 1
        if text not in self._said and len(self._said) < MOST_SAID:
            self._said.add(text)
            self._news = True
            _log.error("device fault: %s", text)

    def failed(self, error: DeviceFailed) -> None:
        """The device is not used from here on, until ``revive`` has brought it back."""
        self._announcement = None
        self.count(error.kind, str(error))
        self._down(str(error))
        if isinstance(error, DeviceGone | DeviceWanted):
            self._part()

    def _part(self) -> None:
        if self._successor is None or not self._successor.part():
            return
        self.absent = True
        self.problem = "there is no balloon device any more: plug one in"
        self._pause = 0.0
        _log.warning("what the balloon held is the guest's again; waiting for another device to be plugged in")

    def look_again(self) -> None:
        """Something was plugged in or has got a driver: another device may be there."""
        if self.absent:
            self._next_try = self._clock()

    def _down(self, problem: str) -> None:
        self.problem = problem
        self._next_try = self._clock() + self._pause
        if self._pause:
            self._silence()
        self._pause = min(max(self._pause * 2, FIRST_PAUSE), LONGEST_PAUSE)

    def announce(self) -> None:
        """For the first time it has been started: from here on it is on its way back, like one that had failed."""
        self.problem = "it is being told what an earlier agent has left in the balloon"
        self._announcement = self._balloon.announce()

    @property
    def announcing(self) -> bool:
        """Whether the device is on its way back."""
        return self._announcement is not None

    @property
    def wait(self) -> float | None:
        """Seconds until ``revive`` is worth a call; None if something has to happen before, see ``look_again``."""
        return None if self._next_try is None else max(0.0, self._next_try - self._clock())

    def revive(self) -> bool:
        """Bring the device back if it is time: reset, negotiate, announce what is held. Whether it can be used again.

        One step at each call: there can be much to announce, and others want to be heard meanwhile.
        """
        if self.problem is None:
            return True
        if self.wait is None or self.wait > 0:
            return False
        if self.absent and not self._find():
            return False
        try:
            if self._announcement is None:
                self._device.start()
                self._started()
                self._announcement = self._balloon.announce()
            for _ in self._announcement:
                return False
        except DeviceFailed as error:
            self.failed(error)
            return False
        except (BalloonError, OSError) as error:
            # It may offer less than before, or its files may have gone.
            text = f"the device does not come back: {error}"
            self._announcement = None
            self.count(DeviceFailed.kind, text)
            self._down(text)
            return False
        self.problem = self._announcement = None
        if self._news:
            size = format_size(self._balloon.actual)
            _log.warning("the device works again, by its %s queues; %s announced anew", self._device.channel_name, size)
            self._news = False
        return True

    def _find(self) -> bool:
        """Whether there is a device again."""
        assert self._successor is not None
        try:
            address = self._successor.find()
        except DeviceNotReady:
            self._next_try = self._clock() + FIRST_PAUSE
            return False
        except DeviceNotFound as error:
            # Nothing to be tried before something is plugged in.
            self.problem, self._next_try = str(error), None
            return False
        except (BalloonError, OSError) as error:
            text = f"the device that is there now cannot be used: {error}"
            self.count(DeviceFailed.kind, text)
            self._down(text)
            return False
        self.absent = False
        self._news = True
        _log.info("another balloon device is there: %s", address)
        return True

    def _silence(self) -> None:
        """Until the next try the device is to leave memory alone."""
        if self._device.quiet or self._device.cut_off:
            return
        try:
            self._device.stop()
        except DeviceFailed as error:
            # The next try finds the same, and counts it.
            _log.debug("%s", error)
