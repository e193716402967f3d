"""The host's target, and the memory of the machine: a target that is larger than that is not followed."""

from __future__ import annotations

import logging
from collections.abc import Callable

from balloon_agent.balloon.device import BalloonDevice
from balloon_agent.frames import FRAME

_log = logging.getLogger(__name__)


class HostTarget:
    """Sizes are in bytes. ``physical`` tells the machine's memory, and ``machine`` the part of it that the host counts.

    ``ram`` is believed where ``physical`` cannot tell.
    """

    def __init__(self, ram: int, physical: Callable[[], int], machine: Callable[[], int] = lambda: 0) -> None:
        self._physical = physical
        self._counted = machine
        self.size = 0
        # The largest target that makes sense; and the machine's memory as the host counts it.
        self.most = self.machine = ram
        self.rejected_total = 0
        self._rejected: int | None = None

    @property
    def is_rejected(self) -> bool:
        """The target is larger than the machine."""
        return self._rejected is not None

    def read(self, device: BalloonDevice) -> None:
        """Take in what the device says. A target that makes no sense is logged once, and counted."""
        self.size = device.target()
        self._measure()
        rejected = self.size if self.size > self.most else None
        if rejected is not None and rejected != self._rejected:
            self.rejected_total += 1
            if self._rejected is None:
                _log.error(
                    "num_pages is %d, more than the %d pages that the machine has: the balloon stays as it is until the host "
                    "asks for less",
                    rejected // FRAME,
                    self.most // FRAME,
                )
        self._rejected = rejected

    def has_become_possible(self) -> bool:
        """Memory has been plugged in, so that the target that was rejected makes sense now."""
        if not self.is_rejected:
            return False
        self._measure()
        return self.most >= self.size

    def forget(self) -> None:
        """The device is gone, and its host's target with it."""
        self.size, self._rejected = 0, None

    def _measure(self) -> None:
        """The machine can be given more memory while it runs."""
        try:
            self.most = self._physical()
            self.machine = self._counted() or self.most
        except OSError as error:
            _log.debug("it cannot be told how much memory there is: %s", error)
